// A layer's forward in one call from Python, which draws the rng and runs the layer's op, and the KL of
// layers in another. The ops are called as through torch.ops, but what a small layer would wait for is left
// out: the parsing of arguments by schema, and Python's part of the draw.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kl_node.h"

namespace bbb_fast {

// W_mu, W_rho, bias_mu, bias_rho, with the prior of them all.
struct PosteriorAndPrior {
  at::Tensor W_mu, W_rho;
  OptionalTensor bias_mu, bias_rho;
  double prior_mu, prior_sigma;
};

// What a forward leaves its layer: where a KL's node can meet the node of the output, while that lives.
// It keeps neither the graph nor a tensor.
struct ForwardTrace {
  std::weak_ptr<KlMeeting> meeting;
};

// The geometry of a convolution, as torch.nn.functional takes it; none for a linear layer.
struct ConvGeometry {
  std::vector<int64_t> stride, padding, dilation;
  bool transposed;
  std::vector<int64_t> output_padding;
  int64_t groups;
};

// One of estimators.h, with the options of them all.
struct EstimatorOption {
  std::string name;
  bool recompute_weight;
  std::optional<at::ScalarType> variance_dtype;
};

struct LayerOutput {
  at::Tensor output;
  std::optional<ForwardTrace> trace;  // where a gradient is recorded
};

// Both are none where Python has to go the long way: under a mode or a transform that must see the op being
// called, for tensors of another class, on a device without kernels.
std::optional<LayerOutput> draw_layer(
    const EstimatorOption& estimator,
    const at::Tensor& input,
    const PosteriorAndPrior& posterior,
    const std::optional<ConvGeometry>& geometry,
    int64_t rng_offset);

// The sum of the layers' KLs, of their parameters as they are now, and for backward the trace of each one's
// last forward. The layers are on one device and of one dtype.
struct LayerPosterior {
  PosteriorAndPrior posterior;
  std::optional<ForwardTrace> trace;
};
OptionalTensor kl_of_layers(const std::vector<LayerPosterior>& layers);

}  // namespace bbb_fast
