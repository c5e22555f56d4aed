// uniform: noise in the open interval (0, 1).
#ifndef BBB_ISA

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../checks.h"
#include "span.h"

namespace bbb_fast {

struct UniformArgs {
  Span out;
  SeedStream draw;
  int bits;
};

}  // namespace bbb_fast

#define BBB_THIS_FILE "uniform.cpp"
#include "foreach_isa.h"

namespace bbb_fast {

at::Tensor uniform_cpu(at::IntArrayRef size, const at::Tensor& rng, at::ScalarType dtype) {
  check_noise("uniform", size, rng, dtype);
  at::Tensor out = at::empty(size, rng.options().dtype(dtype));
  const UniformArgs args{Span(out), seeds_and_streams(rng)[0], uniform_bits(dtype)};
  for_each_chunk(out.numel(), [&](int64_t begin, int64_t end) { BBB_CALL(uniform_chunks, args, begin, end) });
  return out;
}

TORCH_LIBRARY_IMPL(bbb_fast, CPU, m) {
  m.impl("uniform", &uniform_cpu);
}

}  // namespace bbb_fast

#else

inline void uniform_chunks(const UniformArgs& a, int64_t begin, int64_t end) {
  const Noise noise(a.draw.seed, a.draw.stream);
  alignas(64) float buffer[kTile];
  const int64_t stop = std::min(end * kChunk, a.out.numel);
  for (int64_t i = begin * kChunk; i < stop; i += kTile) {
    const int64_t count = std::min<int64_t>(kTile, stop - i);
    float* out = write_tile(a.out, i, count, buffer);
    vuint words[kTile / kWidth];
    noise.words(i / 4, words);
    for (int k = 0; k < kTile / kWidth; ++k) store(out + k * kWidth, uniform_of(words[k], a.bits));
    commit_tile(a.out, i, count, out);
  }
}

#endif
