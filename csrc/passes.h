// Typed calls of the elementwise ops that other ops are made of. The dispatcher takes each to the tensors'
// device, or to its fake kernel.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace bbb_fast {

using OptionalTensor = std::optional<at::Tensor>;

inline bool has(const OptionalTensor& t) {
  return t.has_value() && t->defined();
}

// The tensor, or none if it is undefined.
inline OptionalTensor optional(const at::Tensor& t) {
  return t.defined() ? OptionalTensor(t) : std::nullopt;
}

// Undefined tensors for those that are not there.
inline std::vector<at::Tensor> tensors(const c10::List<OptionalTensor>& list) {
  std::vector<at::Tensor> result;
  result.reserve(list.size());
  for (const OptionalTensor& t : list) result.push_back(t.value_or(at::Tensor()));
  return result;
}

template <class Signature>
c10::TypedOperatorHandle<Signature> find_op(const std::string& name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(("bbb_fast::" + name).c_str(), "").typed<Signature>();
}

std::tuple<std::vector<at::Tensor>, at::Tensor> sample_weights(
    at::TensorList mu,
    at::TensorList rho,
    const at::Tensor& rng,
    double prior_mu,
    double prior_sigma,
    bool with_kl,
    std::optional<at::ScalarType> dtype,
    bool centered = false);
std::tuple<std::vector<at::Tensor>, at::Tensor> variance(
    at::TensorList mu,
    at::TensorList rho,
    double prior_mu,
    double prior_sigma,
    bool with_kl,
    at::ScalarType dtype);

// Undefined tensors stand for those that are not there, also as the second's result. grad_spread may be
// empty.
std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> posterior_backward(
    at::TensorList grad_w,
    const at::Tensor& grad_kl,
    at::TensorList mu,
    at::TensorList rho,
    const at::Tensor& rng,
    at::ArrayRef<double> prior_mu,
    at::ArrayRef<double> prior_sigma);
at::Tensor posterior_backward_out(
    at::TensorList grad_w,
    at::TensorList grad_spread,
    const at::Tensor& grad_kl,
    at::TensorList mu,
    at::TensorList rho,
    const at::Tensor& rng,
    at::ArrayRef<double> prior_mu,
    at::ArrayRef<double> prior_sigma,
    at::TensorList grad_mu,
    at::TensorList grad_rho,
    std::optional<at::ScalarType> again);

at::Tensor drop_elements(const at::Tensor& input, const at::Tensor& rng, double p);

at::Tensor square(const at::Tensor& input, at::ScalarType dtype);
void square_backward_(at::Tensor& grad_input, const at::Tensor& input, const at::Tensor& grad);
void lrt_sample_(at::Tensor& m, const at::Tensor& v, const at::Tensor& rng);
at::Tensor lrt_sample_backward(const at::Tensor& grad, const at::Tensor& v, const at::Tensor& rng);

at::Tensor flip_signs(const at::Tensor& input, const at::Tensor& rng, int64_t stream, int64_t channel_dim);
void add_flipped_(
    at::Tensor& base, const at::Tensor& input, const at::Tensor& rng, int64_t stream, int64_t channel_dim);

}  // namespace bbb_fast
