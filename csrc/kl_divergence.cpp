// kl_divergence: its autograd. Kernels: cpu/kl_divergence.cpp.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "passes.h"

namespace bbb_fast {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

class KlDivergence : public torch::autograd::Function<KlDivergence> {
 public:
  static at::Tensor forward(
      AutogradContext* ctx,
      at::TensorList mu,
      at::TensorList rho,
      at::ArrayRef<double> prior_mu,
      at::ArrayRef<double> prior_sigma) {
    static const auto op =
        c10::Dispatcher::singleton()
            .findSchemaOrThrow("bbb_fast::kl_divergence", "")
            .typed<at::Tensor(at::TensorList, at::TensorList, at::ArrayRef<double>, at::ArrayRef<double>)>();
    at::AutoDispatchBelowADInplaceOrView guard;
    variable_list saved(mu.begin(), mu.end());
    saved.insert(saved.end(), rho.begin(), rho.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["prior_mu"] = prior_mu.vec();
    ctx->saved_data["prior_sigma"] = prior_sigma.vec();
    return op.call(mu, rho, prior_mu, prior_sigma);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const at::TensorList all(saved);
    const size_t count = saved.size() / 2;
    const std::vector<at::Tensor> no_weights(count);
    auto [g_mu, g_rho] = posterior_backward(
        no_weights, grads[0], all.slice(0, count), all.slice(count, count), at::Tensor(),
        ctx->saved_data["prior_mu"].toDoubleVector(), ctx->saved_data["prior_sigma"].toDoubleVector());
    // One entry for each tensor in the lists, then the two lists of numbers.
    variable_list result(2 * count + 2);
    for (size_t k = 0; k < count; ++k) {
      result[k] = g_mu[k];
      result[count + k] = g_rho[k];
    }
    return result;
  }
};

at::Tensor kl_divergence_autograd(
    at::TensorList mu, at::TensorList rho, at::ArrayRef<double> prior_mu, at::ArrayRef<double> prior_sigma) {
  return KlDivergence::apply(mu, rho, prior_mu, prior_sigma);
}

TORCH_LIBRARY_IMPL(bbb_fast, Autograd, m) {
  m.impl("kl_divergence", &kl_divergence_autograd);
}

}  // namespace
}  // namespace bbb_fast
