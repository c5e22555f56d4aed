"""The bilinear layer of every estimator: against the formulas over torch.nn's own, and what it forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, unrelated
from torch import Tensor, nn

from bbb_fast import fixed_noise, functional, kl_loss, posterior_means, reference, tuning
from bbb_fast.functional import draw_rng
from bbb_fast.layers import BBB, BBB_LRT, Flipout
from bbb_fast.layers.base import BayesianLayer

FAMILIES = {"bbb": BBB, "lrt": BBB_LRT, "flipout": Flipout}
# Of sigma around 0.2, so that the noise shows.
PRIORS = {"posterior_mu_initial": (0.0, 0.5), "posterior_rho_initial": (-1.5, 0.3)}
BATCHES = [(4,), (2, 3), (), (0,)]


def make(estimator: str, *args: Any, **options: Any) -> BayesianLayer:
    return FAMILIES[estimator].BBBBilinear(*(args or (5, 4, 3)), priors=PRIORS, **options)


def inputs(*batch: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    first, second = (torch.randn(*batch, width, dtype=dtype, requires_grad=True) for width in (5, 4))
    return first, second


def expected_output(layer: BayesianLayer, x: tuple[Tensor, Tensor], rng: Tensor) -> Tensor:
    """By the estimators' definitions, over F.bilinear or over the pairs of the inputs' elements."""
    pairs = layer.posterior()
    sigmas = [F.softplus(rho) for _, rho in pairs]
    eps = [
        functional.normal(mu.shape, rng + torch.tensor([0, k])).to(mu.dtype)
        for k, (mu, _) in enumerate(pairs)
    ]
    mean = F.bilinear(*x, *(mu for mu, _ in pairs))
    if layer.estimator == "bbb":
        return F.bilinear(*x, *(mu + s * e for (mu, _), s, e in zip(pairs, sigmas, eps, strict=True)))
    if layer.estimator == "lrt":
        v = F.bilinear(*(t.square() for t in x), *(s.square() for s in sigmas))
        return mean + v.sqrt() * functional.normal(mean.shape, rng).to(mean.dtype)
    outer = torch.einsum("...i,...j->...ij", *x)
    s = reference.signs(outer.flatten(-2).shape, rng, 2, -1).view(outer.shape)
    deviation = torch.einsum("...ij,oij->...o", outer * s, sigmas[0] * eps[0])
    if len(eps) > 1:
        deviation = deviation + sigmas[1] * eps[1]
    return mean + deviation * reference.signs(mean.shape, rng, 3, -1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize("estimator", FAMILIES)
def test_equals_the_formulas(backend: str, estimator: str, batch: tuple[int, ...], bias: bool) -> None:
    """The output of a draw and of the means, and every gradient."""
    layer, x = make(estimator, bias=bias, dtype=torch.float64), inputs(*batch, dtype=torch.float64)
    torch.manual_seed(5)
    rng = draw_rng()
    torch.manual_seed(5)
    y, expected = layer(*x), expected_output(layer, x, rng)
    assert y.shape == (*batch, 3)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    grad, leaves = torch.randn_like(y), [*x, *layer.parameters()]
    for a, b in zip(*(torch.autograd.grad(t, leaves, grad) for t in (y, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-5)
    mean = F.bilinear(*x, *(mu for mu, _ in layer.posterior()))
    torch.testing.assert_close(layer(*x, sample=False), mean)
    with posterior_means():
        torch.testing.assert_close(layer(*x), mean)
    if y.numel():
        assert unrelated(layer(*x), layer(*x))


@pytest.mark.parametrize("estimator", FAMILIES)
def test_a_draw_of_the_weights_is_that_of_every_family(backend: str, estimator: str) -> None:
    layer, x = make(estimator), inputs(4)
    mus, rhos = zip(*layer.posterior(), strict=True)
    weights, _ = functional.sample_weights(mus, rhos, torch.tensor([3, 2 << 32]))
    with fixed_noise(3, sample=2):
        y = layer(*x)
    torch.testing.assert_close(y, F.bilinear(*x, *weights))
    bbb = make("bbb")
    bbb.load_state_dict(layer.state_dict())
    with fixed_noise(3, sample=2):
        assert torch.equal(bbb(*x), y)
    torch.testing.assert_close(kl_loss(layer), functional.kl_divergence(mus, rhos, 0.0, 0.1))


@pytest.mark.parametrize("estimator", ["bbb", "flipout"])
def test_recompute_weight(backend: str, estimator: str) -> None:
    layer, x = make(estimator), inputs(4)
    results = []
    for layer.recompute_weight in (False, True):
        torch.manual_seed(2)
        y = layer(*x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [*x, *layer.parameters()])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("variance_dtype", [torch.bfloat16, torch.float64, "auto"])
def test_variance_dtype(backend: str, variance_dtype: Any) -> None:
    layer, x = make("lrt"), inputs(64)
    results = []
    for layer.variance_dtype in (None, variance_dtype):
        torch.manual_seed(2)
        results.append(layer(*x))
    torch.testing.assert_close(*results, rtol=0.02, atol=0.02)
    assert variance_dtype != torch.bfloat16 or not torch.equal(*results)


@pytest.mark.parametrize("estimator", FAMILIES)
def test_what_is_kept_for_backward(backend: str, estimator: str) -> None:
    """The outer product where an estimator needs it, and never in weight space."""
    layer, x = make(estimator, 16, 16, 2), (torch.randn(8, 16), torch.randn(8, 16))
    sizes: list[int] = []

    def keep(t: Tensor) -> Tensor:
        sizes.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        layer(*x)
        assert (max(sizes) >= 8 * 16 * 16) == (estimator != "bbb")
        sizes.clear()
        with fixed_noise(1):
            layer(*x)
        assert 0 < max(sizes) < 8 * 16 * 16


@pytest.mark.parametrize("sample", [True, False])
@pytest.mark.parametrize("estimator", FAMILIES)
def test_types(backend: str, estimator: str, sample: bool) -> None:
    """Float32 parameters follow narrow inputs; under autocast the output has its type; float64 stays."""
    layer, x = make(estimator), inputs(4)
    for narrow in (torch.bfloat16, torch.float16):
        assert layer(*(t.to(narrow) for t in x), sample=sample).dtype == narrow
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert layer(x[0], x[1].bfloat16(), sample=sample).dtype == torch.bfloat16
        wide = make(estimator, dtype=torch.float64)
        assert wide(*(t.double() for t in x), sample=sample).dtype == torch.float64
    with pytest.raises((TypeError, RuntimeError)):
        layer(*(t.double() for t in x), sample=sample)


@pytest.mark.parametrize("estimator", FAMILIES)
def test_wrong_inputs(estimator: str) -> None:
    layer, (first, second) = make(estimator), inputs(4)
    wanted = r"the inputs must be \[\.\.\., 5\] and \[\.\.\., 4\] with the same dimensions before, got "
    for pair, got in (
        ((second, first), r"\[4, 4\] and \[4, 5\]"),
        ((first, second[:3]), r"\[4, 5\] and \[3, 4\]"),
        ((first, second[0]), r"\[4, 5\] and \[4\]"),
        ((first, torch.tensor(1.0)), r"\[4, 5\] and \[\]"),
    ):
        with pytest.raises(ValueError, match=wanted + got):
            layer(*pair)
    with pytest.raises(TypeError, match=r"one dtype, got torch\.float32 and torch\.float64"):
        layer(first, second.double())
    with pytest.raises(TypeError, match="BBBBilinear: input2 must be a tensor, got list"):
        layer(first, [1.0])
    with pytest.raises(TypeError, match="BBBBilinear: input1 must be a dense tensor"):
        layer(first.detach().to_sparse(), second)


@pytest.mark.parametrize("estimator", FAMILIES)
def test_arguments(estimator: str) -> None:
    layer = make(estimator)
    point = nn.Bilinear(5, 4, 3)
    assert layer.bias_mu is not None and layer.bias_mu.shape == point.bias.shape
    assert layer.W_mu.shape == point.weight.shape
    assert repr(layer).startswith(f"BBBBilinear(5, 4, 3, bias=True, estimator='{estimator}'")
    for args, message in (
        ((0, 4, 3), "in1_features must be an int >= 1, got 0"),
        ((5, 1.5, 3), r"in2_features must be an int >= 1, got 1\.5"),
        ((5, 4, -1), "out_features must be an int >= 0, got -1"),
    ):
        with pytest.raises(ValueError, match=f"BBBBilinear: {message}"):
            make(estimator, *args)


def test_it_is_no_place_that_routes_are_measured_for() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.bilinear = BBB_LRT.BBBLinear(5, 4), make("lrt")

        def forward(self, x: Tensor) -> Tensor:
            return self.bilinear(x, self.linear(x))

    assert [place.name for place in tuning.places(Two(), torch.randn(2, 5))] == ["linear"]


@pytest.mark.parametrize("estimator", ["bbb", "flipout"])
def test_a_weight_drawn_again_is_not_kept(native: None, estimator: str) -> None:
    layer, x = make(estimator), inputs(4)
    kept: dict[bool, set[int]] = {False: set(), True: set()}
    parameters = {p.data_ptr() for p in layer.parameters()}
    for layer.recompute_weight, found in kept.items():

        def keep(t: Tensor, found: set[int] = found) -> Tensor:
            found.update({t.numel()} if t.data_ptr() not in parameters else ())
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            layer(*x)
    assert layer.W_mu.numel() in kept[False] - kept[True]
