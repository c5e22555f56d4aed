// Argument checks of the native ops, for the caller: what was wrong, which value, what is allowed.
// bbb_fast/_checks.py says the same for the reference path, in the same words.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <optional>
#include <ostream>
#include <string>

#include "layout.h"

namespace bbb_fast {

inline bool is_supported_dtype(at::ScalarType t) {
  return t == at::kFloat || t == at::kDouble || t == at::kBFloat16 || t == at::kHalf;
}

// torch.float32 and so on, as Python prints it.
inline std::string dtype_name(at::ScalarType t) {
  return "torch." + std::string(c10::getDtypeNames(t).first);
}

// A tensor's name in a message: put together when there is one, since a small layer's checks would take
// longer over names than over tensors.
struct Name {
  const char* group;
  const char* member;

  Name(const char* group_, const char* member_ = "") : group(group_), member(member_) {}
};
inline std::ostream& operator<<(std::ostream& out, const Name& name) {
  return out << name.group << name.member;
}

inline void check_strided(const char* op, const Name& name, const at::Tensor& t) {
  TORCH_CHECK_TYPE(
      t.layout() == at::kStrided, op, ": ", name, " must be a dense tensor, not a sparse or nested one");
}

inline void check_floating(const char* op, const Name& name, const at::Tensor& t) {
  TORCH_CHECK_TYPE(
      is_supported_dtype(t.scalar_type()), op, ": ", name,
      " must be float32, float64, bfloat16 or float16, got ", dtype_name(t.scalar_type()));
  check_strided(op, name, t);
}

inline void check_dtype_option(const char* op, const char* name, std::optional<at::ScalarType> dtype) {
  TORCH_CHECK_TYPE(
      !dtype || is_supported_dtype(*dtype), op, ": ", name,
      " must be float32, float64, bfloat16 or float16, got ", dtype ? dtype_name(*dtype) : "");
}

inline void check_device(const char* op, const Name& name, const at::Tensor& t, at::Device device) {
  TORCH_CHECK_VALUE(t.device() == device, op, ": ", name, " is on ", t.device(), ", expected ", device);
}

// What to do about a derivative that the kernels have not.
constexpr const char* kReferenceHasThem =
    "bbb_fast.set_backend(\"reference\") gives the same numbers with all derivatives";

inline void check_no_tangent(const char* op, const at::Tensor& t) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      !t.defined() || !t._fw_grad(0).defined(), op,
      ": forward-mode derivatives are not implemented by the native kernels; ", kReferenceHasThem);
}

inline void check_shape(const char* op, const Name& name, const at::Tensor& t, at::IntArrayRef sizes) {
  TORCH_CHECK_VALUE(t.sizes() == sizes, op, ": ", name, " must have shape ", sizes, ", got ", t.sizes());
}

inline void check_dtype(const char* op, const Name& name, const at::Tensor& t, at::ScalarType dtype) {
  TORCH_CHECK_TYPE(
      t.scalar_type() == dtype, op, ": ", name, " must be ", dtype_name(dtype), ", got ",
      dtype_name(t.scalar_type()));
}

// Which rng an op takes: of one draw, [2]; or also of S draws, [S, 2]; or also of S draws of the whole batch
// each, [S, 1, 2].
enum class RngOf { one_draw, draws, draws_of_batch };

inline void check_rng(
    const char* op, const at::Tensor& rng, at::Device device, RngOf allowed = RngOf::one_draw) {
  TORCH_CHECK_TYPE(
      rng.scalar_type() == at::kLong, op, ": rng must be int64 (seed, stream), got ",
      dtype_name(rng.scalar_type()));
  const bool pairs = rng.dim() > 0 && rng.size(0) > 0 && rng.size(-1) == 2;
  const bool batch = rng.dim() == 3 && rng.size(1) == 1 && allowed == RngOf::draws_of_batch;
  TORCH_CHECK_VALUE(
      pairs && (rng.dim() == 1 || (rng.dim() == 2 && allowed != RngOf::one_draw) || batch), op,
      ": rng must have shape [2] (seed, stream)",
      allowed == RngOf::draws            ? ", or [S, 2] for S draws"
      : allowed == RngOf::draws_of_batch ? ", or [S, 2] or [S, 1, 2] for S draws"
                                         : "",
      ", got ", rng.sizes());
  check_strided(op, "rng", rng);
  check_device(op, "rng", rng, device);
}

// Of the ops that return noise.
inline void check_noise(const char* op, at::IntArrayRef size, const at::Tensor& rng, at::ScalarType dtype) {
  check_dtype_option(op, "dtype", dtype);
  check_rng(op, rng, rng.device());
  for (int64_t length : size) TORCH_CHECK_VALUE(length >= 0, op, ": size must be >= 0, got ", size);
}

inline void check_dropout(
    const char* op, const at::Tensor& input, const at::Tensor& rng, double p, bool channels = false) {
  check_floating(op, "input", input);
  check_rng(op, rng, input.device());
  TORCH_CHECK_VALUE(p >= 0 && p <= 1, op, ": p must be in [0, 1], got ", p);
  TORCH_CHECK_VALUE(
      !channels || input.dim() >= 2, op, ": with channels, input must have dimensions [N, C, ...], got ",
      input.sizes());
}

inline void check_drop_elements(const char* op, const at::Tensor& input, const at::Tensor& rng, double p) {
  check_dropout(op, input, rng, p);
  TORCH_CHECK_VALUE(input.is_contiguous(), op, ": input must be contiguous, got strides ", input.strides());
}

// How many binary digits of uniform noise, one less than the type has; of float32's in float64 too.
inline int uniform_bits(at::ScalarType dtype) {
  return dtype == at::kHalf ? 10 : dtype == at::kBFloat16 ? 7 : 23;
}

// How many draws an rng [2] or [S, 2] names, or none.
inline int64_t draw_count(const std::optional<at::Tensor>& rng) {
  return rng && rng->defined() && rng->dim() == 2 ? rng->size(0) : 1;
}

inline void check_posterior(
    const char* op, const char* group, const at::Tensor& mu, const at::Tensor& rho, at::Device device) {
  check_floating(op, {group, "mu"}, mu);
  TORCH_CHECK_TYPE(
      mu.scalar_type() == rho.scalar_type(), op, ": ", group, "mu and ", group,
      "rho must have one dtype, got ", dtype_name(mu.scalar_type()), " and ", dtype_name(rho.scalar_type()));
  TORCH_CHECK_VALUE(
      mu.sizes() == rho.sizes(), op, ": ", group, "mu and ", group, "rho must have one shape, got ",
      mu.sizes(), " and ", rho.sizes());
  check_strided(op, {group, "rho"}, rho);
  check_device(op, {group, "mu"}, mu, device);
  check_device(op, {group, "rho"}, rho, device);
}

inline void check_posteriors(const char* op, at::TensorList mu, at::TensorList rho) {
  TORCH_CHECK_VALUE(
      mu.size() == rho.size(), op, ": got ", mu.size(), " mu tensors and ", rho.size(), " rho tensors");
  TORCH_CHECK_VALUE(!mu.empty(), op, ": the list of tensors is empty");
  for (size_t i = 0; i < mu.size(); ++i) {
    check_posterior(op, "", mu[i], rho[i], mu[0].device());
    TORCH_CHECK_TYPE(
        mu[i].scalar_type() == mu[0].scalar_type(), op, ": all tensors must have one dtype, got ",
        dtype_name(mu[0].scalar_type()), " and ", dtype_name(mu[i].scalar_type()));
  }
}

inline void check_prior(const char* op, double prior_mu, double prior_sigma) {
  TORCH_CHECK_VALUE(std::isfinite(prior_mu), op, ": prior_mu must be finite, got ", prior_mu);
  TORCH_CHECK_VALUE(
      std::isfinite(prior_sigma) && prior_sigma > 0, op, ": prior_sigma must be finite and > 0, got ",
      prior_sigma);
}

inline void check_priors(
    const char* op, size_t count, at::ArrayRef<double> prior_mu, at::ArrayRef<double> prior_sigma) {
  TORCH_CHECK_VALUE(
      prior_mu.size() == count && prior_sigma.size() == count, op, ": ", count, " tensors need ", count,
      " priors, got ", prior_mu.size(), " prior_mu and ", prior_sigma.size(), " prior_sigma");
  for (size_t i = 0; i < count; ++i) check_prior(op, prior_mu[i], prior_sigma[i]);
}

inline void check_grad_kl(const char* op, const char* name, const at::Tensor& grad, at::Device device) {
  check_floating(op, name, grad);
  TORCH_CHECK_VALUE(grad.numel() == 1, op, ": ", name, " must be a scalar, got shape ", grad.sizes());
  check_device(op, name, grad, device);
}

// Of one tensor, whose weights have priors of their own.
inline void check_tensor_prior(
    const char* op,
    const at::Tensor& mu,
    const at::Tensor& rho,
    const at::Tensor& prior_mu,
    const at::Tensor& prior_sigma) {
  check_posterior(op, "", mu, rho, mu.device());
  const auto check = [&](const char* name, const at::Tensor& t) {
    check_floating(op, name, t);
    check_device(op, name, t, mu.device());
    TORCH_CHECK_VALUE(
        t.dim() == 0 || t.sizes() == mu.sizes(), op, ": ", name, " must be a number or have shape ",
        mu.sizes(), ", got ", t.sizes());
  };
  check("prior_mu", prior_mu);
  check("prior_sigma", prior_sigma);
}

inline void check_posterior_backward(
    const char* op,
    at::TensorList grad_w,
    at::TensorList grad_spread,
    const std::optional<at::Tensor>& grad_kl,
    at::TensorList mu,
    at::TensorList rho,
    const std::optional<at::Tensor>& rng,
    at::ArrayRef<double> prior_mu,
    at::ArrayRef<double> prior_sigma,
    at::TensorList grad_mu,
    at::TensorList grad_rho,
    std::optional<at::ScalarType> again) {
  check_posteriors(op, mu, rho);
  if (rng && rng->defined()) check_rng(op, *rng, mu[0].device(), RngOf::draws);
  const size_t draws = draw_count(rng);
  check_priors(op, mu.size(), prior_mu, prior_sigma);
  const auto check_gradient = [&](const char* name, size_t k, const at::Tensor& g) {
    check_floating(op, name, g);
    TORCH_CHECK_VALUE(
        g.sizes() == mu[k].sizes(), op, ": ", name, " ", k, " must have shape ", mu[k].sizes(), ", got ",
        g.sizes());
    check_device(op, name, g, mu[0].device());
  };
  const auto check_count = [&](const char* name, size_t count, size_t of_each = 1) {
    TORCH_CHECK_VALUE(
        count == mu.size() * of_each, op, ": got ", count, " ", name, " for ", mu.size(), " tensors",
        of_each == 1 ? std::string() : " of " + std::to_string(of_each) + " draws");
  };
  const bool spread = !grad_spread.empty();
  check_count("grad_w", grad_w.size(), spread ? 1 : draws);
  if (spread) check_count("grad_spread", grad_spread.size(), draws);
  check_count("grad_mu", grad_mu.size());
  check_count("grad_rho", grad_rho.size());
  bool any = false;
  for (size_t k = 0; k < mu.size(); ++k) {
    const bool given = grad_w[spread ? k : k * draws].defined();
    any |= given;
    for (size_t draw = 0; draw < draws; ++draw) {
      if (!spread || draw == 0) {
        const at::Tensor& g = grad_w[spread ? k : k * draws + draw];
        TORCH_CHECK_VALUE(
            g.defined() == given, op, ": give grad_w of all draws of tensor ", k, ", or of none");
        if (given) check_gradient("grad_w", k, g);
      }
      if (spread) {
        const at::Tensor& g = grad_spread[k * draws + draw];
        TORCH_CHECK_VALUE(
            g.defined() == given, op, ": give both grad_w and grad_spread of tensor ", k, ", or neither");
        if (given) check_gradient("grad_spread", k, g);
      }
    }
    for (const at::Tensor& out : {grad_mu[k], grad_rho[k]}) {
      check_gradient("result", k, out);
      TORCH_CHECK_VALUE(
          out.is_contiguous() && out.scalar_type() == mu[k].scalar_type(), op, ": result ", k,
          " must be contiguous and ", dtype_name(mu[k].scalar_type()), " like mu");
    }
    TORCH_CHECK_VALUE(
        !grad_mu[k].is_same(grad_rho[k]), op, ": result ", k, " must be two tensors, got one twice");
  }
  check_dtype_option(op, "again", again);
  TORCH_CHECK_VALUE(
      !again || grad_w[0].defined(), op, ": what the forward formed is formed again with its gradient only");
  if (grad_kl && grad_kl->defined()) check_grad_kl(op, "grad_kl", *grad_kl, mu[0].device());
  TORCH_CHECK_VALUE(
      !any || spread || (rng && rng->defined()), op,
      ": gradients of weights need the rng they were drawn with");
}

// Elementwise passes over two tensors run in memory order: both are dense with the same strides.
inline void check_lrt_sample(
    const char* op, const char* name, const at::Tensor& m, const at::Tensor& v, const at::Tensor& rng) {
  check_floating(op, name, m);
  check_floating(op, "v", v);
  TORCH_CHECK_VALUE(
      m.sizes() == v.sizes(), op, ": ", name, " and v must have one shape, got ", m.sizes(), " and ",
      v.sizes());
  check_device(op, "v", v, m.device());
  TORCH_CHECK_VALUE(
      m.numel() == 0 || (m.is_non_overlapping_and_dense() && same_order(m, v)), op, ": ", name,
      " and v must be dense with the same strides, got ", m.strides(), " and ", v.strides());
  check_rng(op, rng, m.device());
}

inline void check_square_backward(
    const char* op, const at::Tensor& grad_input, const at::Tensor& input, const at::Tensor& grad) {
  check_floating(op, "grad_input", grad_input);
  check_floating(op, "input", input);
  check_floating(op, "grad", grad);
  TORCH_CHECK_TYPE(
      grad_input.scalar_type() == input.scalar_type(), op, ": grad_input and input must have one dtype, got ",
      dtype_name(grad_input.scalar_type()), " and ", dtype_name(input.scalar_type()));
  TORCH_CHECK_VALUE(
      grad_input.sizes() == input.sizes() && grad.sizes() == input.sizes(), op,
      ": grad_input, input and grad must have one shape, got ", grad_input.sizes(), ", ", input.sizes(),
      " and ", grad.sizes());
  TORCH_CHECK_VALUE(
      grad_input.is_non_overlapping_and_dense(), op, ": grad_input must be dense, got strides ",
      grad_input.strides());
  check_device(op, "grad_input", grad_input, input.device());
  check_device(op, "grad", grad, input.device());
}

}  // namespace bbb_fast
