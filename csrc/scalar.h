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
BBB_INLINE uint32_t as_unsigned(int32_t i) {
  return static_cast<uint32_t>(i);
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
// x, or `least` where x is less; NaN stays NaN.
BBB_INLINE float at_least(float x, float least) {
  return x < least ? least : x;
}
// Within 2 units in the last place; of a denormal number too.
BBB_INLINE float square_root(float x) {
#ifdef __CUDA_ARCH__
  float root;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(root) : "f"(x));
  return root;
#else
  return sqrtf(x);
#endif
}
// Of a number that is 0 or normal; within 2 units in the last place.
BBB_INLINE float square_root_normal(float x) {
#ifdef __CUDA_ARCH__
  float root;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(x));
  return root;
#else
  return sqrtf(x);
#endif
}
// 1 / x for x >= 1/2; within 2 units in the last place.
BBB_INLINE float reciprocal(float x) {
#ifdef __CUDA_ARCH__
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
  return inverse;
#else
  return 1.0f / x;
#endif
}
// 1 / sqrt(x) for x > 0; within 2 units in the last place.
BBB_INLINE float reciprocal_root(float x) {
#ifdef __CUDA_ARCH__
  return rsqrtf(x);
#else
  return 1.0f / sqrtf(x);
#endif
}
// p 2^n, denormal results kept.
BBB_INLINE float times_power_of_2(float p, float, float shifted) {
  return p * as_float(as_signed(as_unsigned(as_int(shifted)) << 23)) * 0x1p-64f;
}
BBB_INLINE float negative_abs(float x) {
  return -fabsf(x);
}

// a m = high 2^32 + low.
BBB_INLINE void multiply(uint32_t a, uint32_t m, uint32_t& high, uint32_t& low) {
  const uint64_t product = static_cast<uint64_t>(a) * m;
#ifdef __CUDA_ARCH__
  high = __umulhi(a, m);
#else
  high = static_cast<uint32_t>(product >> 32);
#endif
  low = static_cast<uint32_t>(product);
}
BBB_INLINE uint32_t mix(uint32_t high, uint32_t c, uint32_t key) {
  return high ^ c ^ key;
}

#include "gaussian.h"
#include "philox.h"
#include "words.h"

// The four words of a stream's block.
BBB_INLINE void philox_block(const PhiloxKey& key, uint64_t block, uint64_t stream, uint32_t w[4]) {
  w[0] = static_cast<uint32_t>(block);
  w[1] = static_cast<uint32_t>(block >> 32);
  w[2] = static_cast<uint32_t>(stream);
  w[3] = static_cast<uint32_t>(stream >> 32);
  philox4x32(w[0], w[1], w[2], w[3], key);
}

// The four numbers of noise block `block`: elements 4 block ... 4 block + 3 of the tensor.
BBB_INLINE void noise_block(const PhiloxKey& key, uint64_t block, uint64_t stream, float z[4]) {
  uint32_t w[4];
  philox_block(key, block, stream, w);
  box_muller(w[0], w[1], z[0], z[1]);
  box_muller(w[2], w[3], z[2], z[3]);
}

}  // namespace bbb_fast::scalar
