// The Python module bbb_fast._C: importing it registers the ops; it says how it was built.
#include <ATen/PythonTorchFunctionTLS.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/PyInterpreter.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include <map>
#include <string>
#include <tuple>

#include "cpu/isa.h"
#include "layer_calls.h"
#include "macros.h"
#include "routes.h"

// setup.py defines BBB_FAST_CUDA_ARCHS, as 8.0:9.0+PTX, in a build with CUDA kernels.
#ifdef BBB_FAST_CUDA_ARCHS
#define BBB_FAST_DEVICES "cpu,cuda"
#else
#define BBB_FAST_DEVICES "cpu"
#define BBB_FAST_CUDA_ARCHS none
#endif

namespace {

using namespace bbb_fast;
using Drawn = std::optional<std::pair<at::Tensor, std::optional<ForwardTrace>>>;

// torch.utils._device.DeviceContext: the mode that torch.set_default_device and `with torch.device(...)`
// leave on. It concerns functions that are given no device, so layers and KLs need not wait for it.
PyObject* device_context = nullptr;

// Whether a Python mode must see the ops being called.
bool watched_by_a_mode() {
  using Modes = at::impl::PythonTorchFunctionTLS;
  if (!at::impl::torch_function_mode_enabled()) return false;
  for (int64_t i = 0; i < Modes::stack_len(); ++i) {
    PyObject* const mode = Modes::get_stack_at(i)->ptr(getPyInterpreter());
    if (reinterpret_cast<PyObject*>(Py_TYPE(mode)) != device_context) return true;
  }
  return false;
}

using Numbers = std::vector<int64_t>;

// Arguments in the order of the layers' ops; geometry is that of a convolution: stride, padding, dilation,
// transposed, output_padding, groups.
using Geometry = std::tuple<Numbers, Numbers, Numbers, bool, Numbers, int64_t>;

Drawn draw(
    std::string estimator,
    const at::Tensor& input,
    const at::Tensor& W_mu,
    const at::Tensor& W_rho,
    const OptionalTensor& bias_mu,
    const OptionalTensor& bias_rho,
    int64_t rng_offset,
    std::optional<Geometry> geometry,
    double prior_mu,
    double prior_sigma,
    bool recompute_weight,
    std::optional<at::ScalarType> variance_dtype) {
  if (watched_by_a_mode()) return std::nullopt;
  std::optional<ConvGeometry> conv;
  if (geometry) {
    auto& [stride, padding, dilation, transposed, output_padding, groups] = *geometry;
    conv = ConvGeometry{std::move(stride), std::move(padding),        std::move(dilation),
                        transposed,        std::move(output_padding), groups};
  }
  auto result = draw_layer(
      {std::move(estimator), recompute_weight, variance_dtype}, input,
      {W_mu, W_rho, bias_mu, bias_rho, prior_mu, prior_sigma}, conv, rng_offset);
  if (!result) return std::nullopt;
  return std::pair(std::move(result->output), std::move(result->trace));
}

// W_mu, W_rho, bias_mu, bias_rho, prior_mu, prior_sigma, and what the last forward left.
using LayerTuple = std::tuple<
    at::Tensor,
    at::Tensor,
    OptionalTensor,
    OptionalTensor,
    double,
    double,
    std::optional<ForwardTrace>>;

OptionalTensor kl(const std::vector<LayerTuple>& layers) {
  if (watched_by_a_mode()) return std::nullopt;
  std::vector<LayerPosterior> posteriors;
  posteriors.reserve(layers.size());
  for (const auto& [W_mu, W_rho, bias_mu, bias_rho, prior_mu, prior_sigma, trace] : layers) {
    posteriors.push_back({{W_mu, W_rho, bias_mu, bias_rho, prior_mu, prior_sigma}, trace});
  }
  return kl_of_layers(posteriors);
}

ConvProblem conv_problem(
    const Numbers& input,
    const Numbers& weight,
    const Numbers& stride,
    const Numbers& padding,
    const Numbers& dilation,
    int64_t groups) {
  const auto numbers = [](auto begin, auto end) { return c10::SmallVector<int64_t, 3>(begin, end); };
  const auto all = [&](const Numbers& n) { return numbers(n.begin(), n.end()); };
  return {
      input.at(0),
      input.at(1),
      weight.at(0),
      groups,
      /*contiguous=*/true,
      /*transposed=*/false,
      /*narrow=*/false,
      numbers(input.begin() + 2, input.end()),
      numbers(weight.begin() + 2, weight.end()),
      all(stride),
      all(padding),
      all(dilation)};
}

LinearProblem linear_problem(const Numbers& input, const Numbers& weight) {
  int64_t rows = 1;
  for (size_t d = 0; d + 1 < input.size(); ++d) rows *= input[d];
  return {rows, weight.at(1), weight.at(0)};
}

// A problem as the ways of it, and the one it takes.
template <class Problem>
std::pair<std::vector<std::string>, std::string> ways(const Problem& problem) {
  return {ways_of(problem), way_name(choose_way(problem))};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  // Kept for good: the module is never unloaded.
  device_context = pybind11::object(pybind11::module_::import("torch.utils._device").attr("DeviceContext"))
                       .release()
                       .ptr();
  pybind11::class_<ForwardTrace>(m, "ForwardTrace", "What a forward leaves its layer; keeps nothing alive.");
  m.def(
      "draw", torch::wrap_pybind_function_no_gil(draw),
      "A layer's forward: (output, ForwardTrace or None), or None where torch.ops has to be gone through.");
  m.def(
      "kl", torch::wrap_pybind_function_no_gil(kl),
      "The KL of layers, summed; or None where torch.ops has to be gone through.");
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
      "routes",
      [] {
        const Routes routes = current_routes();
        return std::pair(routes.rules, routes.measured);
      },
      "The rules by which convolutions go around the library, and the measured exceptions as (key, way).");
  m.def(
      "set_routes",
      [](std::string rules, std::vector<std::pair<std::vector<int64_t>, std::string>> measured) {
        set_routes({std::move(rules), std::move(measured)});
      });
  m.def("rules_of_this_cpu", &rules_of_this_cpu);
  m.def(
      "conv_ways",
      [](const Numbers& input, const Numbers& weight, const Numbers& stride, const Numbers& padding,
         const Numbers& dilation,
         int64_t groups) { return ways(conv_problem(input, weight, stride, padding, dilation, groups)); },
      "The ways that a convolution over contiguous float32 images may take, and the one it takes.");
  m.def(
      "linear_ways",
      [](const Numbers& input, const Numbers& weight) { return ways(linear_problem(input, weight)); },
      "Likewise of a linear layer's products.");
  m.def("multiplies_bfloat16", &multiplies_bfloat16, "Whether this CPU has instructions for it.");
  m.def(
      "set_isa", &bbb_fast::set_isa, pybind11::arg("name"),
      "Forces an instruction set: base, avx2, avx512, or auto for the best. For tests and benchmarks.");
}
