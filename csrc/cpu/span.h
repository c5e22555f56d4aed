// What the CPU kernels share: untyped views of contiguous tensors, and how work is cut up.
#pragma once

#include <ATen/EmptyTensor.h>
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
#include "../kl_sum.h"
#include "../macros.h"
#include "huge_pages.h"

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

  // Part k of `count` equal ones.
  Span part(int64_t k, int64_t count) const {
    Span result = *this;
    result.numel = numel / count;
    result.data = static_cast<char*>(data) + k * result.numel * static_cast<int64_t>(c10::elementSize(dtype));
    return result;
  }
};

// A draw's number in Philox.
struct SeedStream {
  uint64_t seed, stream;
};

// Those of the draws that an rng [2] or [S, 2] names, for tensor k of a list.
inline std::vector<SeedStream> seeds_and_streams(const at::Tensor& rng, uint64_t k = 0) {
  const at::Tensor numbers = rng.contiguous();
  const int64_t* n = numbers.const_data_ptr<int64_t>();
  std::vector<SeedStream> draws;
  for (int64_t i = 0; i < numbers.numel(); i += 2) {
    draws.push_back({static_cast<uint64_t>(n[i]), static_cast<uint64_t>(n[i + 1]) + k});
  }
  return draws;
}

// Memory to be written as a whole. Past the dispatcher, whose microsecond a small layer pays several times.
inline at::Tensor fresh(at::IntArrayRef sizes, at::ScalarType dtype) {
  at::Tensor t = at::detail::empty_cpu(sizes, dtype);
  hint_huge_pages(t);
  return t;
}
// The same in the memory order of a dense tensor.
inline at::Tensor fresh_like(const at::Tensor& dense, at::ScalarType dtype) {
  at::Tensor t = at::detail::empty_strided_cpu(dense.sizes(), dense.strides(), dtype);
  hint_huge_pages(t);
  return t;
}

inline int64_t chunk_count(int64_t numel) {
  return (numel + kChunk - 1) / kChunk;
}

// Adds a tensor's partial sums in order, so that the result never depends on the threads.
inline double finish_kl(const std::vector<double>& partial, double constant) {
  double total = constant;
  for (double p : partial) total += p;
  return 0.5 * total;
}

// The KL as it is returned.
inline at::Tensor kl_tensor(double kl, const at::Tensor& mu) {
  at::Tensor t = at::detail::empty_cpu({}, kl_dtype(mu));
  if (t.scalar_type() == at::kDouble) {
    *t.mutable_data_ptr<double>() = kl;
  } else {
    *t.mutable_data_ptr<float>() = static_cast<float>(kl);
  }
  return t;
}

template <class Body>
void for_each_chunk(int64_t numel, const Body& body) {
  at::parallel_for(0, chunk_count(numel), kGrain, [&](int64_t begin, int64_t end) { body(begin, end); });
}

}  // namespace bbb_fast
