// lrt_linear: two library products and two fused passes, for every device; its backward and autograd.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "checks.h"
#include "lrt.h"

namespace bbb_fast {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

std::tuple<at::Tensor, at::Tensor> lrt_linear(
    const at::Tensor& input,
    const at::Tensor& W_mu,
    const at::Tensor& W_rho,
    const OptionalTensor& bias_mu,
    const OptionalTensor& bias_rho,
    const at::Tensor& rng,
    std::optional<at::ScalarType> variance_dtype) {
  TORCH_CHECK_VALUE(
      W_mu.dim() == 2, "lrt_linear: W_mu must be [out_features, in_features], got ", W_mu.sizes());
  TORCH_CHECK_VALUE(
      input.dim() >= 1 && input.size(-1) == W_mu.size(1),
      "lrt_linear: the last dimension of input must be in_features = ", W_mu.size(1), ", got input ",
      input.sizes());
  check_lrt("lrt_linear", input, W_mu, W_rho, bias_mu, bias_rho, rng, W_mu.size(0), variance_dtype);

  const auto dtype = input.scalar_type();
  const auto vdtype = variance_dtype_for(input, variance_dtype);
  OptionalTensor b_mu, b_var;
  if (has(bias_mu)) {
    b_mu = bias_mu->to(dtype);
    b_var = variance(*bias_rho, vdtype);
  }
  at::Tensor m = at::linear(input, W_mu.to(dtype), b_mu).contiguous();
  at::Tensor v = at::linear(square(input, vdtype), variance(W_rho, vdtype), b_var).contiguous();
  lrt_sample_(m, v, rng);
  return {std::move(m), std::move(v)};
}

std::vector<at::Tensor> lrt_linear_backward(
    const at::Tensor& grad,
    const at::Tensor& input,
    const at::Tensor& W_mu,
    const at::Tensor& W_rho,
    const OptionalTensor& bias_rho,
    const at::Tensor& v,
    const at::Tensor& rng,
    c10::List<bool> output_mask) {
  TORCH_CHECK_VALUE(output_mask.size() == 5, "lrt_linear_backward: output_mask must have 5 entries");
  TORCH_CHECK_VALUE(
      grad.sizes() == v.sizes(), "lrt_linear_backward: grad must have shape ", v.sizes(), ", got ",
      grad.sizes());
  const auto dtype = input.scalar_type();
  const auto vdtype = v.scalar_type();
  const int64_t out = W_mu.size(0), in = W_mu.size(1);
  const int64_t rows = c10::multiply_integers(input.sizes().begin(), input.sizes().end() - 1);
  const at::Tensor g = grad.contiguous().view({rows, out});
  const at::Tensor g_v = lrt_sample_backward(g, v.view({rows, out}), rng);
  const at::Tensor x = input.reshape({rows, in});

  std::vector<at::Tensor> grads;
  if (output_mask[0]) {
    at::Tensor g_x = at::mm(g, W_mu.to(dtype));
    square_backward_(g_x, x, at::mm(g_v, variance(W_rho, vdtype)));
    grads.push_back(g_x.view(input.sizes()));
  }
  if (output_mask[1]) grads.push_back(at::mm(g.t(), x).to(W_mu.scalar_type()));
  if (output_mask[2]) {
    grads.push_back(variance_backward(at::mm(g_v.t(), square(x, vdtype)), W_rho));
  }
  if (output_mask[3]) grads.push_back(at::sum(g, {0}, false, W_mu.scalar_type()));
  if (output_mask[4]) {
    const auto wide = bias_rho->scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    grads.push_back(variance_backward(at::sum(g_v, {0}, false, wide), *bias_rho));
  }
  return grads;
}

class LrtLinear : public torch::autograd::Function<LrtLinear> {
 public:
  static variable_list forward(
      AutogradContext* ctx,
      const at::Tensor& input,
      const at::Tensor& W_mu,
      const at::Tensor& W_rho,
      const OptionalTensor& bias_mu,
      const OptionalTensor& bias_rho,
      const at::Tensor& rng,
      std::optional<at::ScalarType> variance_dtype) {
    static const auto op =
        c10::Dispatcher::singleton()
            .findSchemaOrThrow("bbb_fast::lrt_linear", "")
            .typed<std::tuple<at::Tensor, at::Tensor>(
                const at::Tensor&, const at::Tensor&, const at::Tensor&, const OptionalTensor&,
                const OptionalTensor&, const at::Tensor&, std::optional<at::ScalarType>)>();
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, v] = op.call(input, W_mu, W_rho, bias_mu, bias_rho, rng, variance_dtype);
    ctx->saved_data["bias"] = has(bias_mu);
    ctx->save_for_backward({input, W_mu, W_rho, has(bias_rho) ? *bias_rho : at::Tensor(), v, rng});
    ctx->mark_non_differentiable({v});
    return {y, v};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    static const auto op =
        c10::Dispatcher::singleton()
            .findSchemaOrThrow("bbb_fast::lrt_linear_backward", "")
            .typed<std::vector<at::Tensor>(
                const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                const OptionalTensor&, const at::Tensor&, const at::Tensor&, c10::List<bool>)>();
    const auto saved = ctx->get_saved_variables();
    const bool bias = ctx->saved_data["bias"].toBool();
    // Edges count the tensor arguments only.
    c10::List<bool> mask;
    for (size_t i = 0; i < 5; ++i) {
      mask.push_back((i < 3 || bias) && ctx->needs_input_grad(i));
    }
    const OptionalTensor bias_rho = bias ? OptionalTensor(saved[3]) : std::nullopt;
    auto computed = op.call(grads[0], saved[0], saved[1], saved[2], bias_rho, saved[4], saved[5], mask);
    variable_list result(7);
    for (size_t i = 0, next = 0; i < 5; ++i) {
      if (mask[i]) result[i] = std::move(computed[next++]);
    }
    return result;
  }
};

std::tuple<at::Tensor, at::Tensor> lrt_linear_autograd(
    const at::Tensor& input,
    const at::Tensor& W_mu,
    const at::Tensor& W_rho,
    const OptionalTensor& bias_mu,
    const OptionalTensor& bias_rho,
    const at::Tensor& rng,
    std::optional<at::ScalarType> variance_dtype) {
  auto result = LrtLinear::apply(input, W_mu, W_rho, bias_mu, bias_rho, rng, variance_dtype);
  return {result[0], result[1]};
}

TORCH_LIBRARY_IMPL(bbb_fast, CompositeExplicitAutograd, m) {
  m.impl("lrt_linear", &lrt_linear);
  m.impl("lrt_linear_backward", &lrt_linear_backward);
}

TORCH_LIBRARY_IMPL(bbb_fast, Autograd, m) {
  m.impl("lrt_linear", &lrt_linear_autograd);
}

}  // namespace
}  // namespace bbb_fast
