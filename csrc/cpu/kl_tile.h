// The sum of a KL over quads, shared by the kernels that form one. Text without include guard.

// Sums kl_squares - 2 ln(q), in float over a tile and in double over tiles. The q of a tile are multiplied,
// so that it takes one logarithm.
struct KlSum {
  vdouble sum = vdouble{};
  vquad squares = vquad{};
  vfloat products[kQuads];
  vint in_range = ~vint{};

  // Quad number `quad` of a tile of which `count` elements, or all, lie in the tensor.
  template <bool kWhole, class P>
  BBB_INLINE void add(
      int quad, const vquad& mu, const Sigma<vquad>& s, const PriorOf<P>& prior, int64_t count) {
    vquad q;
    vquad square = kl_squares(mu, s, prior, q);
    if constexpr (!kWhole) {
      // Past the tensor's end: lanes that add nothing.
      vfloat lane;
      for (int i = 0; i < kWidth; ++i) lane[i] = static_cast<float>(i);
      const vfloat left = static_cast<float>(count - quad * kQuad) - lane;
      const auto inside = vquad{{left, left - kWidth}, {left - 2.0f * kWidth, left - 3.0f * kWidth}} > 0.0f;
      square = select(inside, square, vquad{});
      q = select(inside, q, vquad{} + 1.0f);
    }
    squares += square;
    products[quad] = (q.a.a * q.a.b) * (q.b.a * q.b.b);
  }

  BBB_INLINE void finish_tile() {
    vfloat product = vfloat{} + 1.0f;
    vint exponents = vint{};
#pragma GCC unroll 8
    for (int quad = 0; quad < kQuads; ++quad) {
      // Neither denormal nor infinite nor NaN.
      in_range &= (products[quad] >= 0x1p-126f) & (products[quad] <= 0x1.fffffep127f);
      product *= mantissa(products[quad]);
      exponents += exponent(products[quad]);
    }
    const vfloat logs = natural_log(product) + to_float(exponents) * kLn2;
    const vfloat terms = (squares.a.a + squares.a.b) + (squares.b.a + squares.b.b);
    sum += __builtin_convertvector(terms - logs * 2.0f, vdouble);
    squares = vquad{};
  }

  // The sum, or NaN where a product of q left float's range: sigma / sigma_p below 2^-31, or not finite.
  double total() const {
    double t = 0.0;
    for (int i = 0; i < kWidth; ++i) t += in_range[i] ? sum[i] : NAN;
    return t;
  }
};
