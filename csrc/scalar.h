// The lane operations that philox.h and gaussian.h are written in, for plain numbers (one lane): CUDA
// threads and the C++ tests. csrc/cpu/simd.h defines the same operations for vectors.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

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

}  // namespace bbb_fast::scalar
