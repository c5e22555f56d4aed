// lrt_sample: y = m + sqrt(v) eps, the epilogue of local reparameterization; its backward gives dL/dv.
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "../checks.h"
#include "dispatch.h"
#include "vectors.h"

namespace bbb_fast::cuda {
namespace {

using f64::lrt_noise;
using f64::lrt_noise_derivative;
using scalar::lrt_noise;
using scalar::lrt_noise_derivative;

template <class M, class V>
struct LrtSampleEntry {
  M* m;  // and the result
  const V* v;
  int64_t numel;
  bool aligned;
};

template <class M, class V>
__global__ void __launch_bounds__(kThreads)
    lrt_sample_kernel(const __grid_constant__ Table<LrtSampleEntry<M, V>, 1> table, const int64_t* rng) {
  using A = Wide<M>;
  constexpr int N = kVector<M, V>;
  struct Operands {
    A m[N], v[N];
  };
  const Noise noise(rng, 0);
  for_each_chunk(table, [&](const auto& e, int64_t, int64_t begin, int count) {
    for_each_vector<N, Operands>(
        e.aligned, count,
        [&](auto whole, unsigned at, int left, Operands& o) {
          read<whole.value>(e.m + begin + at, left, o.m);
          read<whole.value>(e.v + begin + at, left, o.v);
        },
        [&](auto whole, unsigned at, int left, const Operands& o) {
          A z[N];
          noise.fill(begin, at, z);
#pragma unroll
          for (int j = 0; j < N; ++j) z[j] = o.m[j] + lrt_noise(o.v[j], z[j]);
          write<whole.value>(e.m + begin + at, left, z);
        });
  });
}

template <class M, class V>
struct LrtSampleBackwardEntry {
  const M* grad;
  const V* v;
  V* grad_v;
  int64_t numel;
  bool aligned;
};

template <class M, class V>
__global__ void __launch_bounds__(kThreads) lrt_sample_backward_kernel(
    const __grid_constant__ Table<LrtSampleBackwardEntry<M, V>, 1> table, const int64_t* rng) {
  using A = Wide<M>;
  constexpr int N = kVector<M, V>;
  struct Operands {
    A grad[N], v[N];
  };
  const Noise noise(rng, 0);
  for_each_chunk(table, [&](const auto& e, int64_t, int64_t begin, int count) {
    for_each_vector<N, Operands>(
        e.aligned, count,
        [&](auto whole, unsigned at, int left, Operands& o) {
          read<whole.value>(e.grad + begin + at, left, o.grad);
          read<whole.value>(e.v + begin + at, left, o.v);
        },
        [&](auto whole, unsigned at, int left, const Operands& o) {
          A z[N];
          noise.fill(begin, at, z);
#pragma unroll
          for (int j = 0; j < N; ++j) z[j] = o.grad[j] * lrt_noise_derivative(o.v[j], z[j]);
          write<whole.value>(e.grad_v + begin + at, left, z);
        });
  });
}

void lrt_sample_(at::Tensor& m, const at::Tensor& v, const at::Tensor& rng) {
  check_lrt_sample("lrt_sample_", "m", m, v, rng);
  const DeviceGuard guard(m.device());
  const Pair pair = activation_pair(m.scalar_type(), v.scalar_type());
  at::Tensor mean = m.to(pair.first);
  const at::Tensor var = v.to(pair.second);
  const at::Tensor numbers = rng.contiguous();
  dispatch_activation_pair(pair, [&](auto first, auto second) {
    using M = typename decltype(first)::type;
    using V = typename decltype(second)::type;
    constexpr int N = kVector<M, V>;
    M* x = mean.mutable_data_ptr<M>();
    const V* y = var.const_data_ptr<V>();
    const auto table =
        table_of<LrtSampleEntry<M, V>>({x, y, m.numel(), is_aligned<N>(x) && is_aligned<N>(y)});
    launch<&lrt_sample_kernel<M, V>>(table.chunks(), table, numbers.const_data_ptr<int64_t>());
  });
  if (!mean.is_same(m)) m.copy_(mean);
}

at::Tensor lrt_sample_backward(const at::Tensor& grad, const at::Tensor& v, const at::Tensor& rng) {
  check_lrt_sample("lrt_sample_backward", "grad", grad, v, rng);
  const DeviceGuard guard(grad.device());
  const Pair pair = activation_pair(grad.scalar_type(), v.scalar_type());
  const at::Tensor g = grad.to(pair.first);
  const at::Tensor var = v.to(pair.second);
  const at::Tensor numbers = rng.contiguous();
  const at::Tensor grad_v = at::empty_like(var);
  dispatch_activation_pair(pair, [&](auto first, auto second) {
    using M = typename decltype(first)::type;
    using V = typename decltype(second)::type;
    constexpr int N = kVector<M, V>;
    const M* x = g.const_data_ptr<M>();
    const V* y = var.const_data_ptr<V>();
    V* z = grad_v.mutable_data_ptr<V>();
    const bool aligned = is_aligned<N>(x) && is_aligned<N>(y) && is_aligned<N>(z);
    const auto table = table_of<LrtSampleBackwardEntry<M, V>>({x, y, z, v.numel(), aligned});
    launch<&lrt_sample_backward_kernel<M, V>>(table.chunks(), table, numbers.const_data_ptr<int64_t>());
  });
  return grad_v.to(v.scalar_type());
}

TORCH_LIBRARY_IMPL(bbb_fast, BBB_DISPATCH_KEY, m) {
  m.impl("lrt_sample_", &lrt_sample_);
  m.impl("lrt_sample_backward", &lrt_sample_backward);
}

}  // namespace
}  // namespace bbb_fast::cuda
