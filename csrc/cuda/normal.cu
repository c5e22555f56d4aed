// normal: the noise itself, for tests and for users who want the stream.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../checks.h"
#include "dispatch.h"
#include "map.h"

namespace bbb_fast::cuda {
namespace {

struct Normal {
  static constexpr Draw kDraw = Draw::normal;
  template <class A>
  BBB_DEVICE static A call(A z) {
    return z;
  }
};

at::Tensor normal(at::IntArrayRef size, const at::Tensor& rng, at::ScalarType dtype) {
  check_noise("normal", size, rng, dtype);
  const DeviceGuard guard(rng.device());
  at::Tensor out = at::empty(size, rng.options().dtype(dtype));
  const at::Tensor numbers = rng.contiguous();
  dispatch(dtype, [&](auto type) { map<typename decltype(type)::type>(Normal{}, numbers, out); });
  return out;
}

TORCH_LIBRARY_IMPL(bbb_fast, BBB_DISPATCH_KEY, m) {
  m.impl("normal", &normal);
}

}  // namespace
}  // namespace bbb_fast::cuda
