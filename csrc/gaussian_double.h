// The formulas of gaussian.h for float64 tensors, on the library's functions: precision over speed.
#pragma once

#include <cmath>

#include "macros.h"

namespace bbb_fast::f64 {

struct Sigma {
  double t;      // e^-|rho|
  double value;  // sigma
  double base;   // ln(sigma) = min(rho, 0) + ln(base)
};

BBB_INLINE Sigma softplus(double rho) {
  const double t = exp(-fabs(rho));
  const double l = t > 0 ? log1p(t) / t : 1.0;
  const double value = rho < 0 ? t * l : rho + t * l;
  return {t, value, rho < 0 ? l : value};
}

BBB_INLINE void softplus_derivative(double rho, const Sigma& s, double& derivative, double& ratio) {
  ratio = 1.0 / ((1.0 + s.t) * s.base);
  derivative = (rho < 0 ? s.t : 1.0) / (1.0 + s.t);
}

struct Prior {
  double mu;
  double sigma;
};

// (sigma / sigma_p)^2 + ((mu - mu_p) / sigma_p)^2 - 2 ln(sigma / sigma_p): twice a weight's KL, plus 1.
BBB_INLINE double kl_terms(double mu, double rho, const Sigma& s, const Prior& prior) {
  const double r = s.value / prior.sigma;
  const double d = (mu - prior.mu) / prior.sigma;
  return r * r + d * d - 2.0 * ((rho < 0 ? rho : 0.0) + log(s.base) - log(prior.sigma));
}

BBB_INLINE void kl_derivative(
    double mu,
    const Sigma& s,
    double derivative,
    double ratio,
    const Prior& prior,
    double grad,
    double& g_mu,
    double& g_rho) {
  const double inv2 = 1.0 / (prior.sigma * prior.sigma);
  g_mu = (mu - prior.mu) * inv2 * grad;
  g_rho = (s.value * inv2 * derivative - ratio) * grad;
}

BBB_INLINE double lrt_noise(double v, double eps) {
  return sqrt(v) * eps;
}
BBB_INLINE double lrt_noise_derivative(double v, double eps) {
  return v == 0 ? 0.0 : 0.5 * eps / sqrt(v);
}

}  // namespace bbb_fast::f64
