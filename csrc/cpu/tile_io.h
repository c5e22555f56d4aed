// Reading and writing tensors by tiles of kTile floats. Text without include guard, like simd.h.

// kWidth numbers of 16 bits.
typedef uint16_t vnarrow __attribute__((vector_size(2 * BBB_WIDTH)));
typedef uint16_t vnarrow_unaligned __attribute__((vector_size(2 * BBB_WIDTH), aligned(2), may_alias));

// A 16-bit type's conversions from and to float, rounding to the nearest, ties to even.
template <class Narrow>
struct Conversion;

template <>
struct Conversion<c10::BFloat16> {
  static BBB_INLINE vfloat widen(vnarrow x) { return (vfloat)(__builtin_convertvector(x, vuint) << 16); }
  static BBB_INLINE vnarrow round(vfloat x) {
    const vuint bits = (vuint)x;
    const vuint rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return __builtin_convertvector(x != x ? vuint{} + 0x7FC0u : rounded, vnarrow);
  }
};

template <>
struct Conversion<c10::Half> {
#if BBB_WIDTH == 16
  static BBB_INLINE vfloat widen(vnarrow x) { return (vfloat)_mm512_cvtph_ps((__m256i)x); }
  static BBB_INLINE vnarrow round(vfloat x) { return (vnarrow)_mm512_cvtps_ph((__m512)x, 8); }
#elif BBB_WIDTH == 8
  static BBB_INLINE vfloat widen(vnarrow x) { return (vfloat)_mm256_cvtph_ps((__m128i)x); }
  static BBB_INLINE vnarrow round(vfloat x) { return (vnarrow)_mm256_cvtps_ph((__m256)x, 8); }
#else
  static BBB_INLINE vfloat widen(vnarrow x) {
    vfloat wide;
    for (int i = 0; i < kWidth; ++i) wide[i] = c10::Half(x[i], c10::Half::from_bits());
    return wide;
  }
  static BBB_INLINE vnarrow round(vfloat x) {
    vnarrow narrow;
    for (int i = 0; i < kWidth; ++i) narrow[i] = c10::Half(x[i]).x;
    return narrow;
  }
#endif
};

template <class Narrow>
inline void read_narrow(const void* data, int64_t start, int64_t count, float* buffer) {
  const uint16_t* from = static_cast<const uint16_t*>(data) + start;
  alignas(64) uint16_t padded[kTile];
  if (count != kTile) {
    std::memcpy(padded, from, count * sizeof(uint16_t));
    from = padded;
  }
  for (int i = 0; i < kTile; i += kWidth) {
    store(buffer + i, Conversion<Narrow>::widen(*reinterpret_cast<const vnarrow_unaligned*>(from + i)));
  }
}

template <class Narrow>
inline void write_narrow(void* data, int64_t start, int64_t count, const float* tile) {
  uint16_t* const place = static_cast<uint16_t*>(data) + start;
  alignas(64) uint16_t padded[kTile];
  uint16_t* const to = count == kTile ? place : padded;
  for (int i = 0; i < kTile; i += kWidth) {
    *reinterpret_cast<vnarrow_unaligned*>(to + i) = Conversion<Narrow>::round(load(tile + i));
  }
  if (count != kTile) std::memcpy(place, padded, count * sizeof(uint16_t));
}

// Where the tile [start, start + count) of a tensor can be read as floats: in place if it is a whole tile
// of float32, else converted (and padded with zeros) into the buffer.
inline const float* read_tile(const Span& t, int64_t start, int64_t count, float* buffer) {
  if (t.dtype == at::kFloat && count == kTile) return static_cast<const float*>(t.data) + start;
  switch (t.dtype) {
    case at::kFloat:
      std::memcpy(buffer, static_cast<const float*>(t.data) + start, count * sizeof(float));
      break;
    case at::kBFloat16:
      read_narrow<c10::BFloat16>(t.data, start, count, buffer);
      break;
    case at::kHalf:
      read_narrow<c10::Half>(t.data, start, count, buffer);
      break;
    default:
      for (int64_t i = 0; i < count; ++i) {
        buffer[i] = static_cast<float>(static_cast<const double*>(t.data)[start + i]);
      }
  }
  for (int64_t i = count; i < kTile; ++i) buffer[i] = 0.0f;
  return buffer;
}

// Asks for a tile of one of many tensors that are read in turn, too many for the processor to see how each
// goes on.
inline void prefetch_tile(const Span& t, int64_t start) {
  const char* const at = static_cast<const char*>(t.data) + start * c10::elementSize(t.dtype);
  for (size_t line = 0; line < kTile * sizeof(float); line += 64) __builtin_prefetch(at + line);
}

// Where to put a tile's floats, and commit_tile, which moves them on if that was not their place.
inline float* write_tile(const Span& t, int64_t start, int64_t count, float* buffer) {
  if (t.dtype == at::kFloat && count == kTile) return static_cast<float*>(t.data) + start;
  return buffer;
}

inline void commit_tile(const Span& t, int64_t start, int64_t count, const float* tile) {
  switch (t.dtype) {
    case at::kFloat:
      if (count != kTile) {
        std::memcpy(static_cast<float*>(t.data) + start, tile, count * sizeof(float));
      }
      break;
    case at::kBFloat16:
      write_narrow<c10::BFloat16>(t.data, start, count, tile);
      break;
    case at::kHalf:
      write_narrow<c10::Half>(t.data, start, count, tile);
      break;
    default:
      for (int64_t i = 0; i < count; ++i) static_cast<double*>(t.data)[start + i] = tile[i];
  }
}

// The double-precision twin of one element's access, for float64 tensors.
inline double read_double(const Span& t, int64_t i) {
  return static_cast<const double*>(t.data)[i];
}
inline double read_any(const Span& t, int64_t i) {
  switch (t.dtype) {
    case at::kDouble:
      return read_double(t, i);
    case at::kFloat:
      return static_cast<const float*>(t.data)[i];
    case at::kBFloat16:
      return static_cast<float>(static_cast<const c10::BFloat16*>(t.data)[i]);
    default:
      return static_cast<float>(static_cast<const c10::Half*>(t.data)[i]);
  }
}
inline void write_double(const Span& t, int64_t i, double x) {
  switch (t.dtype) {
    case at::kDouble:
      static_cast<double*>(t.data)[i] = x;
      break;
    case at::kFloat:
      static_cast<float*>(t.data)[i] = static_cast<float>(x);
      break;
    case at::kBFloat16:
      static_cast<c10::BFloat16*>(t.data)[i] = c10::BFloat16(static_cast<float>(x));
      break;
    default:
      static_cast<c10::Half*>(t.data)[i] = c10::Half(static_cast<float>(x));
  }
}

// A chunk's partial sum of the KL in double, element by element; prior_at(i) is element i's.
template <class PriorAt>
double exact_chunk_kl(const Span& mu, const Span& rho, const PriorAt& prior_at, int64_t chunk) {
  double sum = 0.0;
  for (int64_t i = chunk * kChunk; i < std::min((chunk + 1) * kChunk, mu.numel); ++i) {
    const double r = read_any(rho, i);
    sum += f64::kl_terms(read_any(mu, i), r, f64::softplus(r), prior_at(i));
  }
  return sum;
}

// The same, formed in float by a KlSum where that can tell it.
template <class Sum, class PriorAt>
double chunk_kl(const Sum& fast, const Span& mu, const Span& rho, const PriorAt& prior_at, int64_t chunk) {
  const double sum = fast.total();
  return std::isfinite(sum) ? sum : exact_chunk_kl(mu, rho, prior_at, chunk);
}

// One prior for all elements.
struct SamePrior {
  const f64::Prior& prior;
  const f64::Prior& operator()(int64_t) const { return prior; }
};
