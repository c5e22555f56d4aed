#include "passes.h"

namespace bbb_fast {
namespace {

using OptionalList = c10::List<OptionalTensor>;

OptionalList optionals(at::TensorList tensors) {
  OptionalList list;
  list.reserve(tensors.size());
  for (const at::Tensor& t : tensors) list.push_back(optional(t));
  return list;
}

}  // namespace

std::tuple<std::vector<at::Tensor>, at::Tensor> sample_weights(
    at::TensorList mu,
    at::TensorList rho,
    const at::Tensor& rng,
    double prior_mu,
    double prior_sigma,
    bool with_kl,
    std::optional<at::ScalarType> dtype,
    bool centered) {
  static const auto op = find_op<std::tuple<std::vector<at::Tensor>, at::Tensor>(
      at::TensorList, at::TensorList, const at::Tensor&, double, double, bool, std::optional<at::ScalarType>,
      bool)>("sample_weights");
  return op.call(mu, rho, rng, prior_mu, prior_sigma, with_kl, dtype, centered);
}

std::tuple<std::vector<at::Tensor>, at::Tensor> variance(
    at::TensorList mu,
    at::TensorList rho,
    double prior_mu,
    double prior_sigma,
    bool with_kl,
    at::ScalarType dtype) {
  static const auto op = find_op<std::tuple<std::vector<at::Tensor>, at::Tensor>(
      at::TensorList, at::TensorList, double, double, bool, at::ScalarType)>("variance");
  return op.call(mu, rho, prior_mu, prior_sigma, with_kl, dtype);
}

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> posterior_backward(
    at::TensorList grad_w,
    const at::Tensor& grad_kl,
    at::TensorList mu,
    at::TensorList rho,
    const at::Tensor& rng,
    at::ArrayRef<double> prior_mu,
    at::ArrayRef<double> prior_sigma) {
  static const auto op = find_op<std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>>(
      const OptionalList&, const OptionalTensor&, at::TensorList, at::TensorList, const OptionalTensor&,
      at::ArrayRef<double>, at::ArrayRef<double>)>("posterior_backward");
  return op.call(optionals(grad_w), optional(grad_kl), mu, rho, optional(rng), prior_mu, prior_sigma);
}

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
    std::optional<at::ScalarType> again) {
  static const auto op = find_op<at::Tensor(
      const OptionalList&, const OptionalList&, const OptionalTensor&, at::TensorList, at::TensorList,
      const OptionalTensor&, at::ArrayRef<double>, at::ArrayRef<double>, at::TensorList, at::TensorList,
      std::optional<at::ScalarType>)>("posterior_backward_out");
  at::Tensor formed = op.call(
      optionals(grad_w), optionals(grad_spread), optional(grad_kl), mu, rho, optional(rng), prior_mu,
      prior_sigma, grad_mu, grad_rho, again);
  return again ? std::move(formed) : at::Tensor();
}

at::Tensor drop_elements(const at::Tensor& input, const at::Tensor& rng, double p) {
  static const auto op = find_op<at::Tensor(const at::Tensor&, const at::Tensor&, double)>("drop_elements");
  return op.call(input, rng, p);
}

at::Tensor square(const at::Tensor& input, at::ScalarType dtype) {
  static const auto op = find_op<at::Tensor(const at::Tensor&, at::ScalarType)>("square");
  return op.call(input, dtype);
}

void square_backward_(at::Tensor& grad_input, const at::Tensor& input, const at::Tensor& grad) {
  static const auto op = find_op<void(at::Tensor&, const at::Tensor&, const at::Tensor&)>("square_backward_");
  op.call(grad_input, input, grad);
}

void lrt_sample_(at::Tensor& m, const at::Tensor& v, const at::Tensor& rng) {
  static const auto op = find_op<void(at::Tensor&, const at::Tensor&, const at::Tensor&)>("lrt_sample_");
  op.call(m, v, rng);
}

at::Tensor lrt_sample_backward(const at::Tensor& grad, const at::Tensor& v, const at::Tensor& rng) {
  static const auto op =
      find_op<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&)>("lrt_sample_backward");
  return op.call(grad, v, rng);
}

at::Tensor flip_signs(const at::Tensor& input, const at::Tensor& rng, int64_t stream, int64_t channel_dim) {
  static const auto op =
      find_op<at::Tensor(const at::Tensor&, const at::Tensor&, int64_t, int64_t)>("flip_signs");
  return op.call(input, rng, stream, channel_dim);
}

void add_flipped_(
    at::Tensor& base, const at::Tensor& input, const at::Tensor& rng, int64_t stream, int64_t channel_dim) {
  static const auto op =
      find_op<void(at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t, int64_t)>("add_flipped_");
  op.call(base, input, rng, stream, channel_dim);
}

}  // namespace bbb_fast
