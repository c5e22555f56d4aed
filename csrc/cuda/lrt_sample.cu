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
  static constexpr bool kNoise = true;
  template <class A>
  BBB_DEVICE static A call(A m, A v, A z) {
    return m + lrt_noise(v, z);
  }
};

struct LrtSampleBackward {
  static constexpr bool kNoise = true;
  template <class A>
  BBB_DEVICE static A call(A grad, A v, A z) {
    return grad * lrt_noise_derivative(v, z);
  }
};

// Calls run(k, the draw's own [seed, stream]) for each draw that numbers names.
template <class Run>
void for_each_draw(const at::Tensor& numbers, const Run& run) {
  if (numbers.dim() == 1) return run(0, numbers);
  for (int64_t k = 0; k < numbers.size(0); ++k) run(k, numbers.select(0, k));
}

at::Tensor part_of(const at::Tensor& t, int64_t k, int64_t draws) {
  return draws == 1 ? t : t.narrow(0, k * (t.size(0) / draws), t.size(0) / draws);
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
    for_each_draw(numbers, [&](int64_t k, const at::Tensor& own) {
      const at::Tensor part = part_of(mean, k, draw_count(rng));
      const at::Tensor of_var = part_of(var, k, draw_count(rng));
      map<LrtSample, M>(own, part, part.const_data_ptr<M>(), of_var.const_data_ptr<V>());
    });
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
    for_each_draw(numbers, [&](int64_t k, const at::Tensor& own) {
      const int64_t draws = draw_count(rng);
      const at::Tensor of_g = part_of(g, k, draws), of_var = part_of(var, k, draws);
      map<LrtSampleBackward, V>(
          own, part_of(grad_v, k, draws), of_g.const_data_ptr<M>(), of_var.const_data_ptr<V>());
    });
  });
  return grad_v.to(v.scalar_type());
}

TORCH_LIBRARY_IMPL(bbb_fast, BBB_DISPATCH_KEY, m) {
  m.impl("lrt_sample_", &lrt_sample_);
  m.impl("lrt_sample_backward", &lrt_sample_backward);
}

}  // namespace
}  // namespace bbb_fast::cuda
