// lrt_sample: y = m + sqrt(v) eps, the epilogue of local reparameterization; its backward gives dL/dv.
#ifndef BBB_ISA

#include <torch/library.h>

#include "../checks.h"
#include "span.h"

namespace bbb_fast {

struct LrtSampleArgs {
  Span m, v, out;
  uint64_t seed, stream;
};

struct LrtSampleBackwardArgs {
  Span grad, v, grad_v;
  uint64_t seed, stream;
};

}  // namespace bbb_fast

#define BBB_THIS_FILE "lrt_sample.cpp"
#include "foreach_isa.h"

namespace bbb_fast {

void lrt_sample_cpu(at::Tensor& m, const at::Tensor& v, const at::Tensor& rng) {
  check_lrt_sample("lrt_sample_", "m", m, v, rng);
  const at::Tensor numbers = rng.contiguous();
  const int64_t* seed_stream = numbers.const_data_ptr<int64_t>();
  const LrtSampleArgs args{
      Span(m), Span(v), Span(m), static_cast<uint64_t>(seed_stream[0]),
      static_cast<uint64_t>(seed_stream[1])};
  for_each_chunk(
      m.numel(), [&](int64_t begin, int64_t end) { BBB_CALL(lrt_sample_chunks, args, begin, end) });
}

at::Tensor lrt_sample_backward_cpu(const at::Tensor& grad, const at::Tensor& v, const at::Tensor& rng) {
  check_lrt_sample("lrt_sample_backward", "grad", grad, v, rng);
  const at::Tensor numbers = rng.contiguous();
  const int64_t* seed_stream = numbers.const_data_ptr<int64_t>();
  at::Tensor grad_v = fresh_like(v, v.scalar_type());
  const LrtSampleBackwardArgs args{
      Span(grad), Span(v), Span(grad_v), static_cast<uint64_t>(seed_stream[0]),
      static_cast<uint64_t>(seed_stream[1])};
  for_each_chunk(
      v.numel(), [&](int64_t begin, int64_t end) { BBB_CALL(lrt_sample_backward_chunks, args, begin, end) });
  return grad_v;
}

TORCH_LIBRARY_IMPL(bbb_fast, CPU, m) {
  m.impl("lrt_sample_", &lrt_sample_cpu);
  m.impl("lrt_sample_backward", &lrt_sample_backward_cpu);
}

}  // namespace bbb_fast

#else

inline void lrt_sample_chunks(const LrtSampleArgs& a, int64_t begin, int64_t end) {
  const Noise noise(a.seed, a.stream);
  const bool wide = a.m.dtype == at::kDouble;
  alignas(64) float m_buffer[kTile], v_buffer[kTile], out_buffer[kTile];
  const int64_t stop = std::min(end * kChunk, a.m.numel);
  for (int64_t i = begin * kChunk; i < stop; i += kTile) {
    const int64_t count = std::min<int64_t>(kTile, stop - i);
    vquad z[kQuads];
    noise.tile(i / 4, z);
    if (wide) {
      for (int q = 0; q < kQuads; ++q) store(m_buffer + q * kQuad, z[q]);
      for (int64_t j = 0; j < count; ++j) {
        const double y = read_double(a.m, i + j) + f64::lrt_noise(read_any(a.v, i + j), m_buffer[j]);
        write_double(a.out, i + j, y);
      }
      continue;
    }
    const float* m = read_tile(a.m, i, count, m_buffer);
    const float* v = read_tile(a.v, i, count, v_buffer);
    float* out = write_tile(a.out, i, count, out_buffer);
    for (int q = 0; q < kQuads; ++q) {
      const int at = q * kQuad;
      store(out + at, load_quad(m + at) + lrt_noise(load_quad(v + at), z[q]));
    }
    commit_tile(a.out, i, count, out);
  }
}

inline void lrt_sample_backward_chunks(const LrtSampleBackwardArgs& a, int64_t begin, int64_t end) {
  const Noise noise(a.seed, a.stream);
  const bool wide = a.grad.dtype == at::kDouble;
  alignas(64) float grad_buffer[kTile], v_buffer[kTile], out_buffer[kTile];
  const int64_t stop = std::min(end * kChunk, a.v.numel);
  for (int64_t i = begin * kChunk; i < stop; i += kTile) {
    const int64_t count = std::min<int64_t>(kTile, stop - i);
    vquad z[kQuads];
    noise.tile(i / 4, z);
    if (wide) {
      for (int q = 0; q < kQuads; ++q) store(v_buffer + q * kQuad, z[q]);
      for (int64_t j = 0; j < count; ++j) {
        const double slope = f64::lrt_noise_derivative(read_any(a.v, i + j), v_buffer[j]);
        write_double(a.grad_v, i + j, read_double(a.grad, i + j) * slope);
      }
      continue;
    }
    const float* grad = read_tile(a.grad, i, count, grad_buffer);
    const float* v = read_tile(a.v, i, count, v_buffer);
    float* out = write_tile(a.grad_v, i, count, out_buffer);
    for (int q = 0; q < kQuads; ++q) {
      const int at = q * kQuad;
      store(out + at, load_quad(grad + at) * lrt_noise_derivative(load_quad(v + at), z[q]));
    }
    commit_tile(a.grad_v, i, count, out);
  }
}

#endif
