#include "lrt.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "checks.h"

namespace bbb_fast {

void check_lrt(
    const char* op,
    const at::Tensor& input,
    const at::Tensor& W_mu,
    const at::Tensor& W_rho,
    const OptionalTensor& bias_mu,
    const OptionalTensor& bias_rho,
    const at::Tensor& rng,
    int64_t out_features,
    std::optional<at::ScalarType> variance_dtype) {
  check_floating(op, "input", input);
  check_posterior(op, "W_", W_mu, W_rho, input.device());
  const auto in = input.scalar_type();
  const auto own = W_mu.scalar_type();
  TORCH_CHECK_TYPE(
      own == in || (own == at::kFloat && in != at::kDouble), op, ": parameters must be ", dtype_name(in),
      " like the input, or float32 under a narrower input, got ", dtype_name(own));
  TORCH_CHECK_VALUE(has(bias_mu) == has(bias_rho), op, ": give both bias_mu and bias_rho, or neither");
  if (has(bias_mu)) {
    check_posterior(op, "bias_", *bias_mu, *bias_rho, input.device());
    TORCH_CHECK_TYPE(
        bias_mu->scalar_type() == own, op, ": all parameters must have one dtype, got ", dtype_name(own),
        " and ", dtype_name(bias_mu->scalar_type()));
    TORCH_CHECK_VALUE(
        bias_mu->dim() == 1 && bias_mu->size(0) == out_features, op, ": bias_mu must have shape [",
        out_features, "], got ", bias_mu->sizes());
  }
  check_dtype_option(op, "variance_dtype", variance_dtype);
  check_rng(op, rng, input.device());
}

at::Tensor variance(const at::Tensor& rho, at::ScalarType dtype) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("bbb_fast::variance", "")
                             .typed<at::Tensor(const at::Tensor&, at::ScalarType)>();
  return op.call(rho, dtype);
}

at::Tensor variance_backward(const at::Tensor& grad, const at::Tensor& rho) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("bbb_fast::variance_backward", "")
                             .typed<at::Tensor(const at::Tensor&, const at::Tensor&)>();
  return op.call(grad, rho);
}

void lrt_sample_(at::Tensor& m, const at::Tensor& v, const at::Tensor& rng) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("bbb_fast::lrt_sample_", "")
                             .typed<void(at::Tensor&, const at::Tensor&, const at::Tensor&)>();
  op.call(m, v, rng);
}

at::Tensor lrt_sample_backward(const at::Tensor& grad, const at::Tensor& v, const at::Tensor& rng) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("bbb_fast::lrt_sample_backward", "")
                             .typed<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&)>();
  return op.call(grad, v, rng);
}

at::ScalarType variance_dtype_for(const at::Tensor& input, std::optional<at::ScalarType> asked) {
  if (asked) return *asked;
  return input.scalar_type() == at::kHalf ? at::kFloat : input.scalar_type();
}

at::Tensor square(const at::Tensor& input, at::ScalarType dtype) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("bbb_fast::square", "")
                             .typed<at::Tensor(const at::Tensor&, at::ScalarType)>();
  return op.call(input, dtype);
}

void square_backward_(at::Tensor& grad_input, const at::Tensor& input, const at::Tensor& grad) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("bbb_fast::square_backward_", "")
                             .typed<void(at::Tensor&, const at::Tensor&, const at::Tensor&)>();
  op.call(grad_input, input, grad);
}

// Everything below is reached only from within an op that has its own backward. Differentiating through
// one of these (a second derivative, say) raises, instead of giving wrong numbers.
TORCH_LIBRARY_IMPL(bbb_fast, Autograd, m) {
  for (const char* name :
       {"normal", "posterior_backward", "variance", "variance_backward", "square", "square_backward_",
        "lrt_sample_", "lrt_sample_backward", "lrt_linear_backward", "lrt_conv_backward"}) {
    m.impl(name, torch::autograd::autogradNotImplementedFallback());
  }
}

}  // namespace bbb_fast
