// sample_weights: its autograd. Kernels: cpu/sample_weights.cpp.
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "passes.h"

namespace bbb_fast {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

class SampleWeights : public torch::autograd::Function<SampleWeights> {
 public:
  // Returns the weights, then the KL.
  static variable_list forward(
      AutogradContext* ctx,
      at::TensorList mu,
      at::TensorList rho,
      const at::Tensor& rng,
      double prior_mu,
      double prior_sigma,
      bool with_kl,
      std::optional<at::ScalarType> dtype) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [outputs, kl] = bbb_fast::sample_weights(mu, rho, rng, prior_mu, prior_sigma, with_kl, dtype);
    variable_list saved(mu.begin(), mu.end());
    saved.insert(saved.end(), rho.begin(), rho.end());
    saved.push_back(rng);
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["prior_mu"] = prior_mu;
    ctx->saved_data["prior_sigma"] = prior_sigma;
    // A weight or a KL that the loss does not use gets an undefined gradient, not zeros to add up.
    ctx->set_materialize_grads(false);
    if (!with_kl) ctx->mark_non_differentiable({kl});
    outputs.push_back(std::move(kl));
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const size_t count = grads.size() - 1;
    const at::TensorList all(saved);
    const std::vector<double> prior_mu(count, ctx->saved_data["prior_mu"].toDouble());
    const std::vector<double> prior_sigma(count, ctx->saved_data["prior_sigma"].toDouble());
    auto [g_mu, g_rho] = posterior_backward(
        {grads.data(), count}, grads[count], all.slice(0, count), all.slice(count, count), all.back(),
        prior_mu, prior_sigma);
    // One entry for each tensor in the lists, then rng and the four plain arguments.
    variable_list result(2 * count + 5);
    for (size_t k = 0; k < count; ++k) {
      result[k] = g_mu[k];
      result[count + k] = g_rho[k];
    }
    return result;
  }
};

std::tuple<std::vector<at::Tensor>, at::Tensor> sample_weights_autograd(
    at::TensorList mu,
    at::TensorList rho,
    const at::Tensor& rng,
    double prior_mu,
    double prior_sigma,
    bool with_kl,
    std::optional<at::ScalarType> dtype) {
  auto outputs = SampleWeights::apply(mu, rho, rng, prior_mu, prior_sigma, with_kl, dtype);
  at::Tensor kl = std::move(outputs.back());
  outputs.pop_back();
  return {std::move(outputs), std::move(kl)};
}

TORCH_LIBRARY_IMPL(bbb_fast, Autograd, m) {
  m.impl("sample_weights", &sample_weights_autograd);
}

}  // namespace
}  // namespace bbb_fast
