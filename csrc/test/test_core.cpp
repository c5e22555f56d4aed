// Unit tests of the shared mathematics and of the CPU kernels' building blocks, without Python; run by
// ctest.
#include <torch/library.h>
#include <torch/torch.h>

#include <cmath>
#include <vector>

#include "../cpu/isa.h"
#include "../cpu/span.h"
#include "../dropout.h"
#include "../scalar.h"
#include "expect.h"

namespace {

namespace s = bbb_fast::scalar;

void philox_known_answers() {
  const uint32_t cases[3][10] = {
      {0, 0, 0, 0, 0, 0, 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8},
      {0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0x408f276d, 0x41c83b0e,
       0xa20bc7c6, 0x6d5451fd},
      {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, 0xa4093822, 0x299f31d0, 0xd16cfe09, 0x94fdcceb,
       0x5001e420, 0x24126ea1}};
  for (const auto& c : cases) {
    uint32_t w[4] = {c[0], c[1], c[2], c[3]};
    const auto key = s::philox_key(c[4] | static_cast<uint64_t>(c[5]) << 32);
    s::philox4x32(w[0], w[1], w[2], w[3], key);
    for (int j = 0; j < 4; ++j) EXPECT(w[j] == c[6 + j]);
  }
}

double relative(double a, double b) {
  return std::fabs(a - b) / std::fmax(std::fabs(b), 1e-300);
}

void elementary_functions() {
  for (double x = 1e-9; x <= 1.0; x *= 1.0009) {
    const float f = static_cast<float>(x);
    // Near 1 the logarithm is small and the argument's rounding is not its fault: f is exact here.
    EXPECT(
        std::fabs(s::natural_log(f) - std::log(static_cast<double>(f))) <=
        2e-7 * std::fmax(std::fabs(std::log(static_cast<double>(f))), 1e-30));
    EXPECT(relative(s::log1p_over(f), std::log1p(static_cast<double>(f)) / f) < 2e-7);
  }
  for (double x = 0.0; x < 87.0; x += 0.013) {
    const float f = static_cast<float>(-x);
    EXPECT(relative(s::exp_negative(f), std::exp(static_cast<double>(f))) < 2e-7);
  }
  EXPECT(s::exp_negative(-100.0f) > 0.0f);
  EXPECT(s::exp_negative(-1e30f) == 0.0f);
  EXPECT(std::isnan(s::exp_negative(NAN)));
  for (float t = -1.5707963f; t <= 1.5707963f; t += 1e-3f) {
    float sin, cos;
    s::sin_cos(t, sin, cos);
    EXPECT(std::fabs(sin - std::sin(static_cast<double>(t))) < 1.5e-7);
    EXPECT(std::fabs(cos - std::cos(static_cast<double>(t))) < 1.5e-7);
  }
}

void softplus_and_kl() {
  for (double rho = -80.0; rho < 80.0; rho += 0.0371) {
    const float r = static_cast<float>(rho);
    const auto a = s::softplus(r);
    const auto e = bbb_fast::f64::softplus(r);
    EXPECT(relative(a.value, e.value) < 3e-7);
    float derivative, ratio;
    double exact_derivative, exact_ratio;
    s::softplus_derivative(r, a, derivative, ratio);
    bbb_fast::f64::softplus_derivative(r, e, exact_derivative, exact_ratio);
    EXPECT(relative(derivative, exact_derivative) < 4e-7);
    EXPECT(relative(ratio, exact_ratio) < 4e-7);
    // The derivative of softplus is its difference quotient.
    const double h = 1e-6;
    const double quotient =
        (bbb_fast::f64::softplus(r + h).value - bbb_fast::f64::softplus(r - h).value) / (2 * h);
    EXPECT(std::fabs(quotient - exact_derivative) < 1e-8 + 1e-4 * exact_derivative);
    const s::Prior prior{0.2f, 10.0f};
    float q;
    const float squares = s::kl_squares(0.1f, a, prior, q);
    const float terms =
        squares - 2.0f * (std::log(s::mantissa(q)) + static_cast<float>(s::exponent(q)) * s::kLn2);
    const double exact = bbb_fast::f64::kl_terms(0.1f, r, e, {0.2, 0.1});
    EXPECT(relative(terms, exact) < 1e-6);
  }
}

void box_muller_extremes() {
  for (uint32_t x : {0u, 1u, 0x7fffffffu, 0x80000000u, 0xffffffffu}) {
    for (uint32_t y : {0u, 0x1fffffffu, 0x20000000u, 0x3fffffffu, 0x40000000u, 0xffffffffu}) {
      float z0, z1;
      s::box_muller(x, y, z0, z1);
      EXPECT(std::isfinite(z0) && std::isfinite(z1));
      const double u = static_cast<float>(x) * 0x1p-32 + 0x1p-33;
      const double radius = std::sqrt(-2.0 * std::log(static_cast<double>(static_cast<float>(u))));
      const double angle = y * 0x1p-32 * 2 * M_PI;
      EXPECT(std::fabs(z0 - radius * std::cos(angle)) < 2e-6);
      EXPECT(std::fabs(z1 - radius * std::sin(angle)) < 2e-6);
    }
  }
}

void uniform_and_dropout() {
  for (int bits : {7, 10, 23}) {
    const float least = std::ldexp(1.0f, -bits - 1);
    EXPECT(s::uniform_of(0u, bits) == least);
    EXPECT(s::uniform_of(0xffffffffu, bits) == 1.0f - least);
    EXPECT(s::uniform_of(0x80000000u, bits) == 0.5f + least);
  }
  EXPECT(s::dropout_factor(4u, 5u, 2.0f) == 0.0f && s::dropout_factor(5u, 5u, 2.0f) == 2.0f);
  const bbb_fast::Dropout nothing(0.0), half(0.5), nearly_all(1.0 - 0x1p-40), all(1.0);
  EXPECT(nothing.least == 0 && nothing.scale == 1.0);
  EXPECT(half.least == 0x80000000u && half.scale == 2.0);
  EXPECT(nearly_all.scale == 0.0 && all.scale == 0.0);
}

at::Tensor normal(int64_t count, int64_t seed, int64_t stream) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("bbb_fast::normal", "")
                             .typed<at::Tensor(c10::SymIntArrayRef, const at::Tensor&, at::ScalarType)>();
  const std::vector<c10::SymInt> size{count};
  return op.call(size, torch::tensor({seed, stream}, at::kLong), at::kFloat);
}

// Every instruction set's tiles against the scalar functions, at every residue of the tile.
void vector_noise_equals_scalar_noise() {
  const char* names[] = {"base", "avx2", "avx512"};
  bbb_fast::set_isa("auto");
  const int best = static_cast<int>(bbb_fast::current_isa());
  for (int isa = 0; isa <= best; ++isa) {
    bbb_fast::set_isa(names[isa]);
    const int64_t seed = 0x123456789abcdef, stream = -3;
    const auto key = s::philox_key(static_cast<uint64_t>(seed));
    for (int64_t count : {0, 1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 1000, 4096, 5001}) {
      const at::Tensor z = normal(count, seed, stream);
      EXPECT(z.numel() == count);
      for (int64_t i = 0; i < count; ++i) {
        float n[4];
        s::noise_block(key, static_cast<uint64_t>(i / 4), static_cast<uint64_t>(stream), n);
        EXPECT(std::fabs(z.data_ptr<float>()[i] - n[i % 4]) < 2e-6);
      }
    }
  }
  bbb_fast::set_isa("auto");
}

void unknown_instruction_set_is_refused() {
  bool thrown = false;
  try {
    bbb_fast::set_isa("mmx");
  } catch (const std::invalid_argument&) {
    thrown = true;
  }
  EXPECT(thrown);
}

}  // namespace

int main() {
  philox_known_answers();
  elementary_functions();
  softplus_and_kl();
  box_muller_extremes();
  uniform_and_dropout();
  vector_noise_equals_scalar_noise();
  unknown_instruction_set_is_refused();
  return report();
}
