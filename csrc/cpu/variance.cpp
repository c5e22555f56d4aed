// variance: sigma^2 = softplus(rho)^2 in the dtype of the variance product, and its gradient.
#ifndef BBB_ISA

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "../checks.h"
#include "../layout.h"
#include "span.h"

namespace bbb_fast {

struct VarianceArgs {
  Span rho, out;
};

struct VarianceBackwardArgs {
  Span grad, rho, grad_rho;
};

}  // namespace bbb_fast

#define BBB_THIS_FILE "variance.cpp"
#include "foreach_isa.h"

namespace bbb_fast {

at::Tensor variance_cpu(const at::Tensor& rho, at::ScalarType dtype) {
  check_floating("variance", "rho", rho);
  check_dtype_option("variance", "dtype", dtype);
  // Element by element, in memory order: a channels_last rho gives a channels_last variance.
  const at::Tensor r = dense(rho);
  at::Tensor out = at::empty_like(r, r.options().dtype(dtype));
  const VarianceArgs args{Span(r), Span(out)};
  for_each_chunk(r.numel(), [&](int64_t begin, int64_t end) { BBB_CALL(variance_chunks, args, begin, end) });
  return out;
}

at::Tensor variance_backward_cpu(const at::Tensor& grad, const at::Tensor& rho) {
  check_floating("variance_backward", "grad", grad);
  check_floating("variance_backward", "rho", rho);
  TORCH_CHECK_VALUE(
      grad.sizes() == rho.sizes(), "variance_backward: grad must have shape ", rho.sizes(), ", got ",
      grad.sizes());
  check_device("variance_backward", "grad", grad, rho.device());
  at::Tensor g = grad.contiguous();
  if (rho.scalar_type() == at::kDouble) g = g.to(at::kDouble);
  const at::Tensor r = rho.contiguous();
  at::Tensor out = at::empty_like(r);
  const VarianceBackwardArgs args{Span(g), Span(r), Span(out)};
  for_each_chunk(
      r.numel(), [&](int64_t begin, int64_t end) { BBB_CALL(variance_backward_chunks, args, begin, end) });
  return out;
}

TORCH_LIBRARY_IMPL(bbb_fast, CPU, m) {
  m.impl("variance", &variance_cpu);
  m.impl("variance_backward", &variance_backward_cpu);
}

}  // namespace bbb_fast

#else

inline void variance_chunks(const VarianceArgs& a, int64_t begin, int64_t end) {
  alignas(64) float rho_buffer[kTile], out_buffer[kTile];
  const int64_t stop = std::min(end * kChunk, a.rho.numel);
  if (a.rho.dtype == at::kDouble) {
    for (int64_t i = begin * kChunk; i < stop; ++i) {
      const double sigma = f64::softplus(read_double(a.rho, i)).value;
      write_double(a.out, i, sigma * sigma);
    }
    return;
  }
  for (int64_t i = begin * kChunk; i < stop; i += kTile) {
    const int64_t count = std::min<int64_t>(kTile, stop - i);
    const float* rho = read_tile(a.rho, i, count, rho_buffer);
    float* out = write_tile(a.out, i, count, out_buffer);
    for (int r = 0; r < 4; ++r) {
      const vfloat sigma = softplus(load(rho + r * kWidth)).value;
      store(out + r * kWidth, sigma * sigma);
    }
    commit_tile(a.out, i, count, out);
  }
}

// d sigma^2 / d rho = 2 sigma sigmoid(rho).
inline void variance_backward_chunks(const VarianceBackwardArgs& a, int64_t begin, int64_t end) {
  alignas(64) float rho_buffer[kTile], grad_buffer[kTile], out_buffer[kTile];
  const int64_t stop = std::min(end * kChunk, a.rho.numel);
  if (a.rho.dtype == at::kDouble) {
    for (int64_t i = begin * kChunk; i < stop; ++i) {
      const double rho = read_double(a.rho, i);
      const f64::Sigma s = f64::softplus(rho);
      double derivative, ratio;
      f64::softplus_derivative(rho, s, derivative, ratio);
      write_double(a.grad_rho, i, read_double(a.grad, i) * 2.0 * s.value * derivative);
    }
    return;
  }
  for (int64_t i = begin * kChunk; i < stop; i += kTile) {
    const int64_t count = std::min<int64_t>(kTile, stop - i);
    const float* grad_tile = read_tile(a.grad, i, count, grad_buffer);
    const float* rho_tile = read_tile(a.rho, i, count, rho_buffer);
    float* out = write_tile(a.grad_rho, i, count, out_buffer);
    for (int r = 0; r < 4; ++r) {
      const vfloat rho = load(rho_tile + r * kWidth);
      const Sigma<vfloat> s = softplus(rho);
      vfloat derivative, ratio;
      softplus_derivative(rho, s, derivative, ratio);
      store(out + r * kWidth, load(grad_tile + r * kWidth) * (s.value * derivative * 2.0f));
    }
    commit_tile(a.grad_rho, i, count, out);
  }
}

#endif
