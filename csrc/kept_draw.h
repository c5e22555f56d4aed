// What the estimators that draw weights keep for backward: the draw, unless it is to be formed again.
#pragma once

#include "checks.h"
#include "layer_op.h"

namespace bbb_fast {

struct KeepsDraw {
  using Option = bool;  // recompute_weight
  static bool keeps(bool recompute_weight) { return !recompute_weight; }

  static void check_kept(
      const char* op, const Layer& layer, at::IntArrayRef /*output*/, const OptionalTensor& kept) {
    if (!has(kept)) return;
    check_dtype(op, "kept", *kept, layer.input.scalar_type());
    check_shape(op, "kept", *kept, Draws(layer.rng).formed_sizes(layer.W_mu.sizes()));
  }
};

}  // namespace bbb_fast
