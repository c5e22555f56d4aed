#include "kl_node.h"

namespace bbb_fast {

namespace ag = torch::autograd;

std::vector<at::Tensor> kl_gradients(
    at::TensorList mu, at::TensorList rho, const at::Tensor& grad_kl, double prior_mu, double prior_sigma) {
  const size_t count = mu.size();
  auto [g_mu, g_rho] = posterior_backward(
      std::vector<at::Tensor>(count), grad_kl, mu, rho, at::Tensor(), std::vector<double>(count, prior_mu),
      std::vector<double>(count, prior_sigma));
  std::vector<at::Tensor> grads;
  for (size_t k = 0; k < count; ++k) {
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

void KlNode::release_variables() {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (auto* list : {&mu, &rho}) {
    for (ag::SavedVariable& saved : *list) saved.reset_data();
  }
}

ag::variable_list KlNode::apply(ag::variable_list&& grads) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const ag::variable_list nothing(2 * mu.size());
  if (!grads[0].defined()) return nothing;
  std::vector<at::Tensor> m, r;
  for (size_t k = 0; k < mu.size(); ++k) {
    m.push_back(mu[k].unpack());
    r.push_back(rho[k].unpack());
  }
  if (meeting->leave(grads[0])) return nothing;
  return kl_gradients(m, r, grads[0], prior_mu, prior_sigma);
}

}  // namespace bbb_fast
