// posterior_backward: the gradient of mu and rho through the weights, whose eps is regenerated, and the KL.
#ifndef BBB_ISA

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../checks.h"
#include "span.h"

namespace bbb_fast {

struct BackwardArgs {
  Span mu, rho;
  Span grad_w;  // data is null where the weight got no gradient
  Span grad_mu, grad_rho;
  uint64_t seed, stream;
  f64::Prior prior;
  double grad_kl;  // 0 without KL
};

}  // namespace bbb_fast

#define BBB_THIS_FILE "posterior_backward.cpp"
#include "foreach_isa.h"

namespace bbb_fast {

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> posterior_backward_cpu(
    const c10::List<std::optional<at::Tensor>>& grad_w,
    const std::optional<at::Tensor>& grad_kl,
    at::TensorList mu,
    at::TensorList rho,
    const std::optional<at::Tensor>& rng,
    at::ArrayRef<double> prior_mu,
    at::ArrayRef<double> prior_sigma) {
  const bool any =
      check_posterior_backward("posterior_backward", grad_w, grad_kl, mu, rho, rng, prior_mu, prior_sigma);
  uint64_t seed = 0, stream = 0;
  if (any) {
    const at::Tensor numbers = rng->contiguous();
    seed = static_cast<uint64_t>(numbers.const_data_ptr<int64_t>()[0]);
    stream = static_cast<uint64_t>(numbers.const_data_ptr<int64_t>()[1]);
  }
  const double g_kl = grad_kl && grad_kl->defined() ? grad_kl->item<double>() : 0.0;
  std::vector<at::Tensor> grad_mu, grad_rho;
  for (size_t k = 0; k < mu.size(); ++k) {
    const at::Tensor m = mu[k].contiguous();
    const at::Tensor r = rho[k].contiguous();
    at::Tensor g_m = at::empty(m.sizes(), m.options());
    at::Tensor g_r = at::empty(m.sizes(), m.options());
    const std::optional<at::Tensor> given = grad_w.get(k);
    at::Tensor g_w;
    if (given && given->defined()) {
      g_w = given->contiguous();
      if (m.scalar_type() == at::kDouble) g_w = g_w.to(at::kDouble);
    }
    const BackwardArgs args{Span(m), Span(r),    g_w.defined() ? Span(g_w) : Span(), Span(g_m), Span(g_r),
                            seed,    stream + k, {prior_mu[k], prior_sigma[k]},      g_kl};
    for_each_chunk(
        m.numel(), [&](int64_t begin, int64_t end) { BBB_CALL(backward_chunks, args, begin, end) });
    grad_mu.push_back(std::move(g_m));
    grad_rho.push_back(std::move(g_r));
  }
  return {std::move(grad_mu), std::move(grad_rho)};
}

TORCH_LIBRARY_IMPL(bbb_fast, CPU, m) {
  m.impl("posterior_backward", &posterior_backward_cpu);
}

}  // namespace bbb_fast

#else

// dw/dmu = 1 and dw/drho = eps sigmoid(rho) (Blundell et al. 2015, section 3.2), plus the KL's.
template <bool kWeight, bool kKl>
void backward_float(const BackwardArgs& a, int64_t begin, int64_t end) {
  const Noise noise(a.seed, a.stream);
  const Prior prior = make_prior(a.prior);
  const float grad_kl = static_cast<float>(a.grad_kl);
  alignas(64) float mu_buffer[kTile], rho_buffer[kTile], w_buffer[kTile];
  alignas(64) float g_mu_buffer[kTile], g_rho_buffer[kTile];
  const int64_t stop = std::min(end * kChunk, a.mu.numel);
  for (int64_t i = begin * kChunk; i < stop; i += kTile) {
    const int64_t count = std::min<int64_t>(kTile, stop - i);
    const float* mu_tile = read_tile(a.mu, i, count, mu_buffer);
    const float* rho_tile = read_tile(a.rho, i, count, rho_buffer);
    const float* w_tile = kWeight ? read_tile(a.grad_w, i, count, w_buffer) : nullptr;
    float* g_mu_tile = write_tile(a.grad_mu, i, count, g_mu_buffer);
    float* g_rho_tile = write_tile(a.grad_rho, i, count, g_rho_buffer);
    vfloat z[4];
    if constexpr (kWeight) noise.tile(i / 4, z);
    for (int r = 0; r < 4; ++r) {
      const vfloat mu = load(mu_tile + r * kWidth);
      const vfloat rho = load(rho_tile + r * kWidth);
      const Sigma<vfloat> s = softplus(rho);
      vfloat derivative, ratio;
      softplus_derivative(rho, s, derivative, ratio);
      vfloat g_mu = vfloat{}, g_rho = vfloat{};
      if constexpr (kKl) kl_derivative(mu, s, derivative, ratio, prior, grad_kl, g_mu, g_rho);
      if constexpr (kWeight) {
        const vfloat g = load(w_tile + r * kWidth);
        g_mu += g;
        g_rho += g * z[r] * derivative;
      }
      store(g_mu_tile + r * kWidth, g_mu);
      store(g_rho_tile + r * kWidth, g_rho);
    }
    commit_tile(a.grad_mu, i, count, g_mu_tile);
    commit_tile(a.grad_rho, i, count, g_rho_tile);
  }
}

inline void backward_double(const BackwardArgs& a, int64_t begin, int64_t end) {
  const Noise noise(a.seed, a.stream);
  alignas(64) float eps[kTile];
  const int64_t stop = std::min(end * kChunk, a.mu.numel);
  for (int64_t i = begin * kChunk; i < stop; i += kTile) {
    vfloat z[4];
    noise.tile(i / 4, z);
    for (int r = 0; r < 4; ++r) store(eps + r * kWidth, z[r]);
    for (int64_t j = i; j < std::min<int64_t>(i + kTile, stop); ++j) {
      const double mu = read_double(a.mu, j), rho = read_double(a.rho, j);
      const double g = a.grad_w.data != nullptr ? read_double(a.grad_w, j) : 0.0;
      const f64::Sigma s = f64::softplus(rho);
      double derivative, ratio, g_mu, g_rho;
      f64::softplus_derivative(rho, s, derivative, ratio);
      f64::kl_derivative(mu, s, derivative, ratio, a.prior, a.grad_kl, g_mu, g_rho);
      write_double(a.grad_mu, j, g_mu + g);
      write_double(a.grad_rho, j, g_rho + g * eps[j - i] * derivative);
    }
  }
}

inline void backward_chunks(const BackwardArgs& a, int64_t begin, int64_t end) {
  const bool weight = a.grad_w.data != nullptr;
  const bool kl = a.grad_kl != 0.0;
  if (a.mu.dtype == at::kDouble) {
    backward_double(a, begin, end);
  } else if (weight && kl) {
    backward_float<true, true>(a, begin, end);
  } else if (weight) {
    backward_float<true, false>(a, begin, end);
  } else {
    backward_float<false, true>(a, begin, end);
  }
}

#endif
