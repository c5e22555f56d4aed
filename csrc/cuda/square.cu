// square: x^2 in the dtype of the variance product, and its gradient, added to the mean product's.
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "../checks.h"
#include "../layout.h"
#include "dispatch.h"
#include "vectors.h"

namespace bbb_fast::cuda {
namespace {

template <class X, class V>
struct SquareEntry {
  const X* x;
  V* out;
  int64_t numel;
  bool aligned;
};

template <class X, class V>
__global__ void __launch_bounds__(kThreads)
    square_kernel(const __grid_constant__ Table<SquareEntry<X, V>, 1> table) {
  using A = Wide<X>;
  constexpr int N = kVector<X, V>;
  struct Operands {
    A x[N];
  };
  for_each_chunk(table, [&](const auto& e, int64_t, int64_t begin, int count) {
    for_each_vector<N, Operands>(
        e.aligned, count,
        [&](auto whole, unsigned at, int left, Operands& o) {
          read<whole.value>(e.x + begin + at, left, o.x);
        },
        [&](auto whole, unsigned at, int left, const Operands& o) {
          A squared[N];
#pragma unroll
          for (int j = 0; j < N; ++j) squared[j] = o.x[j] * o.x[j];
          write<whole.value>(e.out + begin + at, left, squared);
        });
  });
}

template <class X, class V>
struct SquareBackwardEntry {
  X* grad_x;  // and the result
  const X* x;
  const V* grad;
  int64_t numel;
  bool aligned;
};

template <class X, class V>
__global__ void __launch_bounds__(kThreads)
    square_backward_kernel(const __grid_constant__ Table<SquareBackwardEntry<X, V>, 1> table) {
  using A = Wide<X>;
  constexpr int N = kVector<X, V>;
  struct Operands {
    A grad_x[N], x[N], grad[N];
  };
  for_each_chunk(table, [&](const auto& e, int64_t, int64_t begin, int count) {
    for_each_vector<N, Operands>(
        e.aligned, count,
        [&](auto whole, unsigned at, int left, Operands& o) {
          read<whole.value>(e.grad_x + begin + at, left, o.grad_x);
          read<whole.value>(e.x + begin + at, left, o.x);
          read<whole.value>(e.grad + begin + at, left, o.grad);
        },
        [&](auto whole, unsigned at, int left, const Operands& o) {
          A sum[N];
#pragma unroll
          for (int j = 0; j < N; ++j) sum[j] = o.grad_x[j] + A{2} * o.x[j] * o.grad[j];
          write<whole.value>(e.grad_x + begin + at, left, sum);
        });
  });
}

at::Tensor square(const at::Tensor& input, at::ScalarType dtype) {
  check_floating("square", "input", input);
  check_dtype_option("square", "dtype", dtype);
  const DeviceGuard guard(input.device());
  const Pair pair = activation_pair(input.scalar_type(), dtype);
  const at::Tensor x = dense(input).to(pair.first);
  const at::Tensor out = at::empty_like(x, x.options().dtype(pair.second));
  dispatch_activation_pair(pair, [&](auto first, auto second) {
    using X = typename decltype(first)::type;
    using V = typename decltype(second)::type;
    constexpr int N = kVector<X, V>;
    const X* in = x.const_data_ptr<X>();
    V* to = out.mutable_data_ptr<V>();
    const auto table =
        table_of<SquareEntry<X, V>>({in, to, x.numel(), is_aligned<N>(in) && is_aligned<N>(to)});
    launch<&square_kernel<X, V>>(table.chunks(), table);
  });
  return out.to(dtype);
}

void square_backward_(at::Tensor& grad_input, const at::Tensor& input, const at::Tensor& grad) {
  check_square_backward("square_backward_", grad_input, input, grad);
  const DeviceGuard guard(input.device());
  const Pair pair = activation_pair(input.scalar_type(), grad.scalar_type());
  at::Tensor sum = grad_input.to(pair.first);
  // All three in grad_input's memory order.
  const at::Tensor x = in_order_of(grad_input, input).to(pair.first);
  const at::Tensor g = in_order_of(grad_input, grad).to(pair.second);
  dispatch_activation_pair(pair, [&](auto first, auto second) {
    using X = typename decltype(first)::type;
    using V = typename decltype(second)::type;
    constexpr int N = kVector<X, V>;
    X* to = sum.mutable_data_ptr<X>();
    const X* in = x.const_data_ptr<X>();
    const V* from = g.const_data_ptr<V>();
    const bool aligned = is_aligned<N>(to) && is_aligned<N>(in) && is_aligned<N>(from);
    const auto table = table_of<SquareBackwardEntry<X, V>>({to, in, from, x.numel(), aligned});
    launch<&square_backward_kernel<X, V>>(table.chunks(), table);
  });
  if (!sum.is_same(grad_input)) grad_input.copy_(sum);
}

TORCH_LIBRARY_IMPL(bbb_fast, BBB_DISPATCH_KEY, m) {
  m.impl("square", &square);
  m.impl("square_backward_", &square_backward_);
}

}  // namespace
}  // namespace bbb_fast::cuda
