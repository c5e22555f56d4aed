// uniform: noise in the open interval (0, 1).
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../checks.h"
#include "dispatch.h"
#include "map.h"

namespace bbb_fast::cuda {
namespace {

struct Uniform {
  static constexpr Draw kDraw = Draw::word;
  int bits;

  BBB_DEVICE float call(uint32_t word) const { return scalar::uniform_of(word, bits); }
};

at::Tensor uniform(at::IntArrayRef size, const at::Tensor& rng, at::ScalarType dtype) {
  check_noise("uniform", size, rng, dtype);
  const DeviceGuard guard(rng.device());
  at::Tensor out = at::empty(size, rng.options().dtype(dtype));
  const at::Tensor numbers = rng.contiguous();
  dispatch(dtype, [&](auto type) {
    map<typename decltype(type)::type>(Uniform{uniform_bits(dtype)}, numbers, out);
  });
  return out;
}

TORCH_LIBRARY_IMPL(bbb_fast, BBB_DISPATCH_KEY, m) {
  m.impl("uniform", &uniform);
}

}  // namespace
}  // namespace bbb_fast::cuda
