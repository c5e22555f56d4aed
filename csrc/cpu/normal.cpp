// normal: the noise itself, for tests and for users who want the stream.
#ifndef BBB_ISA

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../checks.h"
#include "span.h"

namespace bbb_fast {

struct NormalArgs {
  Span out;
  SeedStream draw;
};

}  // namespace bbb_fast

#define BBB_THIS_FILE "normal.cpp"
#include "foreach_isa.h"

namespace bbb_fast {

at::Tensor normal_cpu(at::IntArrayRef size, const at::Tensor& rng, at::ScalarType dtype) {
  check_noise("normal", size, rng, dtype);
  at::Tensor out = at::empty(size, rng.options().dtype(dtype));
  const NormalArgs args{Span(out), seeds_and_streams(rng)[0]};
  for_each_chunk(out.numel(), [&](int64_t begin, int64_t end) { BBB_CALL(normal_chunks, args, begin, end) });
  return out;
}

TORCH_LIBRARY_IMPL(bbb_fast, CPU, m) {
  m.impl("normal", &normal_cpu);
}

}  // namespace bbb_fast

#else

inline void normal_chunks(const NormalArgs& a, int64_t begin, int64_t end) {
  const Noise noise(a.draw.seed, a.draw.stream);
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
