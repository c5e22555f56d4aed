// variance: sigma^2 = softplus(rho)^2 in the dtype of the variance product, and in the same pass the KL. Its
// backward: posterior_backward.cu.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "../checks.h"
#include "../layout.h"
#include "posterior.h"

namespace bbb_fast::cuda {
namespace {

struct Variance {
  static constexpr bool kMean = false, kNoise = false;
  template <class A, class S>
  BBB_DEVICE static A call(A, const S& s, A) {
    return s.value * s.value;
  }
};

std::tuple<std::vector<at::Tensor>, at::Tensor> variance(
    at::TensorList mu,
    at::TensorList rho,
    double prior_mu,
    double prior_sigma,
    bool with_kl,
    at::ScalarType dtype) {
  check_posteriors("variance", mu, rho);
  check_prior("variance", prior_mu, prior_sigma);
  check_dtype_option("variance", "dtype", dtype);

  const DeviceGuard guard(mu[0].device());
  const Pair pair = parameter_pair(mu[0].scalar_type(), dtype);
  std::vector<at::Tensor> m, r, variances;
  for (size_t k = 0; k < mu.size(); ++k) {
    // Element by element, in memory order: a channels_last rho gives a channels_last variance.
    r.push_back(dense(rho[k]).to(pair.first));
    m.push_back(with_kl ? in_order_of(r[k], mu[k].to(pair.first)) : r[k]);
    variances.push_back(at::empty_like(r[k], r[k].options().dtype(pair.second)));
  }
  const at::Tensor kl = at::empty({}, mu[0].options().dtype(kl_dtype(mu[0])));
  dispatch_parameter_pair(pair, [&](auto first, auto second) {
    using P = typename decltype(first)::type;
    using V = typename decltype(second)::type;
    run_posterior<Variance, P, V>(m, r, variances, {}, prior_mu, prior_sigma, with_kl, kl);
  });
  for (at::Tensor& v : variances) v = v.to(dtype);
  return {std::move(variances), kl};
}

TORCH_LIBRARY_IMPL(bbb_fast, BBB_DISPATCH_KEY, m) {
  m.impl("variance", &variance);
}

}  // namespace
}  // namespace bbb_fast::cuda
