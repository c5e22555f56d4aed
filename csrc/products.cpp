#include "products.h"

#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <limits>

#include "checks.h"
#include "cpu/huge_pages.h"

namespace bbb_fast {
namespace {

// [..., features] as [rows, features].
at::Tensor as_matrix(const at::Tensor& t) {
  if (t.dim() == 2) return t;
  const int64_t rows = c10::multiply_integers(t.sizes().begin(), t.sizes().end() - 1);
  return t.reshape({rows, t.size(-1)});
}

// Of a bias along dimension 1: the sum over the others.
at::Tensor bias_gradient(const at::Tensor& grad) {
  std::vector<int64_t> summed{0};
  for (int64_t d = 2; d < grad.dim(); ++d) summed.push_back(d);
  return at::sum(grad, summed, false, grad.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
}

}  // namespace

void Linear::check(const char* op, const at::Tensor& input, const at::Tensor& weight) const {
  TORCH_CHECK_VALUE(
      weight.dim() == 2, op, ": W_mu must be [out_features, in_features], got ", weight.sizes());
  TORCH_CHECK_VALUE(
      input.dim() >= 1 && input.size(-1) == weight.size(1), op,
      ": the last dimension of input must be in_features = ", weight.size(1), ", got input ", input.sizes());
}

std::vector<int64_t> Linear::output_sizes(const at::Tensor& input, const at::Tensor& weight) const {
  std::vector<int64_t> sizes = input.sizes().vec();
  sizes.back() = out_features(weight);
  return sizes;
}

at::Tensor Linear::forward(
    const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias) const {
  return at::linear(input, weight, bias);
}

ProductGradients Linear::backward(
    const at::Tensor& grad,
    const at::Tensor& input,
    const at::Tensor& weight,
    const std::array<bool, 3>& wanted) const {
  const at::Tensor g = as_matrix(grad);
  at::Tensor g_x, g_w, g_b;
  if (wanted[0]) {
    g_x = at::mm(g, weight);
    if (input.dim() != 2) g_x = g_x.view(input.sizes());
  }
  if (wanted[1]) g_w = at::mm(g.t(), as_matrix(input));
  if (wanted[2]) g_b = bias_gradient(g);
  return {std::move(g_x), std::move(g_w), std::move(g_b)};
}

void Convolution::check(const char* op, const at::Tensor& input, const at::Tensor& weight) const {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();  // sums and products below stay in range
  const int64_t spatial = weight.dim() - 2;
  TORCH_CHECK_VALUE(
      spatial >= 1 && spatial <= 3, op, ": W_mu must have 3, 4 or 5 dimensions, got ", weight.sizes());
  TORCH_CHECK_VALUE(
      input.dim() == weight.dim(), op, ": input must have ", weight.dim(), " dimensions like W_mu, got ",
      input.sizes());
  const auto check = [&](const char* name, c10::SymIntArrayRef values, int64_t least) {
    TORCH_CHECK_VALUE(
        static_cast<int64_t>(values.size()) == spatial, op, ": ", name, " must have ", spatial,
        " numbers, got ", values.size());
    for (const auto& v : values) {
      TORCH_CHECK_VALUE(v >= least, op, ": ", name, " must be >= ", least, ", got ", values);
      TORCH_CHECK_VALUE(v <= kMost, op, ": ", name, " must be < 2^31, got ", values);
    }
  };
  check("stride", stride_, 1);
  check("padding", padding_, 0);
  check("dilation", dilation_, 1);
  check("output_padding", output_padding_, 0);
  TORCH_CHECK_VALUE(groups_ >= 1, op, ": groups must be >= 1, got ", groups_);
  TORCH_CHECK_VALUE(groups_ <= kMost, op, ": groups must be < 2^31, got ", groups_);
  const c10::SymInt channels = transposed_ ? c10::SymInt(weight.size(0)) : weight.size(1) * groups_;
  TORCH_CHECK_VALUE(
      input.size(1) == channels && weight.size(0) % groups_ == 0, op, ": input must have ", channels,
      " channels for W_mu ", weight.sizes(), " and groups = ", groups_, ", got input ", input.sizes());
  for (int64_t d = 0; d < spatial; ++d) {
    const c10::SymInt reach = dilation_[d] * (weight.size(2 + d) - 1) + 1;
    const c10::SymInt padded = input.size(2 + d) + padding_[d] * 2;
    TORCH_CHECK_VALUE(
        transposed_ || padded >= reach, op, ": the kernel reaches over ", reach,
        " elements, more than the padded input's ", padded, ", in dimension ", 2 + d, " of input ",
        input.sizes());
  }
}

std::vector<int64_t> Convolution::output_sizes(const at::Tensor& input, const at::Tensor& weight) const {
  std::vector<int64_t> sizes{input.size(0), out_features(weight)};
  for (int64_t d = 0; d < weight.dim() - 2; ++d) {
    const int64_t stride = stride_[d].expect_int(), padding = padding_[d].expect_int();
    const int64_t reach = dilation_[d].expect_int() * (weight.size(2 + d) - 1) + 1;
    sizes.push_back(
        transposed_ ? (input.size(2 + d) - 1) * stride - 2 * padding + reach + output_padding_[d].expect_int()
                    : (input.size(2 + d) + 2 * padding - reach) / stride + 1);
  }
  return sizes;
}

// channels_last if the input or the weight is stored so and not at the same time contiguous. The same rule
// stands in bbb_fast/reference.py.
at::MemoryFormat Convolution::output_format(const at::Tensor& input, const at::Tensor& weight) const {
  if (input.dim() == 4 || input.dim() == 5) {
    const auto last = input.dim() == 4 ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::ChannelsLast3d;
    for (const at::Tensor& t : {input, weight}) {
      if (t.is_contiguous(last) && !t.is_contiguous()) return last;
    }
  }
  return at::MemoryFormat::Contiguous;
}

std::optional<ConvShape> Convolution::direct(const at::Tensor& input, const at::Tensor& weight) const {
  if (!input.device().is_cpu()) return std::nullopt;
  return direct_conv_shape(
      input, weight, C10_AS_INTARRAYREF_SLOW(stride_), C10_AS_INTARRAYREF_SLOW(padding_),
      C10_AS_INTARRAYREF_SLOW(dilation_), transposed_, groups_.expect_int());
}

// Measured (benchmarks/formats.py): the library takes up to twice as long over contiguous images of many
// pixels and channels, more than it takes to rearrange them.
bool Convolution::faster_in_channels_last(const at::Tensor& input, const at::Tensor& weight) const {
  const auto ones = [](c10::SymIntArrayRef numbers) {
    return std::all_of(numbers.begin(), numbers.end(), [](const c10::SymInt& n) { return n == 1; });
  };
  return input.device().is_cpu() && input.dim() == 4 && input.scalar_type() == at::kFloat && !transposed_ &&
         groups_ == 1 && ones(stride_) && ones(dilation_) && weight.size(0) >= 32 && weight.size(1) >= 32 &&
         weight.size(2) * weight.size(3) >= 9 && input.size(2) * input.size(3) >= 49 && input.numel() > 0;
}

at::Tensor shaped_like(const at::Tensor& weight, at::ScalarType dtype) {
  return weight.scalar_type() == dtype ? weight : at::empty_like(weight, weight.options().dtype(dtype));
}

at::Tensor in_format(const at::Tensor& t, at::MemoryFormat format) {
  if (t.is_contiguous(format)) return t;
  at::Tensor copy = at::empty(t.sizes(), t.options().memory_format(format));
  hint_huge_pages(copy);
  return copy.copy_(t);
}

at::Tensor Convolution::arranged(
    const at::Tensor& t, const at::Tensor& input, const at::Tensor& weight) const {
  return faster_in_channels_last(input, weight) ? in_format(t, at::MemoryFormat::ChannelsLast) : t;
}

// Measured: over so few pixels the library takes several times as long as the products below.
bool Convolution::few_pixels(
    const at::Tensor& grad, const at::Tensor& input, const at::Tensor& weight) const {
  return input.device().is_cpu() && weight.dim() == 4 && input.scalar_type() == at::kFloat && !transposed_ &&
         groups_ == 1 && grad.size(2) * grad.size(3) <= 4 && grad.size(0) >= 16 && weight.size(0) >= 32 &&
         weight.size(1) >= 32;
}

// A product over the batch for each output pixel and tap of the kernel that meets the image there.
at::Tensor Convolution::weight_gradient_by_pixels(
    const at::Tensor& grad, const at::Tensor& input, const at::Tensor& weight) const {
  const at::Tensor g = grad.permute({2, 3, 1, 0}).contiguous(), x = input.permute({2, 3, 0, 1}).contiguous();
  const int64_t kernel_h = weight.size(2), kernel_w = weight.size(3);
  at::Tensor result = at::zeros({kernel_h, kernel_w, weight.size(0), weight.size(1)}, weight.options());
  const auto position = [&](int64_t out, int64_t tap, int d) {
    return out * stride_[d].expect_int() + tap * dilation_[d].expect_int() - padding_[d].expect_int();
  };
  for (int64_t kh = 0; kh < kernel_h; ++kh) {
    for (int64_t kw = 0; kw < kernel_w; ++kw) {
      at::Tensor tap = result[kh][kw];
      for (int64_t oh = 0; oh < g.size(0); ++oh) {
        for (int64_t ow = 0; ow < g.size(1); ++ow) {
          const int64_t h = position(oh, kh, 0), w = position(ow, kw, 1);
          if (h < 0 || h >= x.size(0) || w < 0 || w >= x.size(1)) continue;
          tap.addmm_(g[oh][ow], x[h][w]);
        }
      }
    }
  }
  return result.permute({2, 3, 0, 1}).contiguous();
}

at::Tensor Convolution::forward(
    const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias) const {
  if (const auto shape = direct(input, weight)) return direct_conv(*shape, input, weight, bias);
  return at::convolution_symint(
      input, weight, bias, stride_, padding_, dilation_, transposed_, output_padding_, groups_);
}

ProductGradients Convolution::backward(
    const at::Tensor& grad,
    const at::Tensor& input,
    const at::Tensor& weight,
    const std::array<bool, 3>& wanted) const {
  const auto library = [&](const std::array<bool, 3>& parts) {
    const std::vector<c10::SymInt> features{grad.sym_size(1)};
    return at::convolution_backward_symint(
        grad, input, weight, features, stride_, padding_, dilation_, transposed_, output_padding_, groups_,
        parts);
  };
  const auto shape = direct(input, weight);
  const bool by_pixels = !shape && wanted[1] && few_pixels(grad, input, weight);
  if (by_pixels || (wanted[2] && !wanted[1])) {
    ProductGradients grads;
    // The library's gradient of the bias comes with the weight's, wanted or not.
    if (wanted[0]) grads = backward(grad, input, weight, {true, false, false});
    if (by_pixels) std::get<1>(grads) = weight_gradient_by_pixels(grad, input, weight);
    if (wanted[2]) std::get<2>(grads) = bias_gradient(grad);
    return grads;
  }
  if (!shape) return library(wanted);
  // Measured: the library gains on the direct kernels sooner here than for the other products.
  if (shape->in <= 4) return direct_conv_backward(*shape, grad, input, weight, wanted);
  ProductGradients grads;
  if (wanted[1] || wanted[2]) grads = library({false, wanted[1], wanted[2]});
  std::get<0>(grads) =
      std::get<0>(direct_conv_backward(*shape, grad, input, weight, {wanted[0], false, false}));
  return grads;
}

}  // namespace bbb_fast
