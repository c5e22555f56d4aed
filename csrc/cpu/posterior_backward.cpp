// posterior_backward: the gradient of mu and rho through the weights, whose eps is regenerated, or through
// the mean and apart from it sigma^2 or sigma eps, and through the KL; in the same pass, the weights, sigma^2
// or sigma eps once more.
#ifndef BBB_ISA

#include <torch/library.h>

#include "../checks.h"
#include "../passes.h"
#include "span.h"

namespace bbb_fast {

struct BackwardArgs {
  Span mu, rho;
  std::vector<Span> grad_w, grad_spread;  // of each draw, or one of what all share; empty where there is none
  Span grad_mu, grad_rho;                 // may be in grad_w and grad_spread
  std::vector<Span> again;                // what the forward formed, of each draw; empty where not wanted
  std::vector<SeedStream> draws;          // empty where there was no noise
  f64::Prior prior;
  std::optional<double> grad_kl;
};

}  // namespace bbb_fast

#define BBB_THIS_FILE "posterior_backward.cpp"
#include "foreach_isa.h"

namespace bbb_fast {

at::Tensor posterior_backward_cpu(
    const c10::List<OptionalTensor>& grad_w_list,
    const c10::List<OptionalTensor>& grad_spread_list,
    const OptionalTensor& grad_kl,
    at::TensorList mu,
    at::TensorList rho,
    const OptionalTensor& rng,
    at::ArrayRef<double> prior_mu,
    at::ArrayRef<double> prior_sigma,
    at::TensorList grad_mu,
    at::TensorList grad_rho,
    std::optional<at::ScalarType> again) {
  const std::vector<at::Tensor> grad_w = tensors(grad_w_list), grad_spread = tensors(grad_spread_list);
  check_posterior_backward(
      "posterior_backward", grad_w, grad_spread, grad_kl, mu, rho, rng, prior_mu, prior_sigma, grad_mu,
      grad_rho, again);
  const int64_t draws = draw_count(rng);
  std::optional<double> g_kl;
  if (has(grad_kl)) g_kl = grad_kl->item<double>();
  const auto dense_gradient = [](const at::Tensor& g, const at::Tensor& parameter) {
    return g.defined() && parameter.scalar_type() == at::kDouble ? g.to(at::kDouble).contiguous()
           : g.defined()                                         ? g.contiguous()
                                                                 : g;
  };
  std::vector<int64_t> sizes = mu[0].sizes().vec();
  if (has(rng) && rng->dim() == 2) sizes.insert(sizes.begin(), draws);
  const at::Tensor formed = again ? fresh(sizes, *again) : at::detail::empty_cpu({0}, at::kFloat);
  const bool spread = !grad_spread.empty();
  for (size_t k = 0; k < mu.size(); ++k) {
    const at::Tensor m = mu[k].contiguous(), r = rho[k].contiguous();
    std::vector<at::Tensor> alive;
    const auto spans = [&](at::TensorList list, int64_t count) {
      std::vector<Span> result;
      for (const at::Tensor& g : list.slice(k * count, count)) {
        if (!g.defined()) break;
        alive.push_back(dense_gradient(g, m));
        result.emplace_back(alive.back());
      }
      return result;
    };
    std::vector<Span> of_formed;
    if (again && k == 0) {
      for (int64_t draw = 0; draw < draws; ++draw) of_formed.push_back(Span(formed).part(draw, draws));
    }
    const BackwardArgs args{
        Span(m),
        Span(r),
        spans(grad_w, spread ? 1 : draws),
        spread ? spans(grad_spread, draws) : std::vector<Span>(),
        Span(grad_mu[k]),
        Span(grad_rho[k]),
        std::move(of_formed),
        has(rng) ? seeds_and_streams(*rng, k) : std::vector<SeedStream>(),
        {prior_mu[k], prior_sigma[k]},
        g_kl};
    for_each_chunk(
        m.numel(), [&](int64_t begin, int64_t end) { BBB_CALL(backward_chunks, args, begin, end) });
  }
  return formed;
}

TORCH_LIBRARY_IMPL(bbb_fast, CPU, m) {
  m.impl("posterior_backward_out", &posterior_backward_cpu);
}

}  // namespace bbb_fast

#else

#include "noise_of_draws.h"

enum class Through { kl, weight, variance, noise };

// Through the weight, dw/dmu = 1 and dw/drho = eps sigmoid(rho) (Blundell et al. 2015, section 3.2); through
// the mean and apart from it sigma^2, d sigma^2/drho = 2 sigma sigmoid(rho), or sigma eps; plus the KL's.
template <Through kThrough, bool kKl, bool kOne>
void backward_float(const BackwardArgs& a, int64_t begin, int64_t end) {
  constexpr bool kWeight = kThrough == Through::weight, kVariance = kThrough == Through::variance;
  constexpr bool kDrawn = kWeight || kThrough == Through::noise;
  const NoiseOfDraws<kOne> noise(a.draws);
  const Prior prior = make_prior(a.prior);
  const float grad_kl = static_cast<float>(a.grad_kl.value_or(0.0));
  alignas(64) float mu_buffer[kTile], rho_buffer[kTile], w_buffer[kTile], s_buffer[kTile];
  alignas(64) float g_mu_buffer[kTile], g_rho_buffer[kTile], again_buffer[kTile];
  const bool form = kThrough != Through::kl && !a.again.empty();
  const int64_t stop = std::min(end * kChunk, a.mu.numel);
  for (int64_t i = begin * kChunk; i < stop; i += kTile) {
    const int64_t count = std::min<int64_t>(kTile, stop - i);
    const float* mu_tile = read_tile(a.mu, i, count, mu_buffer);
    const float* rho_tile = read_tile(a.rho, i, count, rho_buffer);
    // Of what is drawn, summed over the draws: the gradient, and the gradient times eps.
    vquad g_sum[kQuads], g_eps[kQuads], z[kQuads];
    if constexpr (kDrawn) {
#pragma GCC unroll 4
      for (int q = 0; q < kQuads; ++q) g_sum[q] = g_eps[q] = vquad{};
      noise.for_each([&](const Noise& own, size_t k) BBB_ALWAYS_INLINE {
        const Span& grad = kWeight ? a.grad_w[k] : a.grad_spread[k];
        const float* tile = read_tile(grad, i, count, s_buffer);
        if constexpr (!kOne) prefetch_tile(grad, i + 2 * kTile);
        own.tile(i / 4, z);
#pragma GCC unroll 4
        for (int q = 0; q < kQuads; ++q) {
          const vquad g = load_quad(tile + q * kQuad);
          g_sum[q] += g;
          g_eps[q] += g * z[q];
        }
        if (kOne || !form) return;
        float* again = write_tile(a.again[k], i, count, again_buffer);
        for (int q = 0; q < kQuads; ++q) {
          const vquad noise_part = softplus(load_quad(rho_tile + q * kQuad)).value * z[q];
          store(again + q * kQuad, kWeight ? noise_part + load_quad(mu_tile + q * kQuad) : noise_part);
        }
        commit_tile(a.again[k], i, count, again);
      });
    }
    constexpr bool kMean = kThrough == Through::noise || kVariance;
    const float* w_tile = kMean ? read_tile(a.grad_w[0], i, count, w_buffer) : nullptr;
    const float* s_tile = kVariance ? read_tile(a.grad_spread[0], i, count, s_buffer) : nullptr;
    const bool form_here = form && (kOne || kVariance);
    float* again_tile = form_here ? write_tile(a.again[0], i, count, again_buffer) : nullptr;
    // These may be given gradients, which have been read up to here.
    float* g_mu_tile = write_tile(a.grad_mu, i, count, g_mu_buffer);
    float* g_rho_tile = write_tile(a.grad_rho, i, count, g_rho_buffer);
#pragma GCC unroll 4
    for (int q = 0; q < kQuads; ++q) {
      const int at = q * kQuad;
      const vquad mu = load_quad(mu_tile + at);
      const vquad rho = load_quad(rho_tile + at);
      const Sigma<vquad> s = softplus(rho);
      vquad derivative, ratio;
      softplus_derivative(rho, s, derivative, ratio);
      vquad g_mu = vquad{}, g_rho = vquad{};
      if constexpr (kKl) kl_derivative(mu, s, derivative, ratio, prior, grad_kl, g_mu, g_rho);
      if constexpr (kMean) g_mu += load_quad(w_tile + at);
      if constexpr (kWeight) g_mu += g_sum[q];
      if constexpr (kDrawn) g_rho += g_eps[q] * derivative;
      if constexpr (kVariance) g_rho += load_quad(s_tile + at) * (s.value * derivative) * 2.0f;
      if (form_here) {
        const vquad noise_part = s.value * (kVariance ? s.value : z[q]);
        store(again_tile + at, kWeight ? noise_part + mu : noise_part);
      }
      store(g_mu_tile + at, g_mu);
      store(g_rho_tile + at, g_rho);
    }
    commit_tile(a.grad_mu, i, count, g_mu_tile);
    commit_tile(a.grad_rho, i, count, g_rho_tile);
    if (form_here) commit_tile(a.again[0], i, count, again_tile);
  }
}

inline void backward_double(const BackwardArgs& a, int64_t begin, int64_t end) {
  const bool spread = !a.grad_spread.empty(), variance = spread && a.draws.empty();
  const std::vector<Span>& of_draws = spread ? a.grad_spread : a.grad_w;
  alignas(64) float eps[kTile];
  double g_mean[kTile], g_sigma[kTile];
  const int64_t stop = std::min(end * kChunk, a.mu.numel);
  for (int64_t i = begin * kChunk; i < stop; i += kTile) {
    const int64_t count = std::min<int64_t>(kTile, stop - i);
    for (int64_t j = 0; j < count; ++j) {
      g_mean[j] = spread ? read_double(a.grad_w[0], i + j) : 0.0;
      g_sigma[j] = 0.0;
    }
    for (size_t k = 0; k < of_draws.size(); ++k) {
      if (!variance) Noise(a.draws[k].seed, a.draws[k].stream).tile(i / 4, eps);
      for (int64_t j = 0; j < count; ++j) {
        const double g = read_double(of_draws[k], i + j);
        if (!spread) g_mean[j] += g;
        g_sigma[j] += variance ? g : g * eps[j];
        if (a.again.empty()) continue;
        const double sigma = f64::softplus(read_double(a.rho, i + j)).value;
        const double mean = spread ? 0.0 : read_double(a.mu, i + j);
        write_double(a.again[k], i + j, variance ? sigma * sigma : mean + sigma * eps[j]);
      }
    }
    for (int64_t j = 0; j < count; ++j) {
      const double mu = read_double(a.mu, i + j), rho = read_double(a.rho, i + j);
      const f64::Sigma s = f64::softplus(rho);
      double derivative, ratio, g_mu = 0.0, g_rho = 0.0;
      f64::softplus_derivative(rho, s, derivative, ratio);
      if (a.grad_kl) f64::kl_derivative(mu, s, derivative, ratio, a.prior, *a.grad_kl, g_mu, g_rho);
      write_double(a.grad_mu, i + j, g_mu + g_mean[j]);
      write_double(
          a.grad_rho, i + j, g_rho + g_sigma[j] * (variance ? s.value * derivative * 2.0 : derivative));
    }
  }
}

template <Through kThrough>
void backward_chunks_through(const BackwardArgs& a, int64_t begin, int64_t end) {
  const auto run = [&](auto one) {
    if (a.grad_kl) {
      backward_float<kThrough, true, one.value>(a, begin, end);
    } else {
      backward_float<kThrough, false, one.value>(a, begin, end);
    }
  };
  constexpr bool kNoise = kThrough == Through::weight || kThrough == Through::noise;
  if constexpr (kNoise) {
    if (a.draws.size() > 1) return run(std::false_type{});
  }
  run(std::true_type{});
}

inline void backward_chunks(const BackwardArgs& a, int64_t begin, int64_t end) {
  if (a.mu.dtype == at::kDouble) {
    backward_double(a, begin, end);
  } else if (!a.grad_spread.empty() && !a.draws.empty()) {
    backward_chunks_through<Through::noise>(a, begin, end);
  } else if (!a.grad_spread.empty()) {
    backward_chunks_through<Through::variance>(a, begin, end);
  } else if (!a.grad_w.empty()) {
    backward_chunks_through<Through::weight>(a, begin, end);
  } else {
    backward_chunks_through<Through::kl>(a, begin, end);
  }
}

#endif
