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
  Span grad_w, grad_spread;  // data is null where there is none
  Span grad_mu, grad_rho;    // may be grad_w and grad_spread
  Span again;                // what the forward formed; data is null where it is not wanted
  bool noise;                // whether there is an rng
  uint64_t seed, stream;
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
  uint64_t seed = 0, stream = 0;
  if (has(rng)) {
    const at::Tensor numbers = rng->contiguous();
    seed = static_cast<uint64_t>(numbers.const_data_ptr<int64_t>()[0]);
    stream = static_cast<uint64_t>(numbers.const_data_ptr<int64_t>()[1]);
  }
  std::optional<double> g_kl;
  if (has(grad_kl)) g_kl = grad_kl->item<double>();
  const auto dense_gradient = [](const at::Tensor& g, const at::Tensor& parameter) {
    return g.defined() && parameter.scalar_type() == at::kDouble ? g.to(at::kDouble).contiguous()
           : g.defined()                                         ? g.contiguous()
                                                                 : g;
  };
  const auto span = [](const at::Tensor& g) { return g.defined() ? Span(g) : Span(); };
  const at::Tensor formed = again ? fresh(mu[0].sizes(), *again) : at::detail::empty_cpu({0}, at::kFloat);
  for (size_t k = 0; k < mu.size(); ++k) {
    const at::Tensor m = mu[k].contiguous(), r = rho[k].contiguous();
    const at::Tensor g_w = dense_gradient(grad_w[k], m);
    const at::Tensor g_s = dense_gradient(grad_spread.empty() ? at::Tensor() : grad_spread[k], m);
    const BackwardArgs args{
        Span(m),
        Span(r),
        span(g_w),
        span(g_s),
        Span(grad_mu[k]),
        Span(grad_rho[k]),
        again && k == 0 ? Span(formed) : Span(),
        has(rng),
        seed,
        stream + k,
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

enum class Through { kl, weight, variance, noise };

// Through the weight, dw/dmu = 1 and dw/drho = eps sigmoid(rho) (Blundell et al. 2015, section 3.2); through
// the mean and apart from it sigma^2, d sigma^2/drho = 2 sigma sigmoid(rho), or sigma eps; plus the KL's.
template <Through kThrough, bool kKl>
void backward_float(const BackwardArgs& a, int64_t begin, int64_t end) {
  const Noise noise(a.seed, a.stream);
  const Prior prior = make_prior(a.prior);
  const float grad_kl = static_cast<float>(a.grad_kl.value_or(0.0));
  alignas(64) float mu_buffer[kTile], rho_buffer[kTile], w_buffer[kTile], s_buffer[kTile];
  alignas(64) float g_mu_buffer[kTile], g_rho_buffer[kTile], again_buffer[kTile];
  constexpr bool kSpread = kThrough == Through::variance || kThrough == Through::noise;
  constexpr bool kNoise = kThrough == Through::weight || kThrough == Through::noise;
  const bool form = kThrough != Through::kl && a.again.data != nullptr;
  const int64_t stop = std::min(end * kChunk, a.mu.numel);
  for (int64_t i = begin * kChunk; i < stop; i += kTile) {
    const int64_t count = std::min<int64_t>(kTile, stop - i);
    const float* mu_tile = read_tile(a.mu, i, count, mu_buffer);
    const float* rho_tile = read_tile(a.rho, i, count, rho_buffer);
    const float* w_tile = kThrough != Through::kl ? read_tile(a.grad_w, i, count, w_buffer) : nullptr;
    const float* s_tile = kSpread ? read_tile(a.grad_spread, i, count, s_buffer) : nullptr;
    float* g_mu_tile = write_tile(a.grad_mu, i, count, g_mu_buffer);
    float* g_rho_tile = write_tile(a.grad_rho, i, count, g_rho_buffer);
    float* again_tile = form ? write_tile(a.again, i, count, again_buffer) : nullptr;
    vquad z[kQuads];
    if constexpr (kNoise) noise.tile(i / 4, z);
    for (int q = 0; q < kQuads; ++q) {
      const int at = q * kQuad;
      const vquad mu = load_quad(mu_tile + at);
      const vquad rho = load_quad(rho_tile + at);
      const Sigma<vquad> s = softplus(rho);
      vquad derivative, ratio;
      softplus_derivative(rho, s, derivative, ratio);
      vquad g_mu = vquad{}, g_rho = vquad{};
      if constexpr (kKl) kl_derivative(mu, s, derivative, ratio, prior, grad_kl, g_mu, g_rho);
      if constexpr (kThrough == Through::weight) {
        const vquad g = load_quad(w_tile + at);
        g_mu += g;
        g_rho += g * z[q] * derivative;
        if (form) store(again_tile + at, s.value * z[q] + mu);
      } else if constexpr (kThrough == Through::variance) {
        g_mu += load_quad(w_tile + at);
        g_rho += load_quad(s_tile + at) * (s.value * derivative) * 2.0f;
        if (form) store(again_tile + at, s.value * s.value);
      } else if constexpr (kThrough == Through::noise) {
        g_mu += load_quad(w_tile + at);
        g_rho += load_quad(s_tile + at) * z[q] * derivative;
        if (form) store(again_tile + at, s.value * z[q]);
      }
      store(g_mu_tile + at, g_mu);
      store(g_rho_tile + at, g_rho);
    }
    commit_tile(a.grad_mu, i, count, g_mu_tile);
    commit_tile(a.grad_rho, i, count, g_rho_tile);
    if (form) commit_tile(a.again, i, count, again_tile);
  }
}

inline void backward_double(const BackwardArgs& a, int64_t begin, int64_t end) {
  const Noise noise(a.seed, a.stream);
  alignas(64) float eps[kTile];
  const int64_t stop = std::min(end * kChunk, a.mu.numel);
  for (int64_t i = begin * kChunk; i < stop; i += kTile) {
    noise.tile(i / 4, eps);
    for (int64_t j = i; j < std::min<int64_t>(i + kTile, stop); ++j) {
      const double mu = read_double(a.mu, j), rho = read_double(a.rho, j);
      const f64::Sigma s = f64::softplus(rho);
      double derivative, ratio, g_mu = 0.0, g_rho = 0.0;
      f64::softplus_derivative(rho, s, derivative, ratio);
      if (a.grad_kl) f64::kl_derivative(mu, s, derivative, ratio, a.prior, *a.grad_kl, g_mu, g_rho);
      if (a.grad_w.data != nullptr) {
        const bool spread = a.grad_spread.data != nullptr, variance = spread && !a.noise;
        const double z = eps[j - i], g_w = read_double(a.grad_w, j);
        const double g_s = spread ? read_double(a.grad_spread, j) : g_w;
        g_mu += g_w;
        g_rho += variance ? g_s * (s.value * derivative) * 2.0 : g_s * z * derivative;
        if (a.again.data != nullptr) {
          write_double(a.again, j, variance ? s.value * s.value : (spread ? 0.0 : mu) + s.value * z);
        }
      }
      write_double(a.grad_mu, j, g_mu);
      write_double(a.grad_rho, j, g_rho);
    }
  }
}

template <Through kThrough>
void backward_chunks_through(const BackwardArgs& a, int64_t begin, int64_t end) {
  if (a.grad_kl) {
    backward_float<kThrough, true>(a, begin, end);
  } else {
    backward_float<kThrough, false>(a, begin, end);
  }
}

inline void backward_chunks(const BackwardArgs& a, int64_t begin, int64_t end) {
  if (a.mu.dtype == at::kDouble) {
    backward_double(a, begin, end);
  } else if (a.grad_spread.data != nullptr && a.noise) {
    backward_chunks_through<Through::noise>(a, begin, end);
  } else if (a.grad_spread.data != nullptr) {
    backward_chunks_through<Through::variance>(a, begin, end);
  } else if (a.grad_w.data != nullptr) {
    backward_chunks_through<Through::weight>(a, begin, end);
  } else {
    backward_chunks_through<Through::kl>(a, begin, end);
  }
}

#endif
