// lrt_sample: y = m + sqrt(v) eps, the epilogue of local reparameterization; its backward gives dL/dv.
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "../checks.h"
#include "dispatch.h"
#include "map.h"

namespace bbb_fast::cuda {
namespace {

using f64::lrt_noise;
using f64::lrt_noise_derivative;
using scalar::lrt_noise;
using scalar::lrt_noise_derivative;

struct LrtSample {
  static constexpr Draw kDraw = Draw::normal;
  template <class A>
  BBB_DEVICE static A call(A m, A v, A z) {
    return m + lrt_noise(v, z);
  }
};

struct LrtSampleBackward {
  static constexpr Draw kDraw = Draw::normal;
  template <class A>
  BBB_DEVICE static A call(A grad, A v, A z) {
    return grad * lrt_noise_derivative(v, z);
  }
};

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
    map<M>(LrtSample{}, numbers, mean, mean.const_data_ptr<M>(), var.const_data_ptr<V>());
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
    map<V>(LrtSampleBackward{}, numbers, grad_v, g.const_data_ptr<M>(), var.const_data_ptr<V>());
  });
  return grad_v.to(v.scalar_type());
}

TORCH_LIBRARY_IMPL(bbb_fast, BBB_DISPATCH_KEY, m) {
  m.impl("lrt_sample_", &lrt_sample_);
  m.impl("lrt_sample_backward", &lrt_sample_backward);
}

}  // namespace
}  // namespace bbb_fast::cuda
