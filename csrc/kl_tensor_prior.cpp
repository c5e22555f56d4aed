// kl_tensor_prior: its autograd. Kernels: cpu/kl_tensor_prior.cpp, cuda/kl_tensor_prior.cu.
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include "checks.h"
#include "kl_node.h"

namespace bbb_fast {
namespace {

namespace ag = torch::autograd;

struct KlTensorPriorNode : ag::Node {
  ag::SavedVariable mu, rho, prior_mu, prior_sigma;

  std::string name() const override { return "kl_tensor_prior_backward"; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto* saved : {&mu, &rho, &prior_mu, &prior_sigma}) saved->reset_data();
  }

  ag::variable_list apply(ag::variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    ag::variable_list result(2);
    if (!grads[0].defined()) return result;
    const at::Tensor m = mu.unpack(), r = rho.unpack(), p_mu = prior_mu.unpack(),
                     p_sigma = prior_sigma.unpack();
    // As in a layer's node: a second derivative raises, else autograd is passed by.
    std::optional<at::AutoDispatchBelowADInplaceOrView> guard;
    if (!at::GradMode::is_enabled()) guard.emplace();
    static const auto op = find_op<std::vector<at::Tensor>(
        const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&)>(
        "kl_tensor_prior_backward");
    std::vector<at::Tensor> formed = op.call(grads[0], m, r, p_mu, p_sigma);
    std::move(formed.begin(), formed.end(), result.begin());
    return result;
  }
};

at::Tensor kl_tensor_prior_autograd(
    const at::Tensor& mu, const at::Tensor& rho, const at::Tensor& prior_mu, const at::Tensor& prior_sigma) {
  for (const at::Tensor* t : {&mu, &rho, &prior_mu, &prior_sigma}) check_no_tangent("kl_tensor_prior", *t);
  TORCH_CHECK_NOT_IMPLEMENTED(
      !ag::compute_requires_grad(prior_mu, prior_sigma),
      "kl_tensor_prior: a prior has no gradient here; bbb_fast.functional.kl_divergence gives it one");
  at::Tensor kl;
  {
    static const auto op =
        find_op<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&)>(
            "kl_tensor_prior");
    at::AutoDispatchBelowADInplaceOrView guard;
    kl = op.call(mu, rho, prior_mu, prior_sigma);
  }
  if (!ag::compute_requires_grad(mu, rho)) return kl;
  auto node = make_node<KlTensorPriorNode>();
  node->set_next_edges(ag::collect_next_edges(mu, rho));
  node->mu = ag::SavedVariable(mu, false);
  node->rho = ag::SavedVariable(rho, false);
  node->prior_mu = ag::SavedVariable(prior_mu, false);
  node->prior_sigma = ag::SavedVariable(prior_sigma, false);
  ag::set_history(kl, node);
  return kl;
}

TORCH_LIBRARY_IMPL(bbb_fast, Autograd, m) {
  m.impl("kl_tensor_prior", &kl_tensor_prior_autograd);
}

}  // namespace
}  // namespace bbb_fast
