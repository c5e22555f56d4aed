// Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
//
// Text without include guard: scalar.h and cpu/simd.h include it inside a namespace that defines the
// lane operations multiply and mix, once per kind of lane. A scalar word is a uint32_t; a vector's is a
// 64-bit lane whose high half is ignored, so that a round needs no shuffles.

// The key schedule: every round adds a Weyl constant to each half of the key.
struct PhiloxKey {
  uint32_t k0[10];
  uint32_t k1[10];
};

BBB_INLINE PhiloxKey philox_key(uint64_t seed) {
  PhiloxKey key;
  uint32_t k0 = static_cast<uint32_t>(seed);
  uint32_t k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    key.k0[round] = k0;
    key.k1[round] = k1;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return key;
}

// Replaces the counter (c0, c1, c2, c3) by the four output words.
template <class Word>
BBB_INLINE void philox4x32(Word& c0, Word& c1, Word& c2, Word& c3, const PhiloxKey& key) {
#if defined(__CUDA_ARCH__)
#pragma unroll
#elif defined(__GNUC__) && !defined(__CUDACC__)
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    Word high0, low0, high1, low1;
    multiply(c0, 0xD2511F53u, high0, low0);
    multiply(c2, 0xCD9E8D57u, high1, low1);
    c0 = mix(high1, c1, key.k0[round]);
    c2 = mix(high0, c3, key.k1[round]);
    c1 = low1;
    c3 = low0;
  }
}
