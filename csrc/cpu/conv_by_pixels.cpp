#include "conv_by_pixels.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "matrix_product.h"

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

// The weight as [height, out, width, in], of which each row of taps is a matrix; and back. An output channel
// at a time, so that its taps stay in the first cache: at::permute's copy would read the weight once a tap.
template <class T>
void copy_rows(const ConvProblem& p, const at::Tensor& from, at::Tensor& to, bool back) {
  const int64_t kernel_h = p.kernel[0], kernel_w = p.kernel[1];
  const T* const source = static_cast<const T*>(from.const_data_ptr());
  T* const target = static_cast<T*>(to.mutable_data_ptr());
  at::parallel_for(0, p.out, 16, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o) {
      for (int64_t kh = 0; kh < kernel_h; ++kh) {
        for (int64_t kw = 0; kw < kernel_w; ++kw) {
          const int64_t row = ((kh * p.out + o) * kernel_w + kw) * p.in;
          const int64_t tap = (o * p.in * kernel_h + kh) * kernel_w + kw, step = kernel_h * kernel_w;
          for (int64_t i = 0; i < p.in; ++i) {
            back ? target[tap + i * step] = source[row + i] : target[row + i] = source[tap + i * step];
          }
        }
      }
    }
  });
}
at::Tensor copied(const ConvProblem& p, const at::Tensor& from, at::IntArrayRef sizes, bool back) {
  const at::Tensor source = from.contiguous();
  at::Tensor to = at::empty(sizes, source.options());
  source.element_size() == 4 ? copy_rows<uint32_t>(p, source, to, back)
                             : copy_rows<uint16_t>(p, source, to, back);
  return to;
}
at::Tensor rows_in_front(const ConvProblem& p, const at::Tensor& weight) {
  return copied(p, weight, {p.kernel[0], p.out, p.kernel[1], p.in}, false);
}
at::Tensor rows_behind(const ConvProblem& p, const at::Tensor& rows) {
  return copied(p, rows, {p.out, p.in, p.kernel[0], p.kernel[1]}, true);
}

// The taps of a meeting as [out, taps * in].
at::Tensor taps(const at::Tensor& rows, const Meeting& m) {
  return rows.select(0, m.kernel_row).narrow(1, m.kernel_column, m.taps).flatten(1);
}

}  // namespace

at::Tensor conv_by_pixels(
    const ConvProblem& p,
    const at::Tensor& input,
    const at::Tensor& weight,
    const std::optional<at::Tensor>& bias) {
  const at::Tensor x = channels_behind(input), w = rows_in_front(p, weight);
  at::Tensor y = at::zeros({p.batch, p.out_size(0), p.out_size(1), p.out}, input.options());
  if (bias && bias->defined()) y.copy_(*bias);
  for_each_meeting(p, [&](const Meeting& m) {
    add_product_(pixels(y, m.out_row, m.out_column), pixels(x, m.row, m.column, m.taps), taps(w, m).t());
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
    const at::Tensor w = rows_in_front(p, weight);
    g_x = at::zeros({p.batch, p.size[0], p.size[1], p.in}, input.options());
    for_each_meeting(p, [&](const Meeting& m) {
      add_product_(pixels(g_x, m.row, m.column, m.taps), pixels(g, m.out_row, m.out_column), taps(w, m));
    });
    g_x = g_x.permute({0, 3, 1, 2});
  }
  if (wanted[1]) {
    const at::Tensor x = channels_behind(input);
    g_w = at::zeros({p.kernel[0], p.out, p.kernel[1], p.in}, input.options());
    for_each_meeting(p, [&](const Meeting& m) {
      add_product_(taps(g_w, m), pixels(g, m.out_row, m.out_column).t(), pixels(x, m.row, m.column, m.taps));
    });
    g_w = rows_behind(p, g_w);
  }
  return {std::move(g_x), std::move(g_w)};
}

}  // namespace bbb_fast
