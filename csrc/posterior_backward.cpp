// posterior_backward: posterior_backward_out into fresh tensors, for every device. Kernels of the latter:
// cpu/posterior_backward.cpp, cuda/posterior_backward.cu.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "passes.h"

namespace bbb_fast {
namespace {

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> allocate_and_run(
    const c10::List<OptionalTensor>& grad_w,
    const OptionalTensor& grad_kl,
    at::TensorList mu,
    at::TensorList rho,
    const OptionalTensor& rng,
    at::ArrayRef<double> prior_mu,
    at::ArrayRef<double> prior_sigma) {
  std::vector<at::Tensor> grad_mu, grad_rho;
  for (const at::Tensor& m : mu) {
    grad_mu.push_back(at::empty(m.sizes(), m.options()));
    grad_rho.push_back(at::empty(m.sizes(), m.options()));
  }
  posterior_backward_out(
      tensors(grad_w), {}, grad_kl.value_or(at::Tensor()), mu, rho, rng.value_or(at::Tensor()), prior_mu,
      prior_sigma, grad_mu, grad_rho, std::nullopt);
  return {std::move(grad_mu), std::move(grad_rho)};
}

TORCH_LIBRARY_IMPL(bbb_fast, CompositeExplicitAutograd, m) {
  m.impl("posterior_backward", &allocate_and_run);
}

}  // namespace
}  // namespace bbb_fast
