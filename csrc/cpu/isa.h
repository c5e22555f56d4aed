// The instruction set the CPU kernels run on.
#pragma once

#include <string>

// Per-function targets by pragma are GCC's; other compilers get the baseline build, which is also what
// other architectures run.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define BBB_X86_DISPATCH 1
#else
#define BBB_X86_DISPATCH 0
#endif

namespace bbb_fast {

enum class Isa { base, avx2, avx512 };

// The best one this CPU has, unless BBB_FAST_ISA (base, avx2, avx512) or set_isa asked for a lower one.
Isa current_isa();
const char* isa_name(Isa isa);
// Throws if the name is unknown or the CPU lacks it. "auto" returns to the best one.
void set_isa(const std::string& name);
// Whether this CPU has instructions for products of bfloat16. Those of other architectures are left to the
// library.
bool multiplies_bfloat16();

}  // namespace bbb_fast
