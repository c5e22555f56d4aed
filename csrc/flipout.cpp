// flipout_linear and flipout_conv: y = x mu + b_mu + ((x s) (sigma eps) + sigma_b eps_b) r with one draw of
// eps for the batch and random signs s and r of each row and channel (Wen, Vicol, Ba, Tran and Grosse,
// "Flipout", ICLR 2018, eq. 4), for every device.
#include "kept_draw.h"
#include "layer_op.h"

namespace bbb_fast {
namespace {

// The noise of the weight and of the bias takes the streams before (bbb.cpp).
constexpr int64_t kInputSigns = 2, kOutputSigns = 3;

struct Flipout : KeepsDraw {
  static constexpr const char* kName = "flipout";
  static constexpr Operands kOperands = Operands::mean_and_noise;

  // sigma eps of the weight and of the bias.
  static std::tuple<std::vector<at::Tensor>, at::Tensor> deviations(
      const Layer& layer, at::TensorList mu, at::TensorList rho, bool with_kl) {
    return sample_weights(
        mu, rho, layer.rng, layer.prior_mu, layer.prior_sigma, with_kl, layer.input.scalar_type(), true);
  }

  template <class Product>
  static std::tuple<at::Tensor, at::Tensor, at::Tensor> forward(
      const char*, const Product& product, const Layer& layer, bool with_kl, bool) {
    const auto dtype = layer.input.scalar_type();
    auto [drawn, kl] = deviations(layer, layer.mu(), layer.rho(), with_kl);
    OptionalTensor b_mu, b_drawn;
    if (has(layer.bias_mu)) {
      b_mu = layer.bias_mu->to(dtype);
      b_drawn = drawn[1];
    }
    const auto format = product.output_format(layer.input, layer.W_mu);
    const at::Tensor x = product.arranged(layer.input, layer.input, layer.W_mu);
    const at::Tensor flipped = flip_signs(x, layer.rng, kInputSigns, Product::kChannelDim);
    at::Tensor y = in_format(product.forward(x, layer.W_mu.to(dtype), b_mu), format);
    const at::Tensor deviation = product.forward(flipped, drawn[0], b_drawn);
    add_flipped_(y, in_format(deviation, format), layer.rng, kOutputSigns, Product::kChannelDim);
    return {std::move(y), std::move(drawn[0]), std::move(kl)};
  }

  template <class Product>
  class Backward {
   public:
    Backward(const Product& product, const Layer& layer, const at::Tensor& grad, const OptionalTensor& kept)
        : product_(product),
          layer_(layer),
          deviation_(kept.value_or(at::Tensor())),
          g_(product.arranged(
              in_format(grad, product.output_format(layer.input, layer.W_mu)), layer.input, layer.W_mu)),
          x_(product.arranged(layer.input, layer.input, layer.W_mu)),
          g_flipped_(flip_signs(g_, layer.rng, kOutputSigns, Product::kChannelDim)),
          x_flipped_(flip_signs(x_, layer.rng, kInputSigns, Product::kChannelDim)) {}

    OperandGradients operands(bool W, bool bias) const {
      const std::array<bool, 3> which{false, W, bias};
      const at::Tensor like = shaped_like(layer_.W_mu, layer_.input.scalar_type());
      OperandGradients grads;
      std::tie(std::ignore, grads.W, grads.bias) = product_.backward(g_, x_, like, which);
      std::tie(std::ignore, grads.W_spread, grads.bias_spread) =
          product_.backward(g_flipped_, x_flipped_, like, which);
      return grads;
    }

    std::optional<at::ScalarType> again() const {
      return deviation_.defined() ? std::nullopt : std::optional(layer_.input.scalar_type());
    }

    at::Tensor input(const at::Tensor& formed) const {
      at::Tensor deviation = deviation_.defined() ? deviation_ : formed;
      if (!deviation.defined()) {
        // The same rng gives the same draw.
        deviation = std::get<0>(deviations(layer_, {layer_.W_mu}, {layer_.W_rho}, false))[0];
      }
      const std::array<bool, 3> which{true, false, false};
      const at::Tensor W = layer_.W_mu.to(layer_.input.scalar_type());
      at::Tensor g_x = std::get<0>(product_.backward(g_, x_, W, which));
      add_flipped_(
          g_x, std::get<0>(product_.backward(g_flipped_, x_flipped_, deviation, which)), layer_.rng,
          kInputSigns, Product::kChannelDim);
      return in_format(g_x, product_.output_format(layer_.input, layer_.W_mu));
    }

   private:
    const Product& product_;
    const Layer& layer_;
    at::Tensor deviation_, g_, x_, g_flipped_, x_flipped_;
  };
};

TORCH_LIBRARY_IMPL(bbb_fast, CompositeExplicitAutograd, m) {
  OverLinear<LayerOp, Flipout>::implement_kernels(m);
  OverConvolution<LayerOp, Flipout>::implement_kernels(m);
}

TORCH_LIBRARY_IMPL(bbb_fast, Autograd, m) {
  OverLinear<LayerOp, Flipout>::implement_autograd(m);
  OverConvolution<LayerOp, Flipout>::implement_autograd(m);
}

}  // namespace
}  // namespace bbb_fast
