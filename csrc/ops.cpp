// Every op's schema. A kernel is registered at the foot of its own file: csrc/cpu/<op>.cpp for the CPU,
// csrc/cuda/<op>.cu for CUDA; the device-independent ones and autograd in csrc/<op>.cpp. Fake kernels:
// bbb_fast/_ops.py. The layers' ops: csrc/bbb.cpp, csrc/lrt.cpp, over csrc/layer_op.h.
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <string>
#include <utility>

TORCH_LIBRARY(bbb_fast, m) {
  m.def("normal(SymInt[] size, Tensor rng, ScalarType dtype) -> Tensor");

  m.def(
      "sample_weights(Tensor[] mu, Tensor[] rho, Tensor rng, float prior_mu, float prior_sigma, "
      "bool with_kl, ScalarType? dtype) -> (Tensor[], Tensor)");
  m.def("kl_divergence(Tensor[] mu, Tensor[] rho, float[] prior_mu, float[] prior_sigma) -> Tensor");
  // The backward of both, and of variance: the gradient of mu and rho through the weights, the KL, or both. A
  // weight that got no gradient is None; rng is needed where one did. The second form writes to grad_mu and
  // grad_rho, which may be the given gradients; grad_variance, where the list is not empty, is that of
  // sigma^2, and grad_w then that of the mean. `again` asks for what the forward formed of the first tensor,
  // in that type: the weight, or with grad_variance sigma^2; without, the result is empty.
  m.def(
      "posterior_backward(Tensor?[] grad_w, Tensor? grad_kl, Tensor[] mu, Tensor[] rho, Tensor? rng, "
      "float[] prior_mu, float[] prior_sigma) -> (Tensor[], Tensor[])");
  m.def(
      "posterior_backward_out(Tensor?[] grad_w, Tensor?[] grad_variance, Tensor? grad_kl, Tensor[] mu, "
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

  // The layers. Results: the output; what is kept for backward (BBB: the weight; LRT: the output's variance);
  // the KL, or 0. The backward ops return a gradient for each true entry of output_mask, in the order input,
  // W_mu, W_rho, bias_mu, bias_rho.
  const std::string operands = "Tensor input, Tensor W_mu, Tensor W_rho, Tensor? bias_mu, Tensor? bias_rho, ";
  const std::string conv =
      "SymInt[] stride, SymInt[] padding, SymInt[] dilation, bool transposed, SymInt[] output_padding, "
      "SymInt groups, ";
  const std::string prior = "float prior_mu, float prior_sigma, ";
  for (const auto& [estimator, option] :
       {std::pair<std::string, std::string>{"bbb", "bool recompute_weight"},
        {"lrt", "ScalarType? variance_dtype"}}) {
    for (const auto& [name, geometry] :
         {std::pair<std::string, std::string>{estimator + "_linear", ""}, {estimator + "_conv", conv}}) {
      const std::string forward = name + "(" + operands + "Tensor rng, " + geometry + prior +
                                  "bool with_kl, " + option + ") -> (Tensor, Tensor, Tensor)";
      const std::string backward = name + "_backward(Tensor grad, Tensor? grad_kl, " + operands +
                                   "Tensor? kept, Tensor rng, " + geometry + prior +
                                   "bool[] output_mask) -> Tensor[]";
      m.def(forward.c_str());
      m.def(backward.c_str());
    }
  }
}

// Each of these is reached only from within an op that has its own backward. Differentiating through
// one of these (a second derivative, say) raises, instead of giving wrong numbers.
TORCH_LIBRARY_IMPL(bbb_fast, Autograd, m) {
  for (const char* name :
       {"normal", "posterior_backward", "posterior_backward_out", "variance", "square", "square_backward_",
        "lrt_sample_", "lrt_sample_backward", "bbb_linear_backward", "bbb_conv_backward",
        "lrt_linear_backward", "lrt_conv_backward"}) {
    m.impl(name, torch::autograd::autogradNotImplementedFallback());
  }
}
