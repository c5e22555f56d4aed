// drop_elements: x times the mask of dropout, scaled, of contiguous tensors. ../dropout.cpp makes the other
// masks of it.
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "../checks.h"
#include "../dropout.h"
#include "dispatch.h"
#include "map.h"

namespace bbb_fast::cuda {
namespace {

template <class A>
struct DropElements {
  static constexpr Draw kDraw = Draw::word;
  uint32_t least;
  A scale;

  BBB_DEVICE A call(A x, uint32_t word) const { return x * scalar::dropout_factor(word, least, scale); }
};

at::Tensor drop_elements(const at::Tensor& input, const at::Tensor& rng, double p) {
  check_drop_elements("drop_elements", input, rng, p);
  const DeviceGuard guard(input.device());
  const at::Tensor out = at::empty_like(input);
  const at::Tensor numbers = rng.contiguous();
  const Dropout dropout(p);
  dispatch(input.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Wide<T>;
    const DropElements<A> drop{dropout.least, static_cast<A>(dropout.scale)};
    map<T>(drop, numbers, out, input.const_data_ptr<T>());
  });
  return out;
}

TORCH_LIBRARY_IMPL(bbb_fast, BBB_DISPATCH_KEY, m) {
  m.impl("drop_elements", &drop_elements);
}

}  // namespace
}  // namespace bbb_fast::cuda
