// Vectors of BBB_WIDTH floats and the lane operations that gaussian.h and philox.h are written in.
// Text without include guard: foreach_isa.h includes it once per instruction set, inside its namespace.

constexpr int kWidth = BBB_WIDTH;
// Kernels work in quads of four vectors, and in tiles of two quads, padding the last one, so that every
// element is computed by the same instructions wherever threads split the range.
constexpr int kQuad = 4 * kWidth;
constexpr int kQuads = 2;  // as many as Noise::tile makes at a time
constexpr int kTile = kQuads * kQuad;

typedef float vfloat __attribute__((vector_size(4 * BBB_WIDTH)));
typedef int32_t vint __attribute__((vector_size(4 * BBB_WIDTH)));
typedef uint32_t vuint __attribute__((vector_size(4 * BBB_WIDTH)));
typedef uint64_t vword __attribute__((vector_size(4 * BBB_WIDTH)));
typedef double vdouble __attribute__((vector_size(8 * BBB_WIDTH)));
typedef float vfloat_unaligned __attribute__((vector_size(4 * BBB_WIDTH), aligned(4), may_alias));

template <class F>
struct Lanes;
template <>
struct Lanes<vfloat> {
  using Int = vint;
  using Uint = vuint;
};

BBB_INLINE vint as_int(vfloat x) {
  return (vint)x;
}
BBB_INLINE vfloat as_float(vint x) {
  return (vfloat)x;
}
BBB_INLINE vint as_signed(vuint x) {
  return (vint)x;
}
BBB_INLINE vuint as_unsigned(vint x) {
  return (vuint)x;
}
BBB_INLINE vfloat to_float(vint x) {
  return __builtin_convertvector(x, vfloat);
}
BBB_INLINE vfloat to_float(vuint x) {
  return __builtin_convertvector(x, vfloat);
}
BBB_INLINE vfloat select(vint mask, vfloat a, vfloat b) {
  return mask ? a : b;
}

BBB_INLINE vfloat load(const float* p) {
  return *reinterpret_cast<const vfloat_unaligned*>(p);
}
BBB_INLINE void store(float* p, vfloat x) {
  *reinterpret_cast<vfloat_unaligned*>(p) = x;
}

// x, or `least` where x is less; NaN stays NaN.
BBB_INLINE vfloat at_least(vfloat x, float least) {
#if BBB_WIDTH == 16
  return (vfloat)_mm512_max_ps(_mm512_set1_ps(least), (__m512)x);
#elif BBB_WIDTH == 8
  return (vfloat)_mm256_max_ps(_mm256_set1_ps(least), (__m256)x);
#elif defined(__SSE2__)
  return (vfloat)_mm_max_ps(_mm_set1_ps(least), (__m128)x);
#else
  return x < least ? vfloat{} + least : x;
#endif
}

BBB_INLINE vfloat square_root(vfloat x) {
#if BBB_WIDTH == 16
  return (vfloat)_mm512_sqrt_ps((__m512)x);
#elif BBB_WIDTH == 8
  return (vfloat)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE2__)
  return (vfloat)_mm_sqrt_ps((__m128)x);
#else
  for (int i = 0; i < kWidth; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

#if BBB_WIDTH == 16
// Roots and quotients of 16 floats keep the units busy for 12 to 20 cycles. The CPU's estimates, of 14 bits,
// and one Newton step take a third of that and are within 2 units in the last place. An infinite x would make
// the step 0 times inf. min and max give their second operand where one is NaN: x, so that NaN stays NaN.
BBB_INLINE vfloat reciprocal(vfloat x) {
  x = (vfloat)_mm512_min_ps(_mm512_set1_ps(0x1p126f), (__m512)x);
  const vfloat y = (vfloat)_mm512_rcp14_ps((__m512)x);
  return y + y * (1.0f - x * y);
}
BBB_INLINE vfloat reciprocal_root(vfloat x) {
  const vfloat y = (vfloat)_mm512_rsqrt14_ps((__m512)x);
  // Of infinity, y is 0 and shall stay so: 0 times inf in the step would be NaN.
  x = (vfloat)_mm512_min_ps(_mm512_set1_ps(0x1.fffffep127f), (__m512)x);
  return y + y * (0.5f - x * (y * 0.5f) * y);
}
BBB_INLINE vfloat square_root_normal(vfloat x) {
  const vfloat y = (vfloat)_mm512_rsqrt14_ps(_mm512_max_ps(_mm512_set1_ps(0x1p-126f), (__m512)x));
  const vfloat root = x * y;
  return root + root * (0.5f - root * (y * 0.5f));
}
#else
BBB_INLINE vfloat reciprocal(vfloat x) {
  return 1.0f / x;
}
BBB_INLINE vfloat reciprocal_root(vfloat x) {
  return 1.0f / square_root(x);
}
BBB_INLINE vfloat square_root_normal(vfloat x) {
  return square_root(x);
}
#endif
// p 2^n, denormal results kept.
#if BBB_WIDTH == 16
BBB_INLINE vfloat times_power_of_2(vfloat p, vfloat n, vfloat) {
  return (vfloat)_mm512_scalef_ps((__m512)p, (__m512)n);
}
#else
BBB_INLINE vfloat times_power_of_2(vfloat p, vfloat, vfloat shifted) {
  return p * (vfloat)((vint)shifted << 23) * 0x1p-64f;
}
#endif
BBB_INLINE vfloat negative_abs(vfloat x) {
  return as_float(as_int(x) | (vint{} - 0x7FFFFFFF - 1));
}

// The 64-bit product of each lane's low half with m, and the same shifted down.
BBB_INLINE void multiply(vword a, uint32_t m, vword& high, vword& low) {
#if BBB_WIDTH == 16
  low = (vword)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(m));
#elif BBB_WIDTH == 8
  low = (vword)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(m));
#elif defined(__SSE2__)
  low = (vword)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(m));
#else
  low = (a & 0xFFFFFFFFu) * static_cast<uint64_t>(m);
#endif
  high = low >> 32;
}
BBB_INLINE vword mix(vword high, vword c, uint32_t key) {
  return high ^ c ^ static_cast<uint64_t>(key);
}

// The generator's words for a tile: even lanes are computed in one vector of a quad, odd ones in another.
struct Words {
  vword v[2 * kQuads];
};
BBB_INLINE void multiply(const Words& a, uint32_t m, Words& high, Words& low) {
#pragma GCC unroll 8
  for (int i = 0; i < 2 * kQuads; ++i) multiply(a.v[i], m, high.v[i], low.v[i]);
}
BBB_INLINE Words mix(const Words& high, const Words& c, uint32_t key) {
  Words result;
#pragma GCC unroll 8
  for (int i = 0; i < 2 * kQuads; ++i) result.v[i] = mix(high.v[i], c.v[i], key);
  return result;
}

#include "pair.h"
// Four vectors in the order of memory.
using vquad = Pair<Pair<vfloat>>;

BBB_INLINE vquad load_quad(const float* p) {
  return {{load(p), load(p + kWidth)}, {load(p + 2 * kWidth), load(p + 3 * kWidth)}};
}
BBB_INLINE void store(float* p, const vquad& x) {
  store(p, x.a.a);
  store(p + kWidth, x.a.b);
  store(p + 2 * kWidth, x.b.a);
  store(p + 3 * kWidth, x.b.b);
}

#include "../gaussian.h"
#include "../philox.h"
#include "../words.h"

// Shuffles within each group of four lanes, the four lanes of a and of b numbered 0-3 and 4-7.
#define BBB_GROUP(g, i) ((i) < 4 ? 4 * (g) + (i) : kWidth + 4 * (g) + (i) - 4)
#define BBB_LANES(g, i, j, k, l) BBB_GROUP(g, i), BBB_GROUP(g, j), BBB_GROUP(g, k), BBB_GROUP(g, l)
#if BBB_WIDTH == 16
#define BBB_MASK(...) \
  {BBB_LANES(0, __VA_ARGS__), BBB_LANES(1, __VA_ARGS__), BBB_LANES(2, __VA_ARGS__), BBB_LANES(3, __VA_ARGS__)}
#elif BBB_WIDTH == 8
#define BBB_MASK(...) {BBB_LANES(0, __VA_ARGS__), BBB_LANES(1, __VA_ARGS__)}
#else
#define BBB_MASK(...) {BBB_LANES(0, __VA_ARGS__)}
#endif
#if defined(__clang__)
#define BBB_SHUFFLE(a, b, ...)                                                                      \
  [](vfloat x, vfloat y) {                                                                          \
    constexpr int lanes[kWidth] = BBB_MASK(__VA_ARGS__);                                            \
    vfloat r;                                                                                       \
    for (int i = 0; i < kWidth; ++i) r[i] = lanes[i] < kWidth ? x[lanes[i]] : y[lanes[i] - kWidth]; \
    return r;                                                                                       \
  }(a, b)
#else
#define BBB_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vint)BBB_MASK(__VA_ARGS__))
#endif

// The noise of one tile: elements 4 * block ... 4 * block + kTile - 1 of the stream, in order.
struct Noise {
  PhiloxKey key;
  uint64_t stream;

  explicit Noise(uint64_t seed, uint64_t stream_) : key(philox_key(seed)), stream(stream_) {}

  BBB_INLINE void tile(uint64_t block, vquad z[kQuads]) const {
    Pair<vuint> w[4];
    blocks(block, w);
    Pair<Pair<vfloat>> n0, n1;
    box_muller(Pair<Pair<vuint>>{w[0], w[2]}, Pair<Pair<vuint>>{w[1], w[3]}, n0, n1);
    z[0] = ordered(n0.a.a, n1.a.a, n0.b.a, n1.b.a);
    z[1] = ordered(n0.a.b, n1.a.b, n0.b.b, n1.b.b);
  }

  BBB_INLINE void tile(uint64_t block, float* out) const {
    vquad z[kQuads];
    tile(block, z);
    for (int q = 0; q < kQuads; ++q) store(out + q * kQuad, z[q]);
  }

  // The words that a tile's elements have.
  BBB_INLINE void words(uint64_t block, vuint out[kTile / kWidth]) const {
    Pair<vuint> w[4];
    blocks(block, w);
    const auto bits = [](vuint x) BBB_ALWAYS_INLINE { return as_float(as_signed(x)); };
    const auto put = [&](vuint* to, const vquad& x) BBB_ALWAYS_INLINE {
      const vfloat parts[] = {x.a.a, x.a.b, x.b.a, x.b.b};
      for (int k = 0; k < 4; ++k) to[k] = as_unsigned(as_int(parts[k]));
    };
    put(out, ordered(bits(w[0].a), bits(w[1].a), bits(w[2].a), bits(w[3].a)));
    put(out + 4, ordered(bits(w[0].b), bits(w[1].b), bits(w[2].b), bits(w[3].b)));
  }

 private:
  // The outputs of a tile's blocks, for both of its quads.
  BBB_INLINE void blocks(uint64_t block, Pair<vuint> w[4]) const {
    // 32-bit lane 4 g + i of a quad works on its block (kWidth / 4) i + g: then a 4 x 4 transpose within each
    // group of lanes puts the outputs in order.
    vword even, odd;
    for (int l = 0; l < kWidth / 2; ++l) {
      even[l] = (kWidth / 4) * (2 * (l % 2)) + l / 2;
      odd[l] = (kWidth / 4) * (2 * (l % 2) + 1) + l / 2;
    }
    Words c[4];
#pragma GCC unroll 8
    for (int q = 0; q < kQuads; ++q) {
      c[0].v[2 * q] = even + (block + q * kWidth);
      c[0].v[2 * q + 1] = odd + (block + q * kWidth);
      for (int i = 2 * q; i < 2 * q + 2; ++i) {
        c[1].v[i] = c[0].v[i] >> 32;
        c[2].v[i] = vword{} + stream;
        c[3].v[i] = vword{} + (stream >> 32);
      }
    }
    philox4x32(c[0], c[1], c[2], c[3], key);
    for (int j = 0; j < 4; ++j) w[j] = {joined(c[j].v[0], c[j].v[1]), joined(c[j].v[2], c[j].v[3])};
  }

  // Outputs 0 to 3 of a quad's blocks in the order of elements.
  static BBB_INLINE vquad ordered(vfloat n0, vfloat n1, vfloat n2, vfloat n3) {
    const vfloat a = BBB_SHUFFLE(n0, n1, 0, 4, 1, 5);
    const vfloat b = BBB_SHUFFLE(n2, n3, 0, 4, 1, 5);
    const vfloat c = BBB_SHUFFLE(n0, n1, 2, 6, 3, 7);
    const vfloat d = BBB_SHUFFLE(n2, n3, 2, 6, 3, 7);
    return {
        {BBB_SHUFFLE(a, b, 0, 1, 4, 5), BBB_SHUFFLE(a, b, 2, 3, 6, 7)},
        {BBB_SHUFFLE(c, d, 0, 1, 4, 5), BBB_SHUFFLE(c, d, 2, 3, 6, 7)}};
  }
  // The low halves of even and odd lanes, in turn.
  static BBB_INLINE vuint joined(vword even, vword odd) {
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    return (vuint)((even << 32) | (odd & 0xFFFFFFFFu));
#else
    return (vuint)((even & 0xFFFFFFFFu) | (odd << 32));
#endif
  }
};
