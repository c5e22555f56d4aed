// variance: sigma^2 = softplus(rho)^2 in the dtype of the variance product, and its gradient.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "../checks.h"
#include "../layout.h"
#include "dispatch.h"
#include "map.h"

namespace bbb_fast::cuda {
namespace {

struct Variance {
  static constexpr bool kNoise = false;
  template <class A>
  BBB_DEVICE static A call(A rho) {
    const A sigma = softplus(rho).value;
    return sigma * sigma;
  }
};

// d sigma^2 / d rho = 2 sigma sigmoid(rho).
struct VarianceBackward {
  static constexpr bool kNoise = false;
  template <class A>
  BBB_DEVICE static A call(A grad, A rho) {
    const auto s = softplus(rho);
    A derivative, ratio;
    softplus_derivative(rho, s, derivative, ratio);
    return grad * (s.value * derivative * A{2});
  }
};

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
    map<Variance, V>({}, out, r.const_data_ptr<P>());
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
    map<VarianceBackward, P>({}, out, g.const_data_ptr<V>(), r.const_data_ptr<P>());
  });
  return out.to(rho.scalar_type());
}

TORCH_LIBRARY_IMPL(bbb_fast, BBB_DISPATCH_KEY, m) {
  m.impl("variance", &variance);
  m.impl("variance_backward", &variance_backward);
}

}  // namespace
}  // namespace bbb_fast::cuda
