// The autograd node of the KL that a layer's forward forms. It is a node of its own, so that the KL's
// backward does not walk into the graph of the layer's input; where the output's backward runs in the same
// pass, it leaves the gradient to that, which forms both in one pass over the parameters.
#pragma once

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <memory>
#include <mutex>

#include "passes.h"

namespace bbb_fast {

// The gradients through the KL alone: of the first mu, the first rho, the second mu and so on.
std::vector<at::Tensor> kl_gradients(
    at::TensorList mu, at::TensorList rho, const at::Tensor& grad_kl, double prior_mu, double prior_sigma);

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
  std::vector<torch::autograd::SavedVariable> mu, rho;
  double prior_mu = 0.0, prior_sigma = 1.0;
  std::shared_ptr<KlMeeting> meeting;

  std::string name() const override { return "layer_kl_backward"; }
  void release_variables() override;
  torch::autograd::variable_list apply(torch::autograd::variable_list&& grads) override;
};

}  // namespace bbb_fast
