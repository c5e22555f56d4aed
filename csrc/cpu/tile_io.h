// Reading and writing tensors by tiles of kTile floats. Text without include guard, like simd.h.

// Where the tile [start, start + count) of a tensor can be read as floats: in place if it is a whole tile
// of float32, else converted (and padded with zeros) into the buffer.
inline const float* read_tile(const Span& t, int64_t start, int64_t count, float* buffer) {
  if (t.dtype == at::kFloat && count == kTile) return static_cast<const float*>(t.data) + start;
  switch (t.dtype) {
    case at::kFloat:
      std::memcpy(buffer, static_cast<const float*>(t.data) + start, count * sizeof(float));
      break;
    case at::kBFloat16:
      for (int64_t i = 0; i < count; ++i) {
        buffer[i] = static_cast<float>(static_cast<const c10::BFloat16*>(t.data)[start + i]);
      }
      break;
    case at::kHalf:
      for (int64_t i = 0; i < count; ++i) {
        buffer[i] = static_cast<float>(static_cast<const c10::Half*>(t.data)[start + i]);
      }
      break;
    default:
      for (int64_t i = 0; i < count; ++i) {
        buffer[i] = static_cast<float>(static_cast<const double*>(t.data)[start + i]);
      }
  }
  for (int64_t i = count; i < kTile; ++i) buffer[i] = 0.0f;
  return buffer;
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
      for (int64_t i = 0; i < count; ++i) {
        static_cast<c10::BFloat16*>(t.data)[start + i] = c10::BFloat16(tile[i]);
      }
      break;
    case at::kHalf:
      for (int64_t i = 0; i < count; ++i) {
        static_cast<c10::Half*>(t.data)[start + i] = c10::Half(tile[i]);
      }
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

// A chunk's partial sum of the KL in double, element by element.
inline double exact_chunk_kl(const Span& mu, const Span& rho, const f64::Prior& prior, int64_t chunk) {
  double sum = 0.0;
  for (int64_t i = chunk * kChunk; i < std::min((chunk + 1) * kChunk, mu.numel); ++i) {
    const double r = read_any(rho, i);
    sum += f64::kl_terms(read_any(mu, i), r, f64::softplus(r), prior);
  }
  return sum;
}

// The same, formed in float by a KlSum where that can tell it.
template <class Sum>
double chunk_kl(const Sum& fast, const Span& mu, const Span& rho, const f64::Prior& prior, int64_t chunk) {
  const double sum = fast.total();
  return std::isfinite(sum) ? sum : exact_chunk_kl(mu, rho, prior, chunk);
}
