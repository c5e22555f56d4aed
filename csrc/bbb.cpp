// bbb_linear and bbb_conv: a product with weights drawn from the posterior (Blundell et al., "Weight
// uncertainty in neural networks", ICML 2015), for every device.
#include "layer_op.h"

namespace bbb_fast {
namespace {

struct WeightSpace {
  static constexpr const char* kName = "bbb";
  static constexpr bool kMoments = false;
  using Option = bool;  // recompute_weight
  static bool keeps(bool recompute_weight) { return !recompute_weight; }

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
  static OperandGradients backward(
      const char*,
      const Product& product,
      const Layer& layer,
      const at::Tensor& grad,
      const OptionalTensor& kept,
      const Wanted& wanted) {
    at::Tensor weight = kept.value_or(at::Tensor());
    if (!weight.defined() && wanted.input) {
      // The same rng gives the same draw.
      weight = std::get<0>(sample_weights(
          {layer.W_mu}, {layer.W_rho}, layer.rng, layer.prior_mu, layer.prior_sigma, false,
          layer.input.scalar_type()))[0];
    }
    // Without the input's gradient, its shape and type alone matter.
    if (!weight.defined()) weight = layer.W_mu.to(layer.input.scalar_type());
    auto [input, W, bias] = product.backward(
        product.arranged(grad, layer.input, weight), product.arranged(layer.input, layer.input, weight),
        weight, {wanted.input, wanted.W, wanted.bias});
    if (input.defined()) input = in_format(input, product.output_format(layer.input, layer.W_mu));
    return {std::move(input), std::move(W), std::move(bias), {}, {}};
  }
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
