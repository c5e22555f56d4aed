#include "conv_by_pixels.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <vector>

#include "../products.h"

namespace bbb_fast {
namespace {

// The tap of the kernel through which an output pixel sees an input pixel: [output pixel][input pixel].
std::vector<int64_t> taps_between(const ConvProblem& p) {
  std::vector<int64_t> taps;
  for (int64_t oh = 0; oh < p.out_size(0); ++oh) {
    for (int64_t ow = 0; ow < p.out_size(1); ++ow) {
      for (int64_t h = 0; h < p.size[0]; ++h) {
        for (int64_t w = 0; w < p.size[1]; ++w) {
          const int64_t kh = h - oh * p.stride[0] + p.padding[0], kw = w - ow * p.stride[1] + p.padding[1];
          taps.push_back(kh * p.kernel[1] + kw);
        }
      }
    }
  }
  return taps;
}

// Calls body(output channel, room for its [tap][in]) for every output channel.
template <class T, class Body>
void for_each_channel(const ConvProblem& p, const Body& body) {
  at::parallel_for(0, p.out, 8, [&](int64_t begin, int64_t end) {
    std::vector<T> room(p.kernel[0] * p.kernel[1] * p.in);
    for (int64_t o = begin; o < end; ++o) body(o, room);
  });
}

// The weight of the linear layer from pixels to pixels, [output pixel, out, input pixel, in], of a
// convolution's.
template <class T>
void expand(const ConvProblem& p, const at::Tensor& weight, at::Tensor& dense) {
  const std::vector<int64_t> taps = taps_between(p);
  const int64_t count = p.kernel[0] * p.kernel[1], pixels = p.size[0] * p.size[1];
  const T* const source = weight.const_data_ptr<T>();
  T* const target = dense.mutable_data_ptr<T>();
  for_each_channel<T>(p, [&](int64_t o, std::vector<T>& room) {
    for (int64_t i = 0; i < p.in; ++i) {
      for (int64_t tap = 0; tap < count; ++tap) room[tap * p.in + i] = source[(o * p.in + i) * count + tap];
    }
    for (size_t pair = 0; pair < taps.size(); ++pair) {
      T* const to = target + ((pair / pixels * p.out + o) * pixels + pair % pixels) * p.in;
      std::copy_n(room.data() + taps[pair] * p.in, p.in, to);
    }
  });
}

// And back: the sum of what became of each number.
template <class T>
void fold(const ConvProblem& p, const at::Tensor& dense, at::Tensor& weight) {
  const std::vector<int64_t> taps = taps_between(p);
  const int64_t count = p.kernel[0] * p.kernel[1], pixels = p.size[0] * p.size[1];
  const T* const source = dense.const_data_ptr<T>();
  T* const target = weight.mutable_data_ptr<T>();
  for_each_channel<float>(p, [&](int64_t o, std::vector<float>& room) {
    std::fill(room.begin(), room.end(), 0.0f);
    for (size_t pair = 0; pair < taps.size(); ++pair) {
      const T* const from = source + ((pair / pixels * p.out + o) * pixels + pair % pixels) * p.in;
      float* const to = room.data() + taps[pair] * p.in;
      for (int64_t i = 0; i < p.in; ++i) to[i] += static_cast<float>(from[i]);
    }
    for (int64_t i = 0; i < p.in; ++i) {
      for (int64_t tap = 0; tap < count; ++tap) {
        target[(o * p.in + i) * count + tap] = static_cast<T>(room[tap * p.in + i]);
      }
    }
  });
}

// A matrix for the time of one call, in memory that the thread keeps for the next: fresh memory takes a page
// fault every 4 KiB, as long as a third of the products here.
at::Tensor scratch(int64_t rows, int64_t columns, const at::TensorOptions& options) {
  constexpr size_t kMostKept = size_t{64} << 20;
  const size_t bytes = rows * columns * options.dtype().itemsize();
  if (bytes > kMostKept) return at::empty({rows, columns}, options);
  static thread_local c10::DataPtr kept;
  static thread_local size_t size = 0;
  if (bytes > size) {
    kept.clear();
    kept = c10::GetCPUAllocator()->allocate(bytes);
    size = bytes;
  }
  return at::from_blob(kept.get(), {rows, columns}, options);
}

at::Tensor as_linear(const ConvProblem& p, const at::Tensor& weight) {
  const int64_t pixels = p.size[0] * p.size[1], out_pixels = p.out_size(0) * p.out_size(1);
  at::Tensor dense = scratch(out_pixels * p.out, pixels * p.in, weight.options());
  p.narrow ? expand<c10::BFloat16>(p, weight.contiguous(), dense)
           : expand<float>(p, weight.contiguous(), dense);
  return dense;
}

at::Tensor from_linear(const ConvProblem& p, const at::Tensor& dense) {
  at::Tensor weight = at::empty({p.out, p.in, p.kernel[0], p.kernel[1]}, dense.options());
  p.narrow ? fold<c10::BFloat16>(p, dense, weight) : fold<float>(p, dense, weight);
  return weight;
}

// [N, C, H, W] as [N, H * W * C]; a copy unless it is channels_last. And back.
at::Tensor flat(const at::Tensor& images) {
  return images.permute({0, 2, 3, 1}).contiguous().flatten(1);
}
at::Tensor images(const at::Tensor& flat, int64_t height, int64_t width) {
  return flat.view({flat.size(0), height, width, -1}).permute({0, 3, 1, 2});
}

}  // namespace

at::Tensor conv_by_pixels(
    const ConvProblem& p,
    const at::Tensor& input,
    const at::Tensor& weight,
    const std::optional<at::Tensor>& bias) {
  std::optional<at::Tensor> of_pixels;
  if (bias && bias->defined()) of_pixels = bias->repeat({p.out_size(0) * p.out_size(1)});
  const at::Tensor y = Linear().forward(flat(input), as_linear(p, weight), of_pixels);
  return images(y, p.out_size(0), p.out_size(1));
}

std::pair<at::Tensor, at::Tensor> conv_by_pixels_backward(
    const ConvProblem& p,
    const at::Tensor& grad,
    const at::Tensor& input,
    const at::Tensor& weight,
    const std::array<bool, 2>& wanted) {
  const at::Tensor x = flat(input);
  // Its numbers are asked for by the gradient of the input alone.
  const at::Tensor dense = wanted[0]
                               ? as_linear(p, weight)
                               : scratch(p.out_size(0) * p.out_size(1) * p.out, x.size(1), input.options());
  auto [g_x, g_w, unused] = Linear().backward(flat(grad), x, dense, {wanted[0], wanted[1], false});
  if (wanted[0]) g_x = images(g_x, p.size[0], p.size[1]);
  if (wanted[1]) g_w = from_linear(p, g_w);
  return {std::move(g_x), std::move(g_w)};
}

}  // namespace bbb_fast
