// flip_signs and add_flipped: a tensor times the random signs of its rows and channels, alone or added to
// another. ../signs.h says which sign an element takes.
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <limits>

#include "../checks.h"
#include "../layout.h"
#include "../signs.h"
#include "dispatch.h"
#include "map.h"

namespace bbb_fast::cuda {
namespace {

// Int holds the number of every element.
template <class T, class Int, bool kAdd>
__global__ void __launch_bounds__(kThreads) flip_kernel(
    const __grid_constant__ Table<MapEntry<T>, 1> table,
    const T* x,
    const int64_t* rng,
    int64_t stream,
    SignLayout layout) {
  using A = Wide<T>;
  constexpr int N = kVector<T>;
  struct Operands {
    Pack<T, N> x;
    std::conditional_t<kAdd, Pack<T, N>, std::tuple<>> base;
  };
  Signs signs(static_cast<uint64_t>(rng[0]), static_cast<uint64_t>(rng[1]) + static_cast<uint64_t>(stream));
  for_each_chunk(table, [&](const auto& e, int64_t, int64_t begin, int count) {
    for_each_vector<N, Operands>(
        e.aligned, count,
        [&](auto whole, unsigned at, int left, Operands& o) {
          read<whole.value>(x + begin + at, left, o.x);
          if constexpr (kAdd) read<whole.value>(e.out + begin + at, left, o.base);
        },
        [&](auto whole, unsigned at, int left, const Operands& o) {
          A result[N];
          SignCursor<Int> element(layout, static_cast<Int>(begin + at));
#pragma unroll
          for (int j = 0; j < N; ++j, element.next()) {
            const A value = o.x.wide(j);
            result[j] = signs.mask(element.number()) != 0 ? -value : value;
            if constexpr (kAdd) result[j] += o.base.wide(j);
          }
          write<whole.value>(e.out + begin + at, left, result);
        });
  });
}

// out, or with kAdd out plus x, times the signs.
template <bool kAdd>
void flip(
    const at::Tensor& x, const at::Tensor& out, const at::Tensor& rng, int64_t stream, int64_t channel_dim) {
  const at::Tensor numbers = rng.contiguous();
  const SignLayout layout = sign_layout(x, channel_dim);
  dispatch(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int N = kVector<T>;
    const T* from = x.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    Table<MapEntry<T>, 1> table;
    table.add({to, out.numel(), is_aligned<N>(to) && is_aligned<N>(from)});
    const int64_t* seed_stream = numbers.const_data_ptr<int64_t>();
    // Division of 64-bit numbers takes a GPU long.
    if (x.numel() <= std::numeric_limits<int32_t>::max() - kChunk) {
      launch<&flip_kernel<T, uint32_t, kAdd>>(table.chunks(), table, from, seed_stream, stream, layout);
    } else {
      launch<&flip_kernel<T, uint64_t, kAdd>>(table.chunks(), table, from, seed_stream, stream, layout);
    }
  });
}

at::Tensor flip_signs(const at::Tensor& input, const at::Tensor& rng, int64_t stream, int64_t channel_dim) {
  check_signs("flip_signs", input, rng, stream, channel_dim);
  const DeviceGuard guard(input.device());
  const at::Tensor x = in_sign_order(input, channel_dim);
  const at::Tensor out = at::empty_like(x);
  flip<false>(x, out, rng, stream, channel_dim);
  return out;
}

void add_flipped_(
    at::Tensor& base, const at::Tensor& input, const at::Tensor& rng, int64_t stream, int64_t channel_dim) {
  check_signs("add_flipped_", input, rng, stream, channel_dim);
  check_add_signed("add_flipped_", base, input);
  const DeviceGuard guard(base.device());
  const at::Tensor sum = in_sign_order(base, channel_dim);
  flip<true>(in_order_of(sum, input), sum, rng, stream, channel_dim);
  if (!sum.is_same(base)) base.copy_(sum);
}

TORCH_LIBRARY_IMPL(bbb_fast, BBB_DISPATCH_KEY, m) {
  m.impl("flip_signs", &flip_signs);
  m.impl("add_flipped_", &add_flipped_);
}

}  // namespace
}  // namespace bbb_fast::cuda
