// Direct convolutions. An image is copied into planes that include the padding. In such a plane, row after
// row, output pixel p is the sum over the kernel of weight(kh, kw) * plane[p + kh * row + kw], for a whole
// run of pixels at once; the few pixels that lie between rows are computed too, and dropped.
#ifndef BBB_ISA

#include "direct_conv.h"

#include <ATen/ops/empty.h>

#include "huge_pages.h"
#include "span.h"

namespace bbb_fast {

namespace {

// Reads go past a plane's last pixel by less than this: a kernel's block of 8 vectors of 16 floats.
constexpr int64_t kSlack = 8 * 16;
// The images of a batch are summed up in so many parts, whatever the number of threads.
constexpr int64_t kParts = 8;
// Sums are kept by lanes of so many floats, on every instruction set.
constexpr int64_t kLanes = 16;

int64_t round_up(int64_t n, int64_t to) {
  return (n + to - 1) / to * to;
}

}  // namespace

// Planes of one image with a border of zeros, and room behind them.
struct Planes {
  int64_t channels, height, width, border_h, border_w;

  int64_t row() const { return width + 2 * border_w; }
  int64_t stride() const { return round_up((height + 2 * border_h) * row(), 16) + kSlack + 2 * row(); }
  std::vector<float> make() const { return std::vector<float>(channels * stride(), 0.0f); }
  void fill(const float* image, float* planes) const {
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t h = 0; h < height; ++h) {
        std::memcpy(
            planes + c * stride() + (h + border_h) * row() + border_w, image + (c * height + h) * width,
            width * sizeof(float));
      }
    }
  }
};

// One image, all output channels. weight: [in][kernel_h][kernel_w] of blocks of output channels; see pack.
struct CorrelateArgs {
  const float* planes;
  int64_t plane, row, in, out, kernel_h, kernel_w, out_height, out_width;
  const float* weight;
  const float* bias;  // or null
  float* wide;        // a block's output, rows as wide as the planes'
  float* output;
};

// A group of images. Several at once where they are small: the sums then leave the cache less often.
struct WeightGradArgs {
  int64_t images;
  const float* planes;  // [images][in]
  const float* grads;   // [images][out], rows as wide as the planes', zeros between them
  int64_t plane, row, grad_plane, in, out, kernel_h, kernel_w, pixels;
  float* sums;  // [out][in][kernel_h][kernel_w] vectors
};

}  // namespace bbb_fast

#define BBB_THIS_FILE "direct_conv.cpp"
#include "foreach_isa.h"

namespace bbb_fast {
namespace {

// Output channels that a kernel computes at once, largest first.
int64_t block_of(int64_t channels, bool wide_registers) {
  for (int64_t block : {8, 6, 4, 3, 2}) {
    if (channels >= block && (wide_registers || block <= 4)) return block;
  }
  return 1;
}

// [out][in][kernel_h][kernel_w] to [block][in][kernel_h][kernel_w][channel of the block]. For the gradient
// of the input, `in` and `out` change places and the kernel is turned round.
std::vector<float> pack(const ConvShape& s, const float* weight, bool turned, bool wide_registers) {
  const int64_t taps = s.kernel_h * s.kernel_w;
  const int64_t in = turned ? s.out : s.in, out = turned ? s.in : s.out;
  std::vector<float> packed;
  packed.reserve(s.in * s.out * taps);
  for (int64_t first = 0; first < out;) {
    const int64_t block = block_of(out - first, wide_registers);
    for (int64_t i = 0; i < in; ++i) {
      for (int64_t tap = 0; tap < taps; ++tap) {
        for (int64_t o = first; o < first + block; ++o) {
          packed.push_back(
              turned ? weight[(i * s.in + o) * taps + taps - 1 - tap] : weight[(o * s.in + i) * taps + tap]);
        }
      }
    }
    first += block;
  }
  return packed;
}

bool wide_registers() {
  return current_isa() == Isa::avx512;
}

void correlate_batch(
    const ConvShape& s,
    const Planes& planes,
    const float* input,
    const std::vector<float>& weight,
    const float* bias,
    int64_t out,
    int64_t out_height,
    int64_t out_width,
    float* output) {
  at::parallel_for(0, s.batch, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> image = planes.make();
    std::vector<float> wide(8 * (out_height * planes.row() + kSlack));
    for (int64_t n = begin; n < end; ++n) {
      planes.fill(input + n * planes.channels * planes.height * planes.width, image.data());
      const CorrelateArgs args{
          image.data(),
          planes.stride(),
          planes.row(),
          planes.channels,
          out,
          s.kernel_h,
          s.kernel_w,
          out_height,
          out_width,
          weight.data(),
          bias,
          wide.data(),
          output + n * out * out_height * out_width};
      BBB_CALL(correlate, args)
    }
  });
}

}  // namespace

ConvShape direct_conv_shape(const ConvProblem& p) {
  // One dimension: images of one row.
  const bool two = p.size.size() == 2;
  return {p.batch,         p.in,
          p.out,           two ? p.size[0] : 1,
          p.size.back(),   two ? p.kernel[0] : 1,
          p.kernel.back(), two ? p.padding[0] : 0,
          p.padding.back()};
}

at::Tensor direct_conv(
    const ConvShape& s,
    const at::Tensor& input,
    const at::Tensor& weight,
    const std::optional<at::Tensor>& bias) {
  const at::Tensor w = weight.contiguous();
  const at::Tensor b = bias && bias->defined() ? bias->contiguous() : at::Tensor();
  std::vector<int64_t> sizes{s.batch, s.out};
  if (weight.dim() == 4) sizes.push_back(s.out_height());
  sizes.push_back(s.out_width());
  at::Tensor output = at::empty(sizes, input.options());
  hint_huge_pages(output);
  correlate_batch(
      s, {s.in, s.height, s.width, s.padding_h, s.padding_w}, input.const_data_ptr<float>(),
      pack(s, w.const_data_ptr<float>(), false, wide_registers()),
      b.defined() ? b.const_data_ptr<float>() : nullptr, s.out, s.out_height(), s.out_width(),
      output.mutable_data_ptr<float>());
  return output;
}

std::pair<at::Tensor, at::Tensor> direct_conv_backward(
    const ConvShape& s,
    const at::Tensor& grad,
    const at::Tensor& input,
    const at::Tensor& weight,
    const std::array<bool, 2>& wanted) {
  const at::Tensor g = grad.contiguous();
  const at::Tensor w = weight.contiguous();
  at::Tensor g_x, g_w;
  if (wanted[0]) {
    g_x = at::empty(input.sizes(), input.options());
    hint_huge_pages(g_x);
    correlate_batch(
        s, {s.out, s.out_height(), s.out_width(), s.kernel_h - 1 - s.padding_h, s.kernel_w - 1 - s.padding_w},
        g.const_data_ptr<float>(), pack(s, w.const_data_ptr<float>(), true, wide_registers()), nullptr, s.in,
        s.height, s.width, g_x.mutable_data_ptr<float>());
  }
  if (wanted[1]) {
    const Planes planes{s.in, s.height, s.width, s.padding_h, s.padding_w};
    const int64_t row = planes.row(), pixels = (s.out_height() - 1) * row + s.out_width();
    const int64_t grad_plane = round_up(s.out_height() * row, 16);
    const int64_t parts = std::min(kParts, s.batch);
    // What a kernel goes over time and again should stay in the first cache.
    const int64_t floats = s.in * planes.stride() + 4 * grad_plane;
    const int64_t group = std::clamp<int64_t>(8192 / floats, 1, 8);
    const int64_t size = s.out * s.in * s.kernel_h * s.kernel_w;
    std::vector<float> sums(parts * size * kLanes, 0.0f);
    at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> images(group * s.in * planes.stride(), 0.0f);
      std::vector<float> grads(group * s.out * grad_plane, 0.0f);
      for (int64_t part = begin; part < end; ++part) {
        const int64_t last = (part + 1) * s.batch / parts;
        for (int64_t first = part * s.batch / parts; first < last; first += group) {
          const int64_t count = std::min(group, last - first);
          for (int64_t k = 0; k < count; ++k) {
            planes.fill(
                input.const_data_ptr<float>() + (first + k) * s.in * s.height * s.width,
                images.data() + k * s.in * planes.stride());
            const float* from =
                g.const_data_ptr<float>() + (first + k) * s.out * s.out_height() * s.out_width();
            float* to = grads.data() + k * s.out * grad_plane;
            for (int64_t o = 0; o < s.out; ++o) {
              for (int64_t h = 0; h < s.out_height(); ++h) {
                std::memcpy(
                    to + o * grad_plane + h * row, from + (o * s.out_height() + h) * s.out_width(),
                    s.out_width() * sizeof(float));
              }
            }
          }
          const WeightGradArgs args{
              count,      images.data(), grads.data(), planes.stride(),
              row,        grad_plane,    s.in,         s.out,
              s.kernel_h, s.kernel_w,    pixels,       sums.data() + part * size * kLanes};
          BBB_CALL(correlate_weights, args)
        }
      }
    });
    g_w = at::empty(w.sizes(), w.options());
    float* to = g_w.mutable_data_ptr<float>();
    for (int64_t i = 0; i < size; ++i) {
      float lanes[kLanes] = {0.0f};
      for (int64_t part = 0; part < parts; ++part) {
        const float* of_part = sums.data() + (part * size + i) * kLanes;
        for (int64_t l = 0; l < kLanes; ++l) lanes[l] += of_part[l];
      }
      for (int64_t half = kLanes / 2; half > 0; half /= 2) {
        for (int64_t l = 0; l < half; ++l) lanes[l] += lanes[l + half];
      }
      to[i] = lanes[0];
    }
  }
  return {std::move(g_x), std::move(g_w)};
}

}  // namespace bbb_fast

#else

// Accumulators that fit into the registers beside what they are formed from.
constexpr int kAccumulators = kWidth == 16 ? 24 : 12;

// kBlock output channels, by kRun vectors of pixels.
template <int kBlock>
inline void correlate_block(const CorrelateArgs& a, const float* weight, int64_t first) {
  constexpr int kRun = kAccumulators / kBlock < 8 ? kAccumulators / kBlock : 8;
  const int64_t pixels = (a.out_height - 1) * a.row + a.out_width;
  const int64_t wide = a.out_height * a.row + kSlack;
  for (int64_t p = 0; p < pixels; p += kRun * kWidth) {
    vfloat sums[kBlock][kRun];
    for (int o = 0; o < kBlock; ++o) {
      const float start = a.bias == nullptr ? 0.0f : a.bias[first + o];
      for (int r = 0; r < kRun; ++r) sums[o][r] = vfloat{} + start;
    }
    const float* w = weight;
    for (int64_t i = 0; i < a.in; ++i) {
      for (int64_t kh = 0; kh < a.kernel_h; ++kh) {
        const float* x = a.planes + i * a.plane + kh * a.row + p;
        for (int64_t kw = 0; kw < a.kernel_w; ++kw, w += kBlock) {
          vfloat run[kRun];
          for (int r = 0; r < kRun; ++r) run[r] = load(x + kw + r * kWidth);
          for (int o = 0; o < kBlock; ++o) {
            for (int r = 0; r < kRun; ++r) sums[o][r] += run[r] * w[o];
          }
        }
      }
    }
    for (int o = 0; o < kBlock; ++o) {
      for (int r = 0; r < kRun; ++r) store(a.wide + o * wide + p + r * kWidth, sums[o][r]);
    }
  }
  for (int o = 0; o < kBlock; ++o) {
    float* out = a.output + (first + o) * a.out_height * a.out_width;
    for (int64_t h = 0; h < a.out_height; ++h) {
      std::memcpy(out + h * a.out_width, a.wide + o * wide + h * a.row, a.out_width * sizeof(float));
    }
  }
}

inline void correlate(const CorrelateArgs& a) {
  const int64_t taps = a.in * a.kernel_h * a.kernel_w;
  for (int64_t first = 0; first < a.out;) {
    const float* weight = a.weight + first * taps;
    const int64_t left = a.out - first;
    // The blocks that pack() made.
    if (kWidth == 16 && left >= 8) {
      correlate_block<8>(a, weight, first);
      first += 8;
    } else if (kWidth == 16 && left >= 6) {
      correlate_block<6>(a, weight, first);
      first += 6;
    } else if (left >= 4) {
      correlate_block<4>(a, weight, first);
      first += 4;
    } else if (left >= 3) {
      correlate_block<3>(a, weight, first);
      first += 3;
    } else if (left >= 2) {
      correlate_block<2>(a, weight, first);
      first += 2;
    } else {
      correlate_block<1>(a, weight, first);
      first += 1;
    }
  }
}

// Adds grads[o][p] * plane[p + shift + k] over all pixels p, for kBlock output channels and kTaps taps of a
// row.
template <int kBlock, int kTaps>
inline void weight_sums(const WeightGradArgs& a, const float* x, int64_t o, float* const to[kBlock]) {
  // Unrolled by name: the compiler would else unroll too late to keep the sums in registers.
  vfloat sums[kBlock][kTaps];
#pragma GCC unroll 8
  for (int b = 0; b < kBlock; ++b) {
#pragma GCC unroll 8
    for (int k = 0; k < kTaps; ++k) sums[b][k] = load(to[b] + k * kLanes);
  }
  for (int64_t n = 0; n < a.images; ++n, x += a.in * a.plane) {
    const float* g = a.grads + (n * a.out + o) * a.grad_plane;
    for (int64_t p = 0; p < a.pixels; p += kWidth) {
      vfloat taps[kTaps];
#pragma GCC unroll 8
      for (int k = 0; k < kTaps; ++k) taps[k] = load(x + p + k);
#pragma GCC unroll 8
      for (int b = 0; b < kBlock; ++b) {
        const vfloat grad = load(g + b * a.grad_plane + p);
#pragma GCC unroll 8
        for (int k = 0; k < kTaps; ++k) sums[b][k] += grad * taps[k];
      }
    }
  }
#pragma GCC unroll 8
  for (int b = 0; b < kBlock; ++b) {
#pragma GCC unroll 8
    for (int k = 0; k < kTaps; ++k) store(to[b] + k * kLanes, sums[b][k]);
  }
}

template <int kBlock>
inline void weight_sums_of_row(const WeightGradArgs& a, int64_t i, int64_t kh, int64_t o) {
  const float* x = a.planes + i * a.plane + kh * a.row;
  for (int64_t kw = 0; kw < a.kernel_w;) {
    float* to[kBlock];
    for (int b = 0; b < kBlock; ++b) {
      to[b] = a.sums + ((((o + b) * a.in + i) * a.kernel_h + kh) * a.kernel_w + kw) * kLanes;
    }
    const int64_t left = a.kernel_w - kw;
    if (left >= 5) {
      weight_sums<kBlock, 5>(a, x + kw, o, to);
      kw += 5;
    } else if (left >= 3) {
      weight_sums<kBlock, 3>(a, x + kw, o, to);
      kw += 3;
    } else {
      weight_sums<kBlock, 1>(a, x + kw, o, to);
      kw += 1;
    }
  }
}

inline void correlate_weights(const WeightGradArgs& a) {
  constexpr int kMost = kWidth == 16 ? 4 : 2;
  for (int64_t o = 0; o < a.out;) {
    const bool most = a.out - o >= kMost;
    for (int64_t i = 0; i < a.in; ++i) {
      for (int64_t kh = 0; kh < a.kernel_h; ++kh) {
        most ? weight_sums_of_row<kMost>(a, i, kh, o) : weight_sums_of_row<1>(a, i, kh, o);
      }
    }
    o += most ? kMost : 1;
  }
}

#endif
