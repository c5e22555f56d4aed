// The backward ops under torch.autograd.grad(is_grads_batched=True), which batches by an older mechanism than
// torch.func.vmap (for that one: bbb_fast/_ops.py): a loop over the batch.
#if __has_include(<ATen/LegacyBatchedTensorImpl.h>)

#include <ATen/LegacyBatchedTensorImpl.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <ATen/ops/stack.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "estimators.h"

namespace bbb_fast {
namespace {

using c10::IValue;
using OptionalTensor = std::optional<at::Tensor>;

struct Batch {
  int64_t level, size;
};

// The argument with `change` made to each tensor in it.
template <class Change>
IValue changed(const IValue& argument, const Change& change) {
  if (argument.isTensor()) return argument.toTensor().defined() ? change(argument.toTensor()) : argument;
  if (argument.isTensorList()) {
    std::vector<at::Tensor> list = argument.toTensorVector();
    std::transform(list.begin(), list.end(), list.begin(), change);
    return list;
  }
  if (argument.isOptionalTensorList()) {
    c10::List<OptionalTensor> list;
    for (const OptionalTensor& t : argument.toOptionalTensorVector()) {
      list.push_back(t && t->defined() ? OptionalTensor(change(*t)) : t);
    }
    return list;
  }
  return argument;
}

std::optional<Batch> batch_of(at::ArrayRef<IValue> arguments) {
  std::optional<Batch> batch;
  for (const IValue& argument : arguments) {
    changed(argument, [&](const at::Tensor& t) {
      if (const auto* batched = at::maybeGetBatchedImpl(t)) {
        const auto dims = batched->bdims();
        TORCH_CHECK_NOT_IMPLEMENTED(dims.size() == 1, "bbb_fast: nested is_grads_batched is not implemented");
        batch = Batch{dims[0].level(), batched->value().size(dims[0].dim())};
      }
      return t;
    });
  }
  return batch;
}

at::Tensor part_of(const at::Tensor& t, int64_t i) {
  const auto* batched = at::maybeGetBatchedImpl(t);
  if (batched == nullptr) return t;
  return batched->value().select(batched->bdims()[0].dim(), i);
}

// Every op here returns lists of tensors.
void loop(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto arguments = torch::jit::pop(*stack, op.schema().arguments().size());
  const size_t returns = op.schema().returns().size();
  const auto batch = batch_of(arguments);
  TORCH_INTERNAL_ASSERT(batch.has_value());
  std::vector<std::vector<std::vector<at::Tensor>>> results(returns);
  for (int64_t i = 0; i < batch->size; ++i) {
    torch::jit::Stack one;
    for (const IValue& argument : arguments) {
      one.push_back(changed(argument, [&](const at::Tensor& t) { return part_of(t, i); }));
    }
    op.callBoxed(one);
    for (size_t r = 0; r < returns; ++r) {
      const std::vector<at::Tensor> list = one[r].toTensorVector();
      results[r].resize(list.size());
      for (size_t k = 0; k < list.size(); ++k) results[r][k].push_back(list[k]);
    }
  }
  for (const auto& result : results) {
    std::vector<at::Tensor> list;
    for (const auto& slices : result) {
      list.push_back(at::addBatchDim(at::stack(slices), batch->level, 0));
    }
    stack->emplace_back(std::move(list));
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(bbb_fast, Batched, m) {
  for (const char* name : {"posterior_backward", "kl_tensor_prior_backward"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&loop>());
  }
  for (const auto& estimator : kEstimators) {
    for (const char* product : kProducts) {
      const std::string name = std::string(estimator.name) + product + "_backward";
      m.impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&loop>());
    }
  }
}

}  // namespace bbb_fast

#endif
