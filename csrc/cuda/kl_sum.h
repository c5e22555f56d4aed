// Sums of a KL in two deterministic stages: each chunk's by a block, then all of them by one block.
#pragma once

#include <ATen/ops/empty.h>

#include "../kl_sum.h"
#include "vectors.h"

namespace bbb_fast::cuda {

// What the mathematics of a type calls a prior, and a weight's share of the KL, twice and plus 1.
template <class A>
struct KlSum;

template <>
struct KlSum<float> {
  using Prior = scalar::Prior;
  using Sigma = scalar::Sigma<float>;

  float terms = 0.0f;
  // ln(q) of a thread's weights costs one logarithm: 16 mantissas below 2 stay in range.
  float product = 1.0f;
  int exponents = 0;

  BBB_DEVICE void add(float mu, float rho, const Sigma& s, const Prior& prior) {
    float q;
    terms += scalar::kl_squares(mu, s, prior, q);
    if (q < 0x1p-126f) {
      // Denormal, or 0: there sigma is e^rho.
      terms -= 2.0f * (rho + logf(prior.inv_sigma));
      q = 1.0f;
    }
    product *= scalar::mantissa(q);
    exponents += scalar::exponent(q);
  }
  BBB_DEVICE double total() const {
    const float logs = scalar::natural_log(product) + static_cast<float>(exponents) * scalar::kLn2;
    return static_cast<double>(terms - 2.0f * logs);
  }
};

template <>
struct KlSum<double> {
  using Prior = f64::Prior;
  using Sigma = f64::Sigma;

  double sum = 0.0;

  BBB_DEVICE void add(double mu, double rho, const Sigma& s, const Prior& prior) {
    sum += f64::kl_terms(mu, rho, s, prior);
  }
  BBB_DEVICE double total() const { return sum; }
};

template <class A>
typename KlSum<A>::Prior prior_for(double mu, double sigma) {
  if constexpr (std::is_same_v<A, double>) {
    return {mu, sigma};
  } else {
    return scalar::make_prior({mu, sigma});
  }
}

// The sum of every thread's x, in a fixed order; thread 0 gets it.
BBB_DEVICE double block_sum(double x) {
  BBB_SHARED(double, sums, kThreads / kWarp);
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_down_sync(0xFFFFFFFFu, x, offset);
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = x;
  __syncthreads();
  double total = 0.0;
  if (threadIdx.x == 0) {
    for (int warp = 0; warp < kThreads / kWarp; ++warp) total += sums[warp];
  }
  // The next call writes sums again.
  __syncthreads();
  return total;
}

// The second stage, on one block: KL = (all partial sums + constant) / 2.
template <class A>
__global__ void __launch_bounds__(kThreads)
    finish_kl(const double* partial, int64_t chunks, double constant, A* kl) {
  double x = 0.0;
  for (int64_t i = threadIdx.x; i < chunks; i += kThreads) x += partial[i];
  x = block_sum(x);
  if (threadIdx.x == 0) *kl = static_cast<A>(0.5 * (x + constant));
}

template <class A>
void launch_finish_kl(const at::Tensor& partial, double constant, const at::Tensor& kl) {
  launch<&finish_kl<A>>(
      1, partial.const_data_ptr<double>(), partial.numel(), constant, kl.mutable_data_ptr<A>());
}

}  // namespace bbb_fast::cuda
