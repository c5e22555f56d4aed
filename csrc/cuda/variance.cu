// variance: sigma^2 = softplus(rho)^2 in the dtype of the variance product, and its gradient.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "../checks.h"
#include "../layout.h"
#include "dispatch.h"
#include "kl_sum.h"

namespace bbb_fast::cuda {
namespace {

template <class P, class V>
struct VarianceEntry {
  const P* rho;
  V* out;
  int64_t numel;
  bool aligned;
};

template <class P, class V>
__global__ void __launch_bounds__(kThreads)
    variance_kernel(const __grid_constant__ Table<VarianceEntry<P, V>, 1> table) {
  using A = Wide<P>;
  constexpr int N = kVector<P, V>;
  struct Operands {
    A rho[N];
  };
  for_each_chunk(table, [&](const auto& e, int64_t, int64_t begin, int count) {
    for_each_vector<N, Operands>(
        e.aligned, count,
        [&](auto whole, unsigned at, int left, Operands& o) {
          read<whole.value>(e.rho + begin + at, left, o.rho);
        },
        [&](auto whole, unsigned at, int left, const Operands& o) {
          A variance[N];
#pragma unroll
          for (int j = 0; j < N; ++j) {
            const A sigma = softplus(o.rho[j]).value;
            variance[j] = sigma * sigma;
          }
          write<whole.value>(e.out + begin + at, left, variance);
        });
  });
}

template <class P, class V>
struct VarianceBackwardEntry {
  const V* grad;
  const P* rho;
  P* grad_rho;
  int64_t numel;
  bool aligned;
};

// d sigma^2 / d rho = 2 sigma sigmoid(rho).
template <class P, class V>
__global__ void __launch_bounds__(kThreads)
    variance_backward_kernel(const __grid_constant__ Table<VarianceBackwardEntry<P, V>, 1> table) {
  using A = Wide<P>;
  constexpr int N = kVector<P, V>;
  struct Operands {
    A grad[N], rho[N];
  };
  for_each_chunk(table, [&](const auto& e, int64_t, int64_t begin, int count) {
    for_each_vector<N, Operands>(
        e.aligned, count,
        [&](auto whole, unsigned at, int left, Operands& o) {
          read<whole.value>(e.grad + begin + at, left, o.grad);
          read<whole.value>(e.rho + begin + at, left, o.rho);
        },
        [&](auto whole, unsigned at, int left, const Operands& o) {
          A grad_rho[N];
#pragma unroll
          for (int j = 0; j < N; ++j) {
            const auto s = softplus(o.rho[j]);
            A derivative, ratio;
            softplus_derivative(o.rho[j], s, derivative, ratio);
            grad_rho[j] = o.grad[j] * (s.value * derivative * A{2});
          }
          write<whole.value>(e.grad_rho + begin + at, left, grad_rho);
        });
  });
}

at::Tensor variance(const at::Tensor& rho, at::ScalarType dtype) {
  check_floating("variance", "rho", rho);
  check_dtype_option("variance", "dtype", dtype);
  const DeviceGuard guard(rho.device());
  const Pair pair = parameter_pair(rho.scalar_type(), dtype);
  // Element by element, in memory order: a channels_last rho gives a channels_last variance.
  const at::Tensor r = dense(rho).to(pair.first);
  const at::Tensor out = at::empty_like(r, r.options().dtype(pair.second));
  dispatch_parameter_pair(pair, [&](auto first, auto second) {
    using P = typename decltype(first)::type;
    using V = typename decltype(second)::type;
    constexpr int N = kVector<P, V>;
    const P* x = r.const_data_ptr<P>();
    V* y = out.mutable_data_ptr<V>();
    const auto table = table_of<VarianceEntry<P, V>>({x, y, r.numel(), is_aligned<N>(x) && is_aligned<N>(y)});
    launch<&variance_kernel<P, V>>(table.chunks(), table);
  });
  return out.to(dtype);
}

at::Tensor variance_backward(const at::Tensor& grad, const at::Tensor& rho) {
  check_floating("variance_backward", "grad", grad);
  check_floating("variance_backward", "rho", rho);
  TORCH_CHECK_VALUE(
      grad.sizes() == rho.sizes(), "variance_backward: grad must have shape ", rho.sizes(), ", got ",
      grad.sizes());
  check_device("variance_backward", "grad", grad, rho.device());
  const DeviceGuard guard(rho.device());
  const Pair pair = parameter_pair(rho.scalar_type(), grad.scalar_type());
  const at::Tensor g = grad.to(pair.second).contiguous();
  const at::Tensor r = rho.to(pair.first).contiguous();
  const at::Tensor out = at::empty(r.sizes(), r.options());
  dispatch_parameter_pair(pair, [&](auto first, auto second) {
    using P = typename decltype(first)::type;
    using V = typename decltype(second)::type;
    constexpr int N = kVector<P, V>;
    const V* x = g.const_data_ptr<V>();
    const P* y = r.const_data_ptr<P>();
    P* z = out.mutable_data_ptr<P>();
    const bool aligned = is_aligned<N>(x) && is_aligned<N>(y) && is_aligned<N>(z);
    const auto table = table_of<VarianceBackwardEntry<P, V>>({x, y, z, r.numel(), aligned});
    launch<&variance_backward_kernel<P, V>>(table.chunks(), table);
  });
  return out.to(rho.scalar_type());
}

TORCH_LIBRARY_IMPL(bbb_fast, BBB_DISPATCH_KEY, m) {
  m.impl("variance", &variance);
  m.impl("variance_backward", &variance_backward);
}

}  // namespace
}  // namespace bbb_fast::cuda
