// flip_signs and add_flipped: a tensor times the random signs of its rows and channels, alone or added to
// another. signs.h says which sign an element takes.
#ifndef BBB_ISA

#include "../signs.h"

#include <torch/library.h>

#include "../checks.h"
#include "../layout.h"
#include "span.h"

namespace bbb_fast {

struct FlipArgs {
  Span base;  // data is null where there is none
  Span x, out;
  uint64_t seed, stream;
  SignLayout layout;
};

}  // namespace bbb_fast

#define BBB_THIS_FILE "signs.cpp"
#include "foreach_isa.h"

namespace bbb_fast {

namespace {

void flip(
    const Span& base,
    const at::Tensor& x,
    const at::Tensor& out,
    const at::Tensor& rng,
    int64_t stream,
    int64_t channel_dim) {
  const at::Tensor numbers = rng.contiguous();
  const int64_t* seed_stream = numbers.const_data_ptr<int64_t>();
  const FlipArgs args{
      base,
      Span(x),
      Span(out),
      static_cast<uint64_t>(seed_stream[0]),
      static_cast<uint64_t>(seed_stream[1]) + static_cast<uint64_t>(stream),
      sign_layout(x, channel_dim)};
  for_each_chunk(x.numel(), [&](int64_t begin, int64_t end) { BBB_CALL(flip_chunks, args, begin, end) });
}

}  // namespace

at::Tensor flip_signs_cpu(
    const at::Tensor& input, const at::Tensor& rng, int64_t stream, int64_t channel_dim) {
  check_signs("flip_signs", input, rng, stream, channel_dim);
  const at::Tensor x = in_sign_order(input, channel_dim);
  at::Tensor out = fresh_like(x, x.scalar_type());
  flip(Span(), x, out, rng, stream, channel_dim);
  return out;
}

void add_flipped_cpu(
    at::Tensor& base, const at::Tensor& input, const at::Tensor& rng, int64_t stream, int64_t channel_dim) {
  check_signs("add_flipped_", input, rng, stream, channel_dim);
  check_add_signed("add_flipped_", base, input);
  const at::Tensor sum = in_sign_order(base, channel_dim);
  flip(Span(sum), in_order_of(sum, input), sum, rng, stream, channel_dim);
  if (!sum.is_same(base)) base.copy_(sum);
}

TORCH_LIBRARY_IMPL(bbb_fast, CPU, m) {
  m.impl("flip_signs", &flip_signs_cpu);
  m.impl("add_flipped_", &add_flipped_cpu);
}

}  // namespace bbb_fast

#else

// The masks of a tensor's elements, a tile at a time and in order.
class SignTiles {
 public:
  SignTiles(const FlipArgs& a) : layout_(a.layout), signs_(a.seed, a.stream) {
    static_assert(kTile % 32 == 0);
    if (layout_.channels_last) row_masks_.resize(layout_.channels + kTile);
  }

  // How many of the `count` elements from i on are one tile: those of one row, where channels lie last.
  int64_t length(int64_t i, int64_t count) const {
    if (!layout_.channels_last) return count;
    const int64_t row = layout_.channels * layout_.inner;
    return std::min(count, row - i % row);
  }

  const uint32_t* masks(int64_t i, int64_t count) {
    if (layout_.channels_last) return of_row(i);
    if (layout_.inner == 1) {
      // i is a multiple of kTile.
      for (int w = 0; w < kTile / 32; ++w) {
        const uint32_t word = signs_.word(i / 32 + w);
        for (int b = 0; b < 32; ++b) buffer_[32 * w + b] = word << (31 - b) & 0x80000000u;
      }
      return buffer_;
    }
    // Runs of one sign.
    int64_t q = i / layout_.inner, left = layout_.inner - i % layout_.inner;
    for (int64_t j = 0; j < count; left = layout_.inner, ++q) {
      const int64_t stop = std::min(count, j + left);
      std::fill(buffer_ + j, buffer_ + stop, signs_.mask(q));
      j = stop;
    }
    return buffer_;
  }

 private:
  // A row's masks repeat from pixel to pixel.
  const uint32_t* of_row(int64_t i) {
    const int64_t channels = layout_.channels, row = i / (channels * layout_.inner);
    if (row != known_row_) {
      known_row_ = row;
      for (int64_t c = 0; c < channels; ++c) row_masks_[c] = signs_.mask(row * channels + c);
      for (int64_t c = channels; c < channels + kTile; ++c) row_masks_[c] = row_masks_[c - channels];
    }
    return row_masks_.data() + i % channels;
  }

  const SignLayout& layout_;
  Signs signs_;
  int64_t known_row_ = -1;
  std::vector<uint32_t> row_masks_;
  alignas(64) uint32_t buffer_[kTile];
};

inline void flip_chunks_double(const FlipArgs& a, int64_t begin, int64_t end) {
  const int64_t stop = std::min(end * kChunk, a.x.numel);
  Signs signs(a.seed, a.stream);
  SignCursor<int64_t> at(a.layout, begin * kChunk);
  for (int64_t i = begin * kChunk; i < stop; ++i, at.next()) {
    const double x = read_double(a.x, i), flipped = signs.mask(at.number()) != 0 ? -x : x;
    write_double(a.out, i, a.base.data == nullptr ? flipped : read_double(a.base, i) + flipped);
  }
}

inline void flip_chunks(const FlipArgs& a, int64_t begin, int64_t end) {
  if (a.x.dtype == at::kDouble) return flip_chunks_double(a, begin, end);
  SignTiles signs(a);
  alignas(64) float base_buffer[kTile], x_buffer[kTile], out_buffer[kTile];
  const int64_t stop = std::min(end * kChunk, a.x.numel);
  int64_t count = 0;
  for (int64_t i = begin * kChunk; i < stop; i += count) {
    count = signs.length(i, std::min<int64_t>(kTile, stop - i));
    const uint32_t* masks = signs.masks(i, count);
    const float* x_tile = read_tile(a.x, i, count, x_buffer);
    const float* base = a.base.data == nullptr ? nullptr : read_tile(a.base, i, count, base_buffer);
    float* out = write_tile(a.out, i, count, out_buffer);
    for (int at = 0; at < kTile; at += kWidth) {
      const vint bits = as_int(load(x_tile + at)) ^ as_int(load(reinterpret_cast<const float*>(masks + at)));
      const vfloat flipped = as_float(bits);
      store(out + at, base == nullptr ? flipped : load(base + at) + flipped);
    }
    commit_tile(a.out, i, count, out);
  }
}

#endif
