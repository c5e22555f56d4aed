// Every op's schema. A kernel is registered at the foot of its own file: csrc/cpu/<op>.cpp for the CPU,
// csrc/cuda/<op>.cu for CUDA; the device-independent ones and autograd in csrc/<op>.cpp. Fake kernels:
// bbb_fast/_ops.py. The layers' ops: those of estimators.h.
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include "checks.h"
#include "estimators.h"
#include "kl_node.h"

namespace {
using bbb_fast::kEstimators;
using bbb_fast::kProducts;

namespace ag = torch::autograd;

// In the place of a derivative that there is none of.
struct NoDerivative : ag::Node {
  std::string op;

  std::string name() const override { return op; }
  ag::variable_list apply(ag::variable_list&&) override {
    TORCH_CHECK_NOT_IMPLEMENTED(
        false, op, ": second derivatives are not implemented by the native kernels; ",
        bbb_fast::kReferenceHasThem);
  }
};

void collect(const c10::IValue& value, std::vector<at::Tensor>& found) {
  if (value.isTensor()) {
    if (value.toTensor().defined()) found.push_back(value.toTensor());
  } else if (value.isList()) {
    for (const c10::IValue& element : value.toListRef()) collect(element, found);
  }
}

// The autograd of an op without a derivative. (autogradNotImplementedFallback overlooks the tensors of a
// list that may hold None, and zeros would take the place of derivatives through these.)
void not_differentiable(
    const c10::OperatorHandle& handle, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const std::string op = handle.schema().name().substr(std::string("bbb_fast::").size());
  std::vector<at::Tensor> inputs, outputs;
  for (const c10::IValue& argument : torch::jit::last(*stack, handle.schema().arguments().size())) {
    collect(argument, inputs);
  }
  for (const at::Tensor& t : inputs) bbb_fast::check_no_tangent(op.c_str(), t);
  const at::TensorList all(inputs);
  const bool wanted = ag::compute_requires_grad(all);
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    handle.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
  }
  if (!wanted) return;
  auto node = bbb_fast::make_node<NoDerivative>();
  node->op = op;
  node->set_next_edges(ag::collect_next_edges(all));
  for (const c10::IValue& result : torch::jit::last(*stack, handle.schema().returns().size())) {
    collect(result, outputs);
  }
  for (const at::Tensor& t : outputs) {
    if (t.is_floating_point()) ag::set_history(t, node);
  }
}

}  // namespace

TORCH_LIBRARY(bbb_fast, m) {
  m.def("normal(SymInt[] size, Tensor rng, ScalarType dtype) -> Tensor");

  m.def("uniform(SymInt[] size, Tensor rng, ScalarType dtype) -> Tensor");

  // Element i of a mask has word i of the noise: of all elements in row-major order, with channels of
  // [rows, channels], and with one_mask of a single row, for all. drop_elements is the pass that dropout is
  // made of.
  m.def("dropout(Tensor input, Tensor rng, float p, bool channels=False, bool one_mask=False) -> Tensor");
  m.def("drop_elements(Tensor input, Tensor rng, float p) -> Tensor");

  m.def(
      "sample_weights(Tensor[] mu, Tensor[] rho, Tensor rng, float prior_mu, float prior_sigma, "
      "bool with_kl, ScalarType? dtype, bool centered=False) -> (Tensor[], Tensor)");
  m.def("kl_divergence(Tensor[] mu, Tensor[] rho, float[] prior_mu, float[] prior_sigma) -> Tensor");
  // The same of one tensor whose weights have priors of their own: tensors of its shape, or scalars.
  m.def("kl_tensor_prior(Tensor mu, Tensor rho, Tensor prior_mu, Tensor prior_sigma) -> Tensor");
  m.def(
      "kl_tensor_prior_backward(Tensor grad, Tensor mu, Tensor rho, Tensor prior_mu, Tensor prior_sigma) -> "
      "Tensor[]");
  // With `centered` sample_weights draws sigma * eps. The backward of both, and of variance: the gradient of
  // mu and rho through the weights, the KL, or both. A weight that got no gradient is None; rng is needed
  // where there was noise. The second form writes to grad_mu and grad_rho, which may be the given gradients;
  // grad_spread, where the list is not empty, is that of sigma^2, or with an rng of sigma * eps, and grad_w
  // then that of the mean. `again` asks for what the forward formed of the first tensor, in that type: the
  // weight, or with grad_spread sigma^2 or sigma * eps; without, the result is empty.
  m.def(
      "posterior_backward(Tensor?[] grad_w, Tensor? grad_kl, Tensor[] mu, Tensor[] rho, Tensor? rng, "
      "float[] prior_mu, float[] prior_sigma) -> (Tensor[], Tensor[])");
  m.def(
      "posterior_backward_out(Tensor?[] grad_w, Tensor?[] grad_spread, Tensor? grad_kl, Tensor[] mu, "
      "Tensor[] rho, Tensor? rng, float[] prior_mu, float[] prior_sigma, Tensor(a!)[] grad_mu, "
      "Tensor(b!)[] grad_rho, ScalarType? again=None) -> Tensor");

  // The passes beside the products of lrt_linear and lrt_conv.
  m.def(
      "variance(Tensor[] mu, Tensor[] rho, float prior_mu, float prior_sigma, bool with_kl, "
      "ScalarType dtype) -> (Tensor[], Tensor)");
  m.def("square(Tensor input, ScalarType dtype) -> Tensor");
  m.def("square_backward_(Tensor(a!) grad_input, Tensor input, Tensor grad) -> ()");
  m.def("lrt_sample_(Tensor(a!) m, Tensor v, Tensor rng) -> ()");
  m.def("lrt_sample_backward(Tensor grad, Tensor v, Tensor rng) -> Tensor");

  // Those beside the products of flipout_linear and flipout_conv. Signs are numbered by rows and channels,
  // the latter along channel_dim (1 of a convolution, -1 of a linear layer), of stream rng[1] + stream.
  m.def("flip_signs(Tensor input, Tensor rng, int stream, int channel_dim) -> Tensor");
  m.def("add_flipped_(Tensor(a!) base, Tensor input, Tensor rng, int stream, int channel_dim) -> ()");

  // The layers. Results: the output; what is kept for backward (BBB: the weight; LRT: the output's variance;
  // Flipout: sigma * eps); the KL, or 0. The backward ops return a gradient for each true entry of
  // output_mask, in the order input, W_mu, W_rho, bias_mu, bias_rho.
  const std::string operands = "Tensor input, Tensor W_mu, Tensor W_rho, Tensor? bias_mu, Tensor? bias_rho, ";
  const std::string geometries[] = {
      "",
      "SymInt[] stride, SymInt[] padding, SymInt[] dilation, bool transposed, SymInt[] output_padding, "
      "SymInt groups, "};
  const std::string prior = "float prior_mu, float prior_sigma, ";
  for (const auto& estimator : kEstimators) {
    for (size_t k = 0; k < std::size(kProducts); ++k) {
      const std::string name = std::string(estimator.name) + kProducts[k];
      const std::string forward = name + "(" + operands + "Tensor rng, " + geometries[k] + prior +
                                  "bool with_kl, " + estimator.option + ") -> (Tensor, Tensor, Tensor)";
      const std::string backward = name + "_backward(Tensor grad, Tensor? grad_kl, " + operands +
                                   "Tensor? kept, Tensor rng, " + geometries[k] + prior +
                                   "bool[] output_mask) -> Tensor[]";
      m.def(forward.c_str());
      m.def(backward.c_str());
    }
  }
}

// Each of these is reached only from within an op that has its own backward. Differentiating through
// one of these (a second derivative, say) raises, instead of giving wrong numbers.
TORCH_LIBRARY_IMPL(bbb_fast, Autograd, m) {
  for (const char* name : {"posterior_backward_out", "square_backward_", "lrt_sample_", "add_flipped_"}) {
    m.impl(name, torch::autograd::autogradNotImplementedFallback());
  }
  const auto refuse = [&](const char* name) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&not_differentiable>());
  };
  for (const char* name :
       {"normal", "uniform", "drop_elements", "kl_tensor_prior_backward", "posterior_backward", "variance",
        "square", "lrt_sample_backward", "flip_signs"}) {
    refuse(name);
  }
  for (const auto& estimator : kEstimators) {
    for (const char* product : kProducts) {
      refuse((std::string(estimator.name) + product + "_backward").c_str());
    }
  }
}
