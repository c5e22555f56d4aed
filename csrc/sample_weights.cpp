// sample_weights: its autograd. Kernels: cpu/sample_weights.cpp.
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include "checks.h"
#include "kl_node.h"

namespace bbb_fast {
namespace {

namespace ag = torch::autograd;

// Not a torch::autograd::Function, which the transforms of torch.func refuse.
struct SampleWeightsNode : ag::Node {
  std::vector<ag::SavedVariable> mu, rho;
  ag::SavedVariable rng;
  double prior_mu = 0.0, prior_sigma = 1.0;

  std::string name() const override { return "sample_weights_backward"; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto* list : {&mu, &rho}) {
      for (ag::SavedVariable& saved : *list) saved.reset_data();
    }
    rng.reset_data();
  }

  // Of the weights, then of the KL; what the loss does not use is undefined.
  ag::variable_list apply(ag::variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const size_t count = mu.size();
    grads.resize(count + 1);
    const auto unpacked = [](std::vector<ag::SavedVariable>& list) {
      std::vector<at::Tensor> result;
      for (ag::SavedVariable& saved : list) result.push_back(saved.unpack());
      return result;
    };
    const std::vector<at::Tensor> m = unpacked(mu), r = unpacked(rho);
    const at::Tensor rng_ = rng.unpack();
    // As in a layer's node: a second derivative raises, else autograd is passed by.
    std::optional<at::AutoDispatchBelowADInplaceOrView> guard;
    if (!at::GradMode::is_enabled()) guard.emplace();
    std::vector<at::Tensor> grad_w;
    for (const at::Tensor& g : at::TensorList(grads.data(), count)) {
      const int64_t draws = rng_.dim() == 2 ? rng_.size(0) : 1;
      for (int64_t k = 0; k < draws; ++k) {
        grad_w.push_back(rng_.dim() == 2 && g.defined() ? g.select(0, k) : g);
      }
    }
    auto [result, g_rho] = posterior_backward(
        grad_w, grads[count], m, r, rng_, std::vector<double>(count, prior_mu),
        std::vector<double>(count, prior_sigma));
    std::move(g_rho.begin(), g_rho.end(), std::back_inserter(result));
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
    std::optional<at::ScalarType> dtype,
    bool centered) {
  std::vector<at::Tensor> parameters(mu.begin(), mu.end());
  parameters.insert(parameters.end(), rho.begin(), rho.end());
  for (const at::Tensor& t : parameters) check_no_tangent("sample_weights", t);
  std::tuple<std::vector<at::Tensor>, at::Tensor> outputs;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    outputs = sample_weights(mu, rho, rng, prior_mu, prior_sigma, with_kl, dtype, centered);
  }
  const at::TensorList all(parameters);
  if (!ag::compute_requires_grad(all)) return outputs;
  TORCH_CHECK_NOT_IMPLEMENTED(
      !centered, "sample_weights: with centered=True there is no gradient; flipout's ops have one");
  auto node = make_node<SampleWeightsNode>();
  node->set_next_edges(ag::collect_next_edges(all));
  for (const at::Tensor& t : mu) node->mu.emplace_back(t, false);
  for (const at::Tensor& t : rho) node->rho.emplace_back(t, false);
  node->rng = ag::SavedVariable(rng, false);
  node->prior_mu = prior_mu;
  node->prior_sigma = prior_sigma;
  for (const at::Tensor& weight : std::get<0>(outputs)) ag::set_history(weight, node);
  if (with_kl) ag::set_history(std::get<1>(outputs), node);
  return outputs;
}

TORCH_LIBRARY_IMPL(bbb_fast, Autograd, m) {
  m.impl("sample_weights", &sample_weights_autograd);
}

}  // namespace
}  // namespace bbb_fast
