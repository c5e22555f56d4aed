// kl_tensor_prior: KL(q || p) where each weight has a prior of its own, and its gradient.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "../checks.h"
#include "dispatch.h"
#include "kl_sum.h"

namespace bbb_fast::cuda {
namespace {

template <class P>
struct KlTensorPriorEntry {
  const P* mu;
  const P* rho;
  const Wide<P>* prior_mu;
  const Wide<P>* prior_sigma;
  P* grad_mu;  // of the gradient alone
  P* grad_rho;
  int64_t numel;
  bool aligned;
};

template <class A>
BBB_DEVICE typename KlSum<A>::Prior prior_of(A mu, A sigma) {
  if constexpr (std::is_same_v<A, double>) {
    return {mu, sigma};
  } else {
    return {mu, 1.0f / sigma};
  }
}

template <class P, int N>
struct KlTensorPriorOperands {
  Pack<P, N> mu, rho;
  Pack<Wide<P>, N> prior_mu, prior_sigma;
};

// Four operands of up to 8 bytes each: few elements a thread, for the registers' sake.
constexpr int kPriorVector = 4;

template <class P>
using PriorTable = Table<KlTensorPriorEntry<P>, 1>;

template <bool kWhole, class P, int N>
BBB_DEVICE void read_operands(
    const KlTensorPriorEntry<P>& e, int64_t from, int left, KlTensorPriorOperands<P, N>& o) {
  read<kWhole>(e.mu + from, left, o.mu);
  read<kWhole>(e.rho + from, left, o.rho);
  read<kWhole>(e.prior_mu + from, left, o.prior_mu);
  read<kWhole>(e.prior_sigma + from, left, o.prior_sigma);
}

// partial: one number a chunk.
template <class P>
__global__ void __launch_bounds__(kThreads)
    kl_tensor_prior_kernel(const __grid_constant__ PriorTable<P> table, double* partial) {
  using A = Wide<P>;
  constexpr int N = kPriorVector;
  using Operands = KlTensorPriorOperands<P, N>;
  BlockSum block_sum;
  for_each_chunk(table, [&](const auto& e, int64_t chunk, int64_t begin, int count) {
    KlSum<A> kl;
    for_each_vector<N, Operands>(
        e.aligned, count,
        [&](auto whole, unsigned at, int left, Operands& o) {
          read_operands<whole.value>(e, begin + at, left, o);
        },
        [&](auto, unsigned, int left, const Operands& o) {
          typename KlSum<A>::Sigma s[N];
#pragma unroll
          for (int j = 0; j < N; ++j) s[j] = softplus(o.rho.wide(j));
          kl.add(
              o.mu, o.rho, s, [&](int j) { return prior_of(o.prior_mu.wide(j), o.prior_sigma.wide(j)); },
              left);
        });
    const auto prior_at = [&](int i) { return prior_of(e.prior_mu[begin + i], e.prior_sigma[begin + i]); };
    const double sum = block_sum(thread_kl<N>(kl, e.mu + begin, e.rho + begin, count, prior_at));
    if (threadIdx.x == 0) partial[chunk] = sum;
  });
}

template <class P>
__global__ void __launch_bounds__(kThreads)
    kl_tensor_prior_backward_kernel(const __grid_constant__ PriorTable<P> table, const Wide<P>* grad) {
  using A = Wide<P>;
  constexpr int N = kPriorVector;
  using Operands = KlTensorPriorOperands<P, N>;
  const A g = *grad;
  for_each_chunk(table, [&](const auto& e, int64_t, int64_t begin, int count) {
    for_each_vector<N, Operands>(
        e.aligned, count,
        [&](auto whole, unsigned at, int left, Operands& o) {
          read_operands<whole.value>(e, begin + at, left, o);
        },
        [&](auto whole, unsigned at, int left, const Operands& o) {
          A g_mu[N], g_rho[N];
#pragma unroll
          for (int j = 0; j < N; ++j) {
            const A rho = o.rho.wide(j);
            const auto s = softplus(rho);
            A derivative, ratio;
            softplus_derivative(rho, s, derivative, ratio);
            const auto prior = prior_of(o.prior_mu.wide(j), o.prior_sigma.wide(j));
            kl_derivative(o.mu.wide(j), s, derivative, ratio, prior, g, g_mu[j], g_rho[j]);
          }
          write<whole.value>(e.grad_mu + begin + at, left, g_mu);
          write<whole.value>(e.grad_rho + begin + at, left, g_rho);
        });
  });
}

// The operands in one layout, the prior in the type of the mathematics.
struct Laid {
  at::Tensor mu, rho, prior_mu, prior_sigma;

  Laid(const at::Tensor& m, const at::Tensor& r, const at::Tensor& p_mu, const at::Tensor& p_sigma)
      : mu(m.contiguous()),
        rho(r.contiguous()),
        prior_mu(p_mu.to(wide(m.scalar_type())).expand(m.sizes()).contiguous()),
        prior_sigma(p_sigma.to(wide(m.scalar_type())).expand(m.sizes()).contiguous()) {}

  template <class P>
  PriorTable<P> table(const at::Tensor& grad_mu, const at::Tensor& grad_rho) const {
    constexpr int N = kPriorVector;
    using A = Wide<P>;
    KlTensorPriorEntry<P> e{
        mu.const_data_ptr<P>(),
        rho.const_data_ptr<P>(),
        prior_mu.const_data_ptr<A>(),
        prior_sigma.const_data_ptr<A>(),
        grad_mu.defined() ? grad_mu.mutable_data_ptr<P>() : nullptr,
        grad_rho.defined() ? grad_rho.mutable_data_ptr<P>() : nullptr,
        mu.numel(),
        false};
    e.aligned = is_aligned<N>(e.mu) && is_aligned<N>(e.rho) && is_aligned<N>(e.prior_mu) &&
                is_aligned<N>(e.prior_sigma) && is_aligned<N>(e.grad_mu) && is_aligned<N>(e.grad_rho);
    PriorTable<P> table;
    table.add(e);
    return table;
  }
};

at::Tensor kl_tensor_prior(
    const at::Tensor& mu, const at::Tensor& rho, const at::Tensor& prior_mu, const at::Tensor& prior_sigma) {
  check_tensor_prior("kl_tensor_prior", mu, rho, prior_mu, prior_sigma);
  const DeviceGuard guard(mu.device());
  const Laid laid(mu, rho, prior_mu, prior_sigma);
  const at::Tensor kl = at::empty({}, mu.options().dtype(kl_dtype(mu)));
  dispatch(mu.scalar_type(), [&](auto type) {
    using P = typename decltype(type)::type;
    const PriorTable<P> table = laid.template table<P>({}, {});
    const at::Tensor partial = at::empty({table.chunks()}, kl.options().dtype(at::kDouble));
    launch<&kl_tensor_prior_kernel<P>>(table.chunks(), table, partial.mutable_data_ptr<double>());
    launch_finish_kl<Wide<P>>(partial, kl_constant(mu), kl);
  });
  return kl;
}

std::vector<at::Tensor> kl_tensor_prior_backward(
    const at::Tensor& grad,
    const at::Tensor& mu,
    const at::Tensor& rho,
    const at::Tensor& prior_mu,
    const at::Tensor& prior_sigma) {
  check_tensor_prior("kl_tensor_prior_backward", mu, rho, prior_mu, prior_sigma);
  check_grad_kl("kl_tensor_prior_backward", "grad", grad, mu.device());
  const DeviceGuard guard(mu.device());
  const Laid laid(mu, rho, prior_mu, prior_sigma);
  const at::Tensor g = grad.to(wide(mu.scalar_type())).contiguous();
  std::vector<at::Tensor> grads{at::empty_like(laid.mu), at::empty_like(laid.mu)};
  dispatch(mu.scalar_type(), [&](auto type) {
    using P = typename decltype(type)::type;
    const PriorTable<P> table = laid.template table<P>(grads[0], grads[1]);
    launch<&kl_tensor_prior_backward_kernel<P>>(table.chunks(), table, g.const_data_ptr<Wide<P>>());
  });
  return grads;
}

TORCH_LIBRARY_IMPL(bbb_fast, BBB_DISPATCH_KEY, m) {
  m.impl("kl_tensor_prior", &kl_tensor_prior);
  m.impl("kl_tensor_prior_backward", &kl_tensor_prior_backward);
}

}  // namespace
}  // namespace bbb_fast::cuda
