// The Python module bbb_fast._C: importing it registers the ops; it says how it was built.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include <map>
#include <string>

#include "cpu/isa.h"
#include "macros.h"

// setup.py defines BBB_FAST_CUDA_ARCHS, as 8.0:9.0+PTX, in a build with CUDA kernels.
#ifdef BBB_FAST_CUDA_ARCHS
#define BBB_FAST_DEVICES "cpu,cuda"
#else
#define BBB_FAST_DEVICES "cpu"
#define BBB_FAST_CUDA_ARCHS none
#endif

PYBIND11_MODULE(_C, m) {
  m.def(
      "build_info",
      [] {
        return std::map<std::string, std::string>{
            {"devices", BBB_FAST_DEVICES},
            {"cuda_architectures", BBB_STRING(BBB_FAST_CUDA_ARCHS)},
            {"torch", TORCH_VERSION},
            {"compiler", __VERSION__},
            {"instruction_set", bbb_fast::isa_name(bbb_fast::current_isa())},
            {"instruction_sets", BBB_X86_DISPATCH ? "base avx2 avx512" : "base"},
        };
      },
      "How the extension was built, and the instruction set in use.");
  m.def(
      "set_isa", &bbb_fast::set_isa, pybind11::arg("name"),
      "Forces an instruction set: base, avx2, avx512, or auto for the best. For tests and benchmarks.");
}
