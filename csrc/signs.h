// The random signs of Flipout (Wen et al., ICLR 2018): one for each row and channel of a tensor, whose
// element q = row * channels + channel takes bit q % 32 of word q / 32 % 4 of Philox block q / 128; a set bit
// is a minus. So a sign depends neither on the memory format nor on the place in an image.
#pragma once

#include <ATen/core/Tensor.h>

#include "checks.h"
#include "scalar.h"

namespace bbb_fast {

// How a dense tensor's elements lie: [rows, channels, inner], or [rows, inner, channels].
struct SignLayout {
  int64_t channels, inner;
  bool channels_last;
};

// The signs of a stream, a block at a time.
class Signs {
 public:
  Signs() = default;
  BBB_INLINE Signs(uint64_t seed, uint64_t stream) : key_(scalar::philox_key(seed)), stream_(stream) {}

  // Bit b is the sign of number 32 w + b.
  BBB_INLINE uint32_t word(int64_t w) {
    const uint64_t block = static_cast<uint64_t>(w) / 4;
    if (block != known_) {
      scalar::philox_block(key_, known_ = block, stream_, words_);
    }
    // Not words_[w % 4], for which a GPU would keep them in memory.
    const uint32_t low = w & 1 ? words_[1] : words_[0], high = w & 1 ? words_[3] : words_[2];
    return w & 2 ? high : low;
  }
  // The sign bit of a float, set for a minus.
  BBB_INLINE uint32_t mask(int64_t q) { return word(q / 32) >> (q % 32) << 31; }

 private:
  scalar::PhiloxKey key_;
  uint64_t stream_ = 0;
  uint64_t known_ = ~uint64_t{0};
  uint32_t words_[4] = {0, 0, 0, 0};
};

// The numbers q of elements that lie behind each other.
template <class Int>
class SignCursor {
 public:
  BBB_INLINE SignCursor(const SignLayout& layout, Int element)
      : channels_(static_cast<Int>(layout.channels)),
        inner_(static_cast<Int>(layout.inner)),
        last_(layout.channels_last) {
    if (last_) {
      const Int pixel = element / channels_;
      pixel_ = pixel % inner_;
      channel_ = element % channels_;
      number_ = pixel / inner_ * channels_ + channel_;
    } else {
      number_ = element / inner_;
      pixel_ = element % inner_;
    }
  }

  BBB_INLINE Int number() const { return number_; }

  BBB_INLINE void next() {
    if (last_) {
      ++number_;
      if (++channel_ < channels_) return;
      channel_ = 0;
      if (++pixel_ < inner_) {
        number_ -= channels_;
      } else {
        pixel_ = 0;
      }
    } else if (++pixel_ == inner_) {
      pixel_ = 0;
      ++number_;
    }
  }

 private:
  Int channels_, inner_;
  bool last_;
  Int number_ = 0, pixel_ = 0, channel_ = 0;
};

// Of linear layers (channel_dim -1) the channels are the last dimension and all others rows; of convolutions
// (channel_dim 1) dimension 0 are the rows.
inline void check_signs(
    const char* op, const at::Tensor& t, const at::Tensor& rng, int64_t stream, int64_t channel_dim) {
  check_floating(op, "input", t);
  check_rng(op, rng, t.device());
  TORCH_CHECK_VALUE(stream >= 0, op, ": stream must be >= 0, got ", stream);
  TORCH_CHECK_VALUE(
      channel_dim == -1 || channel_dim == 1, op, ": channel_dim must be -1 or 1, got ", channel_dim);
  TORCH_CHECK_VALUE(
      t.dim() > (channel_dim == 1 ? 1 : 0), op, ": input must have a dimension ", channel_dim, ", got ",
      t.sizes());
}

inline void check_add_signed(const char* op, const at::Tensor& base, const at::Tensor& t) {
  check_floating(op, "base", base);
  check_dtype(op, "input", t, base.scalar_type());
  check_shape(op, "input", t, base.sizes());
  check_device(op, "input", t, base.device());
}

// t as it is, where its elements lie as a SignLayout can say, else a contiguous copy.
inline at::Tensor in_sign_order(const at::Tensor& t, int64_t channel_dim) {
  const bool last = channel_dim == 1 && (t.is_contiguous(at::MemoryFormat::ChannelsLast) ||
                                         t.is_contiguous(at::MemoryFormat::ChannelsLast3d));
  return last ? t : t.contiguous();
}

// Of what in_sign_order returned.
inline SignLayout sign_layout(const at::Tensor& t, int64_t channel_dim) {
  if (channel_dim == -1) return {t.size(-1), 1, false};
  const int64_t channels = t.size(1), rows = t.size(0);
  const int64_t inner = t.numel() == 0 ? 1 : t.numel() / (channels * rows);
  return {channels, inner, !t.is_contiguous()};
}

}  // namespace bbb_fast
