"""What the three estimators share and what tells them apart: moments, expected gradients, their variance."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

import bbb_fast
from bbb_fast.layers import BBB, BBB_LRT, Flipout

ESTIMATORS = {"bbb": BBB, "lrt": BBB_LRT, "flipout": Flipout}
PRIORS: dict[str, Any] = {
    "prior_sigma": 0.5,
    "posterior_mu_initial": (0.0, 0.5),
    "posterior_rho_initial": (-1.0, 0.2),
}
BETA = 0.01


def effort(draws: int) -> int:
    """That many draws, or a tenth of them where nothing but the slow reference path is there."""
    return draws if bbb_fast.backend() == "native" else draws // 10


# ---------------------------------------------------------------- the moments of one layer

# torch.nn's layer, its arguments, the shapes of its inputs.
LAYERS: list[tuple[str, tuple[Any, ...], dict[str, Any], list[tuple[int, ...]]]] = [
    ("Linear", (7, 4), {}, [(3, 7)]),
    ("Bilinear", (3, 2, 4), {}, [(3, 3), (3, 2)]),
    ("Conv1d", (2, 4, 3), {"stride": 2, "padding": 1, "groups": 2}, [(3, 2, 7)]),
    ("Conv2d", (2, 3, (3, 2)), {"padding": 1, "dilation": (1, 2)}, [(3, 2, 4, 4)]),
    ("ConvTranspose2d", (3, 2, 3), {"stride": 2, "padding": 1, "output_padding": 1}, [(3, 3, 2, 3)]),
]


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(("shape", "args", "options", "sizes"), LAYERS, ids=[case[0] for case in LAYERS])
@torch.no_grad()
def test_moments(
    estimator: str, shape: str, args: tuple[Any, ...], options: dict[str, Any], sizes: list[tuple[int, ...]]
) -> None:
    """Each output is N(m, v), with torch.nn's layer as the product; 4.5 standard errors.

    Rows 0 and 1 are the same: under bbb they have one noise, under the others uncorrelated ones.
    """
    priors = {"posterior_mu_initial": (0.0, 0.3), "posterior_rho_initial": (-2.0, 0.7)}
    layer = getattr(ESTIMATORS[estimator], f"BBB{shape}")(*args, priors=priors, **options)
    product = getattr(nn, shape)(*args, **options).double()
    inputs = [torch.randn(size) for size in sizes]
    for x in inputs:
        x[1] = x[0]

    def theory(inputs: list[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
        arguments = {"weight": weight, "bias": bias}
        return torch.func.functional_call(product, arguments, tuple(inputs))

    (W_mu, W_rho), (b_mu, b_rho) = [[p.double() for p in pair] for pair in layer.posterior()]
    wide = [x.double() for x in inputs]
    m = theory(wide, W_mu, b_mu)
    v = theory([x.square() for x in wide], F.softplus(W_rho).square(), F.softplus(b_rho).square())
    draws = effort(10_000)
    z = (torch.stack([layer(*inputs) for _ in range(draws)]) - m) / v.sqrt()
    assert z.mean(0).abs().max() < 4.5 / math.sqrt(draws)
    assert (z.var(0) - 1).abs().max() < 4.5 * math.sqrt(2 / draws)
    if estimator == "bbb":
        torch.testing.assert_close(z[:, 0], z[:, 1], rtol=0, atol=1e-4)
    else:
        both = z[:, 0] * z[:, 1]
        assert (both.mean(0) / both.std(0)).abs().max() < 4.5 / math.sqrt(draws)


# ---------------------------------------------------------------- the gradients of a small net


def small_nets() -> dict[str, nn.Sequential]:
    """A net for each estimator, all of the same parameters, sigma about as large as mu."""
    nets = {}
    for name, layers in ESTIMATORS.items():
        hidden, last = (layers.BBBLinear(i, o, priors=PRIORS) for i, o in ((8, 10), (10, 3)))
        nets[name] = nn.Sequential(hidden, nn.ReLU(), last)
        nets[name].load_state_dict(nets["bbb"].state_dict())
    return nets


def gradients_by_definition(net: nn.Sequential, x: Tensor, y: Tensor, draws: int) -> list[Tensor]:
    """As :func:`gradients`, by plain autograd: w = mu + sigma * eps, once for all rows."""
    leaves = [p.detach().expand(draws, *p.shape).clone().requires_grad_() for p in net.parameters()]
    prior = Normal(0.0, PRIORS["prior_sigma"])
    a, kl = x.expand(draws, *x.shape), torch.zeros(())
    for k in (0, 4):
        W, b = (Normal(mu, F.softplus(rho)) for mu, rho in (leaves[k : k + 2], leaves[k + 2 : k + 4]))
        a = torch.baddbmm(b.rsample().unsqueeze(1), a.relu() if k else a, W.rsample().mT)
        kl = kl + kl_divergence(W, prior).sum() + kl_divergence(b, prior).sum()
    # A draw's loss is a mean over its rows; the losses are summed, each having leaves of its own.
    nll = F.cross_entropy(a.flatten(0, 1), y.repeat(draws)) * draws
    return list(torch.autograd.grad(nll + BETA * kl, leaves))


def gradients(net: Any, x: Tensor, y: Tensor, draws: int) -> list[Tensor]:
    """The gradient of the loss, draw by draw: [draws, ...] for each of the net's parameters."""
    parameters = list(net.parameters())
    found = []
    for _ in range(draws):
        nll = F.cross_entropy(net(x), y)
        kl = net[0].kl_loss() + net[2].kl_loss()
        found.append(torch.autograd.grad(nll + BETA * kl, parameters))
    return [torch.stack(of_parameter) for of_parameter in zip(*found, strict=True)]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_expected_gradient(estimator: str) -> None:
    """Every estimator's is that of the definition, and so the same: 5 standard errors of the difference."""
    x, y, net = torch.randn(16, 8), torch.randint(3, (16,)), small_nets()[estimator]
    own = gradients(net, x, y, effort(4000))
    expected = gradients_by_definition(net, x, y, 20_000)
    for (name, _), g, h in zip(net.named_parameters(), own, expected, strict=True):
        g, h = g.double(), h.double()
        error = (g.var(0) / len(g) + h.var(0) / len(h)).sqrt()
        off = ((g.mean(0) - h.mean(0)) / error).abs().max()
        assert off < 5, f"{name}: {off:.1f} standard errors"


def test_gradient_variance_falls(backend: str) -> None:
    """bbb > flipout > lrt, for a batch in which rows that share their noise tell."""
    x, y = torch.randn(128, 8), torch.randint(3, (128,))
    total = {name: gradients(net, x, y, 300)[0].var(0).sum() for name, net in small_nets().items()}
    assert total["bbb"] > 2 * total["flipout"]
    assert total["flipout"] > 1.3 * total["lrt"]
