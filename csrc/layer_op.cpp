#include "layer_op.h"

#include <ATen/ops/empty.h>

#include "checks.h"
#include "cpu/huge_pages.h"

namespace bbb_fast {

void Layer::check(const char* op, int64_t out_features) const {
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
  check_rng(op, rng, input.device(), RngOf::draws_of_batch);
  if (rng.dim() > 1) {
    TORCH_CHECK_VALUE(
        input.dim() > 1, op, ": with several draws, input must have a batch dimension, got ", input.sizes());
    TORCH_CHECK_VALUE(
        rng.dim() > 2 || input.size(0) % rng.size(0) == 0, op, ": with ", rng.size(0),
        " draws, the first dimension of input must be a multiple of that, got ", input.sizes());
  }
  check_prior(op, prior_mu, prior_sigma);
}

void Layer::check_backward(
    const char* op,
    at::IntArrayRef output,
    const at::Tensor& grad,
    const OptionalTensor& kept,
    const c10::List<bool>& output_mask) const {
  check_floating(op, "grad", grad);
  check_dtype(op, "grad", grad, input.scalar_type());
  check_shape(op, "grad", grad, output);
  check_device(op, "grad", grad, input.device());
  if (has(kept)) {
    check_floating(op, "kept", *kept);
    check_device(op, "kept", *kept, input.device());
  }
  TORCH_CHECK_VALUE(
      output_mask.size() == 5, op, ": output_mask must have 5 entries, got ", output_mask.size());
  TORCH_CHECK_VALUE(
      has(bias_mu) || !(output_mask[3] || output_mask[4]), op,
      ": output_mask asks for the gradient of a bias, and there is none");
}

PosteriorGradients posterior_gradients(
    const Layer& layer,
    const at::Tensor& rngs,
    const OperandGradients& grads,
    const OptionalTensor& grad_kl,
    Operands formed_of,
    std::optional<at::ScalarType> again) {
  const std::vector<at::Tensor> mu = layer.mu(), rho = layer.rho();
  std::vector<at::Tensor> grad_w, grad_spread, grad_mu, grad_rho;
  const bool spread = formed_of != Operands::weight;
  const auto reused = [](const at::Tensor& grad, const at::Tensor& like) {
    if (grad.defined() && grad.scalar_type() == like.scalar_type() && grad.is_contiguous()) {
      return in_format(grad, at::MemoryFormat::Contiguous);
    }
    at::Tensor fresh = at::empty(like.sizes(), like.options());
    hint_huge_pages(fresh);
    return fresh;
  };
  for (size_t k = 0; k < mu.size(); ++k) {
    const std::vector<at::Tensor>& own = k == 0 ? grads.W : grads.bias;
    const std::vector<at::Tensor>& own_spread = k == 0 ? grads.W_spread : grads.bias_spread;
    grad_mu.push_back(reused(own[0], mu[k]));
    grad_rho.push_back(reused(spread ? own_spread[0] : at::Tensor(), mu[k]));
    grad_w.insert(grad_w.end(), own.begin(), own.end());
    grad_spread.insert(grad_spread.end(), own_spread.begin(), own_spread.end());
  }
  at::Tensor formed = posterior_backward_out(
      grad_w, grad_spread, grad_kl.value_or(at::Tensor()), mu, rho,
      formed_of == Operands::mean_and_variance ? at::Tensor() : rngs, layer.prior_mus(), layer.prior_sigmas(),
      grad_mu, grad_rho, again);
  for (at::Tensor& g : grad_rho) grad_mu.push_back(std::move(g));
  return {std::move(grad_mu), std::move(formed)};
}

std::vector<at::Tensor> pick_gradients(
    const at::Tensor& input, const std::vector<at::Tensor>& parameters, const c10::List<bool>& output_mask) {
  std::vector<at::Tensor> picked;
  const size_t count = parameters.size() / 2;
  if (output_mask[0]) picked.push_back(input);
  for (size_t i = 1; i < 5; ++i) {
    if (output_mask[i]) picked.push_back(parameters.at((i - 1) / 2 + (i % 2 == 0 ? count : 0)));
  }
  return picked;
}

}  // namespace bbb_fast
