"""What a layer keeps for backward, in bytes, exactly; and that it goes when it is no longer needed."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from helpers import conv_case, linear_case, rng
from torch import Tensor, nn

from bbb_fast import functional
from bbb_fast.layers import BBB, BBB_LRT, Flipout
from bbb_fast.layers.base import BayesianLayer

RNG = 16  # two int64
KINDS = ["linear", "conv"]
# The layers, and a batch for them whose size is none of the parameters' or the output's.
SHAPES: dict[str, tuple[tuple[Any, ...], tuple[int, ...]]] = {
    "linear": ((30, 20), (7, 30)),
    "conv": ((3, 8, 3), (5, 3, 9, 8)),
}

pytestmark = pytest.mark.usefixtures("native")


def saved(run: Callable[[], Any], given: list[Tensor]) -> tuple[list[int], Any]:
    """Bytes of each storage that ``run`` saves for backward beside those of ``given``, and its result."""
    storages: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no address is used twice

    def pack(t: Tensor) -> Tensor:
        alive.append(t)
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = run()
    for t in given:
        storages.pop(t.untyped_storage().data_ptr(), None)
    return sorted(storages.values()), result


def layer_of(kind: str, module: Any, **options: Any) -> Any:
    prefix = "" if module is nn else "BBB"
    name = "Linear" if kind == "linear" else "Conv2d"
    return getattr(module, prefix + name)(*SHAPES[kind][0], **options)


def saved_by(layer: nn.Module, x: Tensor) -> tuple[list[int], Tensor]:
    return saved(lambda: layer(x), [x, *layer.parameters()])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_bbb_keeps_the_weight(kind: str, bias: bool) -> None:
    layer, x = layer_of(kind, BBB, bias=bias), torch.randn(SHAPES[kind][1])
    weight = layer.W_mu.numel() * 4
    assert saved_by(layer, x)[0] == [RNG, weight]
    layer.recompute_weight = True
    assert saved_by(layer, x)[0] == [RNG]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_lrt_keeps_one_tensor_of_the_output_size(kind: str, bias: bool) -> None:
    layer, x = layer_of(kind, BBB_LRT, bias=bias), torch.randn(SHAPES[kind][1])
    sizes, y = saved_by(layer, x)
    assert sizes == [RNG, y.numel() * 4]
    layer.variance_dtype = torch.bfloat16
    assert saved_by(layer, x)[0] == [RNG, y.numel() * 2]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_kl", [False, True])
def test_the_kl_keeps_nothing_more(kind: str, with_kl: bool) -> None:
    for estimator in ("bbb", "lrt", "flipout"):
        if kind == "linear":
            case, op = linear_case((7,), 30, 20), getattr(functional, f"{estimator}_linear")
        else:
            case, op = conv_case(2, 5, 3, 8, (3, 3), (9, 8)), getattr(functional, f"{estimator}_conv2d")
        sizes, result = saved(partial(op, *case, rng(), with_kl=with_kl), case)
        y = result[0] if with_kl else result
        kept = y if estimator == "lrt" else case[1]
        assert sizes == [RNG, kept.numel() * 4]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_input_narrows_what_is_kept(kind: str, dtype: torch.dtype) -> None:
    """The weight and, but for float16's squares, the variance are in the input's type; no cast is kept."""
    x = torch.randn(SHAPES[kind][1]).to(dtype)
    bbb, lrt = layer_of(kind, BBB), layer_of(kind, BBB_LRT)
    assert saved_by(bbb, x)[0] == [RNG, bbb.W_mu.numel() * 2]
    sizes, y = saved_by(lrt, x)
    assert sizes == [RNG, y.numel() * (2 if dtype == torch.bfloat16 else 4)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wants_input", [False, True])
def test_beside_the_torch_nn_layer(kind: str, wants_input: bool) -> None:
    """It keeps its input and its weight, a parameter. Ours keep the same input, and what is said above."""
    x = torch.randn(SHAPES[kind][1], requires_grad=wants_input)
    point: Any = layer_of(kind, nn)
    assert saved_by(point, x)[0] == []
    total = sum(saved(lambda: point(x), [])[0])
    weight = point.weight.numel() * 4
    assert total == x.numel() * 4 + (weight if wants_input or kind == "conv" else 0)
    for options, kept in (({}, weight), ({"recompute_weight": True}, 0)):
        layer = layer_of(kind, BBB, **options)
        ours = sum(saved(partial(layer, x), list(layer.parameters()))[0])
        assert ours == x.numel() * 4 + kept + RNG


def test_nothing_is_kept_without_a_gradient() -> None:
    for module in (BBB, BBB_LRT, Flipout):
        for kind in KINDS:
            layer, x = layer_of(kind, module), torch.randn(SHAPES[kind][1])
            with torch.no_grad():
                assert saved_by(layer, x)[0] == []
            layer.requires_grad_(False)
            assert saved_by(layer, x)[0] == []


class Watched(torch.autograd.Function):
    """The identity, with a tensor in its graph that a test can watch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, witness: Tensor) -> Tensor:
        ctx.witness = witness
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def forwarded(layer: BayesianLayer, kind: str) -> tuple[Tensor, weakref.ref[Tensor], weakref.ref[Tensor]]:
    """The output, and references to the layer's input and to what the graph before it holds."""
    x, witness = torch.randn(SHAPES[kind][1], requires_grad=True), torch.zeros(1)
    hidden = Watched.apply(x, witness)
    return layer(hidden), weakref.ref(hidden), weakref.ref(witness)


@pytest.mark.parametrize("module", [BBB, BBB_LRT, Flipout])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backward", [False, True])
def test_the_graph_goes_with_the_results(module: Any, kind: str, backward: bool) -> None:
    layer: Any = layer_of(kind, module)
    y, hidden, witness = forwarded(layer, kind)
    kl = layer.kl_loss()
    if backward:
        (y.sum() + kl).backward()
    assert witness() is not None
    del y, kl
    gc.collect()
    assert hidden() is None and witness() is None


@pytest.mark.parametrize("module", [BBB, BBB_LRT, Flipout])
@pytest.mark.parametrize("kind", KINDS)
def test_backward_frees_the_input_and_what_was_kept(module: Any, kind: str) -> None:
    """Also where the layer still has the KL of that forward, or the caller has."""
    layer: Any = layer_of(kind, module)
    for take in (False, True):
        y, hidden, _ = forwarded(layer, kind)
        kl = layer.kl_loss() if take else None
        y.sum().backward()
        del y
        gc.collect()
        assert hidden() is None
        assert (layer.kl_loss() if kl is None else kl).requires_grad


@pytest.mark.parametrize("module", [BBB, BBB_LRT, Flipout])
def test_a_forward_replaces_what_the_last_one_left(module: Any) -> None:
    """A layer whose KL nobody asks for holds one graph, not one a forward."""
    layer: Any = layer_of("linear", module)
    witnesses = [forwarded(layer, "linear")[2] for _ in range(3)]
    gc.collect()
    assert [w() is None for w in witnesses[:2]] == [True, True]
