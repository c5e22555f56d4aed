#include "layer_calls.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/TracerMode.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/randint.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include <limits>
#include <mutex>
#include <utility>

#include "layer_op.h"

namespace bbb_fast {
namespace {

#ifdef BBB_FAST_CUDA_ARCHS
constexpr bool kWithCuda = true;
#else
constexpr bool kWithCuda = false;
#endif

bool in_transform() {
  return c10::impl::tls_local_dispatch_key_set().included_.has(
      c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

// A tensor whose class has no say in what is done with it.
bool plain(const at::Tensor& t) {
  return !t.key_set().has_any(c10::DispatchKeySet(
      {c10::DispatchKey::Python, c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::FuncTorchGradWrapper,
       c10::DispatchKey::Functionalize}));
}

bool plain(const PosteriorAndPrior& p) {
  return plain(p.W_mu) && plain(p.W_rho) && (!has(p.bias_mu) || plain(*p.bias_mu)) &&
         (!has(p.bias_rho) || plain(*p.bias_rho));
}

bool with_kernels(at::Device device) {
  return device.is_cpu() || (kWithCuda && device.is_cuda());
}

// Not a flat piece of a parameter, nor one whose memory is elsewhere: FullyShardedDataParallel leaves such.
bool whole(const at::Tensor& W) {
  return W.dim() >= 2 && (W.numel() == 0 || W.storage().nbytes() > 0);
}

// Whether someone must see the ops being called. (Modes of Python functions: module.cpp.)
bool watched() {
  return in_transform() || at::tracer::impl::is_dispatch_enabled() ||
         c10::impl::TorchDispatchModeTLS::any_modes_set();
}

// torch.randint(0, 2^63 - 1, (2,)) of the device's generator, plus offset. On the CPU past the dispatcher,
// whose part is three microseconds; python_tests/test_noise.py compares the numbers.
at::Tensor draw_rng(at::Device device, int64_t offset) {
  constexpr int64_t range = std::numeric_limits<int64_t>::max();
  if (!device.is_cpu()) {
    at::Tensor rng = at::randint(0, range, {2}, at::TensorOptions(at::kLong).device(device));
    return offset == 0 ? rng : rng.add_(offset);
  }
  at::Tensor rng = at::detail::empty_cpu({2}, at::kLong);
  auto* const numbers = reinterpret_cast<uint64_t*>(rng.mutable_data_ptr<int64_t>());
  auto* const generator =
      at::get_generator_or_default<at::CPUGeneratorImpl>(std::nullopt, at::detail::getDefaultCPUGenerator());
  const std::lock_guard<std::mutex> lock(generator->mutex_);
  for (int i = 0; i < 2; ++i) {
    numbers[i] = generator->random64() % static_cast<uint64_t>(range) + static_cast<uint64_t>(offset);
  }
  return rng;
}

// Under autocast the products run in its dtype; the parameters stay as they are.
at::Tensor autocast(const at::Tensor& input) {
  const auto device = input.device().type();
  if (!at::autocast::is_autocast_enabled(device) || input.scalar_type() == at::kDouble) return input;
  return input.to(at::autocast::get_autocast_dtype(device));
}

std::vector<c10::SymInt> symbolic(const std::vector<int64_t>& numbers) {
  return {numbers.begin(), numbers.end()};
}

// An estimator's ops, found once.
template <class Option>
struct LayerOps {
  c10::TypedOperatorHandle<OverLinear<LayerForward, Option>> linear;
  c10::TypedOperatorHandle<OverConvolution<LayerForward, Option>> conv;

  explicit LayerOps(const std::string& estimator)
      : linear(find_op<OverLinear<LayerForward, Option>>(estimator + "_linear")),
        conv(find_op<OverConvolution<LayerForward, Option>>(estimator + "_conv")) {}
};

template <class Option>
LayerOutputs call_op(
    const LayerOps<Option>& ops,
    const at::Tensor& input,
    const PosteriorAndPrior& p,
    const at::Tensor& rng,
    const std::optional<ConvGeometry>& geometry,
    Option option) {
  constexpr bool with_kl = false;
  if (!geometry) {
    return ops.linear.call(
        input, p.W_mu, p.W_rho, p.bias_mu, p.bias_rho, rng, p.prior_mu, p.prior_sigma, with_kl, option);
  }
  const auto stride = symbolic(geometry->stride), padding = symbolic(geometry->padding),
             dilation = symbolic(geometry->dilation), output_padding = symbolic(geometry->output_padding);
  return ops.conv.call(
      input, p.W_mu, p.W_rho, p.bias_mu, p.bias_rho, rng, stride, padding, dilation, geometry->transposed,
      output_padding, geometry->groups, p.prior_mu, p.prior_sigma, with_kl, option);
}

LayerOutputs call(
    const EstimatorOption& estimator,
    const at::Tensor& input,
    const PosteriorAndPrior& posterior,
    const at::Tensor& rng,
    const std::optional<ConvGeometry>& geometry) {
  static const LayerOps<std::optional<at::ScalarType>> lrt("lrt");
  static const LayerOps<bool> bbb("bbb"), flipout("flipout");
  if (estimator.name == "lrt") return call_op(lrt, input, posterior, rng, geometry, estimator.variance_dtype);
  TORCH_CHECK_VALUE(
      estimator.name == "bbb" || estimator.name == "flipout", "unknown estimator '", estimator.name, "'");
  return call_op(
      estimator.name == "bbb" ? bbb : flipout, input, posterior, rng, geometry, estimator.recompute_weight);
}

}  // namespace

std::optional<LayerOutput> draw_layer(
    const EstimatorOption& estimator,
    const at::Tensor& input,
    const PosteriorAndPrior& posterior,
    const std::optional<ConvGeometry>& geometry,
    int64_t rng_offset) {
  const bool dense = input.layout() == at::kStrided && !input.is_nested();
  if (!dense || !with_kernels(input.device()) || !plain(input) || !plain(posterior) || watched())
    return std::nullopt;
  const at::Tensor x = autocast(input);
  const at::Tensor rng = draw_rng(x.device(), rng_offset);
  LayerOutput result;
  result.output = std::get<0>(call(estimator, x, posterior, rng, geometry));
  if (const auto* node = dynamic_cast<const LayerNode*>(result.output.grad_fn().get())) {
    result.trace.emplace(ForwardTrace{node->meeting});
  }
  return result;
}

OptionalTensor kl_of_layers(const std::vector<LayerPosterior>& layers) {
  if (watched()) return std::nullopt;
  std::vector<at::Tensor> mu, rho;
  std::vector<double> prior_mu, prior_sigma;
  KlNode::Meetings meetings;
  const auto add = [&](const PosteriorAndPrior& p, const at::Tensor& m, const at::Tensor& r) {
    mu.push_back(m);
    rho.push_back(r);
    prior_mu.push_back(p.prior_mu);
    prior_sigma.push_back(p.prior_sigma);
  };
  for (const auto& [p, trace] : layers) {
    if (!with_kernels(p.W_mu.device()) || !plain(p) || !whole(p.W_mu)) return std::nullopt;
    add(p, p.W_mu, p.W_rho);
    const bool bias = has(p.bias_mu) && has(p.bias_rho);
    if (bias) add(p, *p.bias_mu, *p.bias_rho);
    meetings.emplace_back(trace ? trace->meeting.lock() : nullptr, bias ? 2 : 1);
  }
  return kl_divergence(mu, rho, prior_mu, prior_sigma, meetings);
}

}  // namespace bbb_fast
