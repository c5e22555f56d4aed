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

bool can_draw(const at::Tensor& input, const PosteriorAndPrior& p) {
  const bool device = input.device().is_cpu() || (kWithCuda && input.is_cuda());
  const bool dense = input.layout() == at::kStrided && !input.is_nested();
  return device && dense && plain(input) && plain(p.W_mu) && plain(p.W_rho) &&
         (!has(p.bias_mu) || plain(*p.bias_mu)) && (!has(p.bias_rho) || plain(*p.bias_rho)) &&
         !in_transform() && !at::tracer::impl::is_dispatch_enabled() &&
         !at::impl::torch_function_mode_enabled() && !c10::impl::TorchDispatchModeTLS::any_modes_set();
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

template <class Option>
LayerOutputs call_op(
    const std::string& estimator,
    const at::Tensor& input,
    const PosteriorAndPrior& p,
    const at::Tensor& rng,
    const std::optional<ConvGeometry>& geometry,
    bool with_kl,
    Option option) {
  if (!geometry) {
    static const auto op = find_op<OverLinear<LayerForward, Option>>(estimator + "_linear");
    return op.call(
        input, p.W_mu, p.W_rho, p.bias_mu, p.bias_rho, rng, p.prior_mu, p.prior_sigma, with_kl, option);
  }
  static const auto op = find_op<OverConvolution<LayerForward, Option>>(estimator + "_conv");
  const auto stride = symbolic(geometry->stride), padding = symbolic(geometry->padding),
             dilation = symbolic(geometry->dilation);
  const std::vector<c10::SymInt> no_output_padding(stride.size(), 0);
  return op.call(
      input, p.W_mu, p.W_rho, p.bias_mu, p.bias_rho, rng, stride, padding, dilation, false, no_output_padding,
      geometry->groups, p.prior_mu, p.prior_sigma, with_kl, option);
}

}  // namespace

std::vector<ForwardKl::State> ForwardKl::states(const PosteriorAndPrior& of) {
  std::vector<State> states;
  states.reserve(4);
  for (const at::Tensor& t :
       {of.W_mu, of.W_rho, of.bias_mu.value_or(at::Tensor()), of.bias_rho.value_or(at::Tensor())}) {
    if (t.defined()) {
      states.push_back({t, t.const_data_ptr(), static_cast<int64_t>(t._version()), t.requires_grad()});
    }
  }
  return states;
}

ForwardKl::ForwardKl(at::Tensor kl, const PosteriorAndPrior& of)
    : kl_(std::move(kl)), prior_mu_(of.prior_mu), prior_sigma_(of.prior_sigma), states_(states(of)) {}

OptionalTensor ForwardKl::take(const PosteriorAndPrior& now) const {
  const bool same = prior_mu_ == now.prior_mu && prior_sigma_ == now.prior_sigma && states_ == states(now);
  return same ? OptionalTensor(kl_) : std::nullopt;
}

bool records_plainly() {
  return at::GradMode::is_enabled() && !in_transform();
}

std::optional<LayerOutput> draw_layer(
    const EstimatorOption& estimator,
    const at::Tensor& input,
    const PosteriorAndPrior& posterior,
    const std::optional<ConvGeometry>& geometry,
    int64_t rng_offset) {
  if (!can_draw(input, posterior)) return std::nullopt;
  // Of inference tensors, changes go unseen.
  const bool with_kl = at::GradMode::is_enabled() && !posterior.W_mu.is_inference();
  const at::Tensor x = autocast(input);
  const at::Tensor rng = draw_rng(x.device(), rng_offset);
  auto [output, kept, kl] =
      estimator.lrt ? call_op("lrt", x, posterior, rng, geometry, with_kl, estimator.variance_dtype)
                    : call_op("bbb", x, posterior, rng, geometry, with_kl, estimator.recompute_weight);
  LayerOutput result{std::move(output), std::nullopt};
  if (with_kl) result.kl.emplace(std::move(kl), posterior);
  return result;
}

}  // namespace bbb_fast
