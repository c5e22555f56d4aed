#include "conv_by_pixels.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

namespace bbb_fast {
namespace {

// Row `kernel_row` of the kernel at output pixel (out_row, out_column): `taps` taps from kernel_column on
// meet as many pixels from (row, column) on.
struct Meeting {
  int64_t out_row, out_column, kernel_row, kernel_column, row, column, taps;
};

template <class Body>
void for_each_meeting(const ConvProblem& p, const Body& body) {
  for (int64_t oh = 0; oh < p.out_size(0); ++oh) {
    for (int64_t ow = 0; ow < p.out_size(1); ++ow) {
      const int64_t top = oh * p.stride[0] - p.padding[0], left = ow * p.stride[1] - p.padding[1];
      const int64_t first = std::max<int64_t>(0, -left), last = std::min(p.kernel[1], p.size[1] - left);
      if (first >= last) continue;
      for (int64_t kh = std::max<int64_t>(0, -top); kh < std::min(p.kernel[0], p.size[0] - top); ++kh) {
        body(Meeting{oh, ow, kh, first, top + kh, left + first, last - first});
      }
    }
  }
}

// [N, C, H, W] as [N, H, W, C]; a copy unless it is channels_last.
at::Tensor channels_behind(const at::Tensor& t) {
  return t.permute({0, 2, 3, 1}).contiguous();
}

// Pixels (row, column) ... (row, column + count - 1) of [N, H, W, C] as [N, count * C].
at::Tensor pixels(const at::Tensor& images, int64_t row, int64_t column, int64_t count = 1) {
  return images.select(1, row).narrow(1, column, count).flatten(1);
}

// [out, in, height, width] as [height, width, in, out].
at::Tensor taps_in_front(const at::Tensor& weight) {
  return weight.permute({2, 3, 1, 0}).contiguous();
}

// The taps of a meeting as [taps * in, out].
at::Tensor taps(const at::Tensor& in_front, const Meeting& m) {
  return in_front.select(0, m.kernel_row).narrow(0, m.kernel_column, m.taps).flatten(0, 1);
}

}  // namespace

at::Tensor conv_by_pixels(
    const ConvProblem& p,
    const at::Tensor& input,
    const at::Tensor& weight,
    const std::optional<at::Tensor>& bias) {
  const at::Tensor x = channels_behind(input), w = taps_in_front(weight);
  at::Tensor y = at::zeros({p.batch, p.out_size(0), p.out_size(1), p.out}, input.options());
  if (bias && bias->defined()) y.copy_(*bias);
  for_each_meeting(p, [&](const Meeting& m) {
    pixels(y, m.out_row, m.out_column).addmm_(pixels(x, m.row, m.column, m.taps), taps(w, m));
  });
  return y.permute({0, 3, 1, 2});
}

std::pair<at::Tensor, at::Tensor> conv_by_pixels_backward(
    const ConvProblem& p,
    const at::Tensor& grad,
    const at::Tensor& input,
    const at::Tensor& weight,
    const std::array<bool, 2>& wanted) {
  const at::Tensor g = channels_behind(grad);
  at::Tensor g_x, g_w;
  if (wanted[0]) {
    const at::Tensor w = taps_in_front(weight);
    g_x = at::zeros({p.batch, p.size[0], p.size[1], p.in}, input.options());
    for_each_meeting(p, [&](const Meeting& m) {
      pixels(g_x, m.row, m.column, m.taps).addmm_(pixels(g, m.out_row, m.out_column), taps(w, m).t());
    });
    g_x = g_x.permute({0, 3, 1, 2});
  }
  if (wanted[1]) {
    const at::Tensor x = channels_behind(input);
    g_w = at::zeros({p.kernel[0], p.kernel[1], p.in, p.out}, input.options());
    for_each_meeting(p, [&](const Meeting& m) {
      taps(g_w, m).addmm_(pixels(x, m.row, m.column, m.taps).t(), pixels(g, m.out_row, m.out_column));
    });
    g_w = g_w.permute({3, 2, 0, 1}).contiguous();
  }
  return {std::move(g_x), std::move(g_w)};
}

}  // namespace bbb_fast
