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
    const Draws draws(layer.rng);
    auto [weights, kl] = sample_weights(
        layer.mu(), layer.rho(), draws.rngs(), layer.prior_mu, layer.prior_sigma, with_kl,
        layer.input.scalar_type());
    const OptionalTensor biases = weights.size() > 1 ? OptionalTensor(weights[1]) : std::nullopt;
    const at::Tensor x = product.arranged(layer.input, layer.input, draws.of_formed(weights[0], 0));
    at::Tensor output = draws.outputs(product.output_format(layer.input, layer.W_mu), [&](int64_t k) {
      return product.forward(
          draws.of_input(x, k), draws.of_formed(weights[0], k), draws.of_formed(biases, k));
    });
    return {std::move(output), std::move(weights[0]), std::move(kl)};
  }

  template <class Product>
  class Backward {
   public:
    Backward(const Product& product, const Layer& layer, const at::Tensor& grad, const OptionalTensor& kept)
        : product_(product),
          layer_(layer),
          draws_(layer.rng),
          weight_(kept.value_or(at::Tensor())),
          g_(product.arranged(grad, layer.input, layer.W_mu)),
          x_(product.arranged(layer.input, layer.input, layer.W_mu)) {}

    // Of `size` draws from `first` on.
    OperandGradients operands(bool W, bool bias, int64_t first, int64_t size) const {
      const at::Tensor like = shaped_like(layer_.W_mu, layer_.input.scalar_type());
      OperandGradients grads;
      for (int64_t k = first; k < first + size; ++k) {
        auto [none, g_W, g_bias] =
            product_.backward(draws_.of_output(g_, k), draws_.of_input(x_, k), like, {false, W, bias});
        grads.W.push_back(std::move(g_W));
        grads.bias.push_back(std::move(g_bias));
      }
      return grads;
    }

    std::optional<at::ScalarType> again() const {
      return weight_.defined() ? std::nullopt : std::optional(layer_.input.scalar_type());
    }

    at::Tensor input(const at::Tensor& formed) const {
      at::Tensor weight = weight_.defined() ? weight_ : formed;
      if (!weight.defined()) {
        // The same rng gives the same draw.
        weight = std::get<0>(sample_weights(
            {layer_.W_mu}, {layer_.W_rho}, draws_.rngs(), layer_.prior_mu, layer_.prior_sigma, false,
            layer_.input.scalar_type()))[0];
      }
      return draws_.input_gradient(product_.output_format(layer_.input, layer_.W_mu), [&](int64_t k) {
        const at::Tensor g = draws_.of_output(g_, k), x = draws_.of_input(x_, k);
        return std::get<0>(product_.backward(g, x, draws_.of_formed(weight, k), {true, false, false}));
      });
    }

   private:
    const Product& product_;
    const Layer& layer_;
    const Draws draws_;
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
