// What lrt_linear and lrt_conv share: the checks, the types of the two products, and typed calls of the
// elementwise ops, which the dispatcher takes to the tensors' device.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace bbb_fast {

using OptionalTensor = std::optional<at::Tensor>;

// The two tensors are dense with the same strides; see check_lrt_sample in lrt.cpp.
void check_lrt_sample(
    const char* op, const char* name, const at::Tensor& m, const at::Tensor& v, const at::Tensor& rng);

at::Tensor variance(const at::Tensor& rho, at::ScalarType dtype);
at::Tensor variance_backward(const at::Tensor& grad, const at::Tensor& rho);
void lrt_sample_(at::Tensor& m, const at::Tensor& v, const at::Tensor& rng);
at::Tensor lrt_sample_backward(const at::Tensor& grad, const at::Tensor& v, const at::Tensor& rng);

// The type the variance product runs in: as asked, else the input's; float32 for float16, whose squares
// leave its range.
at::ScalarType variance_dtype_for(const at::Tensor& input, std::optional<at::ScalarType> asked);

// input^2 in dtype, squared before it is rounded.
at::Tensor square(const at::Tensor& input, at::ScalarType dtype);

inline bool has(const OptionalTensor& t) {
  return t.has_value() && t->defined();
}

}  // namespace bbb_fast
