// kl_divergence: its autograd. Kernels: cpu/kl_divergence.cpp, cuda/kl_divergence.cu.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "checks.h"
#include "kl_node.h"

namespace bbb_fast {
namespace {

at::Tensor kl_divergence_autograd(
    at::TensorList mu, at::TensorList rho, at::ArrayRef<double> prior_mu, at::ArrayRef<double> prior_sigma) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("bbb_fast::kl_divergence", "")
          .typed<at::Tensor(at::TensorList, at::TensorList, at::ArrayRef<double>, at::ArrayRef<double>)>();
  for (const at::TensorList list : {mu, rho}) {
    for (const at::Tensor& t : list) check_no_tangent("kl_divergence", t);
  }
  at::Tensor kl;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    kl = op.call(mu, rho, prior_mu, prior_sigma);
  }
  KlNode::attach(kl, mu, rho, prior_mu, prior_sigma, nullptr);
  return kl;
}

TORCH_LIBRARY_IMPL(bbb_fast, Autograd, m) {
  m.impl("kl_divergence", &kl_divergence_autograd);
}

}  // namespace
}  // namespace bbb_fast
