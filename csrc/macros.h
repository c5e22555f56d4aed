#pragma once

// The shared mathematics compiles as host code, as device code, and as SIMD code per instruction set.
#if defined(__CUDACC__)
#define BBB_INLINE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define BBB_ALWAYS_INLINE __attribute__((always_inline))
#define BBB_INLINE inline BBB_ALWAYS_INLINE
#else
#define BBB_ALWAYS_INLINE
#define BBB_INLINE inline
#endif

// The argument, its macros replaced, as a string.
#define BBB_STRING_OF(...) #__VA_ARGS__
#define BBB_STRING(...) BBB_STRING_OF(__VA_ARGS__)
