"""Priors: tensors, the empirical sigma, other kinds, and the pruning that one of them is for."""

from __future__ import annotations

import copy
import math
import pickle
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import DTYPES, assert_same, on, posterior, rng
from torch import Tensor, nn
from torch.distributions import Categorical, MixtureSameFamily, Normal, kl_divergence

from bbb_fast import functional, kl_loss, prune, reference, sparsity
from bbb_fast.layers import BBB, BBB_LRT, Flipout, WeightSpace
from bbb_fast.priors import LogUniform, ScaleMixture, empirical_sigma, resolve_priors


@pytest.fixture(params=[BBB, BBB_LRT, Flipout], ids=["bbb", "lrt", "flipout"])
def family(request: pytest.FixtureRequest) -> ModuleType:
    return request.param


def exact(mu: Tensor, rho: Tensor, prior_mu: Any, prior_sigma: Any) -> Tensor:
    """By torch.distributions, in float64."""
    q = Normal(mu.double(), reference.softplus(rho.double()))
    p = Normal(torch.as_tensor(prior_mu).double(), torch.as_tensor(prior_sigma).double())
    return kl_divergence(q, p).sum()


# ---------------------------------------------------------------- tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_kl_of_tensors(backend: str, dtype: torch.dtype) -> None:
    """Against torch.distributions, beside priors that are numbers, with the gradients of all."""
    pairs = [posterior(3, 5, dtype=dtype), posterior(4, dtype=dtype), posterior(2, 3, dtype=dtype)]
    m_p = torch.randn(3, 5).to(dtype).requires_grad_()
    s_p = (torch.rand(3, 5) + 0.2).to(dtype).requires_grad_()
    priors = [(m_p, s_p), (0.1, 0.4), (0.0, torch.tensor(0.3, dtype=dtype))]
    mus, rhos = zip(*pairs, strict=True)
    kl = functional.kl_divergence(mus, rhos, *map(list, zip(*priors, strict=True)))
    expected = torch.stack([exact(*pair, *prior) for pair, prior in zip(pairs, priors, strict=True)]).sum()
    assert kl.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(kl.double(), expected, rtol=1e-6, atol=0)
    leaves = [*mus, *rhos, m_p, s_p]
    both = (torch.autograd.grad(total, leaves) for total in (kl, expected))
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (64, 3), (4097,), (0, 3), (33, 3, 5, 5)])
def test_kernel_equals_reference(isa: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Whole and partial tiles, and tensors of every memory order; a number beside a tensor."""
    mu, rho = posterior(*shape, dtype=dtype)
    m_p, s_p = torch.randn(shape).to(dtype), (torch.rand(shape) + 0.05).to(dtype)
    for prior in ((m_p, s_p), (m_p, 0.1), (0.2, s_p), (m_p, torch.tensor(0.3, dtype=dtype))):
        kl, expected = (on(b, functional.kl_divergence, mu, rho, *prior) for b in ("native", "reference"))
        assert kl.dtype == expected.dtype
        torch.testing.assert_close(kl, expected, rtol=2e-6, atol=2e-6)
        for a, b in zip(*(torch.autograd.grad(t, [mu, rho]) for t in (kl, expected)), strict=True):
            assert_same(a, b, dtype, 2)
    if len(shape) == 2:
        turned = [t.detach().t().contiguous().t() for t in (mu, rho, m_p, s_p)]
        torch.testing.assert_close(
            functional.kl_divergence(*turned), functional.kl_divergence(mu, rho, m_p, s_p), rtol=1e-6, atol=0
        )


@pytest.mark.parametrize("rho", [-300.0, -104.0, -60.0, 70.0])
def test_far_from_tensor_priors(isa: str, rho: float) -> None:
    """sigma may vanish, and a product of several sigma / sigma_p leave float's range; the KL does not."""
    mu, rhos = torch.randn(4100) * 0.1, torch.randn(4100) - 3
    rhos[::7] = rho
    m_p, s_p = torch.zeros(4100), torch.rand(4100) + 0.1
    kl, expected = (on(b, functional.kl_divergence, mu, rhos, m_p, s_p) for b in ("native", "reference"))
    assert kl.isfinite()
    torch.testing.assert_close(kl, expected, rtol=2e-6, atol=0)


def test_kernel_has_gradients(native: None) -> None:
    op = torch.ops.bbb_fast.kl_tensor_prior
    mu, rho = posterior(3, 4, dtype=torch.float64)
    prior = torch.randn(3, 4).double(), torch.rand(3, 4).double() + 0.1
    assert torch.autograd.gradcheck(lambda m, r: op(m, r, *prior), (mu, rho))
    torch.library.opcheck(op, (mu, rho, *prior))
    torch.library.opcheck(op, (*posterior(5), torch.tensor(0.1), torch.rand(5) + 0.1))
    kl = op(mu, rho, *prior)
    batched = torch.autograd.grad(kl, [mu, rho], torch.tensor([1.0, 3.0]).double(), is_grads_batched=True)
    for g in batched:
        torch.testing.assert_close(3 * g[0], g[1])
    with pytest.raises(NotImplementedError, match="a prior has no gradient here"):
        op(mu, rho, prior[0].requires_grad_(), prior[1])


def test_kernel_under_vmap_and_compile(native: None) -> None:
    mu, rho = (t.detach() for t in posterior(2, 3, 4))
    m_p, s_p = torch.randn(3, 4), torch.rand(3, 4) + 0.1

    def kl(m: Tensor, r: Tensor) -> Tensor:
        return functional.kl_divergence(m, r, m_p, s_p)

    each = torch.stack([kl(m, r) for m, r in zip(mu, rho, strict=True)])
    torch.testing.assert_close(torch.func.vmap(kl)(mu, rho), each)
    compiled = torch.compile(kl, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(mu[0], rho[0]), each[0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"prior_mu": torch.zeros(4)},
            ValueError,
            r"prior_mu must be a number or have shape \[3, 5\], got \[4\]",
        ),
        ({"prior_sigma": torch.ones(3, 1)}, ValueError, "prior_sigma must be a number or have shape"),
        ({"prior_mu": torch.zeros(3, 5, dtype=torch.int64)}, TypeError, "prior_mu must be float32"),
        ({"prior_mu": torch.zeros(3, 5, device="meta")}, ValueError, "prior_mu is on meta, expected cpu"),
        (
            {"prior_mu": torch.zeros(3, 5), "prior_sigma": -1.0},
            ValueError,
            "prior_sigma must be finite and > 0",
        ),
    ],
)
def test_wrong_tensors(backend: str, change: dict[str, Any], error: type[Exception], message: str) -> None:
    mu, rho = posterior(3, 5)
    with pytest.raises(error, match=message):
        functional.kl_divergence(mu, rho, **change)


def test_layers_with_tensors(backend: str, family: ModuleType) -> None:
    """The weight has its own prior; the bias the given one, or beside a tensor the default numbers."""
    m_p, s_p = torch.randn(2, 3), torch.rand(2, 3) + 0.1
    for bias, (bias_mu, bias_sigma) in (
        ({}, (0.0, 0.1)),
        ({"bias_prior_mu": 0.5}, (0.5, 0.1)),
        ({"bias_prior_mu": torch.ones(2), "bias_prior_sigma": 0.3}, (torch.ones(2), 0.3)),
    ):
        layer = family.BBBLinear(3, 2, priors={"prior_mu": m_p, "prior_sigma": s_p, **bias})
        expected = exact(layer.W_mu, layer.W_rho, m_p, s_p) + exact(
            layer.bias_mu, layer.bias_rho, bias_mu, bias_sigma
        )
        for kl in (layer.kl_loss(), kl_loss(nn.Sequential(layer))):
            torch.testing.assert_close(kl.double(), expected, rtol=1e-6, atol=0)
        # With the output, in one backward.
        y = layer(torch.randn(4, 3))
        (y.sum() + layer.kl_loss()).backward()
        g = torch.autograd.grad(expected, layer.W_rho)[0]
        assert g.abs().sum() > 0 and layer.W_rho.grad.isfinite().all()
    numbers = family.BBBLinear(3, 2, priors={"prior_mu": 0.2, "bias_prior_sigma": 0.7})
    expected = exact(numbers.W_mu, numbers.W_rho, 0.2, 0.1) + exact(
        numbers.bias_mu, numbers.bias_rho, 0.2, 0.7
    )
    torch.testing.assert_close(numbers.kl_loss().double(), expected, rtol=1e-6, atol=0)


def test_tensors_are_buffers(family: ModuleType) -> None:
    """They move, are saved, copied and pickled, and come with a checkpoint into a layer that has numbers."""
    layer = family.BBBConv2d(
        2, 4, 3, priors={"prior_mu": torch.randn(4, 2, 3, 3), "bias_prior_mu": torch.randn(4)}
    )
    assert list(layer.state_dict()) == ["W_mu", "W_rho", "bias_mu", "bias_rho", "prior_mu", "bias_prior_mu"]
    kl = layer.kl_loss()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), family.BBBConv2d(2, 4, 3)):
        other.load_state_dict(layer.state_dict())
        torch.testing.assert_close(other.kl_loss(), kl)
    assert layer.double().prior_mu.dtype == torch.float64
    torch.testing.assert_close(layer.kl_loss().float(), kl)
    assert "prior_mu=[4, 2, 3, 3]" in repr(layer) and "bias_prior_mu=[4]" in repr(layer)


@pytest.mark.parametrize(
    ("priors", "message"),
    [
        ({"prior_mu": torch.zeros(3, 2)}, r"priors\['prior_mu'\] must have shape \[2, 3\], got \[3, 2\]"),
        (
            {"bias_prior_sigma": torch.ones(3)},
            r"priors\['bias_prior_sigma'\] must have shape \[2\], got \[3\]",
        ),
        ({"prior_sigma": torch.zeros(2, 3)}, r"priors\['prior_sigma'\] must be finite and > 0 everywhere"),
        ({"prior_mu": torch.full((2, 3), math.nan)}, r"priors\['prior_mu'\] must be finite everywhere"),
        ({"prior_mu": torch.zeros(2, 3).long()}, r"priors\['prior_mu'\] must be a floating-point tensor"),
        ({"prior_sigma": "emprical"}, r"priors\['prior_sigma'\] must be a finite number, got 'emprical'"),
        ({"prior": "log-uniform"}, r"priors\['prior'\] must be a bbb_fast.priors.Prior or None"),
        ({"prior": LogUniform(), "prior_mu": 0.0}, r"priors\['prior'\] takes the place of prior_mu"),
        ({"bias_sigma": 1.0}, "known: .*bias_prior_mu, bias_prior_sigma, prior"),
    ],
)
def test_wrong_priors(family: ModuleType, priors: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        family.BBBLinear(3, 2, priors=priors)


# ---------------------------------------------------------------- empirical


def test_empirical_sigma(backend: str, family: ModuleType) -> None:
    """The sigma at which the KL is least; its gradient is that of the minimum."""
    layer = family.BBBLinear(30, 20, priors={"prior_mu": 0.05, "prior_sigma": "empirical"})
    kl = layer.kl_loss()
    best = torch.zeros((), dtype=torch.float64)
    for mu, rho in layer.posterior():
        sigma = empirical_sigma(mu, rho, 0.05)
        least = exact(mu, rho, 0.05, sigma)
        assert all(exact(mu, rho, 0.05, sigma * factor) > least for factor in (0.95, 1.05))
        # Minimised over sigma, as a function of mu and rho.
        m, s = mu.double(), reference.softplus(rho.double())
        best = best + exact(mu, rho, 0.05, (s.square() + (m - 0.05).square()).mean().sqrt())
    torch.testing.assert_close(kl.double(), best, rtol=1e-6, atol=0)
    parameters = list(layer.parameters())
    for a, b in zip(torch.autograd.grad(kl, parameters), torch.autograd.grad(best, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        layer.W_mu.mul_(10)
    assert kl_loss(layer) < 10 * kl  # the prior follows
    assert "prior_sigma=empirical" in repr(layer)


# ---------------------------------------------------------------- other kinds


def test_log_uniform_is_the_kl_up_to_a_constant() -> None:
    """Against integration over the multiplicative noise: differences agree within the stated error."""
    alphas = torch.logspace(-4, 4, 33, dtype=torch.float64)
    prior = LogUniform()
    mu = torch.ones(33, dtype=torch.float64)
    sigma = alphas.sqrt()
    rho = sigma + torch.log(-torch.expm1(-sigma))
    ours = torch.stack([prior.kl(m[None], r[None]) for m, r in zip(mu, rho, strict=True)])
    # KL = const - ln(alpha) / 2 + E ln|1 + sqrt(alpha) eps|, eps standard normal (eq. 12).
    points = torch.linspace(-12, 12, 2_000_001, dtype=torch.float64)
    density = torch.exp(-points.square() / 2) / math.sqrt(2 * math.pi)
    expectation = torch.stack(
        [
            torch.trapezoid(density * (1 + a.sqrt() * points).abs().clamp_min(1e-300).log(), points)
            for a in alphas
        ]
    )
    theirs = -0.5 * alphas.log() + expectation
    difference = ours - theirs
    assert (difference - difference.mean()).abs().max() < 0.02
    assert ours[-1] < 1e-2 and (ours[:-1] > ours[1:]).all()
    torch.testing.assert_close(prior.log_alpha(mu, rho), alphas.log(), rtol=1e-5, atol=1e-5)


def test_mixture_is_estimated_without_bias() -> None:
    """The mean over many calls is the KL, by quadrature; its gradient too."""
    prior = ScaleMixture(0.3, 1.0, 0.1)
    mu = torch.tensor([0.3, -0.05, 1.0], requires_grad=True)
    rho = torch.tensor([-1.0, -3.0, 0.2], requires_grad=True)
    p = MixtureSameFamily(
        Categorical(torch.tensor([0.3, 0.7]).double()),
        Normal(torch.zeros(2).double(), torch.tensor([1.0, 0.1]).double()),
    )
    w = torch.randn(1000)
    torch.testing.assert_close(prior.log_density(w), p.log_prob(w.double()).float(), rtol=1e-5, atol=1e-5)
    points = torch.linspace(-8, 8, 20_001, dtype=torch.float64)[:, None]
    q = Normal(mu.double(), reference.softplus(rho.double()))
    z = q.mean + q.stddev * points
    weights = torch.exp(-points.square() / 2) / math.sqrt(2 * math.pi) * (points[1] - points[0])
    expected = (weights * (q.log_prob(z) - p.log_prob(z))).sum()
    g_expected = torch.autograd.grad(expected, (mu, rho))
    torch.manual_seed(1)
    values, grads = [], []
    for _ in range(4000):
        kl = prior.kl(mu, rho)
        values.append(kl.detach())
        grads.append(torch.cat(torch.autograd.grad(kl, (mu, rho))))
    for samples, target in (
        (torch.stack(values)[:, None], expected[None]),
        (torch.stack(grads), torch.cat(g_expected)),
    ):
        error = samples.std(0) / math.sqrt(len(samples))
        assert ((samples.mean(0) - target).abs() / error).max() < 4.5


@pytest.mark.parametrize("prior", [LogUniform(), ScaleMixture()], ids=repr)
def test_layers_with_other_priors(backend: str, family: ModuleType, prior: Any) -> None:
    layer = family.BBBConv2d(2, 3, 3, priors={"prior": prior})
    torch.manual_seed(3)
    kl = layer.kl_loss()
    torch.manual_seed(3)
    torch.testing.assert_close(
        kl, prior.kl(layer.W_mu, layer.W_rho) + prior.kl(layer.bias_mu, layer.bias_rho)
    )
    (layer(torch.randn(2, 2, 5, 5)).sum() + kl).backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in layer.parameters())
    assert f"prior={prior}" in repr(layer)
    whole = WeightSpace(nn.GRU(3, 2), {"prior": prior})
    torch.manual_seed(3)
    kl = whole.kl_loss()
    torch.manual_seed(3)
    torch.testing.assert_close(kl, sum(prior.kl(*pair) for pair in whole.posterior()))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert repr(other.prior) == repr(prior)


def test_they_say_what_they_are() -> None:
    assert (LogUniform().kind, ScaleMixture().kind) == ("approximation", "estimate")
    for options in ({"pi": 0.0}, {"pi": 1.0}, {"sigma1": -1.0}, {"sigma2": math.inf}, {"sigma1": True}):
        with pytest.raises(ValueError, match=f"ScaleMixture: {next(iter(options))} must be in"):
            ScaleMixture(**options)
    assert resolve_priors({"prior": LogUniform()})["prior"].kind == "approximation"


@pytest.mark.parametrize("rho", [-200.0, -30.0, 0.0, 200.0])
@pytest.mark.parametrize("mu", [0.0, 1e-30, 1.0, 1e10])
def test_log_uniform_stays_finite(mu: float, rho: float) -> None:
    m, r = torch.tensor([mu], requires_grad=True), torch.tensor([rho], requires_grad=True)
    kl = LogUniform().kl(m, r)
    assert kl.isfinite() and all(g.isfinite() for g in torch.autograd.grad(kl, (m, r)))


# ---------------------------------------------------------------- pruning


def test_pruning(family: ModuleType) -> None:
    model = nn.Sequential(family.BBBLinear(4, 3), nn.ReLU(), WeightSpace(nn.LSTM(3, 2)))
    layer: Any = model[0]
    with torch.no_grad():
        layer.W_mu.fill_(1.0)
        layer.W_rho.fill_(-3.0)
        layer.W_mu[0, 1], layer.W_mu[2] = 1e-4, -1e-3
    assert sparsity(model).layers["0"] == (5, 12)
    assert sparsity(model, threshold=8.0).layers["0"] == (1, 12)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    sparsity(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    found = prune(model)
    assert found.layers["0"] == (5, 12) and found.total == 12 + 24 + 16 and "in all" in str(found)
    assert (layer.W_mu == 0).sum() == 5 and torch.equal(layer.bias_mu, before["0.bias_mu"])
    drawn: Any = functional.sample_weight(layer.W_mu, layer.W_rho, rng())
    assert (drawn[2] == 0).all() and drawn[0, 1] == 0 and (drawn != 0).sum() == 7
    assert prune(model).layers["0"] == (5, 12)
    assert kl_loss(model).isfinite()


def test_tensors_are_each_layers_own(family: ModuleType) -> None:
    """Neither the caller's tensor nor another layer's."""
    s = torch.tensor(0.1)
    model: Any = nn.Sequential(*(family.BBBLinear(3, 3, priors={"prior_sigma": s}) for _ in range(2)))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    state["0.prior_sigma"], state["1.prior_sigma"] = torch.tensor(0.5), torch.tensor(2.0)
    model.load_state_dict(state)
    assert [float(layer.prior_sigma) for layer in model] == [0.5, 2.0] and float(s) == pytest.approx(0.1)
    fresh = family.BBBLinear(3, 3, priors={"prior_sigma": s})
    fresh.load_state_dict({**fresh.state_dict(), "prior_sigma": torch.rand(3, 3) + 0.1})
    assert fresh.prior_sigma.shape == (3, 3)


def test_kl_of_parametrized_layers(backend: str, family: ModuleType) -> None:
    """Their means are formed when asked for: none may be taken for another's."""

    class Same(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 1.0

    model = nn.Sequential(*(family.BBBLinear(10, 10) for _ in range(50)))
    before = kl_loss(model)
    for layer in model:
        nn.utils.parametrize.register_parametrization(layer, "W_mu", Same())
    torch.testing.assert_close(kl_loss(model), before)
