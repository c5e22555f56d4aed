// The autograd node of a KL. It is not the node of the layer's output, so that the KL's backward does not
// walk into the graph of the layer's input; but where the output's node runs in the same backward, it is left
// the gradient, and forms both in one pass over the parameters.
#pragma once

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <memory>
#include <mutex>
#include <type_traits>
#include <utility>
#include <vector>

#include "passes.h"

namespace bbb_fast {

// Torch counts a node's references inside it or, in older releases, beside it.
template <class Node>
auto make_node() {
  if constexpr (std::is_base_of_v<c10::intrusive_ptr_target, torch::autograd::Node>) {
    return c10::make_intrusive<Node>();
  } else {
    return std::shared_ptr<Node>(new Node(), [](Node* node) { deleteNode(node); });
  }
}

// The gradients through the KL alone: of the first mu, the first rho, the second mu and so on.
std::vector<at::Tensor> kl_gradients(
    at::TensorList mu,
    at::TensorList rho,
    const at::Tensor& grad_kl,
    at::ArrayRef<double> prior_mu,
    at::ArrayRef<double> prior_sigma);

class KlMeeting;

// What the node of a layer's output has whatever the layer computes. Its edges: input, W_mu, W_rho, bias_mu,
// bias_rho.
struct LayerNode : torch::autograd::Node {
  LayerNode();
  ~LayerNode() override;

  double prior_mu = 0.0, prior_sigma = 1.0;
  const std::shared_ptr<KlMeeting> meeting;
};

// Where the node of an output meets those of its layer's KLs. In a backward (a graph task) that runs two of
// them, the first leaves an entry, the second clears it: the KL's gradient where the output's node is still
// to come, else a mark that it has gone by. Backwards of one graph may run inside each other and in several
// threads; an entry belongs to one, and goes with it should that fail halfway.
class KlMeeting {
 public:
  explicit KlMeeting(const LayerNode* output) : output_(output) {}

  // Whether the KL's node will be met: the output's is there, not yet spent, and of the same parameters, to
  // which the KL's node has these edges, and the same prior.
  bool join(
      const torch::autograd::Node* kl,
      at::ArrayRef<torch::autograd::Edge> edges,
      double prior_mu,
      double prior_sigma);
  // The KL's node: whether the output's will take this gradient.
  bool leave(const torch::autograd::Node* kl, const at::Tensor& grad_kl);
  // The output's node: the sum of the gradients left in this backward, or undefined.
  at::Tensor take();
  // The KL's node is gone.
  void depart(const torch::autograd::Node* kl);
  // The output's node is spent, or gone.
  void close();

 private:
  struct Entry {
    int task;
    const torch::autograd::Node* kl;
    at::Tensor grad_kl;         // undefined: a mark
    std::weak_ptr<void> lives;  // as long as the task
  };
  using Entries = std::vector<Entry>;
  // Moves the entries that `gone` says to another list, to be destroyed when the lock is free again.
  template <class Gone>
  void move_entries(Entries& to, const Gone& gone);

  std::mutex mutex_;
  const LayerNode* output_;
  std::vector<const torch::autograd::Node*> kls_;
  Entries entries_;
};

struct KlNode : torch::autograd::Node {
  ~KlNode() override;

  // Sets kl's history, if any of mu and rho wants a gradient. meetings: one for each layer, whose tensors lie
  // behind each other, with their number; or null.
  using Meetings = std::vector<std::pair<std::shared_ptr<KlMeeting>, size_t>>;
  static void attach(
      const at::Tensor& kl,
      at::TensorList mu,
      at::TensorList rho,
      at::ArrayRef<double> prior_mu,
      at::ArrayRef<double> prior_sigma,
      const Meetings& meetings);

  std::string name() const override { return "kl_backward"; }
  void release_variables() override;
  torch::autograd::variable_list apply(torch::autograd::variable_list&& grads) override;

 private:
  std::vector<torch::autograd::SavedVariable> mu_, rho_;
  std::vector<double> prior_mu_, prior_sigma_;
  Meetings meetings_;
  bool spent_ = false;
};

// The op kl_divergence, its history set as by attach.
at::Tensor kl_divergence(
    at::TensorList mu,
    at::TensorList rho,
    at::ArrayRef<double> prior_mu,
    at::ArrayRef<double> prior_sigma,
    const KlNode::Meetings& meetings);

}  // namespace bbb_fast
