// The autograd node of a KL: of kl_divergence, and of the KL that a layer's forward forms. There it is not
// the output's node, so that the KL's backward does not walk into the graph of the layer's input; but where
// the output's node runs in the same backward, it is left the gradient, and forms both in one pass over the
// parameters.
#pragma once

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <memory>
#include <mutex>
#include <type_traits>

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

// Where the two nodes of a forward meet.
class KlMeeting {
 public:
  explicit KlMeeting(torch::autograd::Node* output) : output_(output) {}

  // The KL's node: whether the output's node will take this gradient, because it is still to run.
  bool leave(const at::Tensor& grad_kl);
  // The output's node: the gradient left in this backward, or undefined. What comes later is too late.
  at::Tensor take();
  // The output's node is gone.
  void forget_output();

 private:
  std::mutex mutex_;
  torch::autograd::Node* output_;
  int left_in_ = -1, taken_in_ = -1;  // graph tasks
  at::Tensor grad_kl_;
};

struct KlNode : torch::autograd::Node {
  // Sets kl's history, if any of mu and rho wants a gradient; with a meeting, that of the layer's output.
  static void attach(
      const at::Tensor& kl,
      at::TensorList mu,
      at::TensorList rho,
      at::ArrayRef<double> prior_mu,
      at::ArrayRef<double> prior_sigma,
      std::shared_ptr<KlMeeting> meeting);

  std::string name() const override { return "kl_backward"; }
  void release_variables() override;
  torch::autograd::variable_list apply(torch::autograd::variable_list&& grads) override;

 private:
  std::vector<torch::autograd::SavedVariable> mu_, rho_;
  std::vector<double> prior_mu_, prior_sigma_;
  std::shared_ptr<KlMeeting> meeting_;
};

}  // namespace bbb_fast
