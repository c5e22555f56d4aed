// Ops that form each element of a tensor from the same element of others, and from its noise.
#pragma once

#include <tuple>
#include <utility>

#include "vectors.h"

namespace bbb_fast::cuda {

template <class Out>
struct MapEntry {
  Out* out;
  int64_t numel;
  bool aligned;
};

// What a function is given of the noise for each element: a normal number, or the generator's word.
enum class Draw { nothing, normal, word };

// A Function has a constant kDraw, and a member call(element of each input..., what it draws).
template <class A, class Function, class Operands, class Drawn, size_t... k>
BBB_DEVICE A call(const Function& f, const Operands& o, Drawn z, int j, std::index_sequence<k...>) {
  if constexpr (Function::kDraw == Draw::nothing) {
    return f.call(static_cast<A>(std::get<k>(o).wide(j))...);
  } else {
    return f.call(static_cast<A>(std::get<k>(o).wide(j))..., z);
  }
}

template <bool kWhole, class Operands, size_t... k, class... In>
BBB_DEVICE void read_each(Operands& o, int left, std::index_sequence<k...>, const In*... in) {
  (read<kWhole>(in, left, std::get<k>(o)), ...);
}

template <class Function, class Out, class... In>
__global__ void __launch_bounds__(kThreads) map_kernel(
    const __grid_constant__ Table<MapEntry<Out>, 1> table, Function f, const int64_t* rng, const In*... in) {
  using A = Wide<Out>;
  using Drawn = std::conditional_t<Function::kDraw == Draw::word, uint32_t, A>;
  constexpr int N = kVector<Out, In...>;
  using Operands = std::tuple<Pack<In, N>...>;
  Noise noise;
  if constexpr (Function::kDraw != Draw::nothing) noise = Noise(rng, 0);
  for_each_chunk(table, [&](const auto& e, int64_t, int64_t begin, int count) {
    for_each_vector<N, Operands>(
        e.aligned, count,
        [&](auto whole, unsigned at, int left, Operands& o) {
          read_each<whole.value>(o, left, std::index_sequence_for<In...>{}, in + begin + at...);
        },
        [&](auto whole, unsigned at, int left, const Operands& o) {
          Drawn z[N];
          if constexpr (Function::kDraw != Draw::nothing) noise.fill(begin, at, z);
          A result[N];
#pragma unroll
          for (int j = 0; j < N; ++j) {
            result[j] = call<A>(f, o, z[j], j, std::index_sequence_for<In...>{});
          }
          write<whole.value>(e.out + begin + at, left, result);
        });
  });
}

// out[i] = f.call(in[i]..., noise[i]). rng is undefined where there is no noise; out may be an input.
template <class Out, class Function, class... In>
void map(const Function& f, const at::Tensor& rng, const at::Tensor& out, const In*... in) {
  constexpr int N = kVector<Out, In...>;
  Out* to = out.mutable_data_ptr<Out>();
  Table<MapEntry<Out>, 1> table;
  table.add({to, out.numel(), is_aligned<N>(to) && (is_aligned<N>(in) && ...)});
  const int64_t* numbers = Function::kDraw == Draw::nothing ? nullptr : rng.const_data_ptr<int64_t>();
  launch<&map_kernel<Function, Out, In...>>(table.chunks(), table, f, numbers, in...);
}

}  // namespace bbb_fast::cuda
