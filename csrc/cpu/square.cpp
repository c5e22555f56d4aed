// square: x^2 in the dtype of the variance product, and its gradient, added to the mean product's.
#ifndef BBB_ISA

#include <torch/library.h>

#include "../checks.h"
#include "../layout.h"
#include "span.h"

namespace bbb_fast {

struct SquareArgs {
  Span x, out;
};

struct SquareBackwardArgs {
  Span grad_x, x, grad;
};

}  // namespace bbb_fast

#define BBB_THIS_FILE "square.cpp"
#include "foreach_isa.h"

namespace bbb_fast {

at::Tensor square_cpu(const at::Tensor& input, at::ScalarType dtype) {
  check_floating("square", "input", input);
  check_dtype_option("square", "dtype", dtype);
  at::Tensor x = dense(input);
  if (dtype == at::kDouble) x = x.to(at::kDouble);
  at::Tensor out = fresh_like(x, dtype);
  const SquareArgs args{Span(x), Span(out)};
  for_each_chunk(x.numel(), [&](int64_t begin, int64_t end) { BBB_CALL(square_chunks, args, begin, end) });
  return out;
}

void square_backward_cpu(at::Tensor& grad_input, const at::Tensor& input, const at::Tensor& grad) {
  check_square_backward("square_backward_", grad_input, input, grad);
  const at::Tensor x = in_order_of(grad_input, input);
  const at::Tensor g = in_order_of(grad_input, grad);
  const SquareBackwardArgs args{Span(grad_input), Span(x), Span(g)};
  for_each_chunk(
      x.numel(), [&](int64_t begin, int64_t end) { BBB_CALL(square_backward_chunks, args, begin, end) });
}

TORCH_LIBRARY_IMPL(bbb_fast, CPU, m) {
  m.impl("square", &square_cpu);
  m.impl("square_backward_", &square_backward_cpu);
}

}  // namespace bbb_fast

#else

inline void square_chunks(const SquareArgs& a, int64_t begin, int64_t end) {
  alignas(64) float x_buffer[kTile], out_buffer[kTile];
  const int64_t stop = std::min(end * kChunk, a.x.numel);
  if (a.x.dtype == at::kDouble) {
    for (int64_t i = begin * kChunk; i < stop; ++i) {
      const double x = read_double(a.x, i);
      write_double(a.out, i, x * x);
    }
    return;
  }
  for (int64_t i = begin * kChunk; i < stop; i += kTile) {
    const int64_t count = std::min<int64_t>(kTile, stop - i);
    const float* x_tile = read_tile(a.x, i, count, x_buffer);
    float* out = write_tile(a.out, i, count, out_buffer);
    for (int q = 0; q < kQuads; ++q) {
      const vquad x = load_quad(x_tile + q * kQuad);
      store(out + q * kQuad, x * x);
    }
    commit_tile(a.out, i, count, out);
  }
}

inline void square_backward_chunks(const SquareBackwardArgs& a, int64_t begin, int64_t end) {
  alignas(64) float grad_x_buffer[kTile], x_buffer[kTile], grad_buffer[kTile], out_buffer[kTile];
  const int64_t stop = std::min(end * kChunk, a.x.numel);
  if (a.x.dtype == at::kDouble) {
    for (int64_t i = begin * kChunk; i < stop; ++i) {
      write_double(a.grad_x, i, read_double(a.grad_x, i) + read_double(a.x, i) * read_any(a.grad, i) * 2.0);
    }
    return;
  }
  for (int64_t i = begin * kChunk; i < stop; i += kTile) {
    const int64_t count = std::min<int64_t>(kTile, stop - i);
    const float* grad_x = read_tile(a.grad_x, i, count, grad_x_buffer);
    const float* x = read_tile(a.x, i, count, x_buffer);
    const float* grad = read_tile(a.grad, i, count, grad_buffer);
    float* out = write_tile(a.grad_x, i, count, out_buffer);
    for (int q = 0; q < kQuads; ++q) {
      const int at = q * kQuad;
      store(out + at, load_quad(grad_x + at) + load_quad(x + at) * load_quad(grad + at) * 2.0f);
    }
    commit_tile(a.grad_x, i, count, out);
  }
}

#endif
