"""torch.compile(fullgraph=True) over layers and models."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bbb_fast import fixed_noise, functional, predict
from bbb_fast._noise import posterior_means
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


@pytest.mark.parametrize("named", [False, True])
def test_layers_of_one_kind_compiled_one_by_one(named: bool) -> None:
    """They share their code, and each has its own pinned draw."""
    torch._dynamo.reset()
    layers = [BBB.BBBLinear(6, 6) for _ in range(3)]
    model = nn.Sequential(*layers)
    compiled = nn.Sequential(*(torch.compile(layer, fullgraph=True, backend="eager") for layer in layers))
    x = torch.randn(5, 6)
    with fixed_noise(1):
        expected = model(x)
    for _ in range(2):
        with fixed_noise(1, model=compiled if named else None):
            assert torch.equal(compiled(x), expected)
    if named:
        assert torch.equal(predict(compiled, x, 2, seed=1)[0], expected)


def test_contexts_within_the_graph() -> None:
    torch._dynamo.reset()
    layer, x = BBB_LRT.BBBLinear(6, 4), torch.randn(5, 6)

    def run(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with fixed_noise(3, sample=1):
            pinned = layer(x)
        with posterior_means():
            mean = layer(x)
        return pinned, mean, layer(x)

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    (pinned, mean, free), (_, _, other) = compiled(x), compiled(x)
    with fixed_noise(3, sample=1):
        torch.testing.assert_close(pinned, layer(x))
    torch.testing.assert_close(mean, layer(x, sample=False))
    assert not torch.equal(free, other) and not torch.equal(layer(x), layer(x))


def blocks(layers: object) -> nn.Sequential:
    return nn.Sequential(*(nn.Sequential(layers.BBBLinear(8, 8), nn.Tanh()) for _ in range(3)))


def gradients(run: Callable[[torch.Tensor], torch.Tensor], model: nn.Module, x: torch.Tensor) -> list:
    return list(torch.autograd.grad(run(x).square().sum(), list(model.parameters())))


@pytest.mark.parametrize("layers", [BBB, BBB_LRT])
@pytest.mark.parametrize("budget", [0.0, 0.3, 1.0])
def test_recomputation_by_the_partitioner(layers: object, budget: float) -> None:
    """A pinned draw is the same when it is computed again; a fresh one would not be, so it is refused."""
    torch._dynamo.reset()
    model, x = blocks(layers), torch.randn(16, 8)
    with torch._functorch.config.patch(activation_memory_budget=budget):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager_decomp_partition")
        with fixed_noise(3):
            torch.testing.assert_close(gradients(compiled, model, x), gradients(model, model, x))
        if budget < 1:
            with pytest.raises(Exception, match="would draw again in backward what forward drew"):
                compiled(x)
            with torch.no_grad():
                assert not torch.equal(compiled(x), compiled(x))
        else:
            assert all(torch.isfinite(g).all() for g in gradients(compiled, model, x))


@pytest.mark.parametrize("layers", [BBB, BBB_LRT])
def test_checkpoint_within_the_graph(layers: object) -> None:
    """Free: the gradient is that of the function that was drawn, whose noise does not depend on mu."""
    torch._dynamo.reset()
    model, x = blocks(layers), torch.randn(16, 8)

    def run(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(model, x, use_reentrant=False)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager_decomp_partition")
    with fixed_noise(3, model=model):
        torch.testing.assert_close(gradients(compiled, model, x), gradients(model, model, x))

    def loss(step: float) -> torch.Tensor:
        torch.manual_seed(1)
        with torch.no_grad():
            model[0][0].bias_mu.add_(step)
        return compiled(x).square().sum()

    loss(0.0).backward()
    slope = model[0][0].bias_mu.grad.sum()
    rise = (loss(1e-3) - loss(-2e-3)) / 2e-3
    torch.testing.assert_close(rise.detach(), slope, rtol=0.02, atol=0.02)
