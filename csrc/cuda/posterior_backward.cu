// posterior_backward: the gradient of mu and rho through the weights, whose eps is regenerated, and the KL.
// One launch for the tensors of a layer, or of a model.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../checks.h"
#include "dispatch.h"
#include "kl_sum.h"

namespace bbb_fast::cuda {
namespace {

template <class P, class W>
struct BackwardEntry {
  const P* mu;
  const P* rho;
  const W* grad_w;  // null without
  P* grad_mu;
  P* grad_rho;
  int64_t numel;
  uint64_t tensor;  // its noise is stream + tensor
  typename KlSum<Wide<P>>::Prior prior;
  bool aligned;
};

// dw/dmu = 1 and dw/drho = eps sigmoid(rho) (Blundell et al. 2015, section 3.2), plus the KL's.
// The compiler left alone takes 95 registers, for 2 blocks at once; these bounds cost no spill.
template <class P, class W>
__global__ void __launch_bounds__(kThreads, sizeof(P) == sizeof(float) ? 4 : 3) backward_kernel(
    const __grid_constant__ Table<BackwardEntry<P, W>> table, const int64_t* rng, const Wide<P>* grad_kl) {
  using A = Wide<P>;
  constexpr int N = kVector<P, W>;
  struct Operands {
    A mu[N], rho[N], grad_w[N];
  };
  const A g_kl = grad_kl == nullptr ? A{} : *grad_kl;
  for_each_chunk(table, [&](const auto& e, int64_t, int64_t begin, int count) {
    const bool weight = e.grad_w != nullptr;
    Noise noise;
    if (weight) noise = Noise(rng, e.tensor);
    for_each_vector<N, Operands>(
        e.aligned, count,
        [&](auto whole, unsigned at, int left, Operands& o) {
          read<whole.value>(e.mu + begin + at, left, o.mu);
          read<whole.value>(e.rho + begin + at, left, o.rho);
          if (weight) read<whole.value>(e.grad_w + begin + at, left, o.grad_w);
        },
        [&](auto whole, unsigned at, int left, const Operands& o) {
          A g_mu[N], g_rho[N], z[N];
          if (weight) noise.fill(begin, at, z);
#pragma unroll
          for (int j = 0; j < N; ++j) {
            const auto s = softplus(o.rho[j]);
            A derivative, ratio;
            softplus_derivative(o.rho[j], s, derivative, ratio);
            g_mu[j] = g_rho[j] = A{};
            if (grad_kl != nullptr) {
              kl_derivative(o.mu[j], s, derivative, ratio, e.prior, g_kl, g_mu[j], g_rho[j]);
            }
            if (weight) {
              g_mu[j] += o.grad_w[j];
              g_rho[j] += o.grad_w[j] * z[j] * derivative;
            }
          }
          write<whole.value>(e.grad_mu + begin + at, left, g_mu);
          write<whole.value>(e.grad_rho + begin + at, left, g_rho);
        });
  });
}

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> posterior_backward(
    const c10::List<std::optional<at::Tensor>>& grad_w,
    const std::optional<at::Tensor>& grad_kl,
    at::TensorList mu,
    at::TensorList rho,
    const std::optional<at::Tensor>& rng,
    at::ArrayRef<double> prior_mu,
    at::ArrayRef<double> prior_sigma) {
  check_posterior_backward("posterior_backward", grad_w, grad_kl, mu, rho, rng, prior_mu, prior_sigma);
  const DeviceGuard guard(mu[0].device());
  const auto dtype = mu[0].scalar_type();
  const auto given = [](const std::optional<at::Tensor>& t) { return t && t->defined(); };
  // The weights' gradients have one type, unless a caller of the op mixes them.
  std::optional<at::ScalarType> weight_dtype;
  for (size_t k = 0; k < mu.size(); ++k) {
    const std::optional<at::Tensor> t = grad_w.get(k);
    if (given(t)) {
      weight_dtype = c10::promoteTypes(weight_dtype.value_or(t->scalar_type()), t->scalar_type());
    }
  }
  const Pair pair = parameter_pair(dtype, weight_dtype.value_or(dtype));
  const auto dense_as = [&](const std::optional<at::Tensor>& t, at::ScalarType type) {
    return given(t) ? t->to(type).contiguous() : at::Tensor();
  };
  std::vector<at::Tensor> m, r, g, grad_mu, grad_rho;
  for (size_t k = 0; k < mu.size(); ++k) {
    m.push_back(dense_as(mu[k], pair.first));
    r.push_back(dense_as(rho[k], pair.first));
    g.push_back(dense_as(grad_w.get(k), pair.second));
    grad_mu.push_back(at::empty(mu[k].sizes(), mu[k].options().dtype(pair.first)));
    grad_rho.push_back(at::empty(mu[k].sizes(), mu[k].options().dtype(pair.first)));
  }
  const at::Tensor g_kl = dense_as(grad_kl, wide(pair.first));
  const at::Tensor numbers = dense_as(rng, at::kLong);

  dispatch_parameter_pair(pair, [&](auto first, auto second) {
    using P = typename decltype(first)::type;
    using W = typename decltype(second)::type;
    using A = Wide<P>;
    constexpr int N = kVector<P, W>;
    std::vector<BackwardEntry<P, W>> entries;
    for (size_t k = 0; k < m.size(); ++k) {
      BackwardEntry<P, W> e{
          m[k].const_data_ptr<P>(),
          r[k].const_data_ptr<P>(),
          g[k].defined() ? g[k].const_data_ptr<W>() : nullptr,
          grad_mu[k].mutable_data_ptr<P>(),
          grad_rho[k].mutable_data_ptr<P>(),
          m[k].numel(),
          k,
          prior_for<A>(prior_mu[k], prior_sigma[k]),
          false};
      e.aligned = is_aligned<N>(e.mu) && is_aligned<N>(e.rho) && is_aligned<N>(e.grad_w) &&
                  is_aligned<N>(e.grad_mu) && is_aligned<N>(e.grad_rho);
      entries.push_back(e);
    }
    const int64_t* seed_stream = numbers.defined() ? numbers.const_data_ptr<int64_t>() : nullptr;
    const A* grad = g_kl.defined() ? g_kl.const_data_ptr<A>() : nullptr;
    for_each_table(entries, [&](const auto& table, int64_t) {
      launch<&backward_kernel<P, W>>(table.chunks(), table, seed_stream, grad);
    });
  });
  for (size_t k = 0; k < m.size(); ++k) {
    grad_mu[k] = grad_mu[k].to(dtype);
    grad_rho[k] = grad_rho[k].to(dtype);
  }
  return {std::move(grad_mu), std::move(grad_rho)};
}

TORCH_LIBRARY_IMPL(bbb_fast, BBB_DISPATCH_KEY, m) {
  m.impl("posterior_backward", &posterior_backward);
}

}  // namespace
}  // namespace bbb_fast::cuda
