"""torch.compile(fullgraph=True) over layers and models."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bbb_fast import functional
from bbb_fast.layers import BBB, BBB_LRT
from bbb_fast.models import BBBLeNet

pytestmark = pytest.mark.usefixtures("native")


@pytest.mark.parametrize("layers", [BBB, BBB_LRT])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_compiled_layer_trains(layers: object, kind: str) -> None:
    """One graph; the compiled ops give the eager numbers for the same rng; fresh noise at each call."""
    torch._dynamo.reset()
    layer: nn.Module = layers.BBBLinear(6, 4) if kind == "linear" else layers.BBBConv2d(2, 3, 3)
    x = torch.randn(5, 6) if kind == "linear" else torch.randn(2, 2, 6, 6)

    def step(x: torch.Tensor) -> torch.Tensor:
        return layer(x).square().mean() + 1e-3 * layer.kl_loss()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    a, b = compiled(x), compiled(x)
    assert not torch.equal(a, b)
    a.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in layer.parameters())
    torch.manual_seed(0)
    expected = step(x)
    torch.manual_seed(0)
    torch.testing.assert_close(compiled(x), expected)


def test_compiled_op_equals_eager() -> None:
    torch._dynamo.reset()
    W_mu, W_rho = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6, requires_grad=True)
    x, rng = torch.randn(5, 6), torch.tensor([3, 4])

    def run(x: torch.Tensor) -> torch.Tensor:
        return functional.lrt_linear(x, W_mu, W_rho, None, None, rng)

    eager = run(x)
    eager.sum().backward()
    expected = W_mu.grad, W_rho.grad
    W_mu.grad = W_rho.grad = None
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(x)
    compiled.sum().backward()
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close((W_mu.grad, W_rho.grad), expected)


@pytest.mark.parametrize("layers", [BBB, BBB_LRT])
def test_compiled_kl_is_that_of_the_parameters(layers: object) -> None:
    """Eager and compiled calls may alternate: neither takes a KL of other parameters from the other."""
    torch._dynamo.reset()
    layer: nn.Module = layers.BBBLinear(6, 4)
    x = torch.randn(5, 6)

    def step(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return layer(x).square().mean(), layer.kl_loss()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for run in (step, compiled, step, compiled):
        layer(x)
        with torch.no_grad():
            layer.W_mu.add_(0.1)
        _, kl = run(x)
        mu, rho = zip(*layer.posterior(), strict=True)
        expected = functional.kl_divergence(mu, rho)
        torch.testing.assert_close(kl, expected)
        parameters = list(layer.parameters())
        torch.testing.assert_close(
            torch.autograd.grad(kl, parameters), torch.autograd.grad(expected, parameters)
        )


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("estimator", ["bbb", "lrt"])
def test_compiled_op_with_kl_equals_eager(estimator: str, kind: str) -> None:
    torch._dynamo.reset()
    linear = kind == "linear"
    op = getattr(functional, f"{estimator}_linear" if linear else f"{estimator}_conv2d")
    x = torch.randn(5, 6) if linear else torch.randn(2, 2, 6, 6)
    W_mu, W_rho = (torch.randn((4, 6) if linear else (4, 2, 3, 3), requires_grad=True) for _ in range(2))
    b_mu, b_rho = (torch.randn(4, requires_grad=True) for _ in range(2))
    rng, leaves = torch.tensor([3, 4]), [W_mu, W_rho, b_mu, b_rho]

    def run(x: torch.Tensor) -> torch.Tensor:
        y, kl = op(x, *leaves, rng, with_kl=True)
        return y.square().mean() + kl

    eager, compiled = run(x), torch.compile(run, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(torch.autograd.grad(compiled, leaves), torch.autograd.grad(eager, leaves))


@pytest.mark.slow
@pytest.mark.parametrize("layer_type", ["bbb", "lrt"])
def test_inductor_compiles_a_model(layer_type: str) -> None:
    torch._dynamo.reset()
    model = BBBLeNet(10, 1, layer_type=layer_type)
    compiled = torch.compile(model, fullgraph=True)
    output, kl = compiled(torch.randn(4, 1, 32, 32))
    (output.square().mean() + 1e-3 * kl).backward()
    again, _ = compiled(torch.randn(4, 1, 32, 32))
    assert output.shape == again.shape == (4, 10)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
