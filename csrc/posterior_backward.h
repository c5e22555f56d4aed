// The typed call of posterior_backward, which sample_weights and kl_divergence share.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace bbb_fast {

// Undefined tensors stand for None.
std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> posterior_backward(
    at::TensorList grad_w,
    const at::Tensor& grad_kl,
    at::TensorList mu,
    at::TensorList rho,
    const at::Tensor& rng,
    at::ArrayRef<double> prior_mu,
    at::ArrayRef<double> prior_sigma);

}  // namespace bbb_fast
