// posterior_backward: its typed call. Kernels: cpu/posterior_backward.cpp, cuda/posterior_backward.cu.
#include "posterior_backward.h"

#include <ATen/core/dispatch/Dispatcher.h>

namespace bbb_fast {

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> posterior_backward(
    at::TensorList grad_w,
    const at::Tensor& grad_kl,
    at::TensorList mu,
    at::TensorList rho,
    const at::Tensor& rng,
    at::ArrayRef<double> prior_mu,
    at::ArrayRef<double> prior_sigma) {
  using Optional = std::optional<at::Tensor>;
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("bbb_fast::posterior_backward", "")
                             .typed<std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>>(
                                 const c10::List<Optional>&, const Optional&, at::TensorList, at::TensorList,
                                 const Optional&, at::ArrayRef<double>, at::ArrayRef<double>)>();
  const auto optional = [](const at::Tensor& t) { return t.defined() ? Optional(t) : std::nullopt; };
  c10::List<Optional> weights;
  for (const at::Tensor& g : grad_w) weights.push_back(optional(g));
  return op.call(weights, optional(grad_kl), mu, rho, optional(rng), prior_mu, prior_sigma);
}

}  // namespace bbb_fast
