// How a KL is finished from its chunks' partial sums.
#pragma once

#include <cmath>
#include <vector>

namespace bbb_fast {

// A prior as the float kernels want it (gaussian.h's struct Prior has one copy per instruction set).
struct PriorNumbers {
  double mu;
  double sigma;
};

// Partial sums hold twice the KL plus 1 a weight, formed with ln(sigma_p) rounded to float; double
// tensors' use the exact one. Added in order, so that the result never depends on the threads.
inline double finish_kl(
    const double* partial, int64_t chunks, int64_t numel, double prior_sigma, bool rounded) {
  double total = 0.0;
  for (int64_t i = 0; i < chunks; ++i) total += partial[i];
  const double log_sigma = std::log(prior_sigma);
  const double lost = rounded ? log_sigma - static_cast<float>(log_sigma) : 0.0;
  return 0.5 * (total + static_cast<double>(numel) * (2.0 * lost - 1.0));
}

}  // namespace bbb_fast
