"""What records a layer's operations records its draw too: each run of the record has fresh noise."""

from __future__ import annotations

import io
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from bbb_fast import fixed_noise
from bbb_fast.layers import BBB, BBB_LRT, Flipout

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning"
)


@pytest.fixture(params=[BBB, BBB_LRT, Flipout], ids=["bbb", "lrt", "flipout"])
def estimator(request: pytest.FixtureRequest) -> ModuleType:
    return request.param


@pytest.fixture(params=["linear", "conv"])
def case(request: pytest.FixtureRequest, estimator: ModuleType) -> tuple[nn.Module, Tensor]:
    if request.param == "linear":
        return estimator.BBBLinear(4, 3), torch.randn(5, 4)
    return estimator.BBBConv2d(2, 3, 3), torch.randn(2, 2, 6, 6)


def trace(layer: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    return torch.jit.trace(layer, (x,), check_trace=False)


def saved_trace(layer: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    file = io.BytesIO()
    torch.jit.save(trace(layer, x), file)
    file.seek(0)
    return torch.jit.load(file)


RECORDERS: dict[str, Callable[[nn.Module, Tensor], Callable[[Tensor], Tensor]]] = {
    "trace": trace,
    "saved trace": saved_trace,
    "export": lambda layer, x: torch.export.export(layer, (x,), strict=False).module(),
    "make_fx": lambda layer, x: make_fx(lambda x: layer(x))(x),
    "functionalize": lambda layer, x: torch.func.functionalize(lambda x: layer(x)),
}


@pytest.mark.parametrize("recorder", RECORDERS)
def test_a_record_draws_afresh(backend: str, case: tuple[nn.Module, Tensor], recorder: str) -> None:
    layer, x = case
    run = RECORDERS[recorder](layer, x)
    assert not torch.equal(run(x), run(x))
    torch.manual_seed(1)
    y = run(x)
    torch.manual_seed(1)
    torch.testing.assert_close(y, layer(x))


def test_a_trace_of_a_pinned_draw(backend: str, case: tuple[nn.Module, Tensor]) -> None:
    layer, x = case
    with fixed_noise(3):
        run, expected = torch.jit.trace(layer, (x,)), layer(x)
    torch.testing.assert_close(run(x), expected)
    torch.testing.assert_close(run(x), run(x))


def test_fake_tensors(backend: str, estimator: ModuleType) -> None:
    with FakeTensorMode():
        layer, x = estimator.BBBConv2d(2, 3, 3), torch.randn(2, 2, 6, 6)
        y = layer(x)
        with fixed_noise(1):
            pinned = layer(x)
    assert y.shape == pinned.shape == (2, 3, 4, 4)


def test_saved_tensor_hooks(case: tuple[nn.Module, Tensor]) -> None:
    layer, x = case
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t):
        assert not torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("compiler", [torch.jit.script, torch.fx.symbolic_trace])
def test_refused(estimator: ModuleType, compiler: Callable[[nn.Module], Any]) -> None:
    """They cannot record it, and say so."""
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        compiler(estimator.BBBLinear(4, 3))
    if compiler is torch.fx.symbolic_trace:
        with pytest.raises(TypeError, match="input must be a tensor, got Proxy"):
            compiler(nn.Sequential(estimator.BBBLinear(4, 3)))
