#include "matrix_product.h"

#include <ATen/core/dispatch/Dispatcher.h>

namespace bbb_fast {
namespace {

// torch's op for compiled graphs, x W^T + b with nothing fused behind it.
using Linear = at::Tensor(
    const at::Tensor&,
    const at::Tensor&,
    const std::optional<at::Tensor>&,
    std::string_view,
    c10::List<std::optional<at::Scalar>>,
    std::optional<std::string_view>);

const std::optional<c10::OperatorHandle>& linear_op() {
  static const auto op = c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
  return op;
}

// oneDNN takes either order of a matrix as it lies. With a gap between its rows, it goes number by number.
at::Tensor dense(const at::Tensor& t) {
  return t.is_contiguous() || t.t().is_contiguous() ? t : t.contiguous();
}

}  // namespace

bool with_onednn() {
  return linear_op().has_value();
}

at::Tensor onednn_product(const at::Tensor& a, const at::Tensor& b, const std::optional<at::Tensor>& bias) {
  static const auto op = linear_op()->typed<Linear>();
  std::optional<at::Tensor> c;
  // Read without regard to its stride.
  if (bias && bias->defined()) c = bias->contiguous();
  return op.call(
      a.contiguous(), dense(b.t()), c, "none", c10::List<std::optional<at::Scalar>>(), std::nullopt);
}

}  // namespace bbb_fast
