// bbb_linear and bbb_conv: a product with weights drawn from the posterior (Blundell et al., "Weight
// uncertainty in neural networks", ICML 2015), for every device.
#include "kept_draw.h"
#include "layer_op.h"

namespace bbb_fast {
namespace {

struct WeightSpace : KeepsDraw {
  static constexpr const char* kName = "bbb";
  static constexpr Operands kOperands = Operands::weight;

  template <class Product>
  static std::tuple<at::Tensor, at::Tensor, at::Tensor> forward(
      const char*, const Product& product, const Layer& layer, bool with_kl, bool) {
    auto [weights, kl] = sample_weights(
        layer.mu(), layer.rho(), layer.rng, layer.prior_mu, layer.prior_sigma, with_kl,
        layer.input.scalar_type());
    at::Tensor output = product.forward(
        product.arranged(layer.input, layer.input, weights[0]), weights[0],
        weights.size() > 1 ? OptionalTensor(weights[1]) : std::nullopt);
    output = in_format(output, product.output_format(layer.input, layer.W_mu));
    return {std::move(output), std::move(weights[0]), std::move(kl)};
  }

  template <class Product>
  class Backward {
   public:
    Backward(const Product& product, const Layer& layer, const at::Tensor& grad, const OptionalTensor& kept)
        : product_(product),
          layer_(layer),
          weight_(kept.value_or(at::Tensor())),
          g_(product.arranged(grad, layer.input, layer.W_mu)),
          x_(product.arranged(layer.input, layer.input, layer.W_mu)) {}

    OperandGradients operands(bool W, bool bias) const {
      const at::Tensor like =
          weight_.defined() ? weight_ : shaped_like(layer_.W_mu, layer_.input.scalar_type());
      auto [none, g_W, g_bias] = product_.backward(g_, x_, like, {false, W, bias});
      return {std::move(g_W), std::move(g_bias), {}, {}};
    }

    std::optional<at::ScalarType> again() const {
      return weight_.defined() ? std::nullopt : std::optional(layer_.input.scalar_type());
    }

    at::Tensor input(const at::Tensor& formed) const {
      at::Tensor weight = weight_.defined() ? weight_ : formed;
      if (!weight.defined()) {
        // The same rng gives the same draw.
        weight = std::get<0>(sample_weights(
            {layer_.W_mu}, {layer_.W_rho}, layer_.rng, layer_.prior_mu, layer_.prior_sigma, false,
            layer_.input.scalar_type()))[0];
      }
      const at::Tensor g_x = std::get<0>(product_.backward(g_, x_, weight, {true, false, false}));
      return in_format(g_x, product_.output_format(layer_.input, layer_.W_mu));
    }

   private:
    const Product& product_;
    const Layer& layer_;
    at::Tensor weight_, g_, x_;
  };
};

TORCH_LIBRARY_IMPL(bbb_fast, CompositeExplicitAutograd, m) {
  OverLinear<LayerOp, WeightSpace>::implement_kernels(m);
  OverConvolution<LayerOp, WeightSpace>::implement_kernels(m);
}

TORCH_LIBRARY_IMPL(bbb_fast, Autograd, m) {
  OverLinear<LayerOp, WeightSpace>::implement_autograd(m);
  OverConvolution<LayerOp, WeightSpace>::implement_autograd(m);
}

}  // namespace
}  // namespace bbb_fast
