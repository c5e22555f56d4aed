// The estimators: csrc/<name>.cpp each, over csrc/layer_op.h.
#pragma once

namespace bbb_fast {

struct EstimatorSchema {
  const char* name;
  const char* option;  // the last argument of its ops
};

constexpr EstimatorSchema kEstimators[] = {
    {"bbb", "bool recompute_weight"},
    {"lrt", "ScalarType? variance_dtype"},
    {"flipout", "bool recompute_weight"},
};
constexpr const char* kProducts[] = {"_linear", "_conv"};

}  // namespace bbb_fast
