// The vector mathematics of the kernels' `base` build, without torch: .ci/portability.py compiles this and
// csrc/cpu/isa.cpp for other CPUs and runs it there.
//   test_base [SEED STREAM z0 ... z7 z1000000 ... z1000003]   also checks these elements of the noise
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "../cpu/isa.h"
#include "../scalar.h"
#include "expect.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define BBB_ISA base
#define BBB_WIDTH 4
namespace bbb_fast::base {
namespace {
#include "../cpu/simd.h"
static_assert(kTile == kQuads * 4 * kWidth);
#include "../cpu/kl_tile.h"
}  // namespace
}  // namespace bbb_fast::base

namespace {

namespace b = bbb_fast::base;
namespace f64 = bbb_fast::f64;
namespace s = bbb_fast::scalar;

bool close(double x, double expected, double relative, double absolute = 0) {
  return std::fabs(x - expected) <= relative * std::fabs(expected) + absolute;
}

float element(uint64_t seed, uint64_t stream, uint64_t index) {
  float tile[b::kTile];
  b::Noise(seed, stream).tile(index / b::kTile * (b::kTile / 4), tile);
  return tile[index % b::kTile];
}

void noise_is_the_scalar_noise() {
  const uint64_t seed = 0x123456789abcdef, stream = ~uint64_t{2};
  const auto key = s::philox_key(seed);
  // Around the end of the first tiles, and where the block's number needs its second word.
  for (uint64_t start : {uint64_t{0}, uint64_t{1000000}, (uint64_t{1} << 34) - 64}) {
    for (uint64_t i = start; i < start + 128; ++i) {
      float n[4];
      s::noise_block(key, i / 4, stream, n);
      EXPECT(close(element(seed, stream, i), n[i % 4], 0, 2e-6));
    }
  }
}

void words_are_the_scalar_words() {
  const uint64_t seed = 0x123456789abcdef, stream = ~uint64_t{2};
  const auto key = s::philox_key(seed);
  for (uint64_t start : {uint64_t{0}, uint64_t{1} << 34}) {
    b::vuint words[b::kTile / b::kWidth];
    b::Noise(seed, stream).words(start / 4, words);
    for (int i = 0; i < b::kTile; ++i) {
      uint32_t w[4];
      s::philox_block(key, (start + i) / 4, stream, w);
      const b::vuint vector = words[i / b::kWidth];
      const int lane = i % b::kWidth;
      EXPECT(vector[lane] == w[i % 4]);
      EXPECT(b::uniform_of(vector, 23)[lane] == s::uniform_of(w[i % 4], 23));
      const b::vfloat factor = b::dropout_factor(vector, 0x90000000u, b::vfloat{} + 1.5f);
      EXPECT(factor[lane] == s::dropout_factor(w[i % 4], 0x90000000u, 1.5f));
    }
  }
}

void softplus_and_its_derivatives() {
  const b::Prior prior = b::make_prior({0.2, 0.1});
  for (float rho = -80.0f; rho < 80.0f; rho += 0.0371f) {
    const auto v = b::softplus(b::vfloat{} + rho);
    const auto exact = f64::softplus(rho);
    b::vfloat derivative, ratio, g_mu, g_rho;
    double exact_derivative, exact_ratio, exact_g_mu, exact_g_rho;
    b::softplus_derivative(b::vfloat{} + rho, v, derivative, ratio);
    f64::softplus_derivative(rho, exact, exact_derivative, exact_ratio);
    b::kl_derivative(b::vfloat{} + 0.1f, v, derivative, ratio, prior, 0.7f, g_mu, g_rho);
    f64::kl_derivative(0.1f, exact, exact_derivative, exact_ratio, {0.2, 0.1}, 0.7f, exact_g_mu, exact_g_rho);
    for (int lane = 0; lane < b::kWidth; ++lane) {
      EXPECT(close(v.value[lane], exact.value, 3e-7));
      EXPECT(close(derivative[lane], exact_derivative, 4e-7));
      EXPECT(close(ratio[lane], exact_ratio, 4e-7));
      EXPECT(close(g_mu[lane], exact_g_mu, 1e-6));
      EXPECT(close(g_rho[lane], exact_g_rho, 2e-6, 1e-6));
    }
  }
}

// A whole tile and one cut short, whose padding must not count.
void kl_of_a_tile() {
  const f64::Prior prior{0.2, 0.1};
  for (int64_t count : {b::kTile, b::kTile - 3, 1}) {
    float mu[b::kTile], rho[b::kTile];
    double exact = 0;
    for (int64_t i = 0; i < b::kTile; ++i) {
      const float m = 0.01f * static_cast<float>(i), r = 0.7f * static_cast<float>(i) - 5.0f;
      mu[i] = m;
      rho[i] = r;
      if (i < count) exact += f64::kl_terms(m, r, f64::softplus(r), prior);
    }
    b::KlSum kl;
    for (int q = 0; q < b::kQuads; ++q) {
      const auto m = b::load_quad(mu + q * b::kQuad);
      const auto sigma = b::softplus(b::load_quad(rho + q * b::kQuad));
      if (count == b::kTile) {
        kl.add<true>(q, m, sigma, b::make_prior(prior), count);
      } else {
        kl.add<false>(q, m, sigma, b::make_prior(prior), count);
      }
    }
    kl.finish_tile();
    EXPECT(close(kl.total(), exact, 1e-6));
  }
}

void lrt_noise_and_its_derivative() {
  for (float v : {0.0f, 1e-20f, 0.25f, 7.0f}) {
    const b::vfloat noise = b::lrt_noise(b::vfloat{} + v, b::vfloat{} - 1.5f);
    const b::vfloat slope = b::lrt_noise_derivative(b::vfloat{} + v, b::vfloat{} - 1.5f);
    for (int lane = 0; lane < b::kWidth; ++lane) {
      EXPECT(close(noise[lane], f64::lrt_noise(v, -1.5), 2e-7));
      EXPECT(close(slope[lane], f64::lrt_noise_derivative(v, -1.5), 4e-7));
    }
  }
}

// Programs for CPUs without AVX2 are what this is for.
void dispatch_chooses_base() {
  EXPECT(std::string(bbb_fast::isa_name(bbb_fast::current_isa())) == "base");
  for (const char* name : {"avx2", "avx512"}) {
    std::string message;
    try {
      bbb_fast::set_isa(name);
    } catch (const std::invalid_argument& error) {
      message = error.what();
    }
    EXPECT(message.find("is not available on this CPU or in this build") != std::string::npos);
  }
}

void golden_values(char** numbers) {
  const auto integer = [](const char* text) {
    return static_cast<uint64_t>(std::strtoll(text, nullptr, 10));
  };
  const uint64_t seed = integer(numbers[0]), stream = integer(numbers[1]);
  for (uint64_t k = 0; k < 12; ++k) {
    const uint64_t index = k < 8 ? k : 1000000 + k - 8;
    EXPECT(close(element(seed, stream, index), std::strtod(numbers[2 + k], nullptr), 1e-6, 1e-6));
  }
}

}  // namespace

int main(int argc, char** argv) {
  noise_is_the_scalar_noise();
  words_are_the_scalar_words();
  softplus_and_its_derivatives();
  kl_of_a_tile();
  lrt_noise_and_its_derivative();
  dispatch_chooses_base();
  if (argc == 15) golden_values(argv + 1);
  EXPECT(argc == 15 || argc == 1);
  return report();
}
