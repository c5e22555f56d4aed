// What lrt_linear and lrt_conv share: the checks, the types of the two products, and typed calls of the
// elementwise ops, which the dispatcher takes to the tensors' device.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace bbb_fast {

using OptionalTensor = std::optional<at::Tensor>;

at::Tensor variance(const at::Tensor& rho, at::ScalarType dtype);
at::Tensor variance_backward(const at::Tensor& grad, const at::Tensor& rho);
at::Tensor square(const at::Tensor& input, at::ScalarType dtype);
void square_backward_(at::Tensor& grad_input, const at::Tensor& input, const at::Tensor& grad);
void lrt_sample_(at::Tensor& m, const at::Tensor& v, const at::Tensor& rng);
at::Tensor lrt_sample_backward(const at::Tensor& grad, const at::Tensor& v, const at::Tensor& rng);

// The type the variance product runs in: as asked, else the input's; float32 for float16, whose squares
// leave its range.
at::ScalarType variance_dtype_for(const at::Tensor& input, std::optional<at::ScalarType> asked);

inline bool has(const OptionalTensor& t) {
  return t.has_value() && t->defined();
}

}  // namespace bbb_fast
