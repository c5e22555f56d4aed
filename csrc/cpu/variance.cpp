// variance: sigma^2 = softplus(rho)^2 in the dtype of the variance product, and in the same pass the KL. Its
// backward: posterior_backward.cpp.
#ifndef BBB_ISA

#include <torch/library.h>

#include "../checks.h"
#include "../layout.h"
#include "span.h"

namespace bbb_fast {

struct VarianceArgs {
  Span mu, rho, out;
  f64::Prior prior;
  double* partial;  // one number a chunk; null without KL
};

}  // namespace bbb_fast

#define BBB_THIS_FILE "variance.cpp"
#include "foreach_isa.h"

namespace bbb_fast {

std::tuple<std::vector<at::Tensor>, at::Tensor> variance_cpu(
    at::TensorList mu,
    at::TensorList rho,
    double prior_mu,
    double prior_sigma,
    bool with_kl,
    at::ScalarType dtype) {
  check_posteriors("variance", mu, rho);
  check_prior("variance", prior_mu, prior_sigma);
  check_dtype_option("variance", "dtype", dtype);

  std::vector<at::Tensor> variances;
  std::vector<double> partial;
  double kl = 0.0;
  for (size_t k = 0; k < mu.size(); ++k) {
    // Element by element, in memory order: a channels_last rho gives a channels_last variance.
    const at::Tensor r = dense(rho[k]);
    const at::Tensor m = with_kl ? in_order_of(r, mu[k]) : r;
    at::Tensor out = fresh_like(r, dtype);
    if (with_kl) partial.resize(chunk_count(r.numel()));
    const VarianceArgs args{
        Span(m), Span(r), Span(out), {prior_mu, prior_sigma}, with_kl ? partial.data() : nullptr};
    for_each_chunk(
        r.numel(), [&](int64_t begin, int64_t end) { BBB_CALL(variance_chunks, args, begin, end) });
    if (with_kl) kl += finish_kl(partial, kl_constant(m));
    variances.push_back(std::move(out));
  }
  return {std::move(variances), kl_tensor(kl, mu[0])};
}

TORCH_LIBRARY_IMPL(bbb_fast, CPU, m) {
  m.impl("variance", &variance_cpu);
}

}  // namespace bbb_fast

#else

#include "kl_tile.h"

template <bool kWithKl>
void variance_chunks_float(const VarianceArgs& a, int64_t begin, int64_t end) {
  const Prior prior = make_prior(a.prior);
  alignas(64) float mu_buffer[kTile], rho_buffer[kTile], out_buffer[kTile];
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    KlSum kl;
    const int64_t stop = std::min((chunk + 1) * kChunk, a.rho.numel);
    for (int64_t i = chunk * kChunk; i < stop; i += kTile) {
      const int64_t count = std::min<int64_t>(kTile, stop - i);
      const float* mu_tile = kWithKl ? read_tile(a.mu, i, count, mu_buffer) : nullptr;
      const float* rho_tile = read_tile(a.rho, i, count, rho_buffer);
      float* out = write_tile(a.out, i, count, out_buffer);
      const auto quads = [&](auto whole) BBB_ALWAYS_INLINE {
        constexpr bool kWhole = decltype(whole)::value;
#pragma GCC unroll 4
        for (int q = 0; q < kQuads; ++q) {
          const Sigma<vquad> s = softplus(load_quad(rho_tile + q * kQuad));
          store(out + q * kQuad, s.value * s.value);
          if constexpr (kWithKl) kl.add<kWhole>(q, load_quad(mu_tile + q * kQuad), s, prior, count);
        }
      };
      count == kTile ? quads(std::true_type{}) : quads(std::false_type{});
      if constexpr (kWithKl) kl.finish_tile();
      commit_tile(a.out, i, count, out);
    }
    if constexpr (kWithKl) a.partial[chunk] = chunk_kl(kl, a.mu, a.rho, SamePrior{a.prior}, chunk);
  }
}

inline void variance_chunks_double(const VarianceArgs& a, int64_t begin, int64_t end) {
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    double kl = 0.0;
    for (int64_t i = chunk * kChunk; i < std::min((chunk + 1) * kChunk, a.rho.numel); ++i) {
      const double rho = read_double(a.rho, i);
      const f64::Sigma s = f64::softplus(rho);
      write_double(a.out, i, s.value * s.value);
      if (a.partial != nullptr) kl += f64::kl_terms(read_double(a.mu, i), rho, s, a.prior);
    }
    if (a.partial != nullptr) a.partial[chunk] = kl;
  }
}

inline void variance_chunks(const VarianceArgs& a, int64_t begin, int64_t end) {
  if (a.rho.dtype == at::kDouble) {
    variance_chunks_double(a, begin, end);
  } else if (a.partial != nullptr) {
    variance_chunks_float<true>(a, begin, end);
  } else {
    variance_chunks_float<false>(a, begin, end);
  }
}

#endif
