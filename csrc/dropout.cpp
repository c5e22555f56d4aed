// dropout for every device: drop_elements (cpu/dropout.cpp, cuda/dropout.cu) of the input, or of a factor for
// each row and channel, or for each element of a row; and its autograd. It is linear, so that the gradient is
// dropout of the incoming one, by the same rng.

#include <ATen/ops/empty_like.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/ones.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include "checks.h"
#include "cpu/huge_pages.h"
#include "kl_node.h"
#include "passes.h"

namespace bbb_fast {
namespace {

namespace ag = torch::autograd;

at::Tensor dropout(const at::Tensor& input, const at::Tensor& rng, double p, bool channels, bool one_mask) {
  static const auto op =
      find_op<at::Tensor(const at::Tensor&, const at::Tensor&, double, bool, bool)>("dropout");
  return op.call(input, rng, p, channels, one_mask);
}

at::Tensor dropout_kernel(
    const at::Tensor& input, const at::Tensor& rng, double p, bool channels, bool one_mask) {
  check_dropout("dropout", input, rng, p, channels);
  const bool of_a_row = one_mask && input.dim() > 1;
  const bool every = !channels && !of_a_row;
  if (every && input.is_contiguous()) return drop_elements(input, rng, p);
  at::Tensor out = at::empty_like(input);
  hint_huge_pages(out);
  if (every) return out.copy_(drop_elements(input.contiguous(), rng, p));
  std::vector<int64_t> sizes = input.sizes().vec();
  if (of_a_row) sizes[0] = 1;
  if (channels) std::fill(sizes.begin() + 2, sizes.end(), 1);
  const auto wide = input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor factor = drop_elements(at::ones(sizes, input.options().dtype(wide)), rng, p);
  if (!input.is_cpu() || input.scalar_type() == wide) return at::mul_out(out, input, factor);
  // The library's CPU kernel for two types takes many times as long as conversions in the cache.
  constexpr int64_t kAtOnce = 1 << 17;
  const int64_t rows = input.size(0), step = std::max<int64_t>(1, kAtOnce * rows / (input.numel() + 1));
  for (int64_t row = 0; row < rows; row += step) {
    const int64_t count = std::min(step, rows - row);
    const at::Tensor part = input.narrow(0, row, count).to(wide);
    out.narrow(0, row, count).copy_(part.mul_(of_a_row ? factor : factor.narrow(0, row, count)));
  }
  return out;
}

struct DropoutNode : ag::Node {
  ag::SavedVariable rng;
  double p = 0.0;
  bool channels = false, one_mask = false;

  std::string name() const override { return "dropout_backward"; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    rng.reset_data();
  }

  ag::variable_list apply(ag::variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!grads[0].defined()) return {at::Tensor()};
    return {dropout(grads[0], rng.unpack(), p, channels, one_mask)};
  }
};

at::Tensor dropout_autograd(
    const at::Tensor& input, const at::Tensor& rng, double p, bool channels, bool one_mask) {
  check_no_tangent("dropout", input);
  at::Tensor out;
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    out = dropout(input, rng, p, channels, one_mask);
  }
  if (!ag::compute_requires_grad(input)) return out;
  auto node = make_node<DropoutNode>();
  node->set_next_edges(ag::collect_next_edges(input));
  node->rng = ag::SavedVariable(rng, false);
  node->p = p;
  node->channels = channels;
  node->one_mask = one_mask;
  ag::set_history(out, node);
  return out;
}

TORCH_LIBRARY_IMPL(bbb_fast, CompositeExplicitAutograd, m) {
  m.impl("dropout", &dropout_kernel);
}

TORCH_LIBRARY_IMPL(bbb_fast, Autograd, m) {
  m.impl("dropout", &dropout_autograd);
}

}  // namespace
}  // namespace bbb_fast
