// Memory order: elementwise kernels go over dense tensors in the order in which they lie in memory.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>

namespace bbb_fast {

// t itself if it is dense in any order of its dimensions, else a dense copy with the strides of empty_like.
inline at::Tensor dense(const at::Tensor& t) {
  return t.is_non_overlapping_and_dense() ? t : at::empty_like(t).copy_(t);
}

// Whether two tensors of one shape have their elements at the same places: their strides agree, except where
// a dimension has one element, whose stride means nothing.
inline bool same_order(const at::Tensor& a, const at::Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.stride(d) != b.stride(d) && a.size(d) != 1) return false;
  }
  return true;
}

// t in the order of a dense tensor of its shape.
inline at::Tensor in_order_of(const at::Tensor& like, const at::Tensor& t) {
  return same_order(like, t) ? t : at::empty_like(like, t.options()).copy_(t);
}

}  // namespace bbb_fast
