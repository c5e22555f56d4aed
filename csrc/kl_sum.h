// How a KL is finished from partial sums, on every device.
#pragma once

#include <ATen/core/Tensor.h>

#include <cmath>

namespace bbb_fast {

// KL = (sum of a tensor's partial sums + this) / 2. A partial sum holds twice the KL plus 1 a weight,
// formed with ln(sigma_p) rounded to float; float64 tensors' use the exact one.
inline double kl_constant(const at::Tensor& mu, double prior_sigma) {
  const double log_sigma = std::log(prior_sigma);
  const double lost = mu.scalar_type() == at::kDouble ? 0.0 : log_sigma - static_cast<float>(log_sigma);
  return static_cast<double>(mu.numel()) * (2.0 * lost - 1.0);
}

// The type a KL is returned in.
inline at::ScalarType kl_dtype(const at::Tensor& mu) {
  return mu.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

}  // namespace bbb_fast
