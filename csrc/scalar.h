// The lane operations that philox.h and gaussian.h are written in, for plain numbers (one lane): CUDA
// threads and the C++ tests. csrc/cpu/simd.h defines the same operations for vectors.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "gaussian_double.h"
#include "macros.h"

namespace bbb_fast::scalar {

template <class F>
struct Lanes;
template <>
struct Lanes<float> {
  using Int = int32_t;
  using Uint = uint32_t;
};

BBB_INLINE int32_t as_int(float x) {
  int32_t i;
  memcpy(&i, &x, sizeof i);
  return i;
}
BBB_INLINE float as_float(int32_t i) {
  float x;
  memcpy(&x, &i, sizeof x);
  return x;
}
BBB_INLINE int32_t as_signed(uint32_t u) {
  return static_cast<int32_t>(u);
}
BBB_INLINE float to_float(int32_t i) {
  return static_cast<float>(i);
}
BBB_INLINE float to_float(uint32_t u) {
  return static_cast<float>(u);
}
BBB_INLINE float select(bool mask, float a, float b) {
  return mask ? a : b;
}
BBB_INLINE float square_root(float x) {
  return sqrtf(x);
}
BBB_INLINE uint64_t mul32(uint64_t a, uint32_t m) {
  return static_cast<uint64_t>(static_cast<uint32_t>(a)) * m;
}

#include "gaussian.h"
#include "philox.h"

// The four numbers of noise block `block`: elements 4 block ... 4 block + 3 of the tensor.
BBB_INLINE void noise_block(const PhiloxKey& key, uint64_t block, uint64_t stream, float z[4]) {
  uint64_t w[4] = {block, block >> 32, stream, stream >> 32};
  philox4x32(w[0], w[1], w[2], w[3], key);
  box_muller(static_cast<uint32_t>(w[0]), static_cast<uint32_t>(w[1]), z[0], z[1]);
  box_muller(static_cast<uint32_t>(w[2]), static_cast<uint32_t>(w[3]), z[2], z[3]);
}

}  // namespace bbb_fast::scalar
