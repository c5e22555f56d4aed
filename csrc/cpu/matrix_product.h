// Products of float32 matrices on the CPU by oneDNN, which torch uses for convolutions and narrow types only:
// it multiplies float32 matrices by MKL. routes.h says where that is worth it.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace bbb_fast {

// Whether this build of torch has oneDNN.
bool with_onednn();

// a b + bias: [m, k] times [k, n], of one float32 type on the CPU, none of them empty.
at::Tensor onednn_product(
    const at::Tensor& a, const at::Tensor& b, const std::optional<at::Tensor>& bias = std::nullopt);

}  // namespace bbb_fast
