"""Second derivatives and forward mode: right, or an error; never other numbers.

The reference path has them, as it consists of PyTorch's own ops. The native ops have first derivatives alone,
and say so where more is asked of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from helpers import on, posterior, rng
from torch import Tensor, nn
from torch.autograd import forward_ad, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp

from bbb_fast import fixed_noise, functional, kl_loss, posterior_means, reference
from bbb_fast.layers import BBB, BBB_LRT, Flipout, WeightSpace

Scalar = Callable[..., Tensor]

# Their outputs are one tensor or two, by their arguments.
bbb_linear: Callable[..., Any] = functional.bbb_linear
flipout_linear: Callable[..., Any] = functional.flipout_linear
lrt_linear: Callable[..., Any] = functional.lrt_linear
sample_weight: Callable[..., Any] = functional.sample_weight
DOUBLE = torch.float64


class First(nn.Module):
    """The first result of a module that returns several, of an input that it may take several times."""

    def __init__(self, module: nn.Module, times: int = 1) -> None:
        super().__init__()
        self.module, self.times = module, times

    def forward(self, x: Tensor) -> Tensor:
        result = self.module(*[x] * self.times)
        return result[0] if isinstance(result, tuple) else result


class Rows(nn.Module):
    """An embedding's rows, scaled by the input."""

    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.table = table

    def forward(self, x: Tensor) -> Tensor:
        return x * self.table(torch.tensor([1, 2, 1]))


# By name: how a layer is made, and the shape of its input.
LAYERS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "embedding": (lambda: Rows(BBB.BBBEmbedding(5, 2)), (3, 2)),
    "bilinear": (lambda: First(BBB.BBBBilinear(2, 2, 2), times=2), (2, 2)),
    "attention": (lambda: First(BBB.BBBMultiheadAttention(2, 1), times=3), (3, 1, 2)),
    "whole": (lambda: WeightSpace(nn.Sequential(nn.Linear(3, 2), nn.Tanh())), (2, 3)),
}
for _name, _family in (("bbb", BBB), ("lrt", BBB_LRT), ("flipout", Flipout)):
    LAYERS[f"{_name} linear"] = (lambda f=_family: f.BBBLinear(3, 2), (2, 3))
    LAYERS[f"{_name} conv"] = (lambda f=_family: f.BBBConv2d(2, 2, 2), (1, 2, 3, 3))
    LAYERS[f"{_name} transposed"] = (lambda f=_family: f.BBBConvTranspose1d(2, 2, 2), (1, 2, 3))
for _name in ("RNN", "LSTM", "GRU"):
    LAYERS[_name] = (lambda n=_name: First(getattr(BBB, f"BBB{n}")(2, 2)), (3, 1, 2))
    LAYERS[f"{_name}Cell"] = (lambda n=_name: First(getattr(BBB, f"BBB{n}Cell")(2, 2)), (2, 2))
# What is differentiated: the output as the estimator draws it, that of one draw of the weights, that of the
# means, and the KL.
WHAT = ("activations", "weights", "means", "kl")


def loss_of(name: str, what: str) -> tuple[Scalar, list[Tensor]]:
    """A scalar function of the input and the parameters, in float64, with the same noise at each call."""
    torch.manual_seed(2)
    make, shape = LAYERS[name]
    layer = make().to(DOUBLE)
    names = [n for n, _ in layer.named_parameters()]

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            if what == "kl":
                return (0.1 * kl_loss(self) + x.sum()).sin()
            with posterior_means() if what == "means" else fixed_noise(3, model=self, draw=what):
                return (self.layer(x) + 1).square().sin().sum()

    loss = Loss()

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        state = {f"layer.{n}": p for n, p in zip(names, parameters, strict=True)}
        return functional_call(loss, state, (x,))

    return run, [torch.randn(shape, dtype=DOUBLE), *(p.detach() for p in layer.parameters())]


CASES = [(name, what) for name in LAYERS for what in WHAT if what != "activations" or " " in name]


@pytest.mark.parametrize(("name", "what"), CASES)
def test_reference(name: str, what: str) -> None:
    """Against differences of first derivatives, and forward mode against reverse mode."""
    run, at = loss_of(name, what)
    leaves = [t.clone().requires_grad_() for t in at]
    assert on("reference", gradgradcheck, run, leaves)
    every = tuple(range(len(at)))
    twice = on("reference", jacrev(jacrev(run, every), every), *at)
    for a, b in zip(twice, on("reference", hessian(run, every), *at), strict=True):
        torch.testing.assert_close(a, b)
    slopes = on("reference", grad(run, every), *at)
    _, along = on("reference", jvp, run, tuple(at), tuple(torch.ones_like(t) for t in at))
    torch.testing.assert_close(along, sum(s.sum() for s in slopes))


# ---------------------------------------------------------------- the native ops


def by_autograd(run: Scalar, at: list[Tensor], i: int, j: int) -> Tensor:
    leaves = [t.clone().requires_grad_() for t in at]
    (slope,) = torch.autograd.grad(run(*leaves), leaves[i], create_graph=True, allow_unused=True)
    if slope is None or not slope.requires_grad:
        return torch.zeros_like(at[j])
    (second,) = torch.autograd.grad(slope.sin().sum(), leaves[j], allow_unused=True)
    return torch.zeros_like(at[j]) if second is None else second


def by_transforms(run: Scalar, at: list[Tensor], i: int, j: int) -> Tensor:
    return grad(lambda *args: grad(run, i)(*args).sin().sum(), j)(*at)


def forward_over_reverse(run: Scalar, at: list[Tensor], i: int, j: int) -> Tensor:
    return jacfwd(jacrev(run, i), j)(*at)


def dual_numbers(run: Scalar, at: list[Tensor], i: int, j: int) -> Tensor:
    with forward_ad.dual_level():
        args = [forward_ad.make_dual(t, torch.ones_like(t)) if k in (i, j) else t for k, t in enumerate(at)]
        return forward_ad.unpack_dual(run(*args)).tangent


REFUSAL = re.compile(
    r"\w+: (second|forward-mode) derivatives are not implemented by the native kernels; "
    r"bbb_fast\.set_backend\(\"reference\"\) gives the same numbers with all derivatives"
)


def right_or_refused(name: str, what: str, route: Callable[..., Any]) -> int:
    """How many of all pairs of arguments are refused; the others are as on the reference path."""
    run, at = loss_of(name, what)
    refused = 0
    for i, j in product(range(len(at)), repeat=2):
        try:
            found = on("native", route, run, at, i, j)
        except (RuntimeError, NotImplementedError) as error:
            assert REFUSAL.search(str(error)), error
            refused += 1
        else:
            torch.testing.assert_close(found, on("reference", route, run, at, i, j), rtol=1e-5, atol=1e-6)
    return refused


def _native_cases() -> list[Any]:
    routes = [by_autograd, by_transforms, forward_over_reverse, dual_numbers]
    return [
        pytest.param(name, what, route, id=f"{name}-{what}-{route.__name__}")
        for (name, what), route in product(CASES, routes)
    ]


@pytest.mark.parametrize(("name", "what", "route"), _native_cases())
def test_native(native: None, name: str, what: str, route: Callable[..., Any]) -> None:
    """Of every pair of input and parameters, also by forward mode."""
    refused = right_or_refused(name, what, route)
    assert (refused > 0) == (what == "kl" or (what != "means" and name != "embedding"))


# ---------------------------------------------------------------- the ops, and where numbers are extreme


def _functions() -> dict[str, Scalar]:
    prior = torch.rand(2, 3, dtype=DOUBLE), torch.rand(2, 3, dtype=DOUBLE) + 0.1
    return {
        "weight": lambda mu, rho: sample_weight(mu, rho, rng()).sin().sum(),
        "weight and KL": lambda mu, rho: torch.stack(
            [t.sin().sum() for t in sample_weight(mu, rho, rng(), with_kl=True)]
        ),
        "KL": lambda mu, rho: functional.kl_divergence(mu, rho, 0.1, 0.4),
        "KL, priors of tensors": lambda mu, rho: functional.kl_divergence(mu, rho, *prior),
    }


@pytest.mark.parametrize("name", _functions())
def test_functions(backend: str, name: str) -> None:
    run, at = _functions()[name], posterior(2, 3, dtype=DOUBLE)
    if backend == "reference":
        assert gradgradcheck(run, at)
        return
    slopes = torch.autograd.grad(run(*at).sum(), at, create_graph=True)
    with pytest.raises(NotImplementedError, match=REFUSAL):
        torch.autograd.grad([s.sum() for s in slopes], at)


def test_softplus() -> None:
    """To the last digits of float64, with its two derivatives."""
    rho = torch.linspace(-300, 300, 6001, dtype=DOUBLE, requires_grad=True)
    sigma = reference.softplus(rho)
    torch.testing.assert_close(sigma, torch.logaddexp(rho, torch.zeros((), dtype=DOUBLE)), rtol=4e-16, atol=0)
    (slope,) = torch.autograd.grad(sigma.sum(), rho, create_graph=True)
    torch.testing.assert_close(slope, rho.sigmoid(), rtol=1e-15, atol=0)
    (curvature,) = torch.autograd.grad(slope.sum(), rho)
    torch.testing.assert_close(curvature, (rho.sigmoid() * (-rho).sigmoid()).detach(), rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=["float32", "float64"])
@pytest.mark.parametrize("rho", [-1e4, -800.0, -200.0, -60.0, -40.0, 0.0, 40.0, 200.0])
def test_of_any_rho(rho: float, dtype: torch.dtype) -> None:
    """Also of pruned weights, whose rho is -200."""
    at, r = torch.full((2, 3), rho, dtype=dtype), rng()
    x, mu, bias = torch.randn(4, 3, dtype=dtype), torch.randn(2, 3, dtype=dtype), torch.zeros(2, dtype=dtype)
    runs: dict[str, Scalar] = {
        "weight": lambda t: sample_weight(mu, t, r).sum(),
        "KL": lambda t: functional.kl_divergence(mu, t, 0.0, 0.5),
        "bbb": lambda t: bbb_linear(x, mu, t, bias, bias, r).sum(),
        "lrt": lambda t: lrt_linear(x, mu, t, bias, bias, r).sum(),
        "flipout": lambda t: flipout_linear(x, mu, t, bias, bias, r).sum(),
    }
    second = {
        name: on("reference", hessian(run), at).view(6, 6).diagonal().view(2, 3) for name, run in runs.items()
    }
    assert all(torch.isfinite(t).all() for t in second.values())
    exact = at.double()
    curvature = exact.sigmoid() * (-exact).sigmoid()
    eps = functional.normal((2, 3), r, dtype=DOUBLE)
    torch.testing.assert_close(second["weight"], (curvature * eps).to(dtype), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(second["bbb"], (curvature * eps * x.double().sum(0)).to(dtype))
