// square: x^2 in the dtype of the variance product, and its gradient, added to the mean product's.
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "../checks.h"
#include "../layout.h"
#include "dispatch.h"
#include "map.h"

namespace bbb_fast::cuda {
namespace {

struct Square {
  static constexpr Draw kDraw = Draw::nothing;
  template <class A>
  BBB_DEVICE static A call(A x) {
    return x * x;
  }
};

struct SquareBackward {
  static constexpr Draw kDraw = Draw::nothing;
  template <class A>
  BBB_DEVICE static A call(A grad_x, A x, A grad) {
    return grad_x + x * grad * A{2};
  }
};

at::Tensor square(const at::Tensor& input, at::ScalarType dtype) {
  check_floating("square", "input", input);
  check_dtype_option("square", "dtype", dtype);
  const DeviceGuard guard(input.device());
  const Pair pair = activation_pair(input.scalar_type(), dtype);
  const at::Tensor x = dense(input).to(pair.first);
  const at::Tensor out = at::empty_like(x, x.options().dtype(pair.second));
  dispatch_activation_pair(pair, [&](auto first, auto second) {
    using X = typename decltype(first)::type;
    using V = typename decltype(second)::type;
    map<V>(Square{}, {}, out, x.const_data_ptr<X>());
  });
  return out.to(dtype);
}

void square_backward_(at::Tensor& grad_input, const at::Tensor& input, const at::Tensor& grad) {
  check_square_backward("square_backward_", grad_input, input, grad);
  const DeviceGuard guard(input.device());
  const Pair pair = activation_pair(input.scalar_type(), grad.scalar_type());
  at::Tensor sum = grad_input.to(pair.first);
  // All three in grad_input's memory order.
  const at::Tensor x = in_order_of(grad_input, input).to(pair.first);
  const at::Tensor g = in_order_of(grad_input, grad).to(pair.second);
  dispatch_activation_pair(pair, [&](auto first, auto second) {
    using X = typename decltype(first)::type;
    using V = typename decltype(second)::type;
    map<X>(SquareBackward{}, {}, sum, sum.const_data_ptr<X>(), x.const_data_ptr<X>(), g.const_data_ptr<V>());
  });
  if (!sum.is_same(grad_input)) grad_input.copy_(sum);
}

TORCH_LIBRARY_IMPL(bbb_fast, BBB_DISPATCH_KEY, m) {
  m.impl("square", &square);
  m.impl("square_backward_", &square_backward_);
}

}  // namespace
}  // namespace bbb_fast::cuda
