// From run-time dtypes to the types a kernel is compiled for.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

namespace bbb_fast::cuda {

template <class T>
struct Type {
  using type = T;
};

// Calls body(Type<T>) for the dtype; the checks have let only these four pass.
template <class Body>
void dispatch(at::ScalarType dtype, const Body& body) {
  switch (dtype) {
    case at::kFloat:
      return body(Type<float>{});
    case at::kDouble:
      return body(Type<double>{});
    case at::kBFloat16:
      return body(Type<c10::BFloat16>{});
    default:
      return body(Type<c10::Half>{});
  }
}

inline at::ScalarType wide(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

// Two dtypes that kernels of a pair of operands are compiled for. The others first convert to the wider
// type, which changes no number.
struct Pair {
  at::ScalarType first, second;
};

// A parameter and what is formed from it (weight, variance): alike, or a narrow one from float32.
inline Pair parameter_pair(at::ScalarType parameter, at::ScalarType formed) {
  if (parameter == formed) return {parameter, formed};
  const auto p = wide(parameter);
  return {p, p == at::kFloat && formed != at::kDouble ? formed : p};
}

template <class Body>
void dispatch_parameter_pair(const Pair& pair, const Body& body) {
  dispatch(pair.first, [&](auto first) {
    using P = typename decltype(first)::type;
    if constexpr (std::is_same_v<P, float>) {
      switch (pair.second) {
        case at::kBFloat16:
          return body(first, Type<c10::BFloat16>{});
        case at::kHalf:
          return body(first, Type<c10::Half>{});
        default:
          return body(first, first);
      }
    } else {
      body(first, first);
    }
  });
}

// Two operands the size of an activation, one of the variance product and one of the other: as above, or a
// narrow one beside float32.
inline Pair activation_pair(at::ScalarType activation, at::ScalarType variance) {
  if (activation == variance) return {activation, variance};
  if (activation == at::kDouble || variance == at::kDouble) return {at::kDouble, at::kDouble};
  return {activation, activation == at::kFloat ? variance : at::kFloat};
}

template <class Body>
void dispatch_activation_pair(const Pair& pair, const Body& body) {
  if (pair.first != at::kFloat && pair.first != at::kDouble && pair.second == at::kFloat) {
    if (pair.first == at::kBFloat16) return body(Type<c10::BFloat16>{}, Type<float>{});
    return body(Type<c10::Half>{}, Type<float>{});
  }
  dispatch_parameter_pair(pair, body);
}

}  // namespace bbb_fast::cuda
