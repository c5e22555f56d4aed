// In a build without CUDA kernels: a clear error for ops called with CUDA tensors.
#include <torch/library.h>

namespace bbb_fast {
namespace {

void no_cuda(const c10::OperatorHandle& op, torch::jit::Stack*) {
  TORCH_CHECK(
      false, op.schema().name(),
      ": the tensors are on cuda, and this bbb_fast was built without CUDA kernels (devices: cpu); "
      "python -m bbb_fast info says why");
}

TORCH_LIBRARY_IMPL(bbb_fast, CUDA, m) {
  for (const char* name :
       {"normal", "sample_weights", "kl_divergence", "kl_tensor_prior", "kl_tensor_prior_backward",
        "posterior_backward_out", "variance", "square", "square_backward_", "lrt_sample_",
        "lrt_sample_backward", "flip_signs", "add_flipped_", "uniform", "drop_elements"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&no_cuda>());
  }
}

}  // namespace
}  // namespace bbb_fast
