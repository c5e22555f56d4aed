// The gradient of mu and rho through the weights, the KL, or both: the backward of sample_weights and of
// kl_divergence. posterior_backward.cu.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace bbb_fast::cuda {

// grad_w: undefined where a weight got no gradient (rng may then be undefined too); grad_kl: a scalar, or
// undefined; both are read on the device. One prior a tensor. Arguments have been checked.
std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> posterior_backward(
    const std::vector<at::Tensor>& grad_w,
    const at::Tensor& grad_kl,
    at::TensorList mu,
    at::TensorList rho,
    const at::Tensor& rng,
    at::ArrayRef<double> prior_mu,
    at::ArrayRef<double> prior_sigma);

}  // namespace bbb_fast::cuda
