// The sum of a KL over vectors, shared by the kernels that form one. Text without include guard.

// Sums kl_terms - 2 ln(base), in float over a tile and in double over tiles. A tile's bases are multiplied,
// mantissas and exponents apart, so that it takes one logarithm.
struct KlSum {
  vdouble sum = vdouble{};
  vfloat terms = vfloat{};
  vfloat product = vfloat{} + 1.0f;
  vint exponents = vint{};

  // Vector r of a tile of which `count` elements, or all, lie in the tensor.
  template <bool kWhole>
  BBB_INLINE void add(
      vfloat mu, vfloat rho, const Sigma<vfloat>& s, const Prior& prior, int r, int64_t count) {
    vfloat term = kl_terms(mu, rho, s, prior);
    vfloat base = s.base;
    if constexpr (!kWhole) {
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

  BBB_INLINE void finish_tile() {
    const vfloat logs = natural_log(product) + to_float(exponents) * kLn2;
    sum += __builtin_convertvector(terms - logs * 2.0f, vdouble);
    terms = vfloat{};
    product = vfloat{} + 1.0f;
    exponents = vint{};
  }

  double total() const {
    double t = 0.0;
    for (int i = 0; i < kWidth; ++i) t += sum[i];
    return t;
  }
};
