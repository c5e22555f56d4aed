#include "products.h"

#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>

#include <algorithm>
#include <limits>

#include "checks.h"
#include "cpu/conv_by_pixels.h"
#include "cpu/direct_conv.h"
#include "cpu/huge_pages.h"
#include "cpu/matrix_product.h"

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

// Those of at::empty.
std::vector<int64_t> strides_of(at::IntArrayRef sizes, at::MemoryFormat format) {
  if (format == at::MemoryFormat::ChannelsLast) return c10::get_channels_last_strides_2d(sizes);
  if (format == at::MemoryFormat::ChannelsLast3d) return c10::get_channels_last_strides_3d(sizes);
  std::vector<int64_t> strides(sizes.size());
  int64_t next = 1;
  for (size_t d = sizes.size(); d-- > 0; next *= std::max<int64_t>(sizes[d], 1)) strides[d] = next;
  return strides;
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

Way Linear::way(const at::Tensor& input, const at::Tensor& weight) const {
  const bool choice = input.device().is_cpu() && input.scalar_type() == at::kFloat &&
                      weight.scalar_type() == at::kFloat && input.numel() > 0;
  if (!choice) return Way::library;
  return choose_way(LinearProblem{input.numel() / input.size(-1), input.size(-1), weight.size(0)});
}

at::Tensor Linear::forward(
    const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias) const {
  if (way(input, weight) == Way::library) return at::linear(input, weight, bias);
  return onednn_product(as_matrix(input), weight.t(), bias).view(output_sizes(input, weight));
}

ProductGradients Linear::backward(
    const at::Tensor& grad,
    const at::Tensor& input,
    const at::Tensor& weight,
    const std::array<bool, 3>& wanted) const {
  const at::Tensor g = as_matrix(grad);
  const bool by_library = way(input, weight) == Way::library;
  const auto product = [&](const at::Tensor& a, const at::Tensor& b) {
    return by_library ? at::mm(a, b) : onednn_product(a, b);
  };
  at::Tensor g_x, g_w, g_b;
  if (wanted[0]) {
    g_x = product(g, weight);
    if (input.dim() != 2) g_x = g_x.view(input.sizes());
  }
  if (wanted[1]) g_w = product(g.t(), as_matrix(input));
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
    if (transposed_) {
      const c10::SymInt size =
          (input.size(2 + d) - 1) * stride_[d] - padding_[d] * 2 + reach + output_padding_[d];
      TORCH_CHECK_VALUE(
          output_padding_[d] < stride_[d] || output_padding_[d] < dilation_[d], op,
          ": output_padding must be smaller than stride or dilation, got ", output_padding_);
      TORCH_CHECK_VALUE(
          input.size(2 + d) >= 1 && size >= 1, op, ": the output would have ", size,
          " elements in dimension ", 2 + d, ", for input ", input.sizes());
    } else {
      TORCH_CHECK_VALUE(
          padded >= reach, op, ": the kernel reaches over ", reach,
          " elements, more than the padded input's ", padded, ", in dimension ", 2 + d, " of input ",
          input.sizes());
    }
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

ConvProblem Convolution::problem(const at::Tensor& input, const at::Tensor& weight) const {
  const auto numbers = [](c10::SymIntArrayRef symbolic) {
    c10::SmallVector<int64_t, 3> values;
    for (const auto& n : symbolic) values.push_back(n.expect_int());
    return values;
  };
  const auto spatial = [](const at::Tensor& t) {
    return c10::SmallVector<int64_t, 3>(t.sizes().begin() + 2, t.sizes().end());
  };
  return {
      input.size(0),
      input.size(1),
      out_features(weight),
      groups_.expect_int(),
      input.is_contiguous(),
      transposed_,
      input.scalar_type() == at::kBFloat16,
      spatial(input),
      spatial(weight),
      numbers(stride_),
      numbers(padding_),
      numbers(dilation_)};
}

Way Convolution::way(const at::Tensor& input, const at::Tensor& weight) const {
  const auto type = input.scalar_type();
  const bool choice = input.device().is_cpu() && weight.scalar_type() == type &&
                      (type == at::kFloat || type == at::kBFloat16);
  return choice ? choose_way(problem(input, weight)) : Way::library;
}

at::Tensor shaped_like(const at::Tensor& weight, at::ScalarType dtype) {
  return weight.scalar_type() == dtype ? weight : at::empty_like(weight, weight.options().dtype(dtype));
}

at::Tensor in_format(const at::Tensor& t, at::MemoryFormat format) {
  if (t.is_contiguous(format)) {
    // A dimension of size 1 may have any stride.
    const auto strides = strides_of(t.sizes(), format);
    return t.strides() == at::IntArrayRef(strides) ? t : t.as_strided(t.sizes(), strides);
  }
  at::Tensor copy = at::empty(t.sizes(), t.options().memory_format(format));
  hint_huge_pages(copy);
  return copy.copy_(t);
}

at::Tensor Convolution::arranged(
    const at::Tensor& t, const at::Tensor& input, const at::Tensor& weight) const {
  const Way taken = way(input, weight);
  const bool last = taken == Way::channels_last || taken == Way::by_pixels;
  return last ? in_format(t, at::MemoryFormat::ChannelsLast) : t;
}

at::Tensor Convolution::forward(
    const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias) const {
  switch (way(input, weight)) {
    case Way::direct:
      return direct_conv(direct_conv_shape(problem(input, weight)), input, weight, bias);
    case Way::by_pixels:
      return conv_by_pixels(problem(input, weight), input, weight, bias);
    default:
      return at::convolution_symint(
          input, weight, bias, stride_, padding_, dilation_, transposed_, output_padding_, groups_);
  }
}

ProductGradients Convolution::backward(
    const at::Tensor& grad,
    const at::Tensor& input,
    const at::Tensor& weight,
    const std::array<bool, 3>& wanted) const {
  const auto library = [&](const std::array<bool, 3>& parts) {
    const std::vector<c10::SymInt> features{grad.sym_size(1)};
    at::Tensor W = weight;
    if (input.device().is_cpu()) {
      // Where it multiplies without oneDNN, over channels_last images, it refuses weights that lie otherwise,
      // also where it only takes their sizes.
      const auto format = output_format(weight, weight);
      W = parts[0] || weight.is_contiguous(format)
              ? in_format(weight, format)
              : at::empty(weight.sizes(), weight.options().memory_format(format));
    }
    return at::convolution_backward_symint(
        grad, input, W, features, stride_, padding_, dilation_, transposed_, output_padding_, groups_, parts);
  };
  const auto [x_wanted, W_wanted, bias_wanted] = wanted;
  ProductGradients grads;
  auto& [g_x, g_W, g_bias] = grads;
  switch (way(input, weight)) {
    case Way::direct: {
      // Measured: the library gains on the direct kernels sooner for the weight's gradient.
      const bool all = input.size(1) <= 4;
      if (W_wanted && !all) std::tie(std::ignore, g_W, g_bias) = library({false, true, bias_wanted});
      auto direct = direct_conv_backward(
          direct_conv_shape(problem(input, weight)), grad, input, weight, {x_wanted, W_wanted && all});
      g_x = std::move(direct.first);
      if (all) g_W = std::move(direct.second);
      break;
    }
    case Way::by_pixels:
      std::tie(g_x, g_W) =
          conv_by_pixels_backward(problem(input, weight), grad, input, weight, {x_wanted, W_wanted});
      break;
    default:
      // The library's gradient of the bias comes with the weight's, wanted or not.
      if (x_wanted || W_wanted) grads = library({x_wanted, W_wanted, W_wanted && bias_wanted});
  }
  if (bias_wanted && !g_bias.defined()) g_bias = bias_gradient(grad);
  return grads;
}

}  // namespace bbb_fast
