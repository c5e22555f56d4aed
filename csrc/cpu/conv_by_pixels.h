// Convolutions over a few pixels, all of which every output pixel sees, while most taps of the kernel meet
// the padding: as the linear layer from all pixels to all, whose weight repeats the convolution's.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <utility>

#include "../routes.h"

namespace bbb_fast {

// Of a convolution that allows Way::by_pixels; fastest over channels_last. The output is channels_last.
at::Tensor conv_by_pixels(
    const ConvProblem& problem,
    const at::Tensor& input,
    const at::Tensor& weight,
    const std::optional<at::Tensor>& bias);

// Gradients of input (channels_last) and weight (contiguous); undefined where not wanted.
std::pair<at::Tensor, at::Tensor> conv_by_pixels_backward(
    const ConvProblem& problem,
    const at::Tensor& grad,
    const at::Tensor& input,
    const at::Tensor& weight,
    const std::array<bool, 2>& wanted);

}  // namespace bbb_fast
