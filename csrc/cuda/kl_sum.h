// Sums of a KL in two deterministic stages: each chunk's by a block, then all of them by one block.
#pragma once

#include <ATen/ops/empty.h>

#include "../kl_sum.h"
#include "vectors.h"

namespace bbb_fast::cuda {

// What the mathematics of a type calls a prior, and a thread's share of a chunk's KL, twice and plus 1 a
// weight. add takes a vector of weights, of which the first `left` count; prior_at(j) is element j's prior.
template <class A>
struct KlSum;

// One prior for all elements.
template <class Prior>
struct SamePrior {
  const Prior& prior;
  BBB_DEVICE const Prior& operator()(int) const { return prior; }
};
template <class Prior>
SamePrior(const Prior&) -> SamePrior<Prior>;

template <>
struct KlSum<float> {
  using Prior = scalar::Prior;
  using Sigma = scalar::Sigma<float>;

  float terms = 0.0f;
  // ln(q) of all of a thread's weights costs one logarithm: of a product of mantissas, one for four weights.
  float mantissas = 1.0f;
  int exponents = 0;
  bool in_range = true;

  template <class P, int N, class PriorAt>
  BBB_DEVICE void add(
      const Pack<P, N>& mu, const Pack<P, N>&, const Sigma (&s)[N], const PriorAt& prior_at, int left) {
#pragma unroll
    for (int quad = 0; quad < N; quad += 4) {
      float product = 1.0f;
#pragma unroll
      for (int j = quad; j < quad + 4; ++j) {
        float q;
        const float squares = scalar::kl_squares(mu.wide(j), s[j], prior_at(j), q);
        terms += j < left ? squares : 0.0f;
        product *= j < left ? q : 1.0f;
      }
      // Neither denormal nor infinite nor NaN.
      in_range &= product >= 0x1p-126f && product <= 0x1.fffffep127f;
      mantissas *= scalar::mantissa(product);
      exponents += scalar::exponent(product);
    }
  }
  BBB_DEVICE double total() const {
    const float logs = scalar::natural_log(mantissas) + static_cast<float>(exponents) * scalar::kLn2;
    return static_cast<double>(terms - 2.0f * logs);
  }
};

template <>
struct KlSum<double> {
  using Prior = f64::Prior;
  using Sigma = f64::Sigma;

  double sum = 0.0;

  template <int N, class PriorAt>
  BBB_DEVICE void add(
      const Pack<double, N>& mu,
      const Pack<double, N>& rho,
      const Sigma (&s)[N],
      const PriorAt& prior_at,
      int left) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (j < left) sum += f64::kl_terms(mu.x[j], rho.x[j], s[j], prior_at(j));
    }
  }
};

// What this thread's vectors of a chunk add up to; mu and rho begin with the chunk. Weights whose product of
// q left float's range (sigma / sigma_p below 2^-31, or not finite) are formed in double once more.
template <int N, class P, class PriorAt>
BBB_DEVICE double thread_kl(
    const KlSum<float>& kl, const P* mu, const P* rho, int count, const PriorAt& prior_at) {
  if (kl.in_range) return kl.total();
  double sum = 0.0;
#pragma unroll 1
  for (int first = threadIdx.x * N; first < count; first += kThreads * N) {
#pragma unroll 1
    for (int i = first; i < first + N && i < count; ++i) {
      const double r = static_cast<double>(static_cast<float>(rho[i]));
      const scalar::Prior prior = prior_at(i);
      const f64::Prior exact{prior.mu, 1.0 / prior.inv_sigma};
      sum += f64::kl_terms(static_cast<float>(mu[i]), r, f64::softplus(r), exact);
    }
  }
  return sum;
}

template <int N, class PriorAt>
BBB_DEVICE double thread_kl(const KlSum<double>& kl, const double*, const double*, int, const PriorAt&) {
  return kl.sum;
}

template <class A>
typename KlSum<A>::Prior prior_for(double mu, double sigma) {
  if constexpr (std::is_same_v<A, double>) {
    return {mu, sigma};
  } else {
    return scalar::make_prior({mu, sigma});
  }
}

// The sum of every thread's x, in a fixed order; thread 0 gets it. One barrier a call: the next call writes
// to the other half, and the one after that comes behind the next call's barrier.
struct BlockSum {
  int half = 0;

  BBB_DEVICE double operator()(double x) {
    constexpr int kWarps = kThreads / kWarp;
    BBB_SHARED(double, sums, 2 * kWarps);
    double* const mine = sums + half;
    half = kWarps - half;
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_down_sync(0xFFFFFFFFu, x, offset);
    if (threadIdx.x % kWarp == 0) mine[threadIdx.x / kWarp] = x;
    __syncthreads();
    double total = 0.0;
    if (threadIdx.x == 0) {
      for (int warp = 0; warp < kWarps; ++warp) total += mine[warp];
    }
    return total;
  }
};

// The second stage, on one block: KL = (all partial sums + constant) / 2.
template <class A>
__global__ void __launch_bounds__(kThreads)
    finish_kl(const double* partial, int64_t chunks, double constant, A* kl) {
  double x = 0.0;
  for (int64_t i = threadIdx.x; i < chunks; i += kThreads) x += partial[i];
  x = BlockSum()(x);
  if (threadIdx.x == 0) *kl = static_cast<A>(0.5 * (x + constant));
}

template <class A>
void launch_finish_kl(const at::Tensor& partial, double constant, const at::Tensor& kl) {
  launch<&finish_kl<A>>(
      1, partial.const_data_ptr<double>(), partial.numel(), constant, kl.mutable_data_ptr<A>());
}

}  // namespace bbb_fast::cuda
