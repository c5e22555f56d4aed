#pragma once

// The shared mathematics compiles as host code, as device code, and as SIMD code per instruction set.
#if defined(__CUDACC__)
#define BBB_INLINE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define BBB_INLINE inline __attribute__((always_inline))
#else
#define BBB_INLINE inline
#endif
