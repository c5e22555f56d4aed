// Which way a layer's products take on the CPU, where there are several. All give the same numbers up to
// rounding; which is the fastest depends on the CPU and on the shape. The choice is a function of these, and
// of what `bbb-fast tune` has measured: the same machine, shape and measurements, the same way.
#pragma once

#include <c10/util/SmallVector.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace bbb_fast {

enum class Way : int8_t {
  library,        // as it is
  channels_last,  // the library, over images rearranged for it
  direct,         // direct_conv.h
  by_pixels,      // as a linear layer from all pixels to all; conv_by_pixels.h
  onednn,         // a linear layer's products: matrix_product.h
};
constexpr Way kWays[] = {Way::library, Way::channels_last, Way::direct, Way::by_pixels, Way::onednn};
const char* way_name(Way way);

// [rows, in] times [in, out], and its gradients' products of the same numbers, on the CPU in float32.
struct LinearProblem {
  int64_t rows, in, out;

  // As ConvProblem's, in no dimensions.
  std::vector<int64_t> key() const;
  bool allows(Way way) const;
};

// A convolution on the CPU, in float32 or, narrow, in bfloat16.
struct ConvProblem {
  int64_t batch, in, out, groups;
  bool contiguous, transposed, narrow;
  c10::SmallVector<int64_t, 3> size, kernel, stride, padding, dilation;  // by dimension

  int64_t out_size(size_t d) const {
    return (size[d] + 2 * padding[d] - dilation[d] * (kernel[d] - 1) - 1) / stride[d] + 1;
  }
  // What measurements are kept under: every number that matters, the batch by its power of 2.
  std::vector<int64_t> key() const;
  bool allows(Way way) const;
};

// The way as measured for this shape, else by rule. One that the problem allows.
Way choose_way(const ConvProblem& problem);
Way choose_way(const LinearProblem& problem);

// The ways that the problem allows; of a convolution, over contiguous images in float32.
std::vector<std::string> ways_of(const ConvProblem& problem);
std::vector<std::string> ways_of(const LinearProblem& problem);

// The rules measured on one kind of CPU: "intel-avx512", "amd-zen5", or "other", where nothing but what was
// faster on every CPU measured goes around the library.
const char* rules_of_this_cpu();

// The rules in use and the measured choices, as (key, way).
struct Routes {
  std::string rules;
  std::vector<std::pair<std::vector<int64_t>, std::string>> measured;
};
Routes current_routes();
// Takes effect for every call that starts later. Throws std::invalid_argument for a name there is not.
void set_routes(const Routes& routes);

}  // namespace bbb_fast
