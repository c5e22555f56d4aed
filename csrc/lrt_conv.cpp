// lrt_conv: convolutions of 1 to 3 dimensions, two library convolutions and two fused passes, for every
// device; its backward and autograd.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "checks.h"
#include "lrt.h"

namespace bbb_fast {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct Geometry {
  c10::SymIntArrayRef stride, padding, dilation;
  bool transposed;
  c10::SymIntArrayRef output_padding;
  c10::SymInt groups;
};

void check_geometry(const at::Tensor& input, const at::Tensor& W_mu, const Geometry& g) {
  const char* op = "lrt_conv";
  const int64_t spatial = W_mu.dim() - 2;
  TORCH_CHECK_VALUE(
      spatial >= 1 && spatial <= 3, op, ": W_mu must have 3, 4 or 5 dimensions, got ", W_mu.sizes());
  TORCH_CHECK_VALUE(
      input.dim() == W_mu.dim(), op, ": input must have ", W_mu.dim(), " dimensions like W_mu, got ",
      input.sizes());
  const auto check = [&](const char* name, c10::SymIntArrayRef values, int64_t least) {
    TORCH_CHECK_VALUE(
        static_cast<int64_t>(values.size()) == spatial, op, ": ", name, " must have ", spatial,
        " numbers, got ", values.size());
    for (const auto& v : values) {
      TORCH_CHECK_VALUE(v >= least, op, ": ", name, " must be >= ", least, ", got ", values);
    }
  };
  check("stride", g.stride, 1);
  check("padding", g.padding, 0);
  check("dilation", g.dilation, 1);
  check("output_padding", g.output_padding, 0);
  TORCH_CHECK_VALUE(g.groups >= 1, op, ": groups must be >= 1, got ", g.groups);
  const c10::SymInt channels = g.transposed ? c10::SymInt(W_mu.size(0)) : W_mu.size(1) * g.groups;
  TORCH_CHECK_VALUE(
      input.size(1) == channels && W_mu.size(0) % g.groups == 0, op, ": input must have ", channels,
      " channels for W_mu ", W_mu.sizes(), " and groups = ", g.groups, ", got input ", input.sizes());
  for (int64_t d = 0; d < spatial; ++d) {
    const c10::SymInt reach = g.dilation[d] * (W_mu.size(2 + d) - 1) + 1;
    const c10::SymInt padded = input.size(2 + d) + g.padding[d] * 2;
    TORCH_CHECK_VALUE(
        g.transposed || padded >= reach, op, ": the kernel reaches over ", reach,
        " elements, more than the padded input's ", padded, ", in dimension ", 2 + d, " of input ",
        input.sizes());
  }
}

// The memory format of the output, which numbers its noise: channels_last if the input or the weight is
// stored so and not at the same time contiguous. The same rule stands in bbb_fast/reference.py.
at::MemoryFormat output_format(const at::Tensor& input, const at::Tensor& weight) {
  if (input.dim() == 4 || input.dim() == 5) {
    const auto last = input.dim() == 4 ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::ChannelsLast3d;
    for (const at::Tensor& t : {input, weight}) {
      if (t.is_contiguous(last) && !t.is_contiguous()) return last;
    }
  }
  return at::MemoryFormat::Contiguous;
}

at::Tensor convolution(
    const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias, const Geometry& g) {
  return at::convolution_symint(
      input, weight, bias, g.stride, g.padding, g.dilation, g.transposed, g.output_padding, g.groups);
}

std::tuple<at::Tensor, at::Tensor> lrt_conv(
    const at::Tensor& input,
    const at::Tensor& W_mu,
    const at::Tensor& W_rho,
    const OptionalTensor& bias_mu,
    const OptionalTensor& bias_rho,
    const at::Tensor& rng,
    c10::SymIntArrayRef stride,
    c10::SymIntArrayRef padding,
    c10::SymIntArrayRef dilation,
    bool transposed,
    c10::SymIntArrayRef output_padding,
    c10::SymInt groups,
    std::optional<at::ScalarType> variance_dtype) {
  const Geometry geometry{stride, padding, dilation, transposed, output_padding, groups};
  check_geometry(input, W_mu, geometry);
  const int64_t features = transposed ? W_mu.size(1) * groups.expect_int() : W_mu.size(0);
  check_lrt("lrt_conv", input, W_mu, W_rho, bias_mu, bias_rho, rng, features, variance_dtype);

  const auto dtype = input.scalar_type();
  const auto vdtype = variance_dtype_for(input, variance_dtype);
  OptionalTensor b_mu, b_var;
  if (has(bias_mu)) {
    b_mu = bias_mu->to(dtype);
    b_var = variance(*bias_rho, vdtype);
  }
  const auto format = output_format(input, W_mu);
  at::Tensor m = convolution(input, W_mu.to(dtype), b_mu, geometry).contiguous(format);
  at::Tensor v =
      convolution(square(input, vdtype), variance(W_rho, vdtype), b_var, geometry).contiguous(format);
  lrt_sample_(m, v, rng);
  return {std::move(m), std::move(v)};
}

std::vector<at::Tensor> lrt_conv_backward(
    const at::Tensor& grad,
    const at::Tensor& input,
    const at::Tensor& W_mu,
    const at::Tensor& W_rho,
    const OptionalTensor& bias_rho,
    const at::Tensor& v,
    const at::Tensor& rng,
    c10::SymIntArrayRef stride,
    c10::SymIntArrayRef padding,
    c10::SymIntArrayRef dilation,
    bool transposed,
    c10::SymIntArrayRef output_padding,
    c10::SymInt groups,
    c10::List<bool> output_mask) {
  const Geometry geometry{stride, padding, dilation, transposed, output_padding, groups};
  check_geometry(input, W_mu, geometry);
  TORCH_CHECK_VALUE(output_mask.size() == 5, "lrt_conv_backward: output_mask must have 5 entries");
  TORCH_CHECK_VALUE(
      grad.sizes() == v.sizes(), "lrt_conv_backward: grad must have shape ", v.sizes(), ", got ",
      grad.sizes());
  const auto dtype = input.scalar_type();
  const auto vdtype = v.scalar_type();
  const at::Tensor g = grad.contiguous(output_format(input, W_mu));
  const at::Tensor g_v = lrt_sample_backward(g, v, rng);
  const std::vector<c10::SymInt> features{v.sym_size(1)};
  const bool need_x = output_mask[0];

  auto [g_x, g_mu, g_b] = at::convolution_backward_symint(
      g, input, W_mu.to(dtype), features, stride, padding, dilation, transposed, output_padding, groups,
      {need_x, output_mask[1], output_mask[3]});
  auto [g_x2, g_var, g_bvar] = at::convolution_backward_symint(
      g_v, square(input, vdtype), variance(W_rho, vdtype), features, stride, padding, dilation, transposed,
      output_padding, groups, {need_x, output_mask[2], output_mask[4]});

  std::vector<at::Tensor> grads;
  if (need_x) {
    square_backward_(g_x, input, g_x2);
    grads.push_back(std::move(g_x));
  }
  if (output_mask[1]) grads.push_back(g_mu.to(W_mu.scalar_type()));
  if (output_mask[2]) grads.push_back(variance_backward(g_var, W_rho));
  if (output_mask[3]) grads.push_back(g_b.to(W_mu.scalar_type()));
  if (output_mask[4]) grads.push_back(variance_backward(g_bvar, *bias_rho));
  return grads;
}

class LrtConv : public torch::autograd::Function<LrtConv> {
 public:
  static variable_list forward(
      AutogradContext* ctx,
      const at::Tensor& input,
      const at::Tensor& W_mu,
      const at::Tensor& W_rho,
      const OptionalTensor& bias_mu,
      const OptionalTensor& bias_rho,
      const at::Tensor& rng,
      c10::SymIntArrayRef stride,
      c10::SymIntArrayRef padding,
      c10::SymIntArrayRef dilation,
      bool transposed,
      c10::SymIntArrayRef output_padding,
      c10::SymInt groups,
      std::optional<at::ScalarType> variance_dtype) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("bbb_fast::lrt_conv", "")
                               .typed<std::tuple<at::Tensor, at::Tensor>(
                                   const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                   const OptionalTensor&, const OptionalTensor&, const at::Tensor&,
                                   c10::SymIntArrayRef, c10::SymIntArrayRef, c10::SymIntArrayRef, bool,
                                   c10::SymIntArrayRef, c10::SymInt, std::optional<at::ScalarType>)>();
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, v] = op.call(
        input, W_mu, W_rho, bias_mu, bias_rho, rng, stride, padding, dilation, transposed, output_padding,
        groups, variance_dtype);
    ctx->saved_data["bias"] = has(bias_mu);
    ctx->saved_data["stride"] = stride.vec();
    ctx->saved_data["padding"] = padding.vec();
    ctx->saved_data["dilation"] = dilation.vec();
    ctx->saved_data["transposed"] = transposed;
    ctx->saved_data["output_padding"] = output_padding.vec();
    ctx->saved_data["groups"] = groups;
    ctx->save_for_backward({input, W_mu, W_rho, has(bias_rho) ? *bias_rho : at::Tensor(), v, rng});
    ctx->mark_non_differentiable({v});
    return {y, v};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("bbb_fast::lrt_conv_backward", "")
                               .typed<std::vector<at::Tensor>(
                                   const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                   const OptionalTensor&, const at::Tensor&, const at::Tensor&,
                                   c10::SymIntArrayRef, c10::SymIntArrayRef, c10::SymIntArrayRef, bool,
                                   c10::SymIntArrayRef, c10::SymInt, c10::List<bool>)>();
    const auto saved = ctx->get_saved_variables();
    auto& data = ctx->saved_data;
    const bool bias = data["bias"].toBool();
    // Edges count the tensor arguments only.
    c10::List<bool> mask;
    for (size_t i = 0; i < 5; ++i) {
      mask.push_back((i < 3 || bias) && ctx->needs_input_grad(i));
    }
    const OptionalTensor bias_rho = bias ? OptionalTensor(saved[3]) : std::nullopt;
    auto computed = op.call(
        grads[0], saved[0], saved[1], saved[2], bias_rho, saved[4], saved[5], data["stride"].toSymIntVector(),
        data["padding"].toSymIntVector(), data["dilation"].toSymIntVector(), data["transposed"].toBool(),
        data["output_padding"].toSymIntVector(), data["groups"].toSymInt(), mask);
    variable_list result(13);
    for (size_t i = 0, next = 0; i < 5; ++i) {
      if (mask[i]) result[i] = std::move(computed[next++]);
    }
    return result;
  }
};

std::tuple<at::Tensor, at::Tensor> lrt_conv_autograd(
    const at::Tensor& input,
    const at::Tensor& W_mu,
    const at::Tensor& W_rho,
    const OptionalTensor& bias_mu,
    const OptionalTensor& bias_rho,
    const at::Tensor& rng,
    c10::SymIntArrayRef stride,
    c10::SymIntArrayRef padding,
    c10::SymIntArrayRef dilation,
    bool transposed,
    c10::SymIntArrayRef output_padding,
    c10::SymInt groups,
    std::optional<at::ScalarType> variance_dtype) {
  auto result = LrtConv::apply(
      input, W_mu, W_rho, bias_mu, bias_rho, rng, stride, padding, dilation, transposed, output_padding,
      groups, variance_dtype);
  return {result[0], result[1]};
}

TORCH_LIBRARY_IMPL(bbb_fast, CompositeExplicitAutograd, m) {
  m.impl("lrt_conv", &lrt_conv);
  m.impl("lrt_conv_backward", &lrt_conv_backward);
}

TORCH_LIBRARY_IMPL(bbb_fast, Autograd, m) {
  m.impl("lrt_conv", &lrt_conv_autograd);
}

}  // namespace
}  // namespace bbb_fast
