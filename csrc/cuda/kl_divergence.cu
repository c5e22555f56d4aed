// kl_divergence: KL(q || p) of a list of tensors. Its backward: posterior_backward.cu.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../checks.h"
#include "dispatch.h"
#include "kl_sum.h"

namespace bbb_fast::cuda {
namespace {

template <class P>
struct KlEntry {
  const P* mu;
  const P* rho;
  int64_t numel;
  typename KlSum<Wide<P>>::Prior prior;
  bool aligned;
};

// partial: one number a chunk.
template <class P>
__global__ void __launch_bounds__(kThreads)
    kl_kernel(const __grid_constant__ Table<KlEntry<P>> table, double* partial) {
  using A = Wide<P>;
  constexpr int N = kVector<P>;
  struct Operands {
    Pack<P, N> mu, rho;
  };
  BlockSum block_sum;
  for_each_chunk(table, [&](const auto& e, int64_t chunk, int64_t begin, int count) {
    KlSum<A> kl;
    for_each_vector<N, Operands>(
        e.aligned, count,
        [&](auto whole, unsigned at, int left, Operands& o) {
          read<whole.value>(e.mu + begin + at, left, o.mu);
          read<whole.value>(e.rho + begin + at, left, o.rho);
        },
        [&](auto, unsigned, int left, const Operands& o) {
          typename KlSum<A>::Sigma s[N];
#pragma unroll
          for (int j = 0; j < N; ++j) s[j] = softplus(o.rho.wide(j));
          kl.add(o.mu, o.rho, s, SamePrior{e.prior}, left);
        });
    const double sum = block_sum(thread_kl<N>(kl, e.mu + begin, e.rho + begin, count, SamePrior{e.prior}));
    if (threadIdx.x == 0) partial[chunk] = sum;
  });
}

at::Tensor kl_divergence(
    at::TensorList mu, at::TensorList rho, at::ArrayRef<double> prior_mu, at::ArrayRef<double> prior_sigma) {
  check_posteriors("kl_divergence", mu, rho);
  check_priors("kl_divergence", mu.size(), prior_mu, prior_sigma);
  const DeviceGuard guard(mu[0].device());
  std::vector<at::Tensor> m, r;
  double constant = 0.0;
  for (size_t k = 0; k < mu.size(); ++k) {
    m.push_back(mu[k].contiguous());
    r.push_back(rho[k].contiguous());
    constant += kl_constant(mu[k]);
  }
  const at::Tensor kl = at::empty({}, mu[0].options().dtype(kl_dtype(mu[0])));
  dispatch(mu[0].scalar_type(), [&](auto type) {
    using P = typename decltype(type)::type;
    using A = Wide<P>;
    std::vector<KlEntry<P>> entries;
    for (size_t k = 0; k < m.size(); ++k) {
      const P* x = m[k].const_data_ptr<P>();
      const P* y = r[k].const_data_ptr<P>();
      const bool aligned = is_aligned<kVector<P>>(x) && is_aligned<kVector<P>>(y);
      entries.push_back({x, y, m[k].numel(), prior_for<A>(prior_mu[k], prior_sigma[k]), aligned});
    }
    const at::Tensor partial = at::empty({chunk_count(entries)}, kl.options().dtype(at::kDouble));
    for_each_table(entries, [&](const auto& table, int64_t before) {
      launch<&kl_kernel<P>>(table.chunks(), table, partial.mutable_data_ptr<double>() + before);
    });
    launch_finish_kl<A>(partial, constant, kl);
  });
  return kl;
}

TORCH_LIBRARY_IMPL(bbb_fast, BBB_DISPATCH_KEY, m) {
  m.impl("kl_divergence", &kl_divergence);
}

}  // namespace
}  // namespace bbb_fast::cuda
