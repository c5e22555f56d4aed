"""torch.compile(fullgraph=True) and torch.export over ops, layers and models; what fake kernels promise."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from helpers import conv_case, flat, linear_case, rng
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from bbb_fast import ELBO, fixed_noise, functional, kl_loss, predict
from bbb_fast._noise import posterior_means
from bbb_fast.layers import BBB, BBB_LRT, Flipout
from bbb_fast.models import BBB3Conv3FC, BBBAlexNet, BBBLeNet

pytestmark = pytest.mark.usefixtures("native")


@pytest.mark.parametrize("layers", [BBB, BBB_LRT, Flipout])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_compiled_layer_trains(layers: Any, kind: str) -> None:
    """One graph; the compiled ops give the eager numbers for the same rng; fresh noise at each call."""
    torch._dynamo.reset()
    layer: Any = layers.BBBLinear(6, 4) if kind == "linear" else layers.BBBConv2d(2, 3, 3)
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

    def run(x: torch.Tensor) -> Any:
        return functional.lrt_linear(x, W_mu, W_rho, None, None, rng)

    eager = run(x)
    eager.sum().backward()
    expected = W_mu.grad, W_rho.grad
    W_mu.grad = W_rho.grad = None
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(x)
    compiled.sum().backward()
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close((W_mu.grad, W_rho.grad), expected)


@pytest.mark.parametrize("layers", [BBB, BBB_LRT, Flipout])
def test_compiled_kl_is_that_of_the_parameters(layers: Any) -> None:
    """Eager and compiled calls may alternate: neither takes a KL of other parameters from the other."""
    torch._dynamo.reset()
    layer: Any = layers.BBBLinear(6, 4)
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
@pytest.mark.parametrize("estimator", ["bbb", "lrt", "flipout"])
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


FAKE = FakeTensorMode()
PRIOR = (0.1, 0.4)
FORMATS = ("contiguous", "channels_last", "sliced", "transposed", "expanded")
# Shape of the input, of the weight (as torch.nn has it), options.
CONVS: list[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    ((2, 6, 7, 5), (4, 6, 3, 3), {}),
    ((2, 6, 7, 5), (4, 3, 3, 2), {"groups": 2, "stride": 2, "padding": 1}),
    ((3, 8, 6, 6), (8, 1, 3, 3), {"groups": 8, "padding": 1, "dilation": 2}),
    ((2, 6, 5, 5), (4, 6, 1, 1), {}),
    ((1, 6, 1, 5), (1, 6, 1, 3), {}),
    ((2, 1, 5, 5), (6, 1, 3, 3), {}),
    ((0, 3, 5, 5), (4, 3, 3, 3), {}),
    # Where csrc/products.cpp goes around the library on the CPU.
    ((16, 32, 2, 2), (33, 32, 3, 3), {"padding": 1}),
    ((2, 32, 8, 7), (33, 32, 3, 3), {"padding": 1}),
    ((2, 3, 9), (4, 3, 3), {"padding": 1}),
    ((1, 1, 9), (4, 1, 1), {}),
    ((2, 3, 5, 4, 3), (4, 3, 2, 2, 2), {"padding": 1}),
    ((1, 1, 1, 4, 3), (2, 1, 1, 2, 2), {}),
]
MASKS = [
    [True] * 5,
    [True, False, False, False, False],
    [False, True, True, False, False],
    [True, True, False, False, True],
]


def _stored(t: Tensor, how: str) -> Tensor:
    """The same numbers, except for "expanded", in other strides."""
    if how == "channels_last":
        return t.movedim(1, -1).contiguous().movedim(-1, 1)
    if how == "sliced":
        return torch.nn.functional.pad(t, [0, 1] * t.dim())[tuple(slice(0, n) for n in t.shape)]
    if how == "transposed":
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)
    return t[:1].expand(t.shape) if how == "expanded" and len(t) else t


def _geometry(spatial: int, options: dict[str, Any], transposed: bool = False) -> tuple[Any, ...]:
    stride, padding, dilation = (
        [options.get(key, default)] * spatial
        for key, default in (("stride", 1), ("padding", 0), ("dilation", 1))
    )
    return stride, padding, dilation, transposed, [0] * spatial, options.get("groups", 1)


def _arguments(
    shape: tuple[int, ...],
    weight: tuple[int, ...],
    options: dict[str, Any],
    how: tuple[str, str],
    dtype: torch.dtype,
    parameter_dtype: torch.dtype,
    transposed: bool = False,
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Input and parameters of a layer op, and its geometry (none for a linear layer)."""
    linear = len(weight) == 2
    features = weight[0]
    if transposed:
        groups = options.get("groups", 1)
        features = weight[0] // groups * groups
        weight = (weight[1] * groups, weight[0] // groups, *weight[2:])
    x = _stored(torch.randn(shape), how[0]).to(dtype)
    W = [_stored(torch.randn(weight) - k, how[1]).to(parameter_dtype) for k in (0, 2)]
    b = [torch.randn(features).to(parameter_dtype) for _ in range(2)]
    return (x, *W, *b), () if linear else _geometry(len(weight) - 2, options, transposed)


def _like_the_kernel(op: Any, *args: Any) -> list[Tensor]:
    """The results, after the fake kernel's have been found to have their shapes, strides and dtypes."""
    results = flat(op(*args))
    fakes = tree_map_only(Tensor, FAKE.from_tensor, args)
    with FAKE:
        promised = flat(op(*fakes))
    for a, b in zip(results, promised, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
    return results


def _strides_of_a_layer(
    name: str, operands: tuple[Any, ...], geometry: tuple[Any, ...], option: Any, masks: int
) -> None:
    """Forward, and backward for the first so many masks."""
    forward, backward = (getattr(torch.ops.bbb_fast, name + end) for end in ("", "_backward"))
    kept: Any
    y, kept, kl = _like_the_kernel(forward, *operands, rng(), *geometry, *PRIOR, True, option)
    kept = None if option is True else kept
    grads = [torch.randn_like(y)] + ([_stored(torch.randn_like(y), "channels_last")] if y.dim() > 2 else [])
    for grad, mask in product(grads, MASKS[:masks]):
        _like_the_kernel(backward, grad, kl, *operands, kept, rng(), *geometry, *PRIOR, mask)


DTYPES = [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
]
ESTIMATORS = [
    ("bbb", False),
    ("bbb", True),
    ("lrt", None),
    ("lrt", torch.bfloat16),
    ("flipout", False),
    ("flipout", True),
]


@pytest.mark.parametrize(
    "dtypes",
    [*DTYPES[:1], *(pytest.param(d, marks=pytest.mark.slow) for d in DTYPES[1:])],
    ids=[str(d[0])[6:] for d in DTYPES],
)
@pytest.mark.parametrize(("estimator", "option"), ESTIMATORS)
def test_strides_of_convolutions(
    estimator: str, option: Any, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    """They follow from the arguments, on whatever way the products went."""
    hows = [("channels_last", "contiguous")]
    if dtypes[0] == torch.float32:
        hows += [("contiguous", "channels_last"), ("sliced", "contiguous"), ("expanded", "channels_last")]
    for (shape, weight, options), how in product(CONVS, hows):
        for transposed in (False,) if options or how != hows[0] else (False, True):
            operands, geometry = _arguments(shape, weight, options, how, *dtypes, transposed)
            _strides_of_a_layer(f"{estimator}_conv", operands, geometry, option, 4 if how == hows[0] else 1)


@pytest.mark.parametrize(("estimator", "option"), ESTIMATORS)
def test_strides_of_linear_layers(estimator: str, option: Any) -> None:
    batches = [(), (5,), (1,), (0,), (4, 3), (1, 1), (3, 1)]
    for batch, out, how, dtypes in product(batches, (1, 3), ("sliced", "expanded"), DTYPES[:3:2]):
        operands, _ = _arguments((*batch, 7), (out, 7), {}, (how if batch else "", "transposed"), *dtypes)
        _strides_of_a_layer(f"{estimator}_linear", operands, (), option, 1)


@pytest.mark.parametrize(("estimator", "option"), ESTIMATORS)
def test_opcheck(estimator: str, option: Any) -> None:
    """Everything torch.library checks, over memory formats; for the convolutions with dynamic shapes too."""
    forward, backward = (getattr(torch.ops.bbb_fast, f"{estimator}_conv{end}") for end in ("", "_backward"))
    for (shape, weight, options), how in zip(
        [CONVS[k] for k in (0, 3, 11)], product(FORMATS[1:3], FORMATS[:2]), strict=False
    ):
        operands, geometry = _arguments(shape, weight, options, how, torch.float32, torch.float32)
        leaves = [t.requires_grad_() for t in operands]
        torch.library.opcheck(forward, (*leaves, rng(), *geometry, *PRIOR, True, option))
        with torch.no_grad():
            y, kept, kl = forward(*operands, rng(), *geometry, *PRIOR, True, option)
        kept = None if option is True else kept
        arguments = (y, kl, *(t.detach() for t in operands), kept, rng(), *geometry, *PRIOR, MASKS[3])
        torch.library.opcheck(backward, arguments)


def _many(cases: list[tuple[Tensor, ...]], calls: list[Callable[..., Any]]) -> tuple[list[Tensor], Tensor]:
    """The outputs of many layers, behind and before something for the compiler to do, and one loss."""
    outputs, loss = [], torch.zeros(())
    for call, (x, *parameters) in zip(calls, cases, strict=True):
        y, kl = call(torch.relu(x) + 1, *parameters, rng())
        outputs.append(y)
        loss = loss + torch.tanh(y).float().square().sum() + 1e-3 * kl.float()
    return outputs, loss


def _table(
    estimator: str, dtypes: tuple[torch.dtype, torch.dtype], hows: list[tuple[str, str]]
) -> tuple[list[tuple[Tensor, ...]], list[Callable[..., Any]]]:
    cases: list[tuple[Tensor, ...]] = []
    calls: list[Callable[..., Any]] = []
    for (shape, weight, options), how in product(CONVS, hows):
        operands, _ = _arguments(shape, weight, options, how, *dtypes)
        cases.append(tuple(t.requires_grad_() for t in operands))
        op = getattr(functional, f"{estimator}_conv{len(weight) - 2}d")
        calls.append(partial(op, with_kl=True, prior_mu=0.1, prior_sigma=0.4, **options))
        if shape[0] == 1:
            cases.append((operands[0].detach()[0].requires_grad_(), *operands[1:]))
            calls.append(calls[-1])
    return cases, calls


def _compare_with_eager(cases: list[tuple[Tensor, ...]], calls: list[Callable[..., Any]], **how: Any) -> None:
    torch._dynamo.reset()
    leaves = [t for case in cases for t in case]
    rough = 2e-2 if any(t.dtype in (torch.bfloat16, torch.float16) for t in leaves) else 1e-5
    for _, *parameters in cases:
        # As a module's are. (Inductor of torch 2.13 stumbles over quotients of dynamic sizes of kernels.)
        for p in parameters:
            torch._dynamo.mark_static(p)
    # Rounds what lies between two ops as eager does.
    options: Any = {"emulate_precision_casts": True} if how.get("backend", "inductor") == "inductor" else None
    compiled = torch.compile(partial(_many, calls=calls), fullgraph=True, options=options, **how)
    results = []
    for run in (partial(_many, calls=calls), compiled):
        outputs, loss = run(cases)
        results.append((outputs, torch.autograd.grad(loss, leaves)))
    for eager, other in zip(*results, strict=True):
        for a, b in zip(eager, other, strict=True):
            assert a.stride() == b.stride() or any(n < 2 for n in a.shape) or a.dim() < 3
            # In another memory format a product may go another way, which sums in another order.
            largest = float(a.detach().abs().max()) if a.numel() else 0.0
            torch.testing.assert_close(b, a, rtol=rough, atol=rough * max(1.0, largest))


@pytest.mark.slow
@pytest.mark.inductor
def test_inductor_compiles_convolutions() -> None:
    """All in one graph, with the eager numbers forward and backward."""
    tables = [
        _table(estimator, DTYPES[0], hows)
        for estimator, hows in (
            ("bbb", [("channels_last", "contiguous")]),
            ("lrt", [("contiguous", "channels_last")]),
        )
    ]
    (bbb_cases, bbb_calls), (lrt_cases, lrt_calls) = tables
    _compare_with_eager(bbb_cases + lrt_cases, bbb_calls + lrt_calls)


@pytest.mark.slow
@pytest.mark.inductor
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda dtypes: str(dtypes[0])[6:])
@pytest.mark.parametrize("estimator", ["bbb", "lrt", "flipout"])
def test_inductor_over_every_format(
    estimator: str, dtypes: tuple[torch.dtype, torch.dtype], dynamic: bool
) -> None:
    for how in FORMATS:
        _compare_with_eager(*_table(estimator, dtypes, list(product((how,), FORMATS[:2]))), dynamic=dynamic)


@pytest.mark.parametrize("estimator", ["bbb", "lrt", "flipout"])
def test_dynamic_batches(estimator: str) -> None:
    """One graph for every batch size, image size and memory format's noise."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    conv = conv_case(2, 2, 4, 6, (3, 3), (8, 8))[1:]
    linear = linear_case((2,), 6, 5)[1:]
    leaves = [*conv, *linear]
    of_conv, of_linear = (getattr(functional, f"{estimator}_{kind}") for kind in ("conv2d", "linear"))

    def run(x: Tensor) -> Tensor:
        y = of_conv(x, *conv, rng(), stride=2, padding=1)
        return of_linear(y.mean((2, 3)), *linear, rng(1)).square().sum()

    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for n, size in ((3, 8), (5, 9), (7, 12)):
        x = _stored(torch.randn(n, 4, size, size + 1), "channels_last")
        for d in (0, 2, 3):
            torch._dynamo.mark_dynamic(x, d)
        y, expected = compiled(x), run(x)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(torch.autograd.grad(y, leaves), torch.autograd.grad(expected, leaves))
    assert counter.frame_count == 1


def _network(layers: ModuleType, memory_format: torch.memory_format = torch.channels_last) -> nn.Module:
    torch.manual_seed(0)
    network: Any = nn.Sequential(
        layers.BBBConv2d(3, 8, 3, padding=1),
        nn.Softplus(),
        nn.MaxPool2d(2),
        layers.BBBConv2d(8, 16, 3, padding=1, padding_mode="circular"),
        nn.ReLU(),
        layers.BBBConv2d(16, 8, 1, groups=2),
        nn.Flatten(),
        layers.BBBLinear(128, 4),
    )
    return network.to(memory_format=memory_format)


def _images(n: int = 6) -> Tensor:
    return torch.randn(n, 3, 8, 8).to(memory_format=torch.channels_last)


def _train(model: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), 0.02)
    outputs = []
    for k in range(4):
        torch.manual_seed(100 + k)
        optimizer.zero_grad()
        y = run(x)
        (y.square().mean() + 1e-3 * kl_loss(model)).backward()
        optimizer.step()
        outputs.append(y.detach().clone())
    return outputs


def _compare_training(layers: ModuleType, **how: Any) -> None:
    torch._dynamo.reset()
    x, eager, model = _images(), _network(layers), _network(layers)
    expected = _train(eager, eager, x)
    # Else inductor draws the seeds with a generator of its own.
    with inductor_config.patch(fallback_random=True):
        outputs = _train(model, torch.compile(model, fullgraph=True, **how), x)
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(list(model.parameters()), list(eager.parameters()), rtol=1e-4, atol=1e-5)
    assert not torch.isclose(outputs[0], outputs[1]).any()


@pytest.mark.parametrize("layers", [BBB, BBB_LRT, Flipout])
def test_compiled_model_trains(layers: ModuleType) -> None:
    """Steps of an optimizer, fresh noise in each, over a channels_last model: as in eager mode."""
    _compare_training(layers, backend="aot_eager")


@pytest.mark.slow
@pytest.mark.inductor
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune-no-cudagraphs"])
@pytest.mark.parametrize("layers", [BBB, BBB_LRT, Flipout])
def test_inductor_trains_a_model(layers: ModuleType, mode: str) -> None:
    _compare_training(layers, mode=mode)


def test_backward_meets_the_noise_of_its_forward() -> None:
    torch._dynamo.reset()
    layer, x = BBB.BBBLinear(6, 6, bias=False), torch.eye(6)
    backend = "aot_eager_decomp_partition"
    compiled = torch.compile(lambda x: torch.sigmoid(layer(torch.relu(x))), fullgraph=True, backend=backend)
    y = compiled(x)
    g_mu, g_rho = torch.autograd.grad(y.sum(), [layer.W_mu, layer.W_rho])
    W = torch.logit(y.detach()).T
    slope = (y * (1 - y)).detach().T
    torch.testing.assert_close(g_mu, slope, rtol=1e-4, atol=1e-5)
    eps = (W - layer.W_mu) / torch.nn.functional.softplus(layer.W_rho)
    torch.testing.assert_close(
        g_rho, (slope * eps * torch.sigmoid(layer.W_rho)).detach(), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("layers", [BBB, BBB_LRT, Flipout])
def test_export(layers: ModuleType, strict: bool, tmp_path: Path) -> None:
    """A model for every batch size: draws when it runs, and can be saved."""
    torch._dynamo.reset()
    model, x = _network(layers), _images()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},), strict=strict)
    torch.export.save(program, tmp_path / "model.pt2")
    for exported in (program.module(), torch.export.load(tmp_path / "model.pt2").module()):
        for images in (x, _images(9)):
            torch.manual_seed(1)
            y, again = exported(images), exported(images)
            torch.manual_seed(1)
            torch.testing.assert_close(y, model(images))
            assert not torch.isclose(y, again).any()


def test_export_of_layers_and_the_kl() -> None:
    class WithKl(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.layer(x), kl_loss(self)

    for layer in (BBB.BBBLinear(6, 4), BBB_LRT.BBBLinear(6, 4)):
        model, x = WithKl(layer), torch.randn(5, 6)
        exported = torch.export.export(model, (x,)).module()
        torch.manual_seed(1)
        result = exported(x)
        torch.manual_seed(1)
        torch.testing.assert_close(result, model(x))


@pytest.mark.slow
@pytest.mark.inductor
@pytest.mark.parametrize("layers", [BBB, BBB_LRT, Flipout])
def test_ahead_of_time(layers: ModuleType, tmp_path: Path) -> None:
    model, x = _network(layers), _images()
    with torch.no_grad(), inductor_config.patch(fallback_random=True):
        program = torch.export.export(model, (x,))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        compiled = torch._inductor.aoti_load_package(path)
        torch.manual_seed(1)
        y, again = compiled(x), compiled(x)
        torch.manual_seed(1)
        torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-5)
    assert not torch.isclose(y, again).any()


MODELS = [BBBLeNet, BBBAlexNet, BBB3Conv3FC]


def _formats() -> list[Any]:
    cases = product(MODELS, (False, True), ("bbb", "lrt", "flipout"))
    return [pytest.param(*case, id="-".join((case[0].__name__, *map(str, case[1:])))) for case in cases]


@pytest.mark.slow
@pytest.mark.inductor
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("build", "last", "layer_type"), _formats())
def test_inductor_compiles_the_bound(
    build: Callable[..., nn.Module], last: bool, layer_type: str, autocast: bool
) -> None:
    """Model, KL and loss in one graph, and the gradients of eager mode."""
    torch._dynamo.reset()
    memory_format = torch.channels_last if last else torch.contiguous_format
    model: Any = build(10, 3, layer_type=layer_type)
    model = model.to(memory_format=memory_format)
    x, target, bound = torch.randn(4, 3, 32, 32).to(memory_format=memory_format), torch.arange(4), ELBO(100)

    def step(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            y, kl = model(x)
        return bound(torch.log_softmax(y.float(), 1), target, kl, 0.01)

    results = []
    with inductor_config.patch(fallback_random=True):
        for run in (step, torch.compile(step, fullgraph=True)):
            torch.manual_seed(1)
            loss = run(x)
            results.append((loss, torch.autograd.grad(loss, list(model.parameters()))))
    rtol = 5e-2 if autocast else 1e-4
    torch.testing.assert_close(results[1][0], results[0][0], rtol=rtol, atol=1e-4)
    for a, b in zip(results[1][1], results[0][1], strict=True):
        size = float(b.abs().max()) or 1.0
        torch.testing.assert_close(a / size, b / size, rtol=rtol, atol=rtol)


@pytest.mark.slow
@pytest.mark.inductor
@pytest.mark.parametrize("layers", [BBB, BBB_LRT, Flipout])
def test_inductor_predicts(layers: ModuleType) -> None:
    """The draws that fixed_noise pins are the same, compiled or not."""
    torch._dynamo.reset()
    model, x = _network(layers), _images()
    compiled: Any = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(predict(compiled, x, 3, seed=1), predict(model, x, 3, seed=1))
    with torch.no_grad():
        for seed in (4, 5):
            with fixed_noise(seed):
                y = compiled(x)
            with fixed_noise(seed):
                torch.testing.assert_close(y, model(x))


@pytest.mark.parametrize("layers", [BBB, BBB_LRT, Flipout])
@pytest.mark.parametrize("budget", [0.5, 0.0])
def test_noise_is_not_drawn_anew_to_save_memory(layers: ModuleType, budget: float) -> None:
    """Under a memory budget the compiler runs parts of the forward again in backward, random ops included."""
    torch._dynamo.reset()
    model = nn.Sequential(layers.BBBLinear(16, 32), nn.ReLU(), layers.BBBLinear(32, 4))
    x = torch.randn(8, 16)
    gradients = []
    with torch._functorch.config.patch(activation_memory_budget=budget):
        for run in (torch.compile(model, backend="aot_eager"), model):
            torch.manual_seed(3)
            loss = run(x).pow(2).sum()
            gradients.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for compiled, eager in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("named", [False, True])
def test_layers_of_one_kind_compiled_one_by_one(named: bool) -> None:
    """They share their code, and each has its own pinned draw."""
    torch._dynamo.reset()
    layers = [BBB.BBBLinear(6, 6) for _ in range(3)]
    model = nn.Sequential(*layers)
    one_by_one: list[Any] = [torch.compile(layer, fullgraph=True, backend="eager") for layer in layers]
    compiled = nn.Sequential(*one_by_one)
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


def blocks(layers: Any) -> nn.Sequential:
    return nn.Sequential(*(nn.Sequential(layers.BBBLinear(8, 8), nn.Tanh()) for _ in range(3)))


def gradients(run: Callable[[torch.Tensor], torch.Tensor], model: nn.Module, x: torch.Tensor) -> list:
    return list(torch.autograd.grad(run(x).square().sum(), list(model.parameters())))


@pytest.mark.parametrize("layers", [BBB, BBB_LRT, Flipout])
@pytest.mark.parametrize("budget", [0.0, 0.3, 1.0])
def test_recomputation_by_the_partitioner(layers: Any, budget: float) -> None:
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


@pytest.mark.skipif(
    not hasattr(torch.autograd.graph, "region_activation_memory_budget"),
    reason="torch has none",
)
@pytest.mark.parametrize("layers", [BBB, BBB_LRT, Flipout])
@pytest.mark.parametrize("budget", [0.0, 0.5, 1.0])
def test_recomputation_of_a_region(layers: Any, budget: float) -> None:
    """A budget that is given in the graph takes the place of the configuration's."""
    torch._dynamo.reset()
    model, x = blocks(layers), torch.randn(16, 8)

    def run(x: torch.Tensor) -> torch.Tensor:
        with torch.autograd.graph.region_activation_memory_budget(budget):
            return model(x)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager_decomp_partition")
    with torch._functorch.config.patch(activation_memory_budget=0.5 if budget == 1 else 1.0):
        with fixed_noise(3, model=model):
            torch.testing.assert_close(gradients(compiled, model, x), gradients(model, model, x))
        if budget < 1:
            with pytest.raises(Exception, match="would draw again in backward what forward drew"):
                compiled(x)
            return
        results = []
        for each in (compiled, model):
            torch.manual_seed(1)
            results.append(gradients(each, model, x))
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("layers", [BBB, BBB_LRT, Flipout])
def test_checkpoint_within_the_graph(layers: Any) -> None:
    """Free: the gradient is that of the function that was drawn, whose noise does not depend on mu."""
    torch._dynamo.reset()
    # In float64, for the quotient of differences below.
    model: Any = blocks(layers).double()
    x = torch.randn(16, 8, dtype=torch.float64)

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
    torch.testing.assert_close(rise.detach(), slope, rtol=0.005, atol=0.005)
