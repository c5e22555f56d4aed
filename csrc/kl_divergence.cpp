// kl_divergence: its autograd. Kernels: cpu/kl_divergence.cpp, cuda/kl_divergence.cu.
#include <torch/library.h>

#include "checks.h"
#include "kl_node.h"

namespace bbb_fast {

at::Tensor kl_divergence(
    at::TensorList mu,
    at::TensorList rho,
    at::ArrayRef<double> prior_mu,
    at::ArrayRef<double> prior_sigma,
    const KlNode::Meetings& meetings) {
  static const auto op =
      find_op<at::Tensor(at::TensorList, at::TensorList, at::ArrayRef<double>, at::ArrayRef<double>)>(
          "kl_divergence");
  for (const at::TensorList list : {mu, rho}) {
    for (const at::Tensor& t : list) check_no_tangent("kl_divergence", t);
  }
  at::Tensor kl;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    kl = op.call(mu, rho, prior_mu, prior_sigma);
  }
  KlNode::attach(kl, mu, rho, prior_mu, prior_sigma, meetings);
  return kl;
}

namespace {

at::Tensor kl_divergence_autograd(
    at::TensorList mu, at::TensorList rho, at::ArrayRef<double> prior_mu, at::ArrayRef<double> prior_sigma) {
  return kl_divergence(mu, rho, prior_mu, prior_sigma, {{nullptr, mu.size()}});
}

TORCH_LIBRARY_IMPL(bbb_fast, Autograd, m) {
  m.impl("kl_divergence", &kl_divergence_autograd);
}

}  // namespace
}  // namespace bbb_fast
