#include "draws.h"

#include <ATen/ops/empty.h>

namespace bbb_fast {

at::Tensor Draws::rng(int64_t k) const {
  if (!several()) return rng_;
  return of_whole_batch() ? rng_.select(0, k).select(0, 0) : rng_.select(0, k);
}

at::Tensor Draws::rngs(int64_t first, int64_t size) const {
  if (!several()) return rng_;
  const at::Tensor rows = of_whole_batch() ? rng_.select(1, 0) : rng_;
  return rows.narrow(0, first, size);
}

at::Tensor Draws::of_output(const at::Tensor& t, int64_t k) const {
  if (!several()) return t;
  const int64_t rows = t.size(0) / count();
  return t.narrow(0, k * rows, rows);
}

at::Tensor Draws::room_for_all(const at::Tensor& part, at::MemoryFormat format) const {
  std::vector<int64_t> sizes = part.sizes().vec();
  sizes[0] *= count();
  return at::empty(sizes, part.options().memory_format(format));
}

at::Tensor Draws::summed(const at::Tensor& grad) const {
  return of_whole_batch() ? grad.unflatten(0, {count(), grad.size(0) / count()}).sum(0) : grad;
}

std::vector<int64_t> Draws::output_sizes(std::vector<int64_t> sizes) const {
  if (of_whole_batch()) sizes[0] *= count();
  return sizes;
}

std::vector<int64_t> Draws::formed_sizes(at::IntArrayRef sizes) const {
  std::vector<int64_t> result = sizes.vec();
  if (several()) result.insert(result.begin(), count());
  return result;
}

}  // namespace bbb_fast
