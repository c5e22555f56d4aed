// Compiles the including file's kernels once per instruction set, in one binary: each inclusion below sits
// in a namespace of its own under a target pragma, so no compiler flag like -march is needed.
//
// Usage, in csrc/cpu/<op>.cpp:
//   #ifndef BBB_ISA              // first pass: ordinary code
//   #include ...                 // every header the kernels need
//   #define BBB_THIS_FILE "<op>.cpp"
//   #include "foreach_isa.h"
//   ... code that calls BBB_CALL(kernel, arguments) ...
//   #else                        // once per instruction set, inside namespace bbb_fast::<isa>
//   ... kernels ...
//   #endif

#include "isa.h"

#if BBB_X86_DISPATCH
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2,prefer-vector-width=512")
#define BBB_ISA avx512
#define BBB_WIDTH 16
namespace bbb_fast::avx512 {
#include "simd.h"
#include "tile_io.h"
#include BBB_THIS_FILE
}  // namespace bbb_fast::avx512
#include "end_isa.h"
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2")
#define BBB_ISA avx2
#define BBB_WIDTH 8
namespace bbb_fast::avx2 {
#include "simd.h"
#include "tile_io.h"
#include BBB_THIS_FILE
}  // namespace bbb_fast::avx2
#include "end_isa.h"
#pragma GCC pop_options
#elif defined(__SSE2__)
#include <immintrin.h>
#endif

#define BBB_ISA base
#define BBB_WIDTH 4
namespace bbb_fast::base {
#include "simd.h"
#include "tile_io.h"
#include BBB_THIS_FILE
}  // namespace bbb_fast::base
#include "end_isa.h"

// Calls a kernel of the instruction set in use.
#if BBB_X86_DISPATCH
#define BBB_CALL(kernel, ...)                  \
  switch (::bbb_fast::current_isa()) {         \
    case ::bbb_fast::Isa::avx512:              \
      ::bbb_fast::avx512::kernel(__VA_ARGS__); \
      break;                                   \
    case ::bbb_fast::Isa::avx2:                \
      ::bbb_fast::avx2::kernel(__VA_ARGS__);   \
      break;                                   \
    default:                                   \
      ::bbb_fast::base::kernel(__VA_ARGS__);   \
  }
#else
#define BBB_CALL(kernel, ...) ::bbb_fast::base::kernel(__VA_ARGS__);
#endif
