// sample_weights: w = mu + sigma eps, or sigma eps alone, and in the same pass the KL. Its backward:
// posterior_backward.cu.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../checks.h"
#include "posterior.h"

namespace bbb_fast::cuda {
namespace {

struct Draw {
  static constexpr bool kMean = true, kNoise = true;
  template <class A, class S>
  BBB_DEVICE static A call(A mu, const S& s, A z) {
    return s.value * z + mu;
  }
};

struct DrawCentered {
  static constexpr bool kMean = false, kNoise = true;
  template <class A, class S>
  BBB_DEVICE static A call(A, const S& s, A z) {
    return s.value * z;
  }
};

std::tuple<std::vector<at::Tensor>, at::Tensor> sample_weights(
    at::TensorList mu,
    at::TensorList rho,
    const at::Tensor& rng,
    double prior_mu,
    double prior_sigma,
    bool with_kl,
    std::optional<at::ScalarType> dtype,
    bool centered) {
  check_posteriors("sample_weights", mu, rho);
  check_rng("sample_weights", rng, mu[0].device(), RngOf::draws);
  check_prior("sample_weights", prior_mu, prior_sigma);
  check_dtype_option("sample_weights", "dtype", dtype);

  const DeviceGuard guard(mu[0].device());
  const auto wanted = dtype.value_or(mu[0].scalar_type());
  const Pair pair = parameter_pair(mu[0].scalar_type(), wanted);
  const int64_t draws = draw_count(rng);
  std::vector<at::Tensor> m, r, weights;
  for (size_t k = 0; k < mu.size(); ++k) {
    m.push_back(mu[k].to(pair.first).contiguous());
    r.push_back(rho[k].to(pair.first).contiguous());
    std::vector<int64_t> sizes = mu[k].sizes().vec();
    if (rng.dim() == 2) sizes.insert(sizes.begin(), draws);
    weights.push_back(at::empty(sizes, mu[k].options().dtype(pair.second)));
  }
  const at::Tensor kl = at::empty({}, mu[0].options().dtype(kl_dtype(mu[0])));
  const at::Tensor numbers = rng.contiguous();
  dispatch_parameter_pair(pair, [&](auto first, auto second) {
    using P = typename decltype(first)::type;
    using W = typename decltype(second)::type;
    // A launch for each draw, the last with the KL.
    for (int64_t draw = 0; draw < draws; ++draw) {
      std::vector<at::Tensor> out = weights;
      if (rng.dim() == 2) {
        for (at::Tensor& w : out) w = w.select(0, draw);
      }
      const at::Tensor own = rng.dim() == 2 ? numbers.select(0, draw) : numbers;
      const bool kl_here = with_kl && draw + 1 == draws;
      if (centered) {
        run_posterior<DrawCentered, P, W>(m, r, out, own, prior_mu, prior_sigma, kl_here, kl);
      } else {
        run_posterior<Draw, P, W>(m, r, out, own, prior_mu, prior_sigma, kl_here, kl);
      }
    }
  });
  for (at::Tensor& w : weights) w = w.to(wanted);
  return {std::move(weights), kl};
}

TORCH_LIBRARY_IMPL(bbb_fast, BBB_DISPATCH_KEY, m) {
  m.impl("sample_weights", &sample_weights);
}

}  // namespace
}  // namespace bbb_fast::cuda
