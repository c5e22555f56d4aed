// kl_divergence: KL(q || p) of a list of tensors in one call. Its backward: posterior_backward.cpp.
#ifndef BBB_ISA

#include <torch/library.h>

#include "../checks.h"
#include "span.h"

namespace bbb_fast {

struct KlArgs {
  Span mu, rho;
  f64::Prior prior;
  double* partial;  // one number a chunk
};

}  // namespace bbb_fast

#define BBB_THIS_FILE "kl_divergence.cpp"
#include "foreach_isa.h"

namespace bbb_fast {

at::Tensor kl_divergence_cpu(
    at::TensorList mu, at::TensorList rho, at::ArrayRef<double> prior_mu, at::ArrayRef<double> prior_sigma) {
  check_posteriors("kl_divergence", mu, rho);
  check_priors("kl_divergence", mu.size(), prior_mu, prior_sigma);
  double kl = 0.0;
  std::vector<double> partial;
  for (size_t k = 0; k < mu.size(); ++k) {
    const at::Tensor m = mu[k].contiguous();
    const at::Tensor r = rho[k].contiguous();
    const int64_t chunks = chunk_count(m.numel());
    partial.resize(chunks);
    const KlArgs args{Span(m), Span(r), {prior_mu[k], prior_sigma[k]}, partial.data()};
    for_each_chunk(m.numel(), [&](int64_t begin, int64_t end) { BBB_CALL(kl_chunks, args, begin, end) });
    kl += finish_kl(partial, kl_constant(m));
  }
  return kl_tensor(kl, mu[0]);
}

TORCH_LIBRARY_IMPL(bbb_fast, CPU, m) {
  m.impl("kl_divergence", &kl_divergence_cpu);
}

}  // namespace bbb_fast

#else

#include "kl_tile.h"

inline void kl_chunks(const KlArgs& a, int64_t begin, int64_t end) {
  const Prior prior = make_prior(a.prior);
  alignas(64) float mu_buffer[kTile], rho_buffer[kTile];
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    if (a.mu.dtype == at::kDouble) {
      a.partial[chunk] = exact_chunk_kl(a.mu, a.rho, SamePrior{a.prior}, chunk);
      continue;
    }
    KlSum kl;
    const int64_t stop = std::min((chunk + 1) * kChunk, a.mu.numel);
    for (int64_t i = chunk * kChunk; i < stop; i += kTile) {
      const int64_t count = std::min<int64_t>(kTile, stop - i);
      const float* mu_tile = read_tile(a.mu, i, count, mu_buffer);
      const float* rho_tile = read_tile(a.rho, i, count, rho_buffer);
      const auto quads = [&](auto whole) BBB_ALWAYS_INLINE {
        constexpr bool kWhole = decltype(whole)::value;
#pragma GCC unroll 4
        for (int q = 0; q < kQuads; ++q) {
          const Sigma<vquad> s = softplus(load_quad(rho_tile + q * kQuad));
          kl.add<kWhole>(q, load_quad(mu_tile + q * kQuad), s, prior, count);
        }
      };
      count == kTile ? quads(std::true_type{}) : quads(std::false_type{});
      kl.finish_tile();
    }
    a.partial[chunk] = chunk_kl(kl, a.mu, a.rho, SamePrior{a.prior}, chunk);
  }
}

#endif
