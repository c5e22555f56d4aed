// The linear maps that the layers are built on, and their gradients: library products, for every device.
// Linear and Convolution have the same members, so that an estimator is written once for both.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <tuple>
#include <vector>

#include "passes.h"
#include "routes.h"

namespace bbb_fast {

// Gradients of input, weight and bias; undefined where `wanted` said no.
using ProductGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// y = x W^T + b over the last dimension.
class Linear {
 public:
  void check(const char* op, const at::Tensor& input, const at::Tensor& weight) const;
  int64_t out_features(const at::Tensor& weight) const { return weight.size(0); }
  std::vector<int64_t> output_sizes(const at::Tensor& input, const at::Tensor& weight) const;
  // The dimension of an input and of an output that weights tell apart; Flipout has a sign for each row and
  // channel.
  static constexpr int64_t kChannelDim = -1;
  // The memory format of the output, which numbers the noise of local reparameterization.
  at::MemoryFormat output_format(const at::Tensor&, const at::Tensor&) const {
    return at::MemoryFormat::Contiguous;
  }
  // The input, or the output's gradient, in the memory format that the products below are fastest in. Their
  // results come in the format of what they are given.
  at::Tensor arranged(const at::Tensor& t, const at::Tensor& /*input*/, const at::Tensor& /*weight*/) const {
    return t;
  }
  at::Tensor forward(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias) const;
  ProductGradients backward(
      const at::Tensor& grad,
      const at::Tensor& input,
      const at::Tensor& weight,
      const std::array<bool, 3>& wanted) const;

 private:
  Way way(const at::Tensor& input, const at::Tensor& weight) const;
};

// What a product is given as its weight where it forms no gradient of the input: shape and type alone matter.
at::Tensor shaped_like(const at::Tensor& weight, at::ScalarType dtype);

// t with exactly the strides that a fresh tensor of its sizes has in a memory format; a copy if it is not in
// it. What an op returns goes through here: its strides then follow from those of the arguments, whatever way
// the products went, and the fake kernels (bbb_fast/_ops.py) can tell them.
at::Tensor in_format(const at::Tensor& t, at::MemoryFormat format);

// Convolutions of 1 to 3 dimensions.
class Convolution {
 public:
  Convolution(
      c10::SymIntArrayRef stride,
      c10::SymIntArrayRef padding,
      c10::SymIntArrayRef dilation,
      bool transposed,
      c10::SymIntArrayRef output_padding,
      const c10::SymInt& groups)
      : stride_(stride),
        padding_(padding),
        dilation_(dilation),
        transposed_(transposed),
        output_padding_(output_padding),
        groups_(groups) {}

  static constexpr int64_t kChannelDim = 1;
  void check(const char* op, const at::Tensor& input, const at::Tensor& weight) const;
  int64_t out_features(const at::Tensor& weight) const {
    return transposed_ ? weight.size(1) * groups_.expect_int() : weight.size(0);
  }
  std::vector<int64_t> output_sizes(const at::Tensor& input, const at::Tensor& weight) const;
  at::MemoryFormat output_format(const at::Tensor& input, const at::Tensor& weight) const;
  at::Tensor arranged(const at::Tensor& t, const at::Tensor& input, const at::Tensor& weight) const;
  at::Tensor forward(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias) const;
  ProductGradients backward(
      const at::Tensor& grad,
      const at::Tensor& input,
      const at::Tensor& weight,
      const std::array<bool, 3>& wanted) const;

 private:
  ConvProblem problem(const at::Tensor& input, const at::Tensor& weight) const;
  Way way(const at::Tensor& input, const at::Tensor& weight) const;

  c10::SymIntArrayRef stride_, padding_, dilation_;
  bool transposed_;
  c10::SymIntArrayRef output_padding_;
  const c10::SymInt& groups_;
};

}  // namespace bbb_fast
