// normal: the noise itself, for tests and for users who want the stream.
#ifndef BBB_ISA

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../checks.h"
#include "span.h"

namespace bbb_fast {

struct NormalArgs {
  Span out;
  uint64_t seed;
  uint64_t stream;
};

}  // namespace bbb_fast

#define BBB_THIS_FILE "normal.cpp"
#include "foreach_isa.h"

namespace bbb_fast {

at::Tensor normal_cpu(at::IntArrayRef size, const at::Tensor& rng, at::ScalarType dtype) {
  check_noise("normal", size, rng, dtype);
  at::Tensor out = at::empty(size, rng.options().dtype(dtype));
  const at::Tensor numbers = rng.contiguous();
  const int64_t* seed_stream = numbers.const_data_ptr<int64_t>();
  const NormalArgs args{
      Span(out), static_cast<uint64_t>(seed_stream[0]), static_cast<uint64_t>(seed_stream[1])};
  for_each_chunk(out.numel(), [&](int64_t begin, int64_t end) { BBB_CALL(normal_chunks, args, begin, end) });
  return out;
}

TORCH_LIBRARY_IMPL(bbb_fast, CPU, m) {
  m.impl("normal", &normal_cpu);
}

}  // namespace bbb_fast

#else

inline void normal_chunks(const NormalArgs& a, int64_t begin, int64_t end) {
  const Noise noise(a.seed, a.stream);
  alignas(64) float buffer[kTile];
  const int64_t stop = std::min(end * kChunk, a.out.numel);
  for (int64_t i = begin * kChunk; i < stop; i += kTile) {
    const int64_t count = std::min<int64_t>(kTile, stop - i);
    float* out = write_tile(a.out, i, count, buffer);
    noise.tile(i / 4, out);
    commit_tile(a.out, i, count, out);
  }
}

#endif
