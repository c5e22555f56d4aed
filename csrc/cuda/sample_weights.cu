// sample_weights: w = mu + sigma eps, and in the same pass the KL. Its backward: posterior_backward.cu.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../checks.h"
#include "dispatch.h"
#include "kl_sum.h"

namespace bbb_fast::cuda {
namespace {

template <class P, class W>
struct SampleEntry {
  const P* mu;
  const P* rho;
  W* out;
  int64_t numel;
  uint64_t tensor;  // its noise is stream + tensor
  bool aligned;
};

// What a launch needs beside its tensors. partial: one number a chunk; kl is set to 0 without KL.
template <class P>
struct SampleArgs {
  const int64_t* rng;
  typename KlSum<Wide<P>>::Prior prior;
  double* partial;
  Wide<P>* kl;
};

template <class P, class W, bool kWithKl>
__global__ void __launch_bounds__(kThreads) sample_kernel(
    const __grid_constant__ Table<SampleEntry<P, W>> table, const __grid_constant__ SampleArgs<P> args) {
  using A = Wide<P>;
  constexpr int N = kVector<P, W>;
  struct Operands {
    A mu[N], rho[N];
  };
  for_each_chunk(table, [&](const auto& e, int64_t chunk, int64_t begin, int count) {
    const Noise noise(args.rng, e.tensor);
    [[maybe_unused]] KlSum<A> kl;
    for_each_vector<N, Operands>(
        e.aligned, count,
        [&](auto whole, unsigned at, int left, Operands& o) {
          read<whole.value>(e.mu + begin + at, left, o.mu);
          read<whole.value>(e.rho + begin + at, left, o.rho);
        },
        [&](auto whole, unsigned at, int left, const Operands& o) {
          A z[N];
          noise.fill(begin, at, z);
#pragma unroll
          for (int j = 0; j < N; ++j) {
            const auto s = softplus(o.rho[j]);
            z[j] = s.value * z[j] + o.mu[j];
            if constexpr (kWithKl) {
              if (whole.value || j < left) kl.add(o.mu[j], o.rho[j], s, args.prior);
            }
          }
          write<whole.value>(e.out + begin + at, left, z);
        });
    if constexpr (kWithKl) {
      const double sum = block_sum(kl.total());
      if (threadIdx.x == 0) args.partial[chunk] = sum;
    }
  });
  if constexpr (!kWithKl) {
    if (blockIdx.x == 0 && threadIdx.x == 0) *args.kl = A{};
  }
}

template <class P, class W>
void run_sample(
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
  std::vector<SampleEntry<P, W>> entries;
  double constant = 0.0;
  for (size_t k = 0; k < mu.size(); ++k) {
    const P* m = mu[k].const_data_ptr<P>();
    const P* r = rho[k].const_data_ptr<P>();
    W* w = out[k].mutable_data_ptr<W>();
    entries.push_back({m, r, w, mu[k].numel(), k, is_aligned<N>(m) && is_aligned<N>(r) && is_aligned<N>(w)});
    constant += kl_constant(mu[k], prior_sigma);
  }
  SampleArgs<P> args{
      rng.const_data_ptr<int64_t>(), prior_for<A>(prior_mu, prior_sigma), nullptr, kl.mutable_data_ptr<A>()};
  if (with_kl) {
    const at::Tensor partial = at::empty({chunk_count(entries)}, kl.options().dtype(at::kDouble));
    for_each_table(entries, [&](const auto& table, int64_t before) {
      args.partial = partial.mutable_data_ptr<double>() + before;
      launch<&sample_kernel<P, W, true>>(table.chunks(), table, args);
    });
    launch_finish_kl<A>(partial, constant, kl);
  } else {
    for_each_table(entries, [&](const auto& table, int64_t) {
      // One block at least: it also sets the KL to 0.
      launch<&sample_kernel<P, W, false>>(std::max<int64_t>(1, table.chunks()), table, args);
    });
  }
}

std::tuple<std::vector<at::Tensor>, at::Tensor> sample_weights(
    at::TensorList mu,
    at::TensorList rho,
    const at::Tensor& rng,
    double prior_mu,
    double prior_sigma,
    bool with_kl,
    std::optional<at::ScalarType> dtype) {
  check_posteriors("sample_weights", mu, rho);
  check_rng("sample_weights", rng, mu[0].device());
  check_prior("sample_weights", prior_mu, prior_sigma);
  check_dtype_option("sample_weights", "dtype", dtype);

  const DeviceGuard guard(mu[0].device());
  const auto wanted = dtype.value_or(mu[0].scalar_type());
  const Pair pair = parameter_pair(mu[0].scalar_type(), wanted);
  std::vector<at::Tensor> m, r, weights;
  for (size_t k = 0; k < mu.size(); ++k) {
    m.push_back(mu[k].to(pair.first).contiguous());
    r.push_back(rho[k].to(pair.first).contiguous());
    weights.push_back(at::empty(mu[k].sizes(), mu[k].options().dtype(pair.second)));
  }
  const at::Tensor kl = at::empty({}, mu[0].options().dtype(kl_dtype(mu[0])));
  const at::Tensor numbers = rng.contiguous();
  dispatch_parameter_pair(pair, [&](auto first, auto second) {
    using P = typename decltype(first)::type;
    using W = typename decltype(second)::type;
    run_sample<P, W>(m, r, weights, numbers, prior_mu, prior_sigma, with_kl, kl);
  });
  for (at::Tensor& w : weights) w = w.to(wanted);
  return {std::move(weights), kl};
}

TORCH_LIBRARY_IMPL(bbb_fast, BBB_DISPATCH_KEY, m) {
  m.impl("sample_weights", &sample_weights);
}

}  // namespace
}  // namespace bbb_fast::cuda
