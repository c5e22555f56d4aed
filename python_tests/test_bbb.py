"""bbb_linear and bbb_conv: native against reference, against sample_weights, gradients, formats."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    CONV_CASES,
    DEVICE,
    DTYPES,
    LINEAR_CASES,
    assert_same,
    compare,
    compare_subsets,
    conv_case,
    grads,
    leaf,
    linear_case,
    ones_and_formats,
    posterior,
    rng,
)
from torch import Tensor

from bbb_fast import functional

# Called with lists of arguments.
bbb_conv2d: Callable[..., Any] = functional.bbb_conv2d
bbb_linear: Callable[..., Any] = functional.bbb_linear
CONV: dict[int, Callable[..., Any]] = {
    1: functional.bbb_conv1d,
    2: functional.bbb_conv2d,
    3: functional.bbb_conv3d,
}
TORCH_CONV: dict[int, Callable[..., Any]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
KL: dict[str, Any] = {"prior_mu": 0.05, "prior_sigma": 0.4, "with_kl": True}
KINDS = ["linear", "conv"]
# What the ops take between rng and the prior: stride, padding, dilation, transposed, output_padding, groups.
GEOMETRY: dict[str, tuple[Any, ...]] = {
    "linear": (),
    "conv": ([1, 1], [0, 0], [1, 1], False, [0, 0], 1),
}


def small(kind: str, bias: bool = True, dtype: torch.dtype = torch.float32) -> list[Any]:
    if kind == "linear":
        return linear_case((4,), 6, 3, bias, dtype)
    return conv_case(2, 2, 3, 4, (3, 3), (6, 6), bias=bias, dtype=dtype)


def op(kind: str) -> Callable[..., Any]:
    return functional.bbb_linear if kind == "linear" else functional.bbb_conv2d


def drawn(case: list[Any], dtype: torch.dtype | None = None) -> tuple[list[Any], Tensor]:
    """The weight and bias that the op draws for ``rng()``, and the KL, by sample_weights."""
    _, W_mu, W_rho, b_mu, b_rho = case
    mu, rho = ([W_mu], [W_rho]) if b_mu is None else ([W_mu, b_mu], [W_rho, b_rho])
    weights, kl = functional.sample_weights(mu, rho, rng(), **KL, dtype=dtype)
    return [*weights, None][:2], kl


def composed(kind: str, case: list[Any]) -> tuple[Tensor, Tensor]:
    """The same layer as sample_weights and torch's own product."""
    weights, kl = drawn(case)
    product = F.linear if kind == "linear" else F.conv2d
    return product(case[0], *weights), kl


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("batch", "i", "o"), LINEAR_CASES)
def test_linear_equals_reference(isa: str, batch: tuple[int, ...], i: int, o: int, bias: bool) -> None:
    case = linear_case(batch, i, o, bias)
    compare(lambda: bbb_linear(*case, rng()), case, torch.float32)
    compare(lambda: bbb_linear(*case, rng(), **KL), case, torch.float32)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("spatial", "n", "i", "o", "kernel", "size", "options"), CONV_CASES)
def test_conv_equals_reference(
    isa: str, spatial: int, n: int, i: int, o: int, kernel: Any, size: Any, options: Any, bias: bool
) -> None:
    case = conv_case(spatial, n, i, o, kernel, size, options.get("groups", 1), bias)
    compare(lambda: CONV[spatial](*case, rng(), **options), case, torch.float32)
    compare(lambda: CONV[spatial](*case, rng(), **options, **KL), case, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_dtypes(native: None, kind: str, dtype: torch.dtype) -> None:
    if kind == "linear":
        case = linear_case((9,), 31, 13, dtype=dtype)
    else:
        case = conv_case(2, 2, 3, 5, (3, 3), (8, 8), dtype=dtype)
    compare(lambda: op(kind)(*case, rng(), **KL), case, dtype, 2)


@pytest.mark.parametrize("recompute_weight", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_float32_parameters_under_a_narrow_input(
    native: None, kind: str, dtype: torch.dtype, recompute_weight: bool
) -> None:
    if kind == "linear":
        case = linear_case((9,), 31, 13, dtype=dtype, parameter_dtype=torch.float32)
    else:
        case = conv_case(2, 2, 3, 5, (3, 3), (8, 8), dtype=dtype, parameter_dtype=torch.float32)

    def run() -> tuple[Tensor, Tensor]:
        return op(kind)(*case, rng(), **KL, recompute_weight=recompute_weight)

    compare(run, case, dtype, 2)
    y, kl = run()
    assert (y.dtype, kl.dtype) == (dtype, torch.float32)
    (y.float().sum() + kl).backward()
    assert case[0].grad.dtype == dtype
    assert {t.grad.dtype for t in case[1:]} == {torch.float32}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("batch", "i", "o"), LINEAR_CASES)
def test_linear_is_torch_linear_with_drawn_weights(
    isa: str, batch: tuple[int, ...], i: int, o: int, bias: bool
) -> None:
    """Bit for bit: the same draw, the same KL, the same library product."""
    case = linear_case(batch, i, o, bias)
    y, kl = bbb_linear(*case, rng(), **KL)
    weights, expected_kl = drawn(case)
    assert torch.equal(y, F.linear(case[0], *weights)) and torch.equal(kl, expected_kl)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("spatial", "n", "i", "o", "kernel", "size", "options"), CONV_CASES)
def test_conv_is_torch_conv_with_drawn_weights(
    isa: str, spatial: int, n: int, i: int, o: int, kernel: Any, size: Any, options: Any, bias: bool
) -> None:
    """The gradients too. Not bit for bit: some convolutions are our own."""
    case = conv_case(spatial, n, i, o, kernel, size, options.get("groups", 1), bias)
    weights, kl = drawn(case)
    expected = TORCH_CONV[spatial](case[0], *weights, **options)
    grad = [torch.randn_like(expected), torch.tensor(0.7)]
    fused = grads(lambda: CONV[spatial](*case, rng(), **options, **KL), case, grad)
    apart = grads(lambda: [expected, kl], case, grad)
    torch.testing.assert_close(fused, apart, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_drawn_in_the_input_dtype(native: None, kind: str, dtype: torch.dtype) -> None:
    """The weight that is kept is that of sample_weights in the input's type."""
    case: list[Any] = [None if t is None else t.detach() for t in small(kind, dtype=dtype)]
    y, weight, kl = getattr(torch.ops.bbb_fast, f"bbb_{kind}")(
        *case, rng(), *GEOMETRY[kind], *KL.values(), False
    )
    weights, expected_kl = drawn(case, dtype)
    assert torch.equal(weight, weights[0]) and torch.equal(kl, expected_kl)
    expected = (F.linear if kind == "linear" else F.conv2d)(case[0], *weights)
    assert_same(y, expected, dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_without_kl_it_is_zero_and_has_no_gradient(native: None, kind: str) -> None:
    run = getattr(torch.ops.bbb_fast, f"bbb_{kind}")
    y, weight, kl = run(*small(kind), rng(), *GEOMETRY[kind], 0.0, 0.1, False, False)
    assert y.requires_grad and not weight.requires_grad
    assert kl.shape == () and kl.item() == 0 and not kl.requires_grad


def test_the_bias_takes_the_next_stream(backend: str) -> None:
    """Alone it is all of the output: a zero input drops the weight."""
    _, W_mu, W_rho, b_mu, b_rho = linear_case((2,), 6, 50)
    y = bbb_linear(torch.zeros(2, 6), W_mu, W_rho, b_mu, b_rho, rng(3, 40))
    expected = b_mu + F.softplus(b_rho) * functional.normal(50, rng(3, 41))
    assert_same(y, expected.expand(2, 50), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_weight_changes_no_bit(isa: str, kind: str, bias: bool, dtype: torch.dtype) -> None:
    case = small(kind, bias)
    case[0] = case[0].detach().to(dtype).requires_grad_()
    results = []
    for recompute_weight in (False, True):
        y, kl = op(kind)(*case, rng(), **KL, recompute_weight=recompute_weight)
        grad = torch.linspace(-1, 1, y.numel()).reshape(y.shape).to(dtype)
        used = [t for t in case if t is not None]
        results.append([y, kl, *torch.autograd.grad([y, kl], used, [grad, torch.tensor(0.7)])])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("recompute_weight", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(native: None, kind: str, bias: bool, recompute_weight: bool) -> None:
    """Of the output and the KL together, and of each alone."""
    if kind == "linear":
        case = linear_case((3,), 4, 2, bias, torch.float64)
    else:
        case = conv_case(2, 2, 2, 3, (2, 2), (4, 3), bias=bias, dtype=torch.float64)
    used = tuple(t for t in case if t is not None)

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        absent = [None] * (5 - len(tensors))
        return op(kind)(*tensors, *absent, rng(), **KL, recompute_weight=recompute_weight)

    assert torch.autograd.gradcheck(run, used)
    assert torch.autograd.gradcheck(lambda *t: run(*t)[0], used)
    assert torch.autograd.gradcheck(lambda *t: run(case[0].detach(), *t)[1], used[1:])


@pytest.mark.parametrize("bias", [True, False])
def test_linear_strided_inputs(native: None, bias: bool) -> None:
    x = leaf(10, 24)
    _, *parameters = linear_case((1,), 6, 7, bias)
    for view in (
        lambda: x[::2, ::4],
        lambda: x.view(10, 4, 6).transpose(0, 1),
        lambda: x[:, :6].expand(3, 10, 6),
    ):
        compare(
            lambda v=view: bbb_linear(v(), *parameters, rng(), **KL),
            [x, *parameters],
            torch.float32,
        )
    W = posterior(6, 7)
    compare(
        lambda: bbb_linear(x[:, :6], W[0].t(), W[1].t(), *parameters[2:], rng(), **KL),
        [x, *W, *parameters[2:]],
        torch.float32,
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recompute_weight", [False, True])
def test_incoming_gradients_of_any_strides(native: None, kind: str, recompute_weight: bool) -> None:
    """Expanded as sum() gives it, permuted, with holes."""
    case = small(kind)
    for use in (
        lambda y: y.sum(),
        lambda y: y.transpose(0, -1).reshape(-1) @ torch.linspace(-1, 1, y.numel()),
        lambda y: y[..., ::2].square().sum(),
        lambda y: y.expand(3, *y.shape).sum(),
    ):

        def run(use: Any = use) -> list[Tensor]:
            y, kl = op(kind)(*case, rng(), **KL, recompute_weight=recompute_weight)
            return [use(y), kl]

        # Sums over the output, whose terms cancel.
        compare(run, case, torch.float32, 10)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_conv_of_many_channels_keeps_the_memory_format(isa: str, memory_format: torch.memory_format) -> None:
    """Also where the products run in another: output and gradients are stored as torch's are."""
    case = conv_case(2, 2, 32, 34, (3, 3), (8, 7))
    x = case[0] = case[0].detach().contiguous(memory_format=memory_format).requires_grad_()
    y, _ = CONV[2](*case, rng(), padding=1, **KL)
    y.square().sum().backward()
    assert y.is_contiguous(memory_format=memory_format) and x.grad.is_contiguous(memory_format=memory_format)
    assert all(t.grad.is_contiguous() for t in case[1:])


@pytest.mark.parametrize("spatial", [2, 3])
@pytest.mark.parametrize("weight_too", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_conv_channels_last(isa: str, spatial: int, weight_too: bool, channels: int) -> None:
    """The output keeps the input's format; the weights' numbering does not depend on any."""
    case = conv_case(spatial, 2, channels, 5, (3,) * spatial, (8, 7, 5)[:spatial])
    last = torch.channels_last if spatial == 2 else torch.channels_last_3d

    def cl(t: Tensor, wanted: bool = True) -> Tensor:
        return t.contiguous(memory_format=last) if wanted else t

    def run() -> tuple[Tensor, Tensor]:
        parameters = (cl(case[1], weight_too), cl(case[2], weight_too), *case[3:])
        return CONV[spatial](cl(case[0]), *parameters, rng(), **KL)

    compare(run, case, torch.float32)
    y, _ = run()
    assert y.is_contiguous(memory_format=last if channels > 1 else torch.contiguous_format)
    assert_same(y, CONV[spatial](*case, rng()), torch.float32)


@pytest.mark.parametrize("spatial", [2, 3])
def test_conv_dimensions_of_size_1(native: None, spatial: int) -> None:
    """Of any strides: they have no say in the output's format, nor in the noise's order."""
    for case, unbatched in ones_and_formats(spatial):
        x, *parameters = case
        compare(
            lambda x=x[0] if unbatched else x, p=parameters: CONV[spatial](x, *p, rng()),
            case,
            torch.float32,
            2,
        )


@pytest.mark.parametrize("spatial", [1, 2, 3])
@pytest.mark.parametrize("with_kl", [False, True])
def test_conv_unbatched(backend: str, spatial: int, with_kl: bool) -> None:
    case = conv_case(spatial, 1, 3, 5, (3,) * spatial, (8, 7, 5)[:spatial])
    batched = CONV[spatial](*case, rng(), padding="same", with_kl=with_kl)
    single = CONV[spatial](case[0][0], *case[1:], rng(), padding="same", with_kl=with_kl)
    if with_kl:
        assert torch.equal(single[1], batched[1])
        single, batched = single[0], batched[0]
    assert torch.equal(single, batched[0])


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_conv_padding_by_name(backend: str, padding: str) -> None:
    """An uneven "same" puts the odd element behind, as torch.nn.functional does."""
    case = conv_case(2, 2, 3, 5, (4, 3), (7, 7))
    y = bbb_conv2d(*case, rng(), padding=padding, dilation=(1, 2))
    (weight, bias), _ = drawn(case)
    assert_same(y, F.conv2d(case[0], weight, bias, padding=padding, dilation=(1, 2)), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute_weight", [False, True])
@pytest.mark.parametrize("spatial", [0, 1, 2, 3])
def test_frozen_arguments(native: None, spatial: int, recompute_weight: bool, dtype: torch.dtype) -> None:
    """Every subset of what may want a gradient; ``spatial`` 0 is a linear layer."""
    if spatial:
        kernel, size = (3, 2, 2)[:spatial], (5, 4, 3)[:spatial]
        case = conv_case(spatial, 2, 4, 6, kernel, size, dtype=dtype, parameter_dtype=torch.float32)
        function = CONV[spatial]
    else:
        case = linear_case((4,), 6, 3, dtype=dtype, parameter_dtype=torch.float32)
        function = functional.bbb_linear
    for options in ({}, KL):
        run = functools.partial(function, recompute_weight=recompute_weight, **options)
        compare_subsets(lambda *args, run=run: run(*args, rng()), case, dtype, 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("used", ["output", "kl"])
def test_gradient_of_one_result_alone(native: None, kind: str, used: str) -> None:
    case = small(kind)

    def run() -> Tensor:
        y, kl = op(kind)(*case, rng(), **KL)
        return y if used == "output" else kl

    compare(run, case if used == "output" else case[1:], torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_three_forwards_before_one_backward(native: None, kind: str) -> None:
    case = small(kind)

    def run() -> list[Tensor]:
        return [t for k in range(3) for t in op(kind)(*case, rng(stream=2 * k), **KL)]

    compare(run, case, torch.float32)


def test_thread_count_changes_nothing(isa: str, threads: None) -> None:
    """A product that is exact, so that only the draw, the KL and their gradients are left."""
    W_mu, W_rho = posterior(211, 300)
    x = torch.eye(300, requires_grad=True)
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        y, kl = bbb_linear(x, W_mu, W_rho, None, None, rng(), **KL)
        results.append([y, kl, *torch.autograd.grad([y, kl], [W_mu, W_rho], [torch.eye(300, 211), None])])
    assert all(map(torch.equal, *results))


def test_opcheck(native: None) -> None:
    ops = torch.ops.bbb_fast
    plain, full = (0.0, 0.1, False, False), (0.1, 0.5, True, True)
    torch.library.opcheck(ops.bbb_linear, (*linear_case((4, 2), 6, 3), rng(), *plain))
    torch.library.opcheck(ops.bbb_linear, (*linear_case((4,), 6, 3, bias=False), rng(), *full))
    geometry = ([2, 1], [1, 0], [1, 1], False, [0, 0], 1)
    torch.library.opcheck(ops.bbb_conv, (*small("conv"), rng(), *geometry, *full))


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize(
    "mask", [[True] * 5, [False, True, False, True, False], [True, False, True, False, False]]
)
def test_opcheck_backward(native: None, mask: list[bool], recomputed: bool) -> None:
    ops = torch.ops.bbb_fast
    case = [t.detach() for t in small("linear")]
    kept = None if recomputed else torch.randn(3, 6)
    arguments = (torch.randn(4, 3), torch.tensor(1.0), *case, kept, rng(), 0.0, 0.1, mask)
    torch.library.opcheck(ops.bbb_linear_backward, arguments)
    case = [t.detach() for t in small("conv")]
    kept = None if recomputed else torch.randn(4, 3, 3, 3)
    arguments = (torch.randn(2, 4, 4, 4), None, *case, kept, rng(), *GEOMETRY["conv"], 0.0, 0.1, mask)
    torch.library.opcheck(ops.bbb_conv_backward, arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_backward_uses_the_kept_weight(native: None, kind: str) -> None:
    """Whatever is given as kept is the product's operand; nothing is drawn for it."""
    case = [t.detach() for t in small(kind)]
    run = getattr(torch.ops.bbb_fast, f"bbb_{kind}_backward")
    kept = torch.randn_like(case[1])
    grad = torch.randn((4, 3) if kind == "linear" else (2, 4, 4, 4))
    mask = [True, False, False, False, False]
    (g,) = run(grad, None, *case, kept, rng(), *GEOMETRY[kind], 0.0, 0.1, mask)
    x = case[0].requires_grad_()
    (expected,) = torch.autograd.grad((F.linear if kind == "linear" else F.conv2d)(x, kept), x, grad)
    assert_same(g, expected, torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_vmap_over_rng(backend: str, kind: str) -> None:
    case = small(kind)
    rngs = torch.stack([rng(stream=k) for k in range(3)])
    mapped = torch.func.vmap(lambda r: op(kind)(*case, r, **KL))(rngs)
    apart = [op(kind)(*case, r, **KL) for r in rngs]
    assert_same(mapped[0], torch.stack([y for y, _ in apart]), torch.float32)
    assert_same(mapped[1], torch.stack([kl for _, kl in apart]), torch.float32)
    native = torch.autograd.grad(mapped[0].square().sum() + mapped[1].sum(), case)
    expected = torch.autograd.grad(sum(y.square().sum() + kl for y, kl in apart), case)
    for a, b in zip(native, expected, strict=True):
        assert_same(a, b, torch.float32, 2, float(b.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(backend: str, kind: str) -> None:
    case = small(kind)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        y, kl = op(kind)(*case, rng(), **KL)
    assert (y.dtype, kl.dtype) == (torch.bfloat16, torch.float32)
    full, full_kl = op(kind)(*case, rng(), **KL)
    assert_same(y, full.to(torch.bfloat16), torch.bfloat16, 2)
    assert torch.equal(kl, full_kl)
    narrow = torch.autograd.grad(y.float().square().sum() + kl, case)
    wide = torch.autograd.grad(full.square().sum() + full_kl, case)
    for a, b in zip(narrow, wide, strict=True):
        assert a.dtype == torch.float32
        assert_same(a, b, torch.bfloat16, 2, float(b.abs().max()))
