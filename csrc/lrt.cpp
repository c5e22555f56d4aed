// lrt_linear and lrt_conv: local reparameterization (Kingma, Salimans and Welling, NeurIPS 2015, eq. 6), two
// products and the fused passes beside them, for every device.
#include "checks.h"
#include "cpu/isa.h"
#include "layer_op.h"

namespace bbb_fast {
namespace {

// The type the variance product is asked to run in: as given, else the input's; float32 for float16, whose
// squares leave its range.
at::ScalarType variance_dtype_for(const at::Tensor& input, std::optional<at::ScalarType> asked) {
  if (asked) return *asked;
  return input.scalar_type() == at::kHalf ? at::kFloat : input.scalar_type();
}

// The type the library is given it in. A CPU without bfloat16 instructions multiplies bfloat16 several
// times slower than float32; the same rounded numbers in float32 give the same products.
at::ScalarType product_dtype_for(const at::Tensor& input, at::ScalarType vdtype) {
  const bool slow = vdtype == at::kBFloat16 && input.scalar_type() != at::kBFloat16 &&
                    input.device().is_cpu() && !multiplies_bfloat16();
  return slow ? at::kFloat : vdtype;
}

// t.to(dtype), past the dispatcher where there is nothing to do.
at::Tensor as_type(const at::Tensor& t, at::ScalarType dtype) {
  return t.scalar_type() == dtype ? t : t.to(dtype);
}

// x^2. The CPU's transposed convolution in float64 refuses some strides of dimensions of size 1.
at::Tensor squared(const at::Tensor& x, at::ScalarType dtype) {
  const bool plain = dtype == at::kDouble && x.is_contiguous();
  return square(plain ? in_format(x, at::MemoryFormat::Contiguous) : x, dtype);
}

struct LocalReparameterization {
  static constexpr const char* kName = "lrt";
  static constexpr Operands kOperands = Operands::mean_and_variance;
  using Option = std::optional<at::ScalarType>;  // variance_dtype
  static bool keeps(const Option&) { return true; }

  template <class Product>
  static std::tuple<at::Tensor, at::Tensor, at::Tensor> forward(
      const char* op, const Product& product, const Layer& layer, bool with_kl, const Option& asked) {
    check_dtype_option(op, "variance_dtype", asked);
    const auto dtype = layer.input.scalar_type();
    const auto vdtype = variance_dtype_for(layer.input, asked);
    const auto pdtype = product_dtype_for(layer.input, vdtype);
    auto [variances, kl] =
        variance(layer.mu(), layer.rho(), layer.prior_mu, layer.prior_sigma, with_kl, vdtype);
    OptionalTensor b_mu, b_var;
    if (has(layer.bias_mu)) {
      b_mu = as_type(*layer.bias_mu, dtype);
      b_var = as_type(variances[1], pdtype);
    }
    const Draws draws(layer.rng);
    const auto format = product.output_format(layer.input, layer.W_mu);
    const at::Tensor x = product.arranged(layer.input, layer.input, layer.W_mu);
    at::Tensor v = product.forward(as_type(squared(x, vdtype), pdtype), as_type(variances[0], pdtype), b_var);
    v = in_format(as_type(v, vdtype), format);
    at::Tensor y = draws.outputs_from(
        product.forward(x, as_type(layer.W_mu, dtype), b_mu), format,
        [&](at::Tensor& part, int64_t k) { lrt_sample_(part, draws.of_input(v, k), draws.rng(k)); });
    return {std::move(y), std::move(v), std::move(kl)};
  }

  // `output`: the sizes of what the products make of the input.
  static void check_kept(const char* op, const Layer&, at::IntArrayRef output, const OptionalTensor& kept) {
    TORCH_CHECK_VALUE(has(kept), op, ": kept, the variance of the output, is missing");
    check_shape(op, "kept", *kept, output);
  }

  template <class Product>
  class Backward {
   public:
    Backward(const Product& product, const Layer& layer, const at::Tensor& grad, const OptionalTensor& kept)
        : product_(product), layer_(layer) {
      const at::Tensor& v = *kept;
      vdtype_ = v.scalar_type();
      pdtype_ = product_dtype_for(layer.input, vdtype_);
      format_ = product.output_format(layer.input, layer.W_mu);
      const auto arranged = [&](const at::Tensor& t) { return product.arranged(t, layer.input, layer.W_mu); };
      const at::Tensor g = in_format(grad, format_);
      g_v_ = arranged(as_type(variance_gradient(Draws(layer.rng), format_, g, v), pdtype_));
      g_ = arranged(in_format(Draws(layer.rng).summed(g), format_));
      x_ = arranged(layer.input);
      x2_ = as_type(squared(x_, vdtype_), pdtype_);
      W_ = as_type(layer.W_mu, layer.input.scalar_type());
    }

    // Of all draws, which share the weight's mean and variance.
    OperandGradients operands(bool W, bool bias, int64_t, int64_t) const {
      const std::array<bool, 3> which{false, W, bias};
      auto [none, g_W, g_bias] = product_.backward(g_, x_, W_, which);
      auto [none_either, g_W_var, g_bias_var] =
          product_.backward(g_v_, x2_, shaped_like(layer_.W_rho, pdtype_), which);
      return {{std::move(g_W)}, {std::move(g_bias)}, {std::move(g_W_var)}, {std::move(g_bias_var)}};
    }

    std::optional<at::ScalarType> again() const { return vdtype_; }

    at::Tensor input(const at::Tensor& formed) const {
      const at::Tensor W_variance =
          formed.defined()
              ? formed
              : std::get<0>(variance(
                    {layer_.W_mu}, {layer_.W_rho}, layer_.prior_mu, layer_.prior_sigma, false, vdtype_))[0];
      const std::array<bool, 3> which{true, false, false};
      at::Tensor g_x = std::get<0>(product_.backward(g_, x_, W_, which));
      const at::Tensor g_x2 = std::get<0>(product_.backward(g_v_, x2_, as_type(W_variance, pdtype_), which));
      square_backward_(g_x, x_, g_x2);
      return in_format(g_x, format_);
    }

   private:
    // Of the variances, from that of all draws.
    static at::Tensor variance_gradient(
        const Draws& draws, at::MemoryFormat format, const at::Tensor& grad, const at::Tensor& v) {
      return draws.input_gradient(format, [&](int64_t k) {
        return lrt_sample_backward(draws.of_output(grad, k), draws.of_input(v, k), draws.rng(k));
      });
    }

    const Product& product_;
    const Layer& layer_;
    at::ScalarType vdtype_, pdtype_;
    at::MemoryFormat format_;
    at::Tensor g_, g_v_, x_, x2_, W_;
  };
};

TORCH_LIBRARY_IMPL(bbb_fast, CompositeExplicitAutograd, m) {
  OverLinear<LayerOp, LocalReparameterization>::implement_kernels(m);
  OverConvolution<LayerOp, LocalReparameterization>::implement_kernels(m);
}

TORCH_LIBRARY_IMPL(bbb_fast, Autograd, m) {
  OverLinear<LayerOp, LocalReparameterization>::implement_autograd(m);
  OverConvolution<LayerOp, LocalReparameterization>::implement_autograd(m);
}

}  // namespace
}  // namespace bbb_fast
