// Every op's schema. A kernel is registered at the foot of its own file: csrc/cpu/<op>.cpp for the CPU,
// csrc/cuda/<op>.cu for CUDA; the device-independent ones and autograd in csrc/<op>.cpp. Fake kernels:
// bbb_fast/_ops.py.
#include <torch/library.h>

TORCH_LIBRARY(bbb_fast, m) {
  m.def("normal(SymInt[] size, Tensor rng, ScalarType dtype) -> Tensor");

  m.def(
      "sample_weights(Tensor[] mu, Tensor[] rho, Tensor rng, float prior_mu, float prior_sigma, "
      "bool with_kl, ScalarType? dtype) -> (Tensor[], Tensor)");
  m.def("kl_divergence(Tensor[] mu, Tensor[] rho, float[] prior_mu, float[] prior_sigma) -> Tensor");
  // The backward of both: the gradient of mu and rho through the weights, the KL, or both. A weight that got
  // no gradient is None; rng is needed where one did.
  m.def(
      "posterior_backward(Tensor?[] grad_w, Tensor? grad_kl, Tensor[] mu, Tensor[] rho, Tensor? rng, "
      "float[] prior_mu, float[] prior_sigma) -> (Tensor[], Tensor[])");

  // The elementwise passes beside the products of lrt_linear and lrt_conv.
  m.def("variance(Tensor rho, ScalarType dtype) -> Tensor");
  m.def("variance_backward(Tensor grad, Tensor rho) -> Tensor");
  m.def("square(Tensor input, ScalarType dtype) -> Tensor");
  m.def("square_backward_(Tensor(a!) grad_input, Tensor input, Tensor grad) -> ()");
  m.def("lrt_sample_(Tensor(a!) m, Tensor v, Tensor rng) -> ()");
  m.def("lrt_sample_backward(Tensor grad, Tensor v, Tensor rng) -> Tensor");

  // The second result is v, kept for backward. The backward ops return a gradient for each true entry of
  // output_mask, in the order input, W_mu, W_rho, bias_mu, bias_rho.
  m.def(
      "lrt_linear(Tensor input, Tensor W_mu, Tensor W_rho, Tensor? bias_mu, Tensor? bias_rho, Tensor rng, "
      "ScalarType? variance_dtype) -> (Tensor, Tensor)");
  m.def(
      "lrt_linear_backward(Tensor grad, Tensor input, Tensor W_mu, Tensor W_rho, Tensor? bias_rho, "
      "Tensor v, Tensor rng, bool[] output_mask) -> Tensor[]");
  m.def(
      "lrt_conv(Tensor input, Tensor W_mu, Tensor W_rho, Tensor? bias_mu, Tensor? bias_rho, Tensor rng, "
      "SymInt[] stride, SymInt[] padding, SymInt[] dilation, bool transposed, SymInt[] output_padding, "
      "SymInt groups, ScalarType? variance_dtype) -> (Tensor, Tensor)");
  m.def(
      "lrt_conv_backward(Tensor grad, Tensor input, Tensor W_mu, Tensor W_rho, Tensor? bias_rho, Tensor v, "
      "Tensor rng, SymInt[] stride, SymInt[] padding, SymInt[] dilation, bool transposed, "
      "SymInt[] output_padding, SymInt groups, bool[] output_mask) -> Tensor[]");
}
