// kl_tensor_prior: KL(q || p) where each weight has a prior of its own, and its gradient.
#ifndef BBB_ISA

#include <torch/library.h>

#include "../checks.h"
#include "span.h"

namespace bbb_fast {

struct KlTensorPriorArgs {
  Span mu, rho;
  Span prior_mu, prior_sigma;  // of mu's length, or of one element
  double* partial;             // one number a chunk
};

struct KlTensorPriorBackwardArgs {
  Span mu, rho, prior_mu, prior_sigma, grad_mu, grad_rho;
  double grad;
};

}  // namespace bbb_fast

#define BBB_THIS_FILE "kl_tensor_prior.cpp"
#include "foreach_isa.h"

namespace bbb_fast {
namespace {

// In the order of mu's elements, and float64 where mu is.
at::Tensor laid_out(const at::Tensor& t, const at::Tensor& mu) {
  return (mu.scalar_type() == at::kDouble ? t.to(at::kDouble) : t).contiguous();
}

}  // namespace

at::Tensor kl_tensor_prior_cpu(
    const at::Tensor& mu, const at::Tensor& rho, const at::Tensor& prior_mu, const at::Tensor& prior_sigma) {
  check_tensor_prior("kl_tensor_prior", mu, rho, prior_mu, prior_sigma);
  const at::Tensor m = mu.contiguous(), r = rho.contiguous();
  const at::Tensor p_mu = laid_out(prior_mu, mu), p_sigma = laid_out(prior_sigma, mu);
  std::vector<double> partial(chunk_count(m.numel()));
  const KlTensorPriorArgs args{Span(m), Span(r), Span(p_mu), Span(p_sigma), partial.data()};
  for_each_chunk(
      m.numel(), [&](int64_t begin, int64_t end) { BBB_CALL(kl_tensor_prior_chunks, args, begin, end) });
  return kl_tensor(finish_kl(partial, kl_constant(m)), mu);
}

std::vector<at::Tensor> kl_tensor_prior_backward_cpu(
    const at::Tensor& grad,
    const at::Tensor& mu,
    const at::Tensor& rho,
    const at::Tensor& prior_mu,
    const at::Tensor& prior_sigma) {
  check_tensor_prior("kl_tensor_prior_backward", mu, rho, prior_mu, prior_sigma);
  check_grad_kl("kl_tensor_prior_backward", "grad", grad, mu.device());
  const at::Tensor m = mu.contiguous(), r = rho.contiguous();
  const at::Tensor p_mu = laid_out(prior_mu, mu), p_sigma = laid_out(prior_sigma, mu);
  std::vector<at::Tensor> grads{fresh(m.sizes(), m.scalar_type()), fresh(m.sizes(), m.scalar_type())};
  const KlTensorPriorBackwardArgs args{
      Span(m), Span(r), Span(p_mu), Span(p_sigma), Span(grads[0]), Span(grads[1]), grad.item<double>(),
  };
  for_each_chunk(m.numel(), [&](int64_t begin, int64_t end) {
    BBB_CALL(kl_tensor_prior_backward_chunks, args, begin, end)
  });
  return grads;
}

TORCH_LIBRARY_IMPL(bbb_fast, CPU, m) {
  m.impl("kl_tensor_prior", &kl_tensor_prior_cpu);
  m.impl("kl_tensor_prior_backward", &kl_tensor_prior_backward_cpu);
}

}  // namespace bbb_fast

#else

#include "kl_tile.h"

// Each element's prior.
template <class Args>
struct OwnPrior {
  const Args& a;
  f64::Prior operator()(int64_t i) const {
    return {
        read_any(a.prior_mu, a.prior_mu.numel == 1 ? 0 : i),
        read_any(a.prior_sigma, a.prior_sigma.numel == 1 ? 0 : i)};
  }
};

// The tile of a tensor, or of its one number.
inline const float* read_tile_or_number(const Span& t, int64_t i, int64_t count, float* buffer) {
  if (t.numel > 1) return read_tile(t, i, count, buffer);
  const float number = t.numel == 1 ? static_cast<float>(read_any(t, 0)) : 0.0f;
  std::fill(buffer, buffer + kTile, number);
  return buffer;
}

inline PriorOf<vquad> prior_of(const float* mu, const float* sigma) {
  return {load_quad(mu), reciprocal(load_quad(sigma))};
}

inline void kl_tensor_prior_chunks(const KlTensorPriorArgs& a, int64_t begin, int64_t end) {
  alignas(64) float mu_buffer[kTile], rho_buffer[kTile], prior_mu_buffer[kTile], prior_sigma_buffer[kTile];
  const OwnPrior<KlTensorPriorArgs> prior_at{a};
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    if (a.mu.dtype == at::kDouble) {
      a.partial[chunk] = exact_chunk_kl(a.mu, a.rho, prior_at, chunk);
      continue;
    }
    KlSum kl;
    const int64_t stop = std::min((chunk + 1) * kChunk, a.mu.numel);
    for (int64_t i = chunk * kChunk; i < stop; i += kTile) {
      const int64_t count = std::min<int64_t>(kTile, stop - i);
      const float* mu = read_tile(a.mu, i, count, mu_buffer);
      const float* rho = read_tile(a.rho, i, count, rho_buffer);
      const float* prior_mu = read_tile_or_number(a.prior_mu, i, count, prior_mu_buffer);
      const float* prior_sigma = read_tile_or_number(a.prior_sigma, i, count, prior_sigma_buffer);
      const auto quads = [&](auto whole) BBB_ALWAYS_INLINE {
        constexpr bool kWhole = decltype(whole)::value;
        for (int q = 0; q < kQuads; ++q) {
          const int at = q * kQuad;
          const Sigma<vquad> s = softplus(load_quad(rho + at));
          kl.add<kWhole>(q, load_quad(mu + at), s, prior_of(prior_mu + at, prior_sigma + at), count);
        }
      };
      count == kTile ? quads(std::true_type{}) : quads(std::false_type{});
      kl.finish_tile();
    }
    a.partial[chunk] = chunk_kl(kl, a.mu, a.rho, prior_at, chunk);
  }
}

inline void kl_tensor_prior_backward_chunks(const KlTensorPriorBackwardArgs& a, int64_t begin, int64_t end) {
  alignas(64) float mu_buffer[kTile], rho_buffer[kTile], prior_mu_buffer[kTile], prior_sigma_buffer[kTile];
  alignas(64) float g_mu_buffer[kTile], g_rho_buffer[kTile];
  const OwnPrior<KlTensorPriorBackwardArgs> prior_at{a};
  const int64_t stop = std::min(end * kChunk, a.mu.numel);
  for (int64_t i = begin * kChunk; i < stop; i += kTile) {
    const int64_t count = std::min<int64_t>(kTile, stop - i);
    if (a.mu.dtype == at::kDouble) {
      for (int64_t j = i; j < i + count; ++j) {
        const double mu = read_double(a.mu, j), rho = read_double(a.rho, j);
        const f64::Sigma s = f64::softplus(rho);
        double derivative, ratio, g_mu, g_rho;
        f64::softplus_derivative(rho, s, derivative, ratio);
        f64::kl_derivative(mu, s, derivative, ratio, prior_at(j), a.grad, g_mu, g_rho);
        write_double(a.grad_mu, j, g_mu);
        write_double(a.grad_rho, j, g_rho);
      }
      continue;
    }
    const float* mu = read_tile(a.mu, i, count, mu_buffer);
    const float* rho = read_tile(a.rho, i, count, rho_buffer);
    const float* prior_mu = read_tile_or_number(a.prior_mu, i, count, prior_mu_buffer);
    const float* prior_sigma = read_tile_or_number(a.prior_sigma, i, count, prior_sigma_buffer);
    float* g_mu_tile = write_tile(a.grad_mu, i, count, g_mu_buffer);
    float* g_rho_tile = write_tile(a.grad_rho, i, count, g_rho_buffer);
    for (int q = 0; q < kQuads; ++q) {
      const int at = q * kQuad;
      const vquad r = load_quad(rho + at);
      const Sigma<vquad> s = softplus(r);
      vquad derivative, ratio, g_mu, g_rho;
      softplus_derivative(r, s, derivative, ratio);
      kl_derivative(
          load_quad(mu + at), s, derivative, ratio, prior_of(prior_mu + at, prior_sigma + at),
          static_cast<float>(a.grad), g_mu, g_rho);
      store(g_mu_tile + at, g_mu);
      store(g_rho_tile + at, g_rho);
    }
    commit_tile(a.grad_mu, i, count, g_mu_tile);
    commit_tile(a.grad_rho, i, count, g_rho_tile);
  }
}

#endif
