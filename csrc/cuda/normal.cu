// normal: the noise itself, for tests and for users who want the stream.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../checks.h"
#include "dispatch.h"
#include "vectors.h"

namespace bbb_fast::cuda {
namespace {

template <class T>
struct NormalEntry {
  T* out;
  int64_t numel;
  bool aligned;
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    normal_kernel(const __grid_constant__ Table<NormalEntry<T>, 1> table, const int64_t* rng) {
  constexpr int N = kVector<T>;
  struct Operands {};
  const Noise noise(rng, 0);
  for_each_chunk(table, [&](const auto& e, int64_t, int64_t begin, int count) {
    for_each_vector<N, Operands>(
        e.aligned, count, [](auto, unsigned, int, Operands&) {},
        [&](auto whole, unsigned at, int left, const Operands&) {
          Wide<T> z[N];
          noise.fill(begin, at, z);
          write<whole.value>(e.out + begin + at, left, z);
        });
  });
}

at::Tensor normal(at::IntArrayRef size, const at::Tensor& rng, at::ScalarType dtype) {
  check_dtype_option("normal", "dtype", dtype);
  check_rng("normal", rng, rng.device());
  for (int64_t length : size) TORCH_CHECK_VALUE(length >= 0, "normal: size must be >= 0, got ", size);
  const DeviceGuard guard(rng.device());
  at::Tensor out = at::empty(size, rng.options().dtype(dtype));
  const at::Tensor numbers = rng.contiguous();
  dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    T* data = out.mutable_data_ptr<T>();
    const auto table = table_of<NormalEntry<T>>({data, out.numel(), is_aligned<kVector<T>>(data)});
    launch<&normal_kernel<T>>(table.chunks(), table, numbers.const_data_ptr<int64_t>());
  });
  return out;
}

TORCH_LIBRARY_IMPL(bbb_fast, BBB_DISPATCH_KEY, m) {
  m.impl("normal", &normal);
}

}  // namespace
}  // namespace bbb_fast::cuda
