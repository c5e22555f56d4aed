// The draws that a layer op's rng names: one, [2]; S of equal parts of the batch, [S, 2]; or S of the whole
// batch each, [S, 1, 2], whose outputs follow each other.
#pragma once

#include <ATen/OpMathType.h>
#include <ATen/core/Tensor.h>

#include <vector>

#include "passes.h"
#include "products.h"

namespace bbb_fast {

class Draws {
 public:
  explicit Draws(const at::Tensor& rng) : rng_(rng) {}

  int64_t count() const { return several() ? rng_.size(0) : 1; }
  bool several() const { return rng_.dim() > 1; }
  bool of_whole_batch() const { return rng_.dim() > 2; }

  // Draw k's own [seed, stream].
  at::Tensor rng(int64_t k) const;
  // Those of `size` draws from `first` on, as ops take them that know of no batch: [2] or [size, 2].
  at::Tensor rngs(int64_t first, int64_t size) const;
  at::Tensor rngs() const { return rngs(0, count()); }

  // Draw k's part: of the input; of the output; of what was formed of a parameter for each draw.
  at::Tensor of_input(const at::Tensor& t, int64_t k) const { return of_whole_batch() ? t : of_output(t, k); }
  at::Tensor of_output(const at::Tensor& t, int64_t k) const;
  at::Tensor of_formed(const at::Tensor& t, int64_t k) const { return several() ? t.select(0, k) : t; }
  OptionalTensor of_formed(const OptionalTensor& t, int64_t k) const {
    return has(t) ? OptionalTensor(of_formed(*t, k)) : std::nullopt;
  }

  // The output, or something like it, of all draws: run(k) gives draw k's.
  template <class Run>
  at::Tensor outputs(at::MemoryFormat format, const Run& run) const {
    if (!several()) return in_format(run(0), format);
    at::Tensor all;
    for (int64_t k = 0; k < count(); ++k) {
      const at::Tensor part = run(k);
      if (k == 0) all = room_for_all(part, format);
      of_output(all, k).copy_(part);  // while the part is in the cache
    }
    return all;
  }
  // The gradient of the input, or of something like it: run(k) gives that of draw k's part.
  template <class Run>
  at::Tensor input_gradient(at::MemoryFormat format, const Run& run) const {
    if (!of_whole_batch()) return outputs(format, run);
    at::Tensor sum = in_format(run(0), format);
    const auto dtype = sum.scalar_type();
    for (int64_t k = 1; k < count(); ++k) {
      if (k == 1) sum = sum.to(at::toOpMathType(dtype));
      sum.add_(run(k));
    }
    return sum.to(dtype);
  }

  // The output, from what the product makes of the input: run(part, k) adds to draw k's part what is its own.
  template <class Run>
  at::Tensor outputs_from(const at::Tensor& shared, at::MemoryFormat format, const Run& run) const {
    at::Tensor all = of_whole_batch() ? room_for_all(shared, format) : in_format(shared, format);
    for (int64_t k = 0; k < count(); ++k) {
      at::Tensor part = of_output(all, k);
      if (of_whole_batch()) part.copy_(shared);
      run(part, k);
    }
    return all;
  }
  // The gradient of what the product made, from the output's.
  at::Tensor summed(const at::Tensor& grad) const;

  // Sizes of the output, from what the product makes of the input.
  std::vector<int64_t> output_sizes(std::vector<int64_t> sizes) const;
  // Sizes of what is formed of a parameter.
  std::vector<int64_t> formed_sizes(at::IntArrayRef sizes) const;

 private:
  at::Tensor room_for_all(const at::Tensor& part, at::MemoryFormat format) const;

  const at::Tensor& rng_;
};

}  // namespace bbb_fast
