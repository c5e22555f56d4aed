// sample_weights: w = mu + sigma eps, and in the same pass the KL; its backward regenerates eps.
#ifndef BBB_ISA

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "../checks.h"
#include "../kl_sum.h"
#include "span.h"

namespace bbb_fast {

struct SampleArgs {
  Span mu, rho, out;
  uint64_t seed, stream;
  f64::Prior prior;
  double* partial;  // one number a chunk; null without KL
};

struct SampleBackwardArgs {
  Span mu, rho;
  Span grad_w;  // data is null where the weight got no gradient
  Span grad_mu, grad_rho;
  uint64_t seed, stream;
  f64::Prior prior;
  double grad_kl;  // 0 without KL
};

}  // namespace bbb_fast

#define BBB_THIS_FILE "sample_weights.cpp"
#include "foreach_isa.h"

namespace bbb_fast {

std::tuple<std::vector<at::Tensor>, at::Tensor> sample_weights_cpu(
    at::TensorList mu,
    at::TensorList rho,
    const at::Tensor& rng,
    double prior_mu,
    double prior_sigma,
    bool with_kl,
    std::optional<at::ScalarType> dtype) {
  check_posteriors("sample_weights", mu, rho);
  check_rng("sample_weights", rng, mu[0].device());
  check_prior("sample_weights", prior_mu, prior_sigma);
  check_dtype_option("sample_weights", "dtype", dtype);

  const at::Tensor numbers = rng.contiguous();
  const int64_t* seed_stream = numbers.const_data_ptr<int64_t>();
  std::vector<at::Tensor> weights;
  std::vector<double> partial;
  double kl = 0.0;
  for (size_t k = 0; k < mu.size(); ++k) {
    const at::Tensor m = mu[k].contiguous();
    const at::Tensor r = rho[k].contiguous();
    at::Tensor w = at::empty(m.sizes(), m.options().dtype(dtype.value_or(m.scalar_type())));
    const int64_t chunks = chunk_count(m.numel());
    if (with_kl) partial.resize(chunks);
    const SampleArgs args{
        Span(m),
        Span(r),
        Span(w),
        static_cast<uint64_t>(seed_stream[0]),
        static_cast<uint64_t>(seed_stream[1]) + k,
        {prior_mu, prior_sigma},
        with_kl ? partial.data() : nullptr};
    for_each_chunk(m.numel(), [&](int64_t begin, int64_t end) { BBB_CALL(sample_chunks, args, begin, end) });
    if (with_kl) {
      kl += finish_kl(partial, kl_constant(m, prior_sigma));
    }
    weights.push_back(std::move(w));
  }
  return {std::move(weights), at::scalar_tensor(kl, mu[0].options().dtype(kl_dtype(mu[0])))};
}

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> sample_weights_backward_cpu(
    const c10::List<std::optional<at::Tensor>>& grad_w,
    const std::optional<at::Tensor>& grad_kl,
    at::TensorList mu,
    at::TensorList rho,
    const at::Tensor& rng,
    double prior_mu,
    double prior_sigma) {
  check_posteriors("sample_weights_backward", mu, rho);
  check_rng("sample_weights_backward", rng, mu[0].device());
  check_prior("sample_weights_backward", prior_mu, prior_sigma);
  TORCH_CHECK_VALUE(
      grad_w.size() == mu.size(), "sample_weights_backward: got ", grad_w.size(), " gradients for ",
      mu.size(), " tensors");

  const at::Tensor numbers = rng.contiguous();
  const int64_t* seed_stream = numbers.const_data_ptr<int64_t>();
  const double g_kl = grad_kl && grad_kl->defined() ? grad_kl->item<double>() : 0.0;
  std::vector<at::Tensor> grad_mu, grad_rho;
  for (size_t k = 0; k < mu.size(); ++k) {
    const at::Tensor m = mu[k].contiguous();
    const at::Tensor r = rho[k].contiguous();
    at::Tensor g_m = at::empty_like(m);
    at::Tensor g_r = at::empty_like(m);
    std::optional<at::Tensor> given = grad_w.get(k);
    at::Tensor g_w;
    if (given && given->defined()) {
      TORCH_CHECK_VALUE(
          given->sizes() == m.sizes(), "sample_weights_backward: gradient ", k, " must have shape ",
          m.sizes(), ", got ", given->sizes());
      check_floating("sample_weights_backward", "grad_w", *given);
      check_device("sample_weights_backward", "grad_w", *given, m.device());
      g_w = given->contiguous();
      if (m.scalar_type() == at::kDouble) g_w = g_w.to(at::kDouble);
    }
    const SampleBackwardArgs args{
        Span(m),
        Span(r),
        g_w.defined() ? Span(g_w) : Span(),
        Span(g_m),
        Span(g_r),
        static_cast<uint64_t>(seed_stream[0]),
        static_cast<uint64_t>(seed_stream[1]) + k,
        {prior_mu, prior_sigma},
        g_kl};
    for_each_chunk(
        m.numel(), [&](int64_t begin, int64_t end) { BBB_CALL(sample_backward_chunks, args, begin, end) });
    grad_mu.push_back(std::move(g_m));
    grad_rho.push_back(std::move(g_r));
  }
  return {std::move(grad_mu), std::move(grad_rho)};
}

TORCH_LIBRARY_IMPL(bbb_fast, CPU, m) {
  m.impl("sample_weights", &sample_weights_cpu);
  m.impl("sample_weights_backward", &sample_weights_backward_cpu);
}

}  // namespace bbb_fast

#else

#include "kl_tile.h"

template <bool kWithKl>
void sample_chunks_float(const SampleArgs& a, int64_t begin, int64_t end) {
  const Noise noise(a.seed, a.stream);
  const Prior prior = make_prior(a.prior);
  alignas(64) float mu_buffer[kTile], rho_buffer[kTile], out_buffer[kTile];
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    KlSum kl;
    const int64_t stop = std::min((chunk + 1) * kChunk, a.mu.numel);
    for (int64_t i = chunk * kChunk; i < stop; i += kTile) {
      const int64_t count = std::min<int64_t>(kTile, stop - i);
      const float* mu_tile = read_tile(a.mu, i, count, mu_buffer);
      const float* rho_tile = read_tile(a.rho, i, count, rho_buffer);
      float* out = write_tile(a.out, i, count, out_buffer);
      vfloat z[4], mu[4], rho[4];
      Sigma<vfloat> s[4];
      noise.tile(i / 4, z);
      for (int r = 0; r < 4; ++r) {
        mu[r] = load(mu_tile + r * kWidth);
        rho[r] = load(rho_tile + r * kWidth);
        s[r] = softplus(rho[r]);
        store(out + r * kWidth, s[r].value * z[r] + mu[r]);
      }
      if constexpr (kWithKl) kl.add(mu, rho, s, prior, count);
      commit_tile(a.out, i, count, out);
    }
    if constexpr (kWithKl) a.partial[chunk] = kl.total();
  }
}

inline void sample_chunks_double(const SampleArgs& a, int64_t begin, int64_t end) {
  const Noise noise(a.seed, a.stream);
  alignas(64) float eps[kTile];
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    double kl = 0.0;
    const int64_t stop = std::min((chunk + 1) * kChunk, a.mu.numel);
    for (int64_t i = chunk * kChunk; i < stop; i += kTile) {
      vfloat z[4];
      noise.tile(i / 4, z);
      for (int r = 0; r < 4; ++r) store(eps + r * kWidth, z[r]);
      for (int64_t j = i; j < std::min<int64_t>(i + kTile, stop); ++j) {
        const double mu = read_double(a.mu, j), rho = read_double(a.rho, j);
        const f64::Sigma s = f64::softplus(rho);
        write_double(a.out, j, mu + s.value * eps[j - i]);
        if (a.partial != nullptr) kl += f64::kl_terms(mu, rho, s, a.prior);
      }
    }
    if (a.partial != nullptr) a.partial[chunk] = kl;
  }
}

inline void sample_chunks(const SampleArgs& a, int64_t begin, int64_t end) {
  if (a.mu.dtype == at::kDouble) {
    sample_chunks_double(a, begin, end);
  } else if (a.partial != nullptr) {
    sample_chunks_float<true>(a, begin, end);
  } else {
    sample_chunks_float<false>(a, begin, end);
  }
}

// dw/dmu = 1 and dw/drho = eps sigmoid(rho) (Blundell et al. 2015, section 3.2), plus the KL's.
template <bool kWeight, bool kKl>
void sample_backward_float(const SampleBackwardArgs& a, int64_t begin, int64_t end) {
  const Noise noise(a.seed, a.stream);
  const Prior prior = make_prior(a.prior);
  const float grad_kl = static_cast<float>(a.grad_kl);
  alignas(64) float mu_buffer[kTile], rho_buffer[kTile], w_buffer[kTile];
  alignas(64) float g_mu_buffer[kTile], g_rho_buffer[kTile];
  const int64_t stop = std::min(end * kChunk, a.mu.numel);
  for (int64_t i = begin * kChunk; i < stop; i += kTile) {
    const int64_t count = std::min<int64_t>(kTile, stop - i);
    const float* mu_tile = read_tile(a.mu, i, count, mu_buffer);
    const float* rho_tile = read_tile(a.rho, i, count, rho_buffer);
    const float* w_tile = kWeight ? read_tile(a.grad_w, i, count, w_buffer) : nullptr;
    float* g_mu_tile = write_tile(a.grad_mu, i, count, g_mu_buffer);
    float* g_rho_tile = write_tile(a.grad_rho, i, count, g_rho_buffer);
    vfloat z[4];
    if constexpr (kWeight) noise.tile(i / 4, z);
    for (int r = 0; r < 4; ++r) {
      const vfloat mu = load(mu_tile + r * kWidth);
      const vfloat rho = load(rho_tile + r * kWidth);
      const Sigma<vfloat> s = softplus(rho);
      vfloat derivative, ratio;
      softplus_derivative(rho, s, derivative, ratio);
      vfloat g_mu = vfloat{}, g_rho = vfloat{};
      if constexpr (kKl) kl_derivative(mu, s, derivative, ratio, prior, grad_kl, g_mu, g_rho);
      if constexpr (kWeight) {
        const vfloat g = load(w_tile + r * kWidth);
        g_mu += g;
        g_rho += g * z[r] * derivative;
      }
      store(g_mu_tile + r * kWidth, g_mu);
      store(g_rho_tile + r * kWidth, g_rho);
    }
    commit_tile(a.grad_mu, i, count, g_mu_tile);
    commit_tile(a.grad_rho, i, count, g_rho_tile);
  }
}

inline void sample_backward_double(const SampleBackwardArgs& a, int64_t begin, int64_t end) {
  const Noise noise(a.seed, a.stream);
  alignas(64) float eps[kTile];
  const int64_t stop = std::min(end * kChunk, a.mu.numel);
  for (int64_t i = begin * kChunk; i < stop; i += kTile) {
    vfloat z[4];
    noise.tile(i / 4, z);
    for (int r = 0; r < 4; ++r) store(eps + r * kWidth, z[r]);
    for (int64_t j = i; j < std::min<int64_t>(i + kTile, stop); ++j) {
      const double mu = read_double(a.mu, j), rho = read_double(a.rho, j);
      const double g = a.grad_w.data != nullptr ? read_double(a.grad_w, j) : 0.0;
      const f64::Sigma s = f64::softplus(rho);
      double derivative, ratio, g_mu, g_rho;
      f64::softplus_derivative(rho, s, derivative, ratio);
      f64::kl_derivative(mu, s, derivative, ratio, a.prior, a.grad_kl, g_mu, g_rho);
      write_double(a.grad_mu, j, g_mu + g);
      write_double(a.grad_rho, j, g_rho + g * eps[j - i] * derivative);
    }
  }
}

inline void sample_backward_chunks(const SampleBackwardArgs& a, int64_t begin, int64_t end) {
  const bool weight = a.grad_w.data != nullptr;
  const bool kl = a.grad_kl != 0.0;
  if (a.mu.dtype == at::kDouble) {
    sample_backward_double(a, begin, end);
  } else if (weight && kl) {
    sample_backward_float<true, true>(a, begin, end);
  } else if (weight) {
    sample_backward_float<true, false>(a, begin, end);
  } else {
    sample_backward_float<false, true>(a, begin, end);
  }
}

#endif
