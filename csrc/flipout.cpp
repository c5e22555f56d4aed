// flipout_linear and flipout_conv: y = x mu + b_mu + ((x s) (sigma eps) + sigma_b eps_b) r with one draw of
// eps for the batch and random signs s and r of each row and channel (Wen, Vicol, Ba, Tran and Grosse,
// "Flipout", ICLR 2018, eq. 4), for every device.
#include <ATen/ops/zeros.h>

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
        mu, rho, Draws(layer.rng).rngs(), layer.prior_mu, layer.prior_sigma, with_kl,
        layer.input.scalar_type(), true);
  }

  template <class Product>
  static std::tuple<at::Tensor, at::Tensor, at::Tensor> forward(
      const char*, const Product& product, const Layer& layer, bool with_kl, bool) {
    const auto dtype = layer.input.scalar_type();
    const Draws draws(layer.rng);
    auto [drawn, kl] = deviations(layer, layer.mu(), layer.rho(), with_kl);
    OptionalTensor b_mu, b_drawn;
    if (has(layer.bias_mu)) {
      b_mu = layer.bias_mu->to(dtype);
      b_drawn = drawn[1];
    }
    const auto format = product.output_format(layer.input, layer.W_mu);
    const at::Tensor x = product.arranged(layer.input, layer.input, layer.W_mu);
    at::Tensor y = draws.outputs_from(
        product.forward(x, layer.W_mu.to(dtype), b_mu), format, [&](at::Tensor& part, int64_t k) {
          const at::Tensor rng = draws.rng(k);
          const at::Tensor flipped = flip_signs(draws.of_input(x, k), rng, kInputSigns, Product::kChannelDim);
          const at::Tensor deviation =
              product.forward(flipped, draws.of_formed(drawn[0], k), draws.of_formed(b_drawn, k));
          add_flipped_(part, in_format(deviation, format), rng, kOutputSigns, Product::kChannelDim);
        });
    return {std::move(y), std::move(drawn[0]), std::move(kl)};
  }

  template <class Product>
  class Backward {
   public:
    Backward(const Product& product, const Layer& layer, const at::Tensor& grad, const OptionalTensor& kept)
        : product_(product),
          layer_(layer),
          draws_(layer.rng),
          format_(product.output_format(layer.input, layer.W_mu)),
          deviation_(kept.value_or(at::Tensor())),
          g_(product.arranged(in_format(grad, format_), layer.input, layer.W_mu)),
          x_(product.arranged(layer.input, layer.input, layer.W_mu)) {
      for (int64_t k = 0; k < draws_.count(); ++k) {
        const at::Tensor rng = draws_.rng(k);
        g_flipped_.push_back(flip_signs(draws_.of_output(g_, k), rng, kOutputSigns, Product::kChannelDim));
        x_flipped_.push_back(flip_signs(draws_.of_input(x_, k), rng, kInputSigns, Product::kChannelDim));
      }
      // The mean product is one for all draws.
      g_ = draws_.summed(g_);
    }

    // Of `size` draws from `first` on, and of the means with the first.
    OperandGradients operands(bool W, bool bias, int64_t first, int64_t size) const {
      const std::array<bool, 3> which{false, W, bias};
      const at::Tensor like = shaped_like(layer_.W_mu, layer_.input.scalar_type());
      OperandGradients grads;
      const auto add = [](auto gradients, std::vector<at::Tensor>& of_W, std::vector<at::Tensor>& of_bias) {
        of_W.push_back(std::move(std::get<1>(gradients)));
        of_bias.push_back(std::move(std::get<2>(gradients)));
      };
      if (first == 0) {
        add(product_.backward(g_, x_, like, which), grads.W, grads.bias);
      } else {
        const auto options = layer_.input.options();
        grads.W.push_back(W ? at::zeros(layer_.W_mu.sizes(), options) : at::Tensor());
        grads.bias.push_back(bias ? at::zeros(layer_.bias_mu->sizes(), options) : at::Tensor());
      }
      for (int64_t k = first; k < first + size; ++k) {
        add(product_.backward(g_flipped_[k], x_flipped_[k], like, which), grads.W_spread, grads.bias_spread);
      }
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
      for (int64_t k = 0; k < draws_.count(); ++k) {
        at::Tensor part = draws_.of_input(g_x, k);
        add_flipped_(
            part,
            std::get<0>(
                product_.backward(g_flipped_[k], x_flipped_[k], draws_.of_formed(deviation, k), which)),
            draws_.rng(k), kInputSigns, Product::kChannelDim);
      }
      return in_format(g_x, format_);
    }

   private:
    const Product& product_;
    const Layer& layer_;
    const Draws draws_;
    const at::MemoryFormat format_;
    at::Tensor deviation_, g_, x_;
    std::vector<at::Tensor> g_flipped_, x_flipped_;  // of each draw
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
