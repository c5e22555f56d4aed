// posterior_backward: the gradient of mu and rho through the weights, whose eps is regenerated, or through
// the mean and apart from it sigma^2 or sigma eps, and through the KL. One launch for the tensors of a layer,
// or of a model.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "../checks.h"
#include "../passes.h"
#include "dispatch.h"
#include "kl_sum.h"

namespace bbb_fast::cuda {
namespace {

template <class P, class W>
struct BackwardEntry {
  const P* mu;
  const P* rho;
  const W* grad_w;       // null without
  const W* grad_spread;  // with grad_w, that of the mean; or null
  P* grad_mu;            // may be grad_w
  P* grad_rho;           // may be grad_spread
  int64_t numel;
  uint64_t tensor;  // its noise is stream + tensor
  typename KlSum<Wide<P>>::Prior prior;
  bool aligned;
};

// Through the weight, dw/dmu = 1 and dw/drho = eps sigmoid(rho) (Blundell et al. 2015, section 3.2); through
// the mean and apart from it sigma^2, d sigma^2/drho = 2 sigma sigmoid(rho), or sigma eps; plus the KL's.
enum class Through { weight, variance, noise };

// The compiler left alone takes 95 registers, for 2 blocks at once; these bounds cost no spill, as long as a
// thread takes no more than 4 elements of 16 bits either.
constexpr int kBackwardVector = 4;
template <class P, Through kThrough>
constexpr int kBackwardBlocks = (sizeof(P) == sizeof(double) ? 3 : 4) - (kThrough == Through::weight ? 0 : 1);

template <class P, class W, Through kThrough>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks<P, kThrough>) backward_kernel(
    const __grid_constant__ Table<BackwardEntry<P, W>> table, const int64_t* rng, const Wide<P>* grad_kl) {
  using A = Wide<P>;
  constexpr int N = kBackwardVector;
  constexpr bool kSpread = kThrough != Through::weight, kNoise = kThrough != Through::variance;
  struct Operands {
    Pack<P, N> mu, rho;
    Pack<W, N> grad_w;
    std::conditional_t<kSpread, Pack<W, N>, std::tuple<>> grad_spread;
  };
  const A g_kl = grad_kl == nullptr ? A{} : *grad_kl;
  for_each_chunk(table, [&](const auto& e, int64_t, int64_t begin, int count) {
    const bool weight = e.grad_w != nullptr;
    [[maybe_unused]] Noise noise;
    if constexpr (kNoise) {
      if (weight) noise = Noise(rng, e.tensor);
    }
    for_each_vector<N, Operands>(
        e.aligned, count,
        [&](auto whole, unsigned at, int left, Operands& o) {
          read<whole.value>(e.mu + begin + at, left, o.mu);
          read<whole.value>(e.rho + begin + at, left, o.rho);
          if (weight) read<whole.value>(e.grad_w + begin + at, left, o.grad_w);
          if constexpr (kSpread) {
            if (weight) read<whole.value>(e.grad_spread + begin + at, left, o.grad_spread);
          }
        },
        [&](auto whole, unsigned at, int left, const Operands& o) {
          A g_mu[N], g_rho[N];
          [[maybe_unused]] A z[N];
          if constexpr (kNoise) {
            if (weight) noise.fill(begin, at, z);
          }
#pragma unroll
          for (int j = 0; j < N; ++j) {
            const A rho = o.rho.wide(j);
            const auto s = softplus(rho);
            A derivative, ratio;
            softplus_derivative(rho, s, derivative, ratio);
            g_mu[j] = g_rho[j] = A{};
            if (grad_kl != nullptr) {
              kl_derivative(o.mu.wide(j), s, derivative, ratio, e.prior, g_kl, g_mu[j], g_rho[j]);
            }
            if (weight) {
              g_mu[j] += o.grad_w.wide(j);
              if constexpr (kThrough == Through::variance) {
                g_rho[j] += o.grad_spread.wide(j) * (s.value * derivative) * A{2};
              } else if constexpr (kThrough == Through::noise) {
                g_rho[j] += o.grad_spread.wide(j) * z[j] * derivative;
              } else {
                g_rho[j] += o.grad_w.wide(j) * z[j] * derivative;
              }
            }
          }
          write<whole.value>(e.grad_mu + begin + at, left, g_mu);
          write<whole.value>(e.grad_rho + begin + at, left, g_rho);
        });
  });
}

// One draw's, or that of sigma^2, which has none.
void run_backward(
    at::TensorList grad_w,
    at::TensorList grad_spread,
    const OptionalTensor& grad_kl,
    at::TensorList mu,
    at::TensorList rho,
    const OptionalTensor& rng,
    at::ArrayRef<double> prior_mu,
    at::ArrayRef<double> prior_sigma,
    at::TensorList grad_mu,
    at::TensorList grad_rho) {
  const auto dtype = mu[0].scalar_type();
  const bool spread = !grad_spread.empty(), noise = has(rng);
  // The gradients given have one type, or are brought to one.
  std::optional<at::ScalarType> given_dtype;
  const auto meet = [&](const at::Tensor& t) {
    if (!t.defined()) return;
    given_dtype = c10::promoteTypes(given_dtype.value_or(t.scalar_type()), t.scalar_type());
  };
  for (size_t k = 0; k < mu.size(); ++k) {
    meet(grad_w[k]);
    if (spread) meet(grad_spread[k]);
  }
  const Pair pair = parameter_pair(dtype, given_dtype.value_or(dtype));
  const auto dense_as = [](const at::Tensor& t, at::ScalarType type) {
    return t.defined() ? t.to(type).contiguous() : t;
  };
  std::vector<at::Tensor> m, r, g, g_s, g_mu, g_rho;
  for (size_t k = 0; k < mu.size(); ++k) {
    m.push_back(dense_as(mu[k], pair.first));
    r.push_back(dense_as(rho[k], pair.first));
    g.push_back(dense_as(grad_w[k], pair.second));
    g_s.push_back(spread ? dense_as(grad_spread[k], pair.second) : at::Tensor());
    // Themselves, unless the mathematics runs in a wider type; then they are converted at the end.
    g_mu.push_back(grad_mu[k].to(pair.first));
    g_rho.push_back(grad_rho[k].to(pair.first));
  }
  const at::Tensor g_kl = dense_as(grad_kl.value_or(at::Tensor()), wide(pair.first));
  const at::Tensor numbers = dense_as(rng.value_or(at::Tensor()), at::kLong);

  dispatch_parameter_pair(pair, [&](auto first, auto second) {
    using P = typename decltype(first)::type;
    using W = typename decltype(second)::type;
    using A = Wide<P>;
    constexpr int N = kBackwardVector;
    const auto data = [](const at::Tensor& t) { return t.defined() ? t.const_data_ptr<W>() : nullptr; };
    std::vector<BackwardEntry<P, W>> entries;
    for (size_t k = 0; k < m.size(); ++k) {
      BackwardEntry<P, W> e{
          m[k].const_data_ptr<P>(),
          r[k].const_data_ptr<P>(),
          data(g[k]),
          data(g_s[k]),
          g_mu[k].mutable_data_ptr<P>(),
          g_rho[k].mutable_data_ptr<P>(),
          m[k].numel(),
          k,
          prior_for<A>(prior_mu[k], prior_sigma[k]),
          false};
      e.aligned = is_aligned<N>(e.mu) && is_aligned<N>(e.rho) && is_aligned<N>(e.grad_w) &&
                  is_aligned<N>(e.grad_spread) && is_aligned<N>(e.grad_mu) && is_aligned<N>(e.grad_rho);
      entries.push_back(e);
    }
    const int64_t* seed_stream = numbers.defined() ? numbers.const_data_ptr<int64_t>() : nullptr;
    const A* grad = g_kl.defined() ? g_kl.const_data_ptr<A>() : nullptr;
    for_each_table(entries, [&](const auto& table, int64_t) {
      if (!spread) {
        launch<&backward_kernel<P, W, Through::weight>>(table.chunks(), table, seed_stream, grad);
      } else if (noise) {
        launch<&backward_kernel<P, W, Through::noise>>(table.chunks(), table, seed_stream, grad);
      } else {
        launch<&backward_kernel<P, W, Through::variance>>(table.chunks(), table, seed_stream, grad);
      }
    });
  });
  for (size_t k = 0; k < m.size(); ++k) {
    if (!g_mu[k].is_same(grad_mu[k])) grad_mu[k].copy_(g_mu[k]);
    if (!g_rho[k].is_same(grad_rho[k])) grad_rho[k].copy_(g_rho[k]);
  }
}

at::Tensor posterior_backward_out(
    const c10::List<OptionalTensor>& grad_w_list,
    const c10::List<OptionalTensor>& grad_spread_list,
    const OptionalTensor& grad_kl,
    at::TensorList mu,
    at::TensorList rho,
    const OptionalTensor& rng,
    at::ArrayRef<double> prior_mu,
    at::ArrayRef<double> prior_sigma,
    at::TensorList grad_mu,
    at::TensorList grad_rho,
    std::optional<at::ScalarType> again) {
  const std::vector<at::Tensor> grad_w = tensors(grad_w_list), grad_spread = tensors(grad_spread_list);
  check_posterior_backward(
      "posterior_backward", grad_w, grad_spread, grad_kl, mu, rho, rng, prior_mu, prior_sigma, grad_mu,
      grad_rho, again);
  const DeviceGuard guard(mu[0].device());
  const size_t draws = draw_count(rng);
  const bool spread = !grad_spread.empty(), several = has(rng) && rng->dim() == 2;
  const auto of_draw = [&](const std::vector<at::Tensor>& list, size_t draw) {
    std::vector<at::Tensor> own;
    for (size_t k = draw; k < list.size(); k += draws) own.push_back(list[k]);
    return own;
  };
  // A launch for each draw: the first writes, maybe to its own given gradients, and the others are added.
  for (size_t draw = 0; draw < draws; ++draw) {
    std::vector<at::Tensor> g_w = spread ? grad_w : of_draw(grad_w, draw), g_mu, g_rho;
    const OptionalTensor own = several ? OptionalTensor(rng->select(0, static_cast<int64_t>(draw))) : rng;
    if (draw == 0) {
      run_backward(
          g_w, of_draw(grad_spread, draw), grad_kl, mu, rho, own, prior_mu, prior_sigma, grad_mu, grad_rho);
      continue;
    }
    for (size_t k = 0; k < mu.size(); ++k) {
      g_mu.push_back(at::empty_like(grad_mu[k]));
      g_rho.push_back(at::empty_like(grad_rho[k]));
    }
    run_backward(
        g_w, of_draw(grad_spread, draw), std::nullopt, mu, rho, own, prior_mu, prior_sigma, g_mu, g_rho);
    for (size_t k = 0; k < mu.size(); ++k) {
      if (!spread) grad_mu[k].add_(g_mu[k]);
      grad_rho[k].add_(g_rho[k]);
    }
  }
  if (!again) return at::empty({0}, mu[0].options().dtype(at::kFloat));
  // A pass of its own here: written into the kernel, it would have to be measured.
  auto formed =
      spread && !has(rng)
          ? variance({mu[0]}, {rho[0]}, prior_mu[0], prior_sigma[0], false, *again)
          : sample_weights({mu[0]}, {rho[0]}, *rng, prior_mu[0], prior_sigma[0], false, again, spread);
  return std::get<0>(formed)[0];
}

TORCH_LIBRARY_IMPL(bbb_fast, BBB_DISPATCH_KEY, m) {
  m.impl("posterior_backward_out", &posterior_backward_out);
}

}  // namespace
}  // namespace bbb_fast::cuda
