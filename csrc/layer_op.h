// What the layer ops share: their checks, registration and autograd. An op is an estimator (estimators.h)
// over a product (products.h):
//
//   <estimator>_<product>(input, W_mu, W_rho, bias_mu, bias_rho, rng, <geometry>..., prior_mu, prior_sigma,
//       with_kl, option) -> (output, kept, kl)
//   <estimator>_<product>_backward(grad, grad_kl, input, W_mu, W_rho, bias_mu, bias_rho, kept, rng,
//       <geometry>..., prior_mu, prior_sigma, output_mask) -> gradients of the first five
//
// kept is what the estimator may keep for backward: BBB the weight, LRT the variance of the output, Flipout
// the weight's deviation from its mean. Where rng names several draws (draws.h), BBB and Flipout keep theirs
// of each, [S, ...], and LRT, of draws of the whole batch, the one variance that they share.
#pragma once

#include <ATen/ops/cat.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "checks.h"
#include "draws.h"
#include "kl_node.h"
#include "passes.h"
#include "products.h"

namespace bbb_fast {

// The tensors and the prior of a layer op.
struct Layer {
  const at::Tensor& input;
  const at::Tensor& W_mu;
  const at::Tensor& W_rho;
  const OptionalTensor& bias_mu;
  const OptionalTensor& bias_rho;
  const at::Tensor& rng;
  double prior_mu;
  double prior_sigma;

  void check(const char* op, int64_t out_features) const;
  // What the backward op is given besides; `output` is the shape of the forward's.
  void check_backward(
      const char* op,
      at::IntArrayRef output,
      const at::Tensor& grad,
      const OptionalTensor& kept,
      const c10::List<bool>& output_mask) const;
  // The posteriors: of the weight and, if there is one, of the bias.
  std::vector<at::Tensor> mu() const { return list(W_mu, bias_mu); }
  std::vector<at::Tensor> rho() const { return list(W_rho, bias_rho); }
  // The prior, once for each of them.
  std::vector<double> prior_mus() const { return std::vector<double>(has(bias_mu) ? 2 : 1, prior_mu); }
  std::vector<double> prior_sigmas() const { return std::vector<double>(has(bias_mu) ? 2 : 1, prior_sigma); }

 private:
  static std::vector<at::Tensor> list(const at::Tensor& W, const OptionalTensor& bias) {
    return has(bias) ? std::vector<at::Tensor>{W, *bias} : std::vector<at::Tensor>{W};
  }
};

// What the products' operands are formed of: the drawn weight; or the mean, and apart from it, what sigma
// makes.
enum class Operands { weight, mean_and_variance, mean_and_noise };

// The gradients of the products' operands, undefined where not wanted, become those of the posteriors: in
// place where the types allow, so that no more memory of the parameters' size is taken. W and bias are those
// of the weights of each draw, or of the means; the others of what each draw makes of sigma, or of sigma^2.
struct OperandGradients {
  std::vector<at::Tensor> W, bias, W_spread, bias_spread;
};
struct PosteriorGradients {
  std::vector<at::Tensor> parameters;  // of mu, then of rho
  at::Tensor formed;                   // the weight's second operand (or only one), if `again` asked for it
};
PosteriorGradients posterior_gradients(
    const Layer& layer,
    const at::Tensor& rngs,
    const OperandGradients& grads,
    const OptionalTensor& grad_kl,
    Operands formed_of,
    std::optional<at::ScalarType> again);

// The gradients that output_mask wants, in the order input, W_mu, W_rho, bias_mu, bias_rho.
std::vector<at::Tensor> pick_gradients(
    const at::Tensor& input, const std::vector<at::Tensor>& parameters, const c10::List<bool>& output_mask);

template <class... Geometry>
auto product_of(const Geometry&... geometry) {
  if constexpr (sizeof...(Geometry) == 0) {
    return Linear();
  } else {
    return Convolution(geometry...);
  }
}

// A geometry argument that outlives the call.
template <class T>
struct Owned {
  T value;
  explicit Owned(const T& v) : value(v) {}
  const T& get() const { return value; }
};
template <>
struct Owned<c10::SymIntArrayRef> {
  std::vector<c10::SymInt> value;
  explicit Owned(c10::SymIntArrayRef v) : value(v.vec()) {}
  c10::SymIntArrayRef get() const { return value; }
};

using LayerOutputs = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

template <class Option, class... Geometry>
using LayerForward = LayerOutputs(
    const at::Tensor&,
    const at::Tensor&,
    const at::Tensor&,
    const OptionalTensor&,
    const OptionalTensor&,
    const at::Tensor&,
    Geometry...,
    double,
    double,
    bool,
    Option);

template <class Estimator, class... Geometry>
class LayerOp {
 public:
  using Option = typename Estimator::Option;
  using ForwardSignature = LayerForward<Option, Geometry...>;
  using BackwardSignature = std::vector<at::Tensor>(
      const at::Tensor&,
      const OptionalTensor&,
      const at::Tensor&,
      const at::Tensor&,
      const at::Tensor&,
      const OptionalTensor&,
      const OptionalTensor&,
      const OptionalTensor&,
      const at::Tensor&,
      Geometry...,
      double,
      double,
      c10::List<bool>);

  static std::string name() {
    return std::string(Estimator::kName) + (sizeof...(Geometry) == 0 ? "_linear" : "_conv");
  }

  static LayerOutputs forward(
      const at::Tensor& input,
      const at::Tensor& W_mu,
      const at::Tensor& W_rho,
      const OptionalTensor& bias_mu,
      const OptionalTensor& bias_rho,
      const at::Tensor& rng,
      Geometry... geometry,
      double prior_mu,
      double prior_sigma,
      bool with_kl,
      Option option) {
    static const std::string op = name();
    // Autocast has had its say: it would give the products other types than the estimator does.
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const auto product = product_of(geometry...);
    const Layer layer{input, W_mu, W_rho, bias_mu, bias_rho, rng, prior_mu, prior_sigma};
    product.check(op.c_str(), input, W_mu);
    layer.check(op.c_str(), product.out_features(W_mu));
    return Estimator::forward(op.c_str(), product, layer, with_kl, option);
  }

  static std::vector<at::Tensor> backward(
      const at::Tensor& grad,
      const OptionalTensor& grad_kl,
      const at::Tensor& input,
      const at::Tensor& W_mu,
      const at::Tensor& W_rho,
      const OptionalTensor& bias_mu,
      const OptionalTensor& bias_rho,
      const OptionalTensor& kept,
      const at::Tensor& rng,
      Geometry... geometry,
      double prior_mu,
      double prior_sigma,
      c10::List<bool> output_mask) {
    static const std::string op = name() + "_backward";
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const auto product = product_of(geometry...);
    const Layer layer{input, W_mu, W_rho, bias_mu, bias_rho, rng, prior_mu, prior_sigma};
    product.check(op.c_str(), input, W_mu);
    layer.check(op.c_str(), product.out_features(W_mu));
    const auto output = product.output_sizes(input, W_mu);
    layer.check_backward(op.c_str(), Draws(rng).output_sizes(output), grad, kept, output_mask);
    Estimator::check_kept(op.c_str(), layer, output, kept);
    const bool W = output_mask[1] || output_mask[2];
    const bool bias = output_mask[3] || output_mask[4];
    const typename Estimator::template Backward<decltype(product)> through(product, layer, grad, kept);
    PosteriorGradients gradients;
    if (W || bias) {
      // The pass over the parameters also forms what the input's gradient needs of them.
      const auto again = output_mask[0] && W ? through.again() : std::nullopt;
      gradients = through_posterior(layer, through, W, bias, grad_kl, again);
    }
    const at::Tensor grad_input = output_mask[0] ? through.input(gradients.formed) : at::Tensor();
    return pick_gradients(grad_input, gradients.parameters, output_mask);
  }

  static LayerOutputs autograd(
      const at::Tensor& input,
      const at::Tensor& W_mu,
      const at::Tensor& W_rho,
      const OptionalTensor& bias_mu,
      const OptionalTensor& bias_rho,
      const at::Tensor& rng,
      Geometry... geometry,
      double prior_mu,
      double prior_sigma,
      bool with_kl,
      Option option) {
    namespace ag = torch::autograd;
    const at::Tensor b_mu = bias_mu.value_or(at::Tensor()), b_rho = bias_rho.value_or(at::Tensor());
    static const std::string own_name = name();
    for (const at::Tensor* t : {&input, &W_mu, &W_rho, &b_mu, &b_rho}) {
      check_no_tangent(own_name.c_str(), *t);
    }
    decltype(make_node<Node>()) node;
    if (ag::compute_requires_grad(input, W_mu, W_rho, b_mu, b_rho)) {
      node = make_node<Node>();
      node->set_next_edges(ag::collect_next_edges(input, W_mu, W_rho, b_mu, b_rho));
    }
    LayerOutputs outputs;
    {
      static const auto op = find_op<ForwardSignature>(name());
      at::AutoDispatchBelowADInplaceOrView guard;
      outputs = op.call(
          input, W_mu, W_rho, bias_mu, bias_rho, rng, geometry..., prior_mu, prior_sigma, with_kl, option);
    }
    if (node) {
      const Layer layer{input, W_mu, W_rho, bias_mu, bias_rho, rng, prior_mu, prior_sigma};
      auto& [output, kept, kl] = outputs;
      node->input = ag::SavedVariable(input, false);
      node->W_mu = ag::SavedVariable(W_mu, false);
      node->W_rho = ag::SavedVariable(W_rho, false);
      node->bias_mu = ag::SavedVariable(b_mu, false);
      node->bias_rho = ag::SavedVariable(b_rho, false);
      node->rng = ag::SavedVariable(rng, false);
      if (Estimator::keeps(option)) node->kept = ag::SavedVariable(kept, false);
      node->geometry.emplace(Owned<Geometry>(geometry)...);
      node->prior_mu = prior_mu;
      node->prior_sigma = prior_sigma;
      ag::set_history(output, node);
      if (with_kl) {
        // After the output's node: the engine runs later nodes first.
        const auto mu = layer.mu();
        KlNode::attach(
            kl, mu, layer.rho(), layer.prior_mus(), layer.prior_sigmas(), {{node->meeting, mu.size()}});
      }
    }
    return outputs;
  }

  static void implement_kernels(torch::Library& m) {
    m.impl(name().c_str(), &forward);
    m.impl((name() + "_backward").c_str(), &backward);
  }
  static void implement_autograd(torch::Library& m) { m.impl(name().c_str(), &autograd); }

 private:
  // Several draws' in groups: the gradients of all their weights at once would take as much memory as is kept
  // of them.
  template <class Through>
  static PosteriorGradients through_posterior(
      const Layer& layer,
      const Through& through,
      bool W,
      bool bias,
      const OptionalTensor& grad_kl,
      const std::optional<at::ScalarType>& again) {
    constexpr int64_t kGroup = 4;
    const Draws draws(layer.rng);
    const int64_t count = Estimator::kOperands == Operands::mean_and_variance ? 1 : draws.count();
    PosteriorGradients sum;
    std::vector<at::Tensor> formed;
    for (int64_t first = 0; first < count; first += kGroup) {
      const int64_t size = std::min(kGroup, count - first);
      const auto own = first == 0 ? grad_kl : std::nullopt;
      PosteriorGradients part = posterior_gradients(
          layer, draws.rngs(first, size), through.operands(W, bias, first, size), own, Estimator::kOperands,
          again);
      if (again) formed.push_back(std::move(part.formed));
      if (first == 0) {
        sum = std::move(part);
        continue;
      }
      for (size_t k = 0; k < sum.parameters.size(); ++k) sum.parameters[k].add_(part.parameters[k]);
    }
    if (again) sum.formed = formed.size() == 1 ? std::move(formed[0]) : at::cat(formed);
    return sum;
  }

  // Not a torch::autograd::Function: its bookkeeping takes longer than a small layer's product.
  struct Node : LayerNode {
    torch::autograd::SavedVariable input, W_mu, W_rho, bias_mu, bias_rho, kept, rng;
    std::optional<std::tuple<Owned<Geometry>...>> geometry;

    std::string name() const override { return LayerOp::name() + "_backward"; }

    void release_variables() override {
      const std::lock_guard<std::mutex> lock(mutex_);
      meeting->close();
      for (auto* saved : {&input, &W_mu, &W_rho, &bias_mu, &bias_rho, &kept, &rng}) saved->reset_data();
    }

    torch::autograd::variable_list apply(torch::autograd::variable_list&& grads) override {
      const std::lock_guard<std::mutex> lock(mutex_);
      torch::autograd::variable_list result(5);
      const at::Tensor grad_kl = meeting->take();
      if (!grads[0].defined() && !grad_kl.defined()) return result;
      // First, since unpacking may run a forward (activation checkpointing).
      const at::Tensor x = input.unpack(), m = W_mu.unpack(), r = W_rho.unpack(), rng_ = rng.unpack();
      const OptionalTensor b_m = optional(bias_mu.unpack()), b_r = optional(bias_rho.unpack());
      const OptionalTensor kept_ = optional(kept.unpack());
      // The ops below have no derivative of their own: asked for one, their autograd raises. Otherwise
      // passing it by saves a microsecond or more an op.
      std::optional<at::AutoDispatchBelowADInplaceOrView> guard;
      if (!at::GradMode::is_enabled()) guard.emplace();
      if (!grads[0].defined()) {
        const Layer layer{x, m, r, b_m, b_r, rng_, prior_mu, prior_sigma};
        auto parameters =
            kl_gradients(layer.mu(), layer.rho(), grad_kl, layer.prior_mus(), layer.prior_sigmas());
        std::move(parameters.begin(), parameters.end(), result.begin() + 1);
        return result;
      }
      static const auto op = find_op<BackwardSignature>(name());
      c10::List<bool> mask;
      mask.reserve(5);
      for (size_t i = 0; i < 5; ++i) mask.push_back(task_should_compute_output(i));
      auto computed = std::apply(
          [&](const auto&... g) {
            return op.call(
                grads[0], optional(grad_kl), x, m, r, b_m, b_r, kept_, rng_, g.get()..., prior_mu,
                prior_sigma, mask);
          },
          *geometry);
      for (size_t i = 0, next = 0; i < 5; ++i) {
        if (mask[i]) result[i] = std::move(computed[next++]);
      }
      return result;
    }
  };
};

// Over each product.
template <template <class...> class Of, class First>
using OverLinear = Of<First>;
template <template <class...> class Of, class First>
using OverConvolution =
    Of<First,
       c10::SymIntArrayRef,
       c10::SymIntArrayRef,
       c10::SymIntArrayRef,
       bool,
       c10::SymIntArrayRef,
       c10::SymInt>;

}  // namespace bbb_fast
