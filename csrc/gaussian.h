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
  // 2^23 times the exponent, and the mantissa in [sqrt(1/2), sqrt(2)).
  const I exponent = (bits - 0x3F3504F3) & ~0x007FFFFF;
  const F f = as_float(bits - exponent) - 1.0f;
  F p = f * -7.634429634e-02f + 1.276154965e-01f;
  p = p * f + -1.316019446e-01f;
  p = p * f + 1.420176178e-01f;
  p = p * f + -1.662335694e-01f;
  p = p * f + 2.000122666e-01f;
  p = p * f + -2.500082254e-01f;
  p = p * f + 3.333333135e-01f;
  p = p * f + -5.000000000e-01f;
  return to_float(exponent) * (kLn2 * 0x1p-23f) + (p * (f * f) + f);
}

// Adding this to |n| < 2^22 rounds n to an integer and leaves n + 191 in the low bits of the sum's mantissa.
// Shifted by 23 they make 2^(n + 64), which is normal for n >= -152 where 2^n is not: times_power_of_2
// multiplies by it and then by 2^-64, so that only the last product can become denormal.
constexpr float kPowerShift = 12582912.0f + 191.0f;

// e^x for x <= 0, 3e-9; denormal results are kept, below about -104 the result is 0.
template <class F>
BBB_INLINE F exp_negative(F x) {
  x = at_least(x, -105.0f);
  const F shifted = x * kLog2E + kPowerShift;
  const F n = shifted - kPowerShift;
  const F r = (x - n * kLn2Hi) - n * kLn2Lo;
  F p = r * 1.381461043e-03f + 8.368710056e-03f;
  p = p * r + 4.166838899e-02f;
  p = p * r + 1.666652113e-01f;
  p = p * r + 4.999999404e-01f;
  p = p * r + 1.0f;
  return times_power_of_2(p * r + 1.0f, n, shifted);
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

// sin and cos of |t| <= pi / 2, 5e-9.
template <class F>
BBB_INLINE void sin_cos(F t, F& sin, F& cos) {
  const F z = t * t;
  F s = z * 2.608932681e-06f + -1.981111276e-04f;
  s = s * z + 8.333088167e-03f;
  s = s * z + -1.666666046e-01f;
  sin = s * (z * t) + t;
  F c = z * -2.619381522e-07f + 2.476930424e-05f;
  c = c * z + -1.388856916e-03f;
  c = c * z + 4.166665577e-02f;
  c = c * z + -5.000000000e-01f;
  cos = c * z + 1.0f;
}

// Two standard normals from two 32-bit words (Box and Muller 1958). The radius uses
// u = (x + 1/2) / 2^32, which is never 0; y is the angle in units of 2^-32 turns.
template <class F, class U>
BBB_INLINE void box_muller(U x, U y, F& z0, F& z1) {
  const F u = to_float(x) * 0x1p-32f + 0x1p-33f;
  const F length = square_root_normal(natural_log(u) * -2.0f);
  // The angle is the nearest number of half turns, which is bit 31 of y + 2^30, and what is left of y
  // without its top bit: -1/4 to 1/4 turns. A half turn flips both signs.
  const F radius = as_float(as_int(length) ^ as_signed((y + 0x40000000u) & 0x80000000u));
  const F angle = to_float(as_signed(y << 1)) * (3.14159265358979324f * 0x1p-32f);
  F sin, cos;
  sin_cos(angle, sin, cos);
  z0 = radius * cos;
  z1 = radius * sin;
}

// sigma = softplus(rho) with what its derivative needs. With t = e^-|rho| and L = ln(1 + t) / t: sigma = t L
// for rho < 0 and rho + t L else; base = L or sigma, by which the derivative's ratio to sigma is formed
// without dividing by a denormal.
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

// KL(q || p) of n weights, with mu_p, sigma_p the prior's and q = sigma / sigma_p:
//   1/2 sum[q^2 + ((mu - mu_p) / sigma_p)^2] - ln(prod q) - n / 2.
// A product of several weights' q costs one logarithm for all of them.
// A number each, or one of each lane.
template <class F>
struct PriorOf {
  F mu;
  F inv_sigma;
};
using Prior = PriorOf<float>;

inline Prior make_prior(const f64::Prior& p) {
  return {static_cast<float>(p.mu), static_cast<float>(1.0 / p.sigma)};
}

// A weight's summand, and q.
template <class F, class P>
BBB_INLINE F kl_squares(F mu, const Sigma<F>& s, const PriorOf<P>& prior, F& q) {
  q = s.value * prior.inv_sigma;
  const F d = (mu - prior.mu) * prior.inv_sigma;
  return q * q + d * d;
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
template <class F, class P>
BBB_INLINE void kl_derivative(
    F mu, const Sigma<F>& s, F derivative, F ratio, const PriorOf<P>& prior, float grad, F& g_mu, F& g_rho) {
  const P inv2 = prior.inv_sigma * prior.inv_sigma;
  g_mu = (mu - prior.mu) * (inv2 * grad);
  g_rho = (s.value * inv2 * derivative - ratio) * grad;
}

// sqrt(v) eps, and its derivative by v; both 0 where v = 0, and NaN where v is negative or NaN.
template <class F>
BBB_INLINE F lrt_noise(F v, F eps) {
  return square_root(v) * eps;
}
template <class F>
BBB_INLINE F lrt_noise_derivative(F v, F eps) {
  return select(v == 0.0f, F{}, eps * 0.5f * reciprocal_root(v));
}
