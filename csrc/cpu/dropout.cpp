// drop_elements: x times the mask of dropout, scaled, of contiguous tensors. ../dropout.cpp makes the other
// masks of it.
#ifndef BBB_ISA

#include "../dropout.h"

#include <torch/library.h>

#include "../checks.h"
#include "span.h"

namespace bbb_fast {

struct DropArgs {
  Span x, out;
  SeedStream draw;
  Dropout dropout;
};

}  // namespace bbb_fast

#define BBB_THIS_FILE "dropout.cpp"
#include "foreach_isa.h"

namespace bbb_fast {

at::Tensor drop_elements_cpu(const at::Tensor& input, const at::Tensor& rng, double p) {
  check_drop_elements("drop_elements", input, rng, p);
  at::Tensor out = fresh_like(input, input.scalar_type());
  const DropArgs args{Span(input), Span(out), seeds_and_streams(rng)[0], Dropout(p)};
  for_each_chunk(input.numel(), [&](int64_t begin, int64_t end) { BBB_CALL(drop_chunks, args, begin, end) });
  return out;
}

TORCH_LIBRARY_IMPL(bbb_fast, CPU, m) {
  m.impl("drop_elements", &drop_elements_cpu);
}

}  // namespace bbb_fast

#else

inline void drop_chunks(const DropArgs& a, int64_t begin, int64_t end) {
  const Noise noise(a.draw.seed, a.draw.stream);
  const bool wide = a.x.dtype == at::kDouble;
  const vfloat scale = vfloat{} + static_cast<float>(a.dropout.scale);
  alignas(64) float x_buffer[kTile], out_buffer[kTile];
  const int64_t stop = std::min(end * kChunk, a.x.numel);
  for (int64_t i = begin * kChunk; i < stop; i += kTile) {
    const int64_t count = std::min<int64_t>(kTile, stop - i);
    vuint words[kTile / kWidth];
    noise.words(i / 4, words);
    if (wide) {
      for (int64_t j = 0; j < count; ++j) {
        const uint32_t word = words[j / kWidth][j % kWidth];
        const double factor = dropout_factor(word, a.dropout.least, a.dropout.scale);
        write_double(a.out, i + j, read_double(a.x, i + j) * factor);
      }
      continue;
    }
    const float* x = read_tile(a.x, i, count, x_buffer);
    float* out = write_tile(a.out, i, count, out_buffer);
    for (int k = 0; k < kTile / kWidth; ++k) {
      const vfloat factor = dropout_factor(words[k], a.dropout.least, scale);
      store(out + k * kWidth, load(x + k * kWidth) * factor);
    }
    commit_tile(a.out, i, count, out);
  }
}

#endif
