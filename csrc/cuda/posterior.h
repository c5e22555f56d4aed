// Ops that form a number of each weight from its posterior, and in the same pass the KL: sample_weights and
// variance. One launch for the tensors of a layer, or of a model.
#pragma once

#include <ATen/ops/empty.h>

#include "dispatch.h"
#include "kl_sum.h"

namespace bbb_fast::cuda {

template <class P, class W>
struct PosteriorEntry {
  const P* mu;
  const P* rho;
  W* out;
  int64_t numel;
  uint64_t tensor;  // its noise is stream + tensor
  bool aligned;
};

// What a launch needs beside its tensors. partial: one number a chunk; kl is set to 0 without KL.
template <class P>
struct PosteriorArgs {
  const int64_t* rng;
  typename KlSum<Wide<P>>::Prior prior;
  double* partial;
  Wide<P>* kl;
};

// A Function has constants kMean and kNoise, and a template call(mu, Sigma, noise), which uses what they say.
template <class Function, class P, class W, bool kWithKl>
__global__ void __launch_bounds__(kThreads) posterior_kernel(
    const __grid_constant__ Table<PosteriorEntry<P, W>> table,
    const __grid_constant__ PosteriorArgs<P> args) {
  using A = Wide<P>;
  constexpr int N = kVector<P, W>;
  struct Operands {
    Pack<P, N> mu, rho;
  };
  [[maybe_unused]] BlockSum block_sum;
  for_each_chunk(table, [&](const auto& e, int64_t chunk, int64_t begin, int count) {
    [[maybe_unused]] Noise noise;
    if constexpr (Function::kNoise) noise = Noise(args.rng, e.tensor);
    [[maybe_unused]] KlSum<A> kl;
    for_each_vector<N, Operands>(
        e.aligned, count,
        [&](auto whole, unsigned at, int left, Operands& o) {
          if constexpr (Function::kMean || kWithKl) read<whole.value>(e.mu + begin + at, left, o.mu);
          read<whole.value>(e.rho + begin + at, left, o.rho);
        },
        [&](auto whole, unsigned at, int left, const Operands& o) {
          A z[N];
          typename KlSum<A>::Sigma s[N];
          if constexpr (Function::kNoise) noise.fill(begin, at, z);
#pragma unroll
          for (int j = 0; j < N; ++j) {
            s[j] = softplus(o.rho.wide(j));
            z[j] = Function::call(o.mu.wide(j), s[j], z[j]);
          }
          write<whole.value>(e.out + begin + at, left, z);
          if constexpr (kWithKl) kl.add(o.mu, o.rho, s, SamePrior{args.prior}, left);
        });
    if constexpr (kWithKl) {
      const double sum =
          block_sum(thread_kl<N>(kl, e.mu + begin, e.rho + begin, count, SamePrior{args.prior}));
      if (threadIdx.x == 0) args.partial[chunk] = sum;
    }
  });
  if constexpr (!kWithKl) {
    if (blockIdx.x == 0 && threadIdx.x == 0) *args.kl = A{};
  }
}

// rng is undefined where there is no noise.
template <class Function, class P, class W>
void run_posterior(
    const std::vector<at::Tensor>& mu,
    const std::vector<at::Tensor>& rho,
    const std::vector<at::Tensor>& out,
    const at::Tensor& rng,
    double prior_mu,
    double prior_sigma,
    bool with_kl,
    const at::Tensor& kl) {
  using A = Wide<P>;
  constexpr int N = kVector<P, W>;
  std::vector<PosteriorEntry<P, W>> entries;
  double constant = 0.0;
  for (size_t k = 0; k < mu.size(); ++k) {
    const P* m = mu[k].const_data_ptr<P>();
    const P* r = rho[k].const_data_ptr<P>();
    W* w = out[k].mutable_data_ptr<W>();
    entries.push_back({m, r, w, mu[k].numel(), k, is_aligned<N>(m) && is_aligned<N>(r) && is_aligned<N>(w)});
    constant += kl_constant(mu[k]);
  }
  PosteriorArgs<P> args{
      Function::kNoise ? rng.const_data_ptr<int64_t>() : nullptr, prior_for<A>(prior_mu, prior_sigma),
      nullptr, kl.mutable_data_ptr<A>()};
  if (with_kl) {
    const at::Tensor partial = at::empty({chunk_count(entries)}, kl.options().dtype(at::kDouble));
    for_each_table(entries, [&](const auto& table, int64_t before) {
      args.partial = partial.mutable_data_ptr<double>() + before;
      launch<&posterior_kernel<Function, P, W, true>>(table.chunks(), table, args);
    });
    launch_finish_kl<A>(partial, constant, kl);
  } else {
    for_each_table(entries, [&](const auto& table, int64_t) {
      // One block at least: it also sets the KL to 0.
      launch<&posterior_kernel<Function, P, W, false>>(std::max<int64_t>(1, table.chunks()), table, args);
    });
  }
}

}  // namespace bbb_fast::cuda
