// The mathematics of Gaussian weights, written once for CPU and CUDA: Box-Muller, softplus and its
// derivative, the terms of the KL, and the noise of local reparameterization.
//
// Text without include guard: scalar.h and cpu/simd.h include it inside a namespace that defines the
// lane operations (as_int, as_float, to_float, select, square_root and so on) for F = float or a vector of
// floats.
// No branches, no tables. Polynomials are minimax fits of the stated relative error on the reduced range.

constexpr float kLog2E = 1.44269504088896341f;
// ln 2 in two parts: the first has 9 significant bits, so that its multiples by an exponent are exact.
constexpr float kLn2Hi = 0.693359375f;
constexpr float kLn2Lo = -2.12194440e-4f;
constexpr float kLn2 = 0.693147180559945309f;

// ln(x) of a positive normal x, 6e-9.
template <class F>
BBB_INLINE F natural_log(F x) {
  using I = typename Lanes<F>::Int;
  const I bits = as_int(x);
  // Exponent and mantissa with the mantissa in [sqrt(1/2), sqrt(2)).
  const I exponent = (bits - 0x3F3504F3) >> 23;
  const F f = as_float(bits - (exponent << 23)) - 1.0f;
  const F e = to_float(exponent);
  const F z = f * f;
  F p = f * -7.634429634e-02f + 1.276154965e-01f;
  p = p * f + -1.316019446e-01f;
  p = p * f + 1.420176178e-01f;
  p = p * f + -1.662335694e-01f;
  p = p * f + 2.000122666e-01f;
  p = p * f + -2.500082254e-01f;
  p = p * f + 3.333333135e-01f;
  F y = p * (z * f) + e * kLn2Lo;
  y = z * -0.5f + y;
  return e * kLn2Hi + (f + y);
}

// e^x for x <= 0, 3e-9; denormal results are kept, below about -104 the result is 0.
template <class F>
BBB_INLINE F exp_negative(F x) {
  x = at_least(x, -105.0f);
  // Adding 1.5 * 2^23 leaves the rounded integer n in the low bits of the mantissa.
  const F shifted = x * kLog2E + 12582912.0f;
  const F nf = shifted - 12582912.0f;
  const F r = (x - nf * kLn2Hi) - nf * kLn2Lo;
  F p = r * 1.381461043e-03f + 8.368710056e-03f;
  p = p * r + 4.166838899e-02f;
  p = p * r + 1.666652113e-01f;
  p = p * r + 4.999999404e-01f;
  p = p * (r * r) + r + 1.0f;
  // 2^(n + 64), which is normal, and then 2^-64: only the last product can become denormal.
  const F scale = as_float(as_signed((as_unsigned(as_int(shifted)) << 23) + (191u << 23)));
  return p * scale * 0x1p-64f;
}

// ln(1 + t) / t for 0 <= t <= 1, 5e-9.
template <class F>
BBB_INLINE F log1p_over(F t) {
  F p = t * -3.243980929e-03f + 1.985126175e-02f;
  p = p * t + -5.695915967e-02f;
  p = p * t + 1.060361713e-01f;
  p = p * t + -1.530556977e-01f;
  p = p * t + 1.967593133e-01f;
  p = p * t + -2.495413274e-01f;
  p = p * t + 3.332996368e-01f;
  p = p * t + -4.999990165e-01f;
  return p * t + 1.0f;
}

// sin and cos of |t| <= pi / 4, 4e-9.
template <class F>
BBB_INLINE void sin_cos(F t, F& sin, F& cos) {
  const F z = t * t;
  F s = z * -1.951729791e-04f + 8.332177997e-03f;
  s = s * z + -1.666665524e-01f;
  sin = s * (z * t) + t;
  F c = z * 2.443845005e-05f + -1.388736768e-03f;
  c = c * z + 4.166664556e-02f;
  cos = c * (z * z) + (z * -0.5f + 1.0f);
}

// Two standard normals from two 32-bit words (Box and Muller 1958). The radius uses
// u = (x + 1/2) / 2^32, which is never 0; y is the angle in units of 2^-32 turns.
template <class F, class U>
BBB_INLINE void box_muller(U x, U y, F& z0, F& z1) {
  const F u = to_float(x) * 0x1p-32f + 0x1p-33f;
  const F radius = square_root_normal(natural_log(u) * -2.0f);
  const U quadrant = (y + 0x20000000u) >> 30;
  // The remainder in (-1/8, 1/8] turns; shifting the quadrant out keeps its sign.
  const F angle = to_float(as_signed(y << 2)) * (1.57079632679489662f * 0x1p-32f);
  F sin, cos;
  sin_cos(angle, sin, cos);
  const auto swap = (as_signed(quadrant) & 1) != 0;
  const F a = select(swap, sin, cos);
  const F b = select(swap, cos, sin);
  // Bit 1 of the quadrant number becomes the sign bit.
  z0 = radius * as_float(as_int(a) ^ as_signed(((quadrant + 1u) & 2u) << 30));
  z1 = radius * as_float(as_int(b) ^ as_signed((quadrant & 2u) << 30));
}

// sigma = softplus(rho) with what its derivative and its logarithm need. With t = e^-|rho| and
// L = ln(1 + t) / t: sigma = t L for rho < 0 and rho + t L else, and
// ln(sigma) = min(rho, 0) + ln(base), base = L or sigma; no denormal is ever logged or divided by.
template <class F>
struct Sigma {
  F t;      // e^-|rho|
  F value;  // sigma
  F base;
};

template <class F>
BBB_INLINE Sigma<F> softplus(F rho) {
  Sigma<F> s;
  s.t = exp_negative(negative_abs(rho));
  const F l = log1p_over(s.t);
  s.value = s.t * l + at_least(rho, 0.0f);
  s.base = select(rho < 0.0f, l, s.value);
  return s;
}

// d sigma / d rho = sigmoid(rho), and its ratio to sigma, which stays finite where sigma vanishes.
template <class F>
BBB_INLINE void softplus_derivative(F rho, const Sigma<F>& s, F& derivative, F& ratio) {
  // base is ln(2) or more, and inf where rho is; the ratio is then 0 as it should be.
  const F inverse = reciprocal(s.t + 1.0f);
  ratio = reciprocal(s.base) * inverse;
  derivative = select(rho < 0.0f, s.t, F{} + 1.0f) * inverse;
}

// KL(q || p) of n weights, with mu_p, sigma_p the prior's:
//   1/2 sum[(sigma / sigma_p)^2 + ((mu - mu_p) / sigma_p)^2 - 2 (min(rho, 0) - ln sigma_p)]
//   - ln(prod base) - n / 2.
// kl_terms gives a weight's summand; the product is taken by mantissa and exponent (below), which costs
// one logarithm for several weights.
struct Prior {
  float mu;
  float inv_sigma;
  float log_sigma;  // rounded; kl_constant (kl_sum.h) adds what the rounding lost
};

inline Prior make_prior(const f64::Prior& p) {
  return {static_cast<float>(p.mu), static_cast<float>(1.0 / p.sigma), static_cast<float>(std::log(p.sigma))};
}

template <class F>
BBB_INLINE F kl_terms(F mu, F rho, const Sigma<F>& s, const Prior& prior) {
  const F r = s.value * prior.inv_sigma;
  const F d = (mu - prior.mu) * prior.inv_sigma;
  return (r * r + d * d) + (at_least(-rho, 0.0f) + prior.log_sigma) * 2.0f;
}

// Splits x > 0 into mantissa in [1, 2) and exponent.
template <class F>
BBB_INLINE F mantissa(F x) {
  return as_float((as_int(x) & 0x007FFFFF) | 0x3F800000);
}
template <class F>
BBB_INLINE typename Lanes<F>::Int exponent(F x) {
  return (as_int(x) >> 23) - 127;
}

// dKL / dmu and dKL / drho, times grad.
template <class F>
BBB_INLINE void kl_derivative(
    F mu, const Sigma<F>& s, F derivative, F ratio, const Prior& prior, float grad, F& g_mu, F& g_rho) {
  const float inv2 = prior.inv_sigma * prior.inv_sigma;
  g_mu = (mu - prior.mu) * (inv2 * grad);
  g_rho = (s.value * inv2 * derivative - ratio) * grad;
}

// sqrt(v) eps, and its derivative by v; both 0 where v = 0.
template <class F>
BBB_INLINE F lrt_noise(F v, F eps) {
  return square_root(v) * eps;
}
template <class F>
BBB_INLINE F lrt_noise_derivative(F v, F eps) {
  return select(v > 0.0f, eps * 0.5f * reciprocal_root(v), F{});
}
