"""kl_divergence: against torch.distributions and the reference, at the extremes, in lists."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import DTYPES, assert_same, grads, on, posterior
from torch import Tensor
from torch.distributions import Normal
from torch.distributions import kl_divergence as exact_kl
from torch.nn.functional import softplus

from bbb_fast import functional

SHAPES = [(1,), (63,), (64,), (65,), (4097,), (33, 3, 5, 5)]


def exact(mu: Tensor, rho: Tensor, prior_mu: float = 0.0, prior_sigma: float = 0.1) -> Tensor:
    q = Normal(mu.detach().double(), softplus(rho.detach().double()))
    p = Normal(torch.tensor(prior_mu).double(), torch.tensor(prior_sigma).double())
    return exact_kl(q, p).sum()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prior", [(0.0, 0.1), (0.3, 1.7), (-2.0, 0.013)])
def test_equals_torch_distributions(backend: str, shape: tuple[int, ...], prior: tuple[float, float]) -> None:
    mu, rho = posterior(*shape)
    kl = functional.kl_divergence(mu, rho, *prior)
    assert kl.dtype == torch.float32 and kl.shape == ()
    # prior_sigma = 0.1 is not a float32 number: the exact value uses the double next to it.
    p = Normal(torch.tensor(prior[0]).double(), torch.tensor(prior[1], dtype=torch.float64))
    q = Normal(mu.detach().double(), softplus(rho.detach().double()))
    # A weight's terms of order 1 cancel where its posterior is near the prior: there an absolute error stays.
    cancelled = 2.5e-7 * mu.numel()
    torch.testing.assert_close(kl.double(), exact_kl(q, p).sum(), rtol=1e-6, atol=cancelled)


@pytest.mark.parametrize("value", [-12.0, -3.0, -1.0, 0.5])
def test_equal_weights_do_not_add_up_roundings(isa: str, value: float) -> None:
    """All weights alike: every rounding error has the same sign, the worst case of a sum."""
    mu, rho = torch.full((200_000,), 0.05), torch.full((200_000,), value)
    q = Normal(mu.double(), softplus(rho.double()))
    p = Normal(torch.tensor(0.0).double(), torch.tensor(0.1, dtype=torch.float64))
    torch.testing.assert_close(
        functional.kl_divergence(mu, rho).double(), exact_kl(q, p).sum(), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("rho", [-300.0, -104.0, -89.0, -60.0, -24.0, 70.0, 1e6, 1e16])
@pytest.mark.parametrize("count", [1, 70, 4100])
def test_far_from_the_prior(isa: str, rho: float, count: int) -> None:
    """sigma may vanish, and a product of several sigma / sigma_p leave float's range; the KL does not."""
    mu, rhos = torch.randn(count) * 0.1, torch.randn(count) * 0.3 - 3
    rhos[-1], rhos[: count // 3] = rho, rho
    sigma = softplus(rhos.double())
    log_sigma = torch.where(rhos < -30, rhos.double(), sigma.log())
    prior = 0.1
    terms = (sigma / prior) ** 2 + (mu.double() / prior) ** 2 - 1 - 2 * (log_sigma - math.log(prior))
    ops, rng = torch.ops.bbb_fast, torch.tensor([1, 2])
    for kl in (
        ops.kl_divergence([mu], [rhos], [0.0], [prior]),
        ops.sample_weights([mu], [rhos], rng, 0.0, prior, True, None)[1],
        ops.variance([mu], [rhos], 0.0, prior, True, torch.float32)[1],
    ):
        torch.testing.assert_close(kl.double(), terms.sum() / 2, rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_not_hidden(isa: str, value: float) -> None:
    mu, rho = torch.zeros(200), torch.full((200,), -3.0)
    for bad in (mu, rho):
        bad[150] = value
        assert not functional.kl_divergence(mu, rho).isfinite()
        bad[150] = 0.0


@pytest.mark.parametrize("shape", [*SHAPES, (0,), (3, 0)])
def test_gradients_equal_reference(isa: str, shape: tuple[int, ...]) -> None:
    mu, rho = posterior(*shape)

    def run() -> Tensor:
        return functional.kl_divergence(mu, rho, 0.2, 0.5)

    native = on("native", grads, run, [mu, rho], [torch.tensor(0.9)])
    expected = on("reference", grads, run, [mu, rho], [torch.tensor(0.9)])
    for a, b in zip(native[0] + native[1], expected[0] + expected[1], strict=True):
        assert_same(a, b, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(native: None, dtype: torch.dtype) -> None:
    mu, rho = posterior(31, 9, dtype=dtype)
    result_dtype = torch.float64 if dtype == torch.float64 else torch.float32

    def run() -> Tensor:
        return functional.kl_divergence(mu, rho)

    ours = on("native", grads, run, [mu, rho], [torch.tensor(0.9, dtype=result_dtype)])
    expected = on("reference", grads, run, [mu, rho], [torch.tensor(0.9, dtype=result_dtype)])
    assert ours[0][0].dtype == result_dtype
    assert_same(ours[0][0], expected[0][0], result_dtype)
    for a, b in zip(ours[1], expected[1], strict=True):
        assert_same(a, b, dtype)


def test_list_is_the_sum(backend: str) -> None:
    pairs = [posterior(7, 3), posterior(7), posterior(1000)]
    mus, rhos = [p[0] for p in pairs], [p[1] for p in pairs]
    priors = [0.0, 0.1, -0.2], [0.1, 0.2, 3.0]
    total = functional.kl_divergence(mus, rhos, *priors)
    expected = sum(exact(m, r, pm, ps) for m, r, pm, ps in zip(mus, rhos, *priors, strict=True))
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=0)
    total.backward()
    for m, p_mu, p_sigma in zip(mus, *priors, strict=True):
        torch.testing.assert_close(m.grad, (m.detach() - p_mu) / p_sigma**2)


def test_prior_equal_to_posterior_gives_zero(backend: str) -> None:
    rho = torch.full((1000,), -2.2521684610440904)  # softplus = 0.1
    kl = functional.kl_divergence(torch.zeros(1000), rho)
    assert 0.0 <= kl.abs() < 1e-3


def test_strided(backend: str) -> None:
    mu, rho = posterior(12, 10)
    kl = functional.kl_divergence(mu[:, ::2], rho[:, ::2])
    torch.testing.assert_close(kl.double(), exact(mu[:, ::2], rho[:, ::2]), rtol=1e-6, atol=0)
    kl.backward()
    assert mu.grad is not None and not mu.grad[:, 1::2].any() and mu.grad[:, ::2].all()


def test_is_deterministic_for_any_threads(isa: str, threads: None) -> None:
    mu, rho = posterior(300_007)
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        outputs, gradients = grads(lambda: functional.kl_divergence(mu, rho), [mu, rho], [torch.tensor(1.0)])
        results.append([*outputs, *gradients])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_gradcheck(backend: str) -> None:
    mu, rho = posterior(4, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda m, r: functional.kl_divergence(m, r, 0.1, 0.4), (mu, rho))


def test_opcheck(native: None) -> None:
    (m0, r0), (m1, r1) = posterior(4, 3), posterior(4)
    torch.library.opcheck(torch.ops.bbb_fast.kl_divergence, ([m0, m1], [r0, r1], [0.0, 0.1], [0.1, 0.2]))
    detached = [[t.detach() for t in ts] for ts in ([m0, m1], [r0, r1])]
    torch.library.opcheck(
        torch.ops.bbb_fast.posterior_backward,
        ([None, None], torch.tensor(1.0), *detached, None, [0.0, 0.1], [0.1, 0.2]),
    )


@pytest.mark.slow
def test_a_hundred_million_weights_keep_six_digits(native: None) -> None:
    mu, rho = torch.randn(100_000_000) * 0.1, torch.randn(100_000_000) * 0.3 - 3
    total = 0.0
    for m, r in zip(mu.split(10_000_000), rho.split(10_000_000), strict=True):
        total += float(exact(m, r))
    assert abs(float(functional.kl_divergence(mu, rho)) / total - 1) < 1e-6
