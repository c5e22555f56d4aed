// sample_weights: w = mu + sigma eps, or sigma eps alone, and in the same pass the KL. Its backward:
// posterior_backward.cpp.
#ifndef BBB_ISA

#include <torch/library.h>

#include "../checks.h"
#include "span.h"

namespace bbb_fast {

struct SampleArgs {
  Span mu, rho;
  std::vector<Span> out;  // one for each draw
  std::vector<SeedStream> draws;
  f64::Prior prior;
  double* partial;  // one number a chunk; null without KL
  bool centered;    // without mu
};

}  // namespace bbb_fast

#define BBB_THIS_FILE "sample_weights.cpp"
#include "foreach_isa.h"

namespace bbb_fast {

std::tuple<std::vector<at::Tensor>, at::Tensor> sample_weights_cpu(
    at::TensorList mu,
    at::TensorList rho,
    const at::Tensor& rng,
    double prior_mu,
    double prior_sigma,
    bool with_kl,
    std::optional<at::ScalarType> dtype,
    bool centered) {
  check_posteriors("sample_weights", mu, rho);
  check_rng("sample_weights", rng, mu[0].device(), RngOf::draws);
  check_prior("sample_weights", prior_mu, prior_sigma);
  check_dtype_option("sample_weights", "dtype", dtype);

  const int64_t draws = draw_count(rng);
  std::vector<at::Tensor> weights;
  std::vector<double> partial;
  double kl = 0.0;
  for (size_t k = 0; k < mu.size(); ++k) {
    const at::Tensor m = mu[k].contiguous();
    const at::Tensor r = rho[k].contiguous();
    std::vector<int64_t> sizes = m.sizes().vec();
    if (rng.dim() == 2) sizes.insert(sizes.begin(), draws);
    at::Tensor w = fresh(sizes, dtype.value_or(m.scalar_type()));
    std::vector<Span> out;
    for (int64_t draw = 0; draw < draws; ++draw) out.push_back(Span(w).part(draw, draws));
    const int64_t chunks = chunk_count(m.numel());
    if (with_kl) partial.resize(chunks);
    const SampleArgs args{
        Span(m),
        Span(r),
        std::move(out),
        seeds_and_streams(rng, k),
        {prior_mu, prior_sigma},
        with_kl ? partial.data() : nullptr,
        centered};
    for_each_chunk(m.numel(), [&](int64_t begin, int64_t end) { BBB_CALL(sample_chunks, args, begin, end) });
    if (with_kl) {
      kl += finish_kl(partial, kl_constant(m));
    }
    weights.push_back(std::move(w));
  }
  return {std::move(weights), kl_tensor(kl, mu[0])};
}

TORCH_LIBRARY_IMPL(bbb_fast, CPU, m) {
  m.impl("sample_weights", &sample_weights_cpu);
}

}  // namespace bbb_fast

#else

#include "kl_tile.h"
#include "noise_of_draws.h"

template <bool kWithKl, bool kCentered, bool kOne>
void sample_chunks_float(const SampleArgs& a, int64_t begin, int64_t end) {
  const NoiseOfDraws<kOne> noise(a.draws);
  const Prior prior = make_prior(a.prior);
  alignas(64) float mu_buffer[kTile], rho_buffer[kTile], out_buffer[kTile];
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    KlSum kl;
    const int64_t stop = std::min((chunk + 1) * kChunk, a.mu.numel);
    for (int64_t i = chunk * kChunk; i < stop; i += kTile) {
      const int64_t count = std::min<int64_t>(kTile, stop - i);
      const float* mu_tile = read_tile(a.mu, i, count, mu_buffer);
      const float* rho_tile = read_tile(a.rho, i, count, rho_buffer);
      vquad mean[kQuads], sigma[kQuads];
      const auto quads = [&](auto whole) BBB_ALWAYS_INLINE {
        constexpr bool kWhole = decltype(whole)::value;
#pragma GCC unroll 4
        for (int q = 0; q < kQuads; ++q) {
          const vquad mu = load_quad(mu_tile + q * kQuad);
          const Sigma<vquad> s = softplus(load_quad(rho_tile + q * kQuad));
          mean[q] = mu;
          sigma[q] = s.value;
          if constexpr (kWithKl) kl.add<kWhole>(q, mu, s, prior, count);
        }
      };
      count == kTile ? quads(std::true_type{}) : quads(std::false_type{});
      if constexpr (kWithKl) kl.finish_tile();
      noise.for_each([&](const Noise& own, size_t k) BBB_ALWAYS_INLINE {
        float* out = write_tile(a.out[k], i, count, out_buffer);
        vquad z[kQuads];
        own.tile(i / 4, z);
#pragma GCC unroll 4
        for (int q = 0; q < kQuads; ++q) {
          const vquad noise_part = sigma[q] * z[q];
          store(out + q * kQuad, kCentered ? noise_part : noise_part + mean[q]);
        }
        commit_tile(a.out[k], i, count, out);
      });
    }
    if constexpr (kWithKl) a.partial[chunk] = chunk_kl(kl, a.mu, a.rho, SamePrior{a.prior}, chunk);
  }
}

inline void sample_chunks_double(const SampleArgs& a, int64_t begin, int64_t end) {
  alignas(64) float eps[kTile];
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    double kl = 0.0;
    const int64_t stop = std::min((chunk + 1) * kChunk, a.mu.numel);
    for (int64_t i = chunk * kChunk; i < stop; i += kTile) {
      for (size_t k = 0; k < a.draws.size(); ++k) {
        Noise(a.draws[k].seed, a.draws[k].stream).tile(i / 4, eps);
        for (int64_t j = i; j < std::min<int64_t>(i + kTile, stop); ++j) {
          const double mu = read_double(a.mu, j), rho = read_double(a.rho, j);
          const f64::Sigma s = f64::softplus(rho);
          write_double(a.out[k], j, (a.centered ? 0.0 : mu) + s.value * eps[j - i]);
          if (a.partial != nullptr && k == 0) kl += f64::kl_terms(mu, rho, s, a.prior);
        }
      }
    }
    if (a.partial != nullptr) a.partial[chunk] = kl;
  }
}

template <bool kWithKl, bool kCentered>
void sample_chunks_narrow(const SampleArgs& a, int64_t begin, int64_t end) {
  if (a.draws.size() == 1) {
    sample_chunks_float<kWithKl, kCentered, true>(a, begin, end);
  } else {
    sample_chunks_float<kWithKl, kCentered, false>(a, begin, end);
  }
}

inline void sample_chunks(const SampleArgs& a, int64_t begin, int64_t end) {
  const bool with_kl = a.partial != nullptr;
  if (a.mu.dtype == at::kDouble) {
    sample_chunks_double(a, begin, end);
  } else if (a.centered) {
    with_kl ? sample_chunks_narrow<true, true>(a, begin, end)
            : sample_chunks_narrow<false, true>(a, begin, end);
  } else {
    with_kl ? sample_chunks_narrow<true, false>(a, begin, end)
            : sample_chunks_narrow<false, false>(a, begin, end);
  }
}

#endif
