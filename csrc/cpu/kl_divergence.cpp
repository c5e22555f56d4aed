// kl_divergence: KL(q || p) of a list of tensors in one call, and its gradient.
#ifndef BBB_ISA

#include <ATen/ops/empty_like.h>
#include <ATen/ops/scalar_tensor.h>
#include <torch/library.h>

#include "../checks.h"
#include "../kl_sum.h"
#include "span.h"

namespace bbb_fast {

struct KlArgs {
  Span mu, rho;
  f64::Prior prior;
  double* partial;  // one number a chunk
};

struct KlBackwardArgs {
  Span mu, rho, grad_mu, grad_rho;
  f64::Prior prior;
  double grad;
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
    kl += finish_kl(partial, kl_constant(m, prior_sigma[k]));
  }
  return at::scalar_tensor(kl, mu[0].options().dtype(kl_dtype(mu[0])));
}

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> kl_divergence_backward_cpu(
    const at::Tensor& grad,
    at::TensorList mu,
    at::TensorList rho,
    at::ArrayRef<double> prior_mu,
    at::ArrayRef<double> prior_sigma) {
  check_posteriors("kl_divergence_backward", mu, rho);
  check_priors("kl_divergence_backward", mu.size(), prior_mu, prior_sigma);
  TORCH_CHECK_VALUE(
      grad.numel() == 1, "kl_divergence_backward: grad must be a scalar, got shape ", grad.sizes());
  const double g = grad.item<double>();
  std::vector<at::Tensor> grad_mu, grad_rho;
  for (size_t k = 0; k < mu.size(); ++k) {
    const at::Tensor m = mu[k].contiguous();
    const at::Tensor r = rho[k].contiguous();
    at::Tensor g_m = at::empty_like(m);
    at::Tensor g_r = at::empty_like(m);
    const KlBackwardArgs args{Span(m), Span(r), Span(g_m), Span(g_r), {prior_mu[k], prior_sigma[k]}, g};
    for_each_chunk(
        m.numel(), [&](int64_t begin, int64_t end) { BBB_CALL(kl_backward_chunks, args, begin, end) });
    grad_mu.push_back(std::move(g_m));
    grad_rho.push_back(std::move(g_r));
  }
  return {std::move(grad_mu), std::move(grad_rho)};
}

TORCH_LIBRARY_IMPL(bbb_fast, CPU, m) {
  m.impl("kl_divergence", &kl_divergence_cpu);
  m.impl("kl_divergence_backward", &kl_divergence_backward_cpu);
}

}  // namespace bbb_fast

#else

#include "kl_tile.h"

inline void kl_chunks(const KlArgs& a, int64_t begin, int64_t end) {
  const Prior prior = make_prior(a.prior);
  alignas(64) float mu_buffer[kTile], rho_buffer[kTile];
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t stop = std::min((chunk + 1) * kChunk, a.mu.numel);
    if (a.mu.dtype == at::kDouble) {
      double total = 0.0;
      for (int64_t i = chunk * kChunk; i < stop; ++i) {
        const double rho = read_double(a.rho, i);
        total += f64::kl_terms(read_double(a.mu, i), rho, f64::softplus(rho), a.prior);
      }
      a.partial[chunk] = total;
      continue;
    }
    KlSum kl;
    for (int64_t i = chunk * kChunk; i < stop; i += kTile) {
      const int64_t count = std::min<int64_t>(kTile, stop - i);
      const float* mu_tile = read_tile(a.mu, i, count, mu_buffer);
      const float* rho_tile = read_tile(a.rho, i, count, rho_buffer);
      vfloat mu[4], rho[4];
      Sigma<vfloat> s[4];
      for (int r = 0; r < 4; ++r) {
        mu[r] = load(mu_tile + r * kWidth);
        rho[r] = load(rho_tile + r * kWidth);
        s[r] = softplus(rho[r]);
      }
      kl.add(mu, rho, s, prior, count);
    }
    a.partial[chunk] = kl.total();
  }
}

inline void kl_backward_chunks(const KlBackwardArgs& a, int64_t begin, int64_t end) {
  const Prior prior = make_prior(a.prior);
  const float grad = static_cast<float>(a.grad);
  alignas(64) float mu_buffer[kTile], rho_buffer[kTile], g_mu_buffer[kTile], g_rho_buffer[kTile];
  const int64_t stop = std::min(end * kChunk, a.mu.numel);
  if (a.mu.dtype == at::kDouble) {
    for (int64_t i = begin * kChunk; i < stop; ++i) {
      const double rho = read_double(a.rho, i);
      const f64::Sigma s = f64::softplus(rho);
      double derivative, ratio, g_mu, g_rho;
      f64::softplus_derivative(rho, s, derivative, ratio);
      f64::kl_derivative(
          read_double(a.mu, i), s, derivative, ratio, a.prior, a.grad, g_mu, g_rho);
      write_double(a.grad_mu, i, g_mu);
      write_double(a.grad_rho, i, g_rho);
    }
    return;
  }
  for (int64_t i = begin * kChunk; i < stop; i += kTile) {
    const int64_t count = std::min<int64_t>(kTile, stop - i);
    const float* mu_tile = read_tile(a.mu, i, count, mu_buffer);
    const float* rho_tile = read_tile(a.rho, i, count, rho_buffer);
    float* g_mu_tile = write_tile(a.grad_mu, i, count, g_mu_buffer);
    float* g_rho_tile = write_tile(a.grad_rho, i, count, g_rho_buffer);
    for (int r = 0; r < 4; ++r) {
      const vfloat rho = load(rho_tile + r * kWidth);
      const Sigma<vfloat> s = softplus(rho);
      vfloat derivative, ratio, g_mu, g_rho;
      softplus_derivative(rho, s, derivative, ratio);
      kl_derivative(load(mu_tile + r * kWidth), s, derivative, ratio, prior, grad, g_mu, g_rho);
      store(g_mu_tile + r * kWidth, g_mu);
      store(g_rho_tile + r * kWidth, g_rho);
    }
    commit_tile(a.grad_mu, i, count, g_mu_tile);
    commit_tile(a.grad_rho, i, count, g_rho_tile);
  }
}

#endif
