// What the CPU kernels share: untyped views of contiguous tensors, and how work is cut up.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "../gaussian_double.h"
#include "../macros.h"

namespace bbb_fast {

// Elements a chunk: the unit that threads share out and that reductions sum over. A constant, and a
// multiple of every instruction set's tile, so that results do not depend on the number of threads.
constexpr int64_t kChunk = 4096;
// Chunks below which a second thread is not worth waking.
constexpr int64_t kGrain = 4;

// A dense tensor, in memory order.
struct Span {
  void* data = nullptr;
  at::ScalarType dtype = at::kFloat;
  int64_t numel = 0;

  Span() = default;
  explicit Span(const at::Tensor& t) : data(t.data_ptr()), dtype(t.scalar_type()), numel(t.numel()) {}
};

inline int64_t chunk_count(int64_t numel) {
  return (numel + kChunk - 1) / kChunk;
}

// Adds a tensor's partial sums in order, so that the result never depends on the threads.
inline double finish_kl(const std::vector<double>& partial, double constant) {
  double total = constant;
  for (double p : partial) total += p;
  return 0.5 * total;
}

template <class Body>
void for_each_chunk(int64_t numel, const Body& body) {
  at::parallel_for(0, chunk_count(numel), kGrain, [&](int64_t begin, int64_t end) { body(begin, end); });
}

}  // namespace bbb_fast
