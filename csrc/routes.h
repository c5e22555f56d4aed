// Which way a convolution takes on the CPU, where there are several. All give the same numbers up to
// rounding; which is the fastest depends on the CPU and on the shape. The choice is a function of these, and
// of what `bbb-fast tune` has measured: the same machine, shape and measurements, the same way.
#pragma once

#include <c10/util/SmallVector.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace bbb_fast {

enum class ConvWay : int8_t {
  library,        // as it is
  channels_last,  // the library, over images rearranged for it
  direct,         // direct_conv.h
  by_pixels,      // a product over the batch for each pair of pixels that meet; products.cpp
};
constexpr ConvWay kConvWays[] = {
    ConvWay::library, ConvWay::channels_last, ConvWay::direct, ConvWay::by_pixels};
const char* way_name(ConvWay way);

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
  bool allows(ConvWay way) const;
};

// The way as measured for this shape, else by rule. One that the problem allows.
ConvWay choose_way(const ConvProblem& problem);

// The ways a convolution over contiguous images in float32 has.
std::vector<std::string> ways_of(const ConvProblem& problem);

// The rules measured on one kind of CPU: "intel-avx512", or "other", where nothing but what was faster on
// every CPU measured goes around the library.
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
