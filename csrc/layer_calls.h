// A layer's forward in one call from Python: draws the rng and runs the layer's op. The op itself is called
// as through torch.ops, but what a small layer would wait for is left out: the parsing of arguments by
// schema, Python's part of the draw and of the bookkeeping around the KL.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "passes.h"

namespace bbb_fast {

// W_mu, W_rho, bias_mu, bias_rho, with the prior of them all.
struct PosteriorAndPrior {
  at::Tensor W_mu, W_rho;
  OptionalTensor bias_mu, bias_rho;
  double prior_mu, prior_sigma;
};

// The KL that a forward formed, for whoever asks while it is that of the parameters still.
class ForwardKl {
 public:
  ForwardKl(at::Tensor kl, const PosteriorAndPrior& of);

  const at::Tensor& kl() const { return kl_; }
  // The KL, if nothing changed since and gradients are recorded as they were; writes to a tensor's .data go
  // unnoticed.
  OptionalTensor take(const PosteriorAndPrior& now) const;

 private:
  // Changes with the tensor's values.
  struct State {
    at::Tensor tensor;
    const void* data;
    int64_t version;
    bool requires_grad;

    bool operator==(const State& other) const {
      return tensor.is_same(other.tensor) && data == other.data && version == other.version &&
             requires_grad == other.requires_grad;
    }
  };
  static std::vector<State> states(const PosteriorAndPrior& of);

  at::Tensor kl_;
  double prior_mu_, prior_sigma_;
  std::vector<State> states_;
};

// The geometry of a convolution, as torch.nn.functional takes it; none for a linear layer.
struct ConvGeometry {
  std::vector<int64_t> stride, padding, dilation;
  int64_t groups;
};

// Bayes by Backprop, or local reparameterization with the type of its variance product.
struct EstimatorOption {
  bool lrt;
  bool recompute_weight;
  std::optional<at::ScalarType> variance_dtype;
};

struct LayerOutput {
  at::Tensor output;
  std::optional<ForwardKl> kl;  // where a gradient is recorded
};

// None where Python has to go the long way: under a mode or a transform that must see the op being called,
// for tensors of another class, on a device without kernels.
std::optional<LayerOutput> draw_layer(
    const EstimatorOption& estimator,
    const at::Tensor& input,
    const PosteriorAndPrior& posterior,
    const std::optional<ConvGeometry>& geometry,
    int64_t rng_offset);

// Whether gradients are recorded, and by no transform.
bool records_plainly();

}  // namespace bbb_fast
