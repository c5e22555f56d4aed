#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace bbb_fast {
namespace {

Isa best_isa() {
#if BBB_X86_DISPATCH
  __builtin_cpu_init();
  // f16c and bmi2 come with every CPU that has these; they are tested because the kernels use them.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return Isa::avx512;
  }
  if (avx2) return Isa::avx2;
#endif
  return Isa::base;
}

Isa parse(const std::string& name) {
  const Isa best = best_isa();
  if (name.empty() || name == "auto") return best;
  for (Isa isa : {Isa::base, Isa::avx2, Isa::avx512}) {
    if (name != isa_name(isa)) continue;
    if (isa > best) {
      throw std::invalid_argument(
          "instruction set '" + name + "' is not available on this CPU or in this build; the best is '" +
          isa_name(best) + "'");
    }
    return isa;
  }
  throw std::invalid_argument("unknown instruction set '" + name + "'; allowed: auto, base, avx2, avx512");
}

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> isa = [] {
    const char* asked = std::getenv("BBB_FAST_ISA");
    try {
      return parse(asked == nullptr ? "auto" : asked);
    } catch (const std::invalid_argument& error) {
      throw std::invalid_argument(std::string("BBB_FAST_ISA: ") + error.what());
    }
  }();
  return isa;
}

}  // namespace

Isa current_isa() {
  return chosen().load(std::memory_order_relaxed);
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "base";
  }
}

void set_isa(const std::string& name) {
  chosen().store(parse(name), std::memory_order_relaxed);
}

bool multiplies_bfloat16() {
#if defined(__x86_64__) && defined(__GNUC__)
  // Every CPU with bfloat16 tiles has these too.
  static const bool has = (__builtin_cpu_init(), __builtin_cpu_supports("avx512bf16"));
  return has;
#else
  return true;
#endif
}

}  // namespace bbb_fast
