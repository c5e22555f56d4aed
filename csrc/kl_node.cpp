#include "kl_node.h"

#include <ATen/ops/add.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/functions/utils.h>

#include <algorithm>
#include <iterator>

#include "checks.h"

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

namespace {

// Whether the current backward runs this node. Where only some gradients are asked for (torch.autograd.grad),
// a node of its graph may be passed by.
bool runs_in_task(const ag::Node* node) {
  auto* const key = const_cast<ag::Node*>(node);
  const auto* nodes = ag::get_current_graph_task_nodes_in_graph();
  if (nodes == nullptr || nodes->count(key) == 0) return false;
  const auto* wanted = ag::get_current_graph_task_exec_info();
  if (wanted == nullptr || wanted->empty()) return true;
  const auto info = wanted->find(key);
  return info != wanted->end() && info->second.needed_;
}

// Lives as long as the current backward, which holds its callbacks also when it fails.
std::weak_ptr<void> life_of_task() {
  auto token = std::make_shared<char>();
  ag::Engine::get_default_engine().queue_callback([token] {});
  return token;
}

}  // namespace

LayerNode::LayerNode() : meeting(std::make_shared<KlMeeting>(this)) {}

LayerNode::~LayerNode() {
  meeting->close();
}

template <class Gone>
void KlMeeting::move_entries(Entries& to, const Gone& gone) {
  const auto first =
      std::stable_partition(entries_.begin(), entries_.end(), [&](const Entry& e) { return !gone(e); });
  std::move(first, entries_.end(), std::back_inserter(to));
  entries_.erase(first, entries_.end());
}

bool KlMeeting::join(const ag::Node* kl, at::ArrayRef<ag::Edge> edges, double prior_mu, double prior_sigma) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (output_ == nullptr || prior_mu != output_->prior_mu || prior_sigma != output_->prior_sigma)
    return false;
  // An edge tells the tensor, and whether it wants a gradient.
  for (uint32_t k = 0; k < 4; ++k) {
    if (output_->next_edge(1 + k) != (k < edges.size() ? edges[k] : ag::Edge())) return false;
  }
  if (std::find(kls_.begin(), kls_.end(), kl) != kls_.end()) return false;
  kls_.push_back(kl);
  return true;
}

bool KlMeeting::leave(const ag::Node* kl, const at::Tensor& grad_kl) {
  Entries gone;
  const std::lock_guard<std::mutex> lock(mutex_);
  const int task = ag::get_current_graph_task_id();
  const auto mine = [&](const Entry& e) { return e.kl == kl && e.task == task; };
  const bool output_went_by = std::any_of(entries_.begin(), entries_.end(), mine);
  move_entries(gone, [&](const Entry& e) { return mine(e) || e.lives.expired(); });
  if (output_went_by || output_ == nullptr || task < 0 || !runs_in_task(output_)) return false;
  entries_.push_back({task, kl, grad_kl, life_of_task()});
  return true;
}

at::Tensor KlMeeting::take() {
  Entries gone, left;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    const int task = ag::get_current_graph_task_id();
    move_entries(gone, [](const Entry& e) { return e.lives.expired(); });
    move_entries(left, [&](const Entry& e) { return e.task == task; });
    for (const ag::Node* kl : kls_) {
      const bool came = std::any_of(left.begin(), left.end(), [&](const Entry& e) { return e.kl == kl; });
      if (!came && task >= 0 && runs_in_task(kl)) entries_.push_back({task, kl, {}, life_of_task()});
    }
  }
  at::Tensor sum;
  for (Entry& e : left) sum = sum.defined() ? at::add(sum, e.grad_kl) : std::move(e.grad_kl);
  return sum;
}

void KlMeeting::depart(const ag::Node* kl) {
  Entries gone;
  const std::lock_guard<std::mutex> lock(mutex_);
  kls_.erase(std::remove(kls_.begin(), kls_.end(), kl), kls_.end());
  move_entries(gone, [&](const Entry& e) { return e.kl == kl; });
}

void KlMeeting::close() {
  Entries gone;
  const std::lock_guard<std::mutex> lock(mutex_);
  output_ = nullptr;
  gone.swap(entries_);
}

KlNode::~KlNode() {
  for (const auto& [meeting, count] : meetings_) {
    if (meeting) meeting->depart(this);
  }
}

void KlNode::attach(
    const at::Tensor& kl,
    at::TensorList mu,
    at::TensorList rho,
    at::ArrayRef<double> prior_mu,
    at::ArrayRef<double> prior_sigma,
    const Meetings& meetings) {
  // Fake kernels, which meta tensors reach, check nothing.
  TORCH_CHECK_VALUE(
      mu.size() == rho.size(), "kl_divergence: got ", mu.size(), " mu tensors and ", rho.size(),
      " rho tensors");
  check_priors("kl_divergence", mu.size(), prior_mu, prior_sigma);
  std::vector<at::Tensor> parameters;
  for (size_t k = 0; k < mu.size(); ++k) {
    for (const at::Tensor& t : {mu[k], rho[k]}) {
      check_no_tangent("kl_divergence", t);
      parameters.push_back(t);
    }
  }
  const at::TensorList all(parameters);
  if (!ag::compute_requires_grad(all)) return;
  auto node = make_node<KlNode>();
  ag::edge_list edges = ag::collect_next_edges(all);
  const at::ArrayRef<ag::Edge> edges_of(edges);
  size_t first = 0;
  for (auto [meeting, count] : meetings) {
    const auto own = edges_of.slice(2 * first, 2 * count);
    if (meeting && !meeting->join(node.get(), own, prior_mu[first], prior_sigma[first])) meeting.reset();
    node->meetings_.emplace_back(std::move(meeting), count);
    first += count;
  }
  node->set_next_edges(std::move(edges));
  for (const at::Tensor& t : mu) node->mu_.emplace_back(t, false);
  for (const at::Tensor& t : rho) node->rho_.emplace_back(t, false);
  node->prior_mu_ = prior_mu.vec();
  node->prior_sigma_ = prior_sigma.vec();
  ag::set_history(kl, node);
}

void KlNode::release_variables() {
  const std::lock_guard<std::mutex> lock(mutex_);
  spent_ = true;
  for (auto* list : {&mu_, &rho_}) {
    for (ag::SavedVariable& saved : *list) saved.reset_data();
  }
}

ag::variable_list KlNode::apply(ag::variable_list&& grads) {
  const std::lock_guard<std::mutex> lock(mutex_);
  ag::variable_list result(2 * mu_.size());
  if (!grads[0].defined()) return result;
  // The tensors whose gradients are formed here. Whoever forms one unpacks the parameter, with autograd's
  // checks.
  std::vector<size_t> own;
  size_t first = 0;
  for (const auto& [meeting, count] : meetings_) {
    const bool left = meeting && !spent_ && meeting->leave(this, grads[0]);
    for (size_t k = first; k < first + count && !left; ++k) {
      if (task_should_compute_output(2 * k) || task_should_compute_output(2 * k + 1)) own.push_back(k);
    }
    first += count;
  }
  if (own.empty()) return result;
  std::vector<at::Tensor> mu, rho;
  std::vector<double> prior_mu, prior_sigma;
  for (const size_t k : own) {
    mu.push_back(mu_[k].unpack());
    rho.push_back(rho_[k].unpack());
    prior_mu.push_back(prior_mu_[k]);
    prior_sigma.push_back(prior_sigma_[k]);
  }
  // As in a layer's node: a second derivative raises, else autograd is passed by.
  std::optional<at::AutoDispatchBelowADInplaceOrView> guard;
  if (!at::GradMode::is_enabled()) guard.emplace();
  std::vector<at::Tensor> formed = kl_gradients(mu, rho, grads[0], prior_mu, prior_sigma);
  for (size_t i = 0; i < own.size(); ++i) {
    for (size_t j = 0; j < 2; ++j) result[2 * own[i] + j] = std::move(formed[2 * i + j]);
  }
  return result;
}

}  // namespace bbb_fast
