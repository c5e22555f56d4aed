// Convolutions of few channels in float32, which the library runs at a tenth of the CPU's speed or less:
// its kernels want channels by the 16. Directly, by rows of pixels.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <utility>

#include "../routes.h"

namespace bbb_fast {

struct ConvShape {
  int64_t batch, in, out;  // images, channels
  int64_t height, width;   // of the input
  int64_t kernel_h, kernel_w;
  int64_t padding_h, padding_w;

  int64_t out_height() const { return height + 2 * padding_h - kernel_h + 1; }
  int64_t out_width() const { return width + 2 * padding_w - kernel_w + 1; }
};

// Of a convolution that allows Way::direct.
ConvShape direct_conv_shape(const ConvProblem& problem);

at::Tensor direct_conv(
    const ConvShape& shape,
    const at::Tensor& input,
    const at::Tensor& weight,
    const std::optional<at::Tensor>& bias);

// Gradients of input and weight; undefined where not wanted. The weight's does not depend on the number of
// threads.
std::pair<at::Tensor, at::Tensor> direct_conv_backward(
    const ConvShape& shape,
    const at::Tensor& grad,
    const at::Tensor& input,
    const at::Tensor& weight,
    const std::array<bool, 2>& wanted);

}  // namespace bbb_fast
