#include "kl_node.h"

#include <torch/csrc/autograd/functions/utils.h>

namespace bbb_fast {

namespace ag = torch::autograd;

std::vector<at::Tensor> kl_gradients(
    at::TensorList mu,
    at::TensorList rho,
    const at::Tensor& grad_kl,
    at::ArrayRef<double> prior_mu,
    at::ArrayRef<double> prior_sigma) {
  auto [g_mu, g_rho] = posterior_backward(
      std::vector<at::Tensor>(mu.size()), grad_kl, mu, rho, at::Tensor(), prior_mu, prior_sigma);
  std::vector<at::Tensor> grads;
  for (size_t k = 0; k < mu.size(); ++k) {
    grads.push_back(std::move(g_mu[k]));
    grads.push_back(std::move(g_rho[k]));
  }
  return grads;
}

bool KlMeeting::leave(const at::Tensor& grad_kl) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const int task = ag::get_current_graph_task_id();
  if (output_ == nullptr || task < 0 || taken_in_ == task) return false;
  const auto* nodes = ag::get_current_graph_task_nodes_in_graph();
  if (nodes == nullptr || nodes->count(output_) == 0) return false;
  // Where only some gradients are asked for (torch.autograd.grad), the output's node may be passed by.
  const auto* wanted = ag::get_current_graph_task_exec_info();
  if (wanted != nullptr && !wanted->empty()) {
    const auto info = wanted->find(output_);
    if (info == wanted->end() || !info->second.should_execute()) return false;
  }
  grad_kl_ = grad_kl;
  left_in_ = task;
  return true;
}

at::Tensor KlMeeting::take() {
  const std::lock_guard<std::mutex> lock(mutex_);
  taken_in_ = ag::get_current_graph_task_id();
  at::Tensor left = std::move(grad_kl_);
  grad_kl_ = at::Tensor();
  return left_in_ == taken_in_ ? left : at::Tensor();
}

void KlMeeting::forget_output() {
  const std::lock_guard<std::mutex> lock(mutex_);
  output_ = nullptr;
}

void KlNode::attach(
    const at::Tensor& kl,
    at::TensorList mu,
    at::TensorList rho,
    at::ArrayRef<double> prior_mu,
    at::ArrayRef<double> prior_sigma,
    std::shared_ptr<KlMeeting> meeting) {
  std::vector<at::Tensor> parameters;
  for (size_t k = 0; k < mu.size(); ++k) {
    parameters.push_back(mu[k]);
    parameters.push_back(rho[k]);
  }
  const at::TensorList all(parameters);
  if (!ag::compute_requires_grad(all)) return;
  auto node = make_node<KlNode>();
  node->set_next_edges(ag::collect_next_edges(all));
  for (const at::Tensor& t : mu) node->mu_.emplace_back(t, false);
  for (const at::Tensor& t : rho) node->rho_.emplace_back(t, false);
  node->prior_mu_ = prior_mu.vec();
  node->prior_sigma_ = prior_sigma.vec();
  node->meeting_ = std::move(meeting);
  ag::set_history(kl, node);
}

void KlNode::release_variables() {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (auto* list : {&mu_, &rho_}) {
    for (ag::SavedVariable& saved : *list) saved.reset_data();
  }
}

ag::variable_list KlNode::apply(ag::variable_list&& grads) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const ag::variable_list nothing(2 * mu_.size());
  if (!grads[0].defined()) return nothing;
  // Whoever takes the gradient unpacks the parameters, with autograd's checks.
  if (meeting_ && meeting_->leave(grads[0])) return nothing;
  std::vector<at::Tensor> mu, rho;
  for (size_t k = 0; k < mu_.size(); ++k) {
    mu.push_back(mu_[k].unpack());
    rho.push_back(rho_[k].unpack());
  }
  // As in a layer's node: a second derivative raises, else autograd is passed by.
  std::optional<at::AutoDispatchBelowADInplaceOrView> guard;
  if (!at::GradMode::is_enabled()) guard.emplace();
  return kl_gradients(mu, rho, grads[0], prior_mu_, prior_sigma_);
}

}  // namespace bbb_fast
