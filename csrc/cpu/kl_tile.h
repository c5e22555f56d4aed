// The KL of one tile, shared by sample_weights.cpp and kl_divergence.cpp. Text without include guard.

// Sums kl_terms - 2 ln(base) over tiles, in double precision.
struct KlSum {
  vdouble sum = vdouble{};

  BBB_INLINE void add(
      const vfloat mu[4], const vfloat rho[4], const Sigma<vfloat> s[4], const Prior& prior, int64_t count) {
    vfloat terms = vfloat{};
    vfloat product = vfloat{} + 1.0f;
    vint exponents = vint{};
    for (int r = 0; r < 4; ++r) {
      vfloat term = kl_terms(mu[r], rho[r], s[r], prior);
      vfloat base = s[r].base;
      if (count != kTile) {
        // Past the tensor's end: lanes that add nothing.
        vint lane;
        for (int i = 0; i < kWidth; ++i) lane[i] = r * kWidth + i;
        const vint inside = lane < static_cast<int32_t>(count);
        term = select(inside, term, vfloat{});
        base = select(inside, base, vfloat{} + 1.0f);
      }
      terms += term;
      product *= mantissa(base);
      exponents += exponent(base);
    }
    const vfloat logs = natural_log(product) + to_float(exponents) * kLn2;
    sum += __builtin_convertvector(terms - logs * 2.0f, vdouble);
  }

  double total() const {
    double t = 0.0;
    for (int i = 0; i < kWidth; ++i) t += sum[i];
    return t;
  }
};
