"""lrt_linear and lrt_conv: native against reference, gradients, formats, and the passes beside them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    CONV_CASES,
    DEVICE,
    DTYPES,
    LINEAR_CASES,
    assert_same,
    compare,
    compare_subsets,
    conv_case,
    leaf,
    linear_case,
    ones_and_formats,
    posterior,
    rng,
    variance_of,
    variance_slope,
)
from torch import Tensor

from bbb_fast import functional, reference

# Called with lists of arguments.
lrt_conv2d: Callable[..., Any] = functional.lrt_conv2d
lrt_linear: Callable[..., Any] = functional.lrt_linear
KL: dict[str, Any] = {"prior_mu": 0.05, "prior_sigma": 0.4, "with_kl": True}


def small(kind: str, bias: bool = True, dtype: torch.dtype = torch.float32) -> list[Any]:
    if kind == "linear":
        return linear_case((4,), 6, 3, bias, dtype)
    return conv_case(2, 2, 3, 4, (3, 3), (6, 6), bias=bias, dtype=dtype)


def op(kind: str) -> Callable[..., Any]:
    return functional.lrt_linear if kind == "linear" else functional.lrt_conv2d


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("batch", "i", "o"), LINEAR_CASES)
def test_linear_equals_reference(isa: str, batch: tuple[int, ...], i: int, o: int, bias: bool) -> None:
    case = linear_case(batch, i, o, bias)
    compare(lambda: lrt_linear(*case, rng()), case, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_dtypes(native: None, dtype: torch.dtype) -> None:
    case = linear_case((9,), 31, 13, dtype=dtype)
    compare(lambda: lrt_linear(*case, rng()), case, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_float32_parameters_under_a_narrow_input(native: None, dtype: torch.dtype) -> None:
    case = linear_case((9,), 31, 13, dtype=dtype, parameter_dtype=torch.float32)
    compare(lambda: lrt_linear(*case, rng()), case, torch.float32, 4000)
    out = lrt_linear(*case, rng())
    assert out.dtype == dtype
    out.float().sum().backward()
    assert case[1].grad.dtype == case[2].grad.dtype == case[4].grad.dtype == torch.float32


@pytest.mark.parametrize("variance_dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_linear_variance_dtype(backend: str, variance_dtype: torch.dtype) -> None:
    case = linear_case((40,), 50, 20)
    narrow = lrt_linear(*case, rng(), variance_dtype=variance_dtype)
    wide = lrt_linear(*case, rng())
    noise = (wide - torch.nn.functional.linear(case[0], case[1], case[3])).abs()
    # Three digits of a variance: the deviation moves by half its relative error.
    assert ((narrow - wide).abs() <= 0.01 * noise + 1e-5).all()
    narrow.sum().backward()
    assert all(torch.isfinite(t.grad).all() for t in case)


def test_linear_formula(backend: str) -> None:
    """The textbook formula, written out, with the noise of `normal`."""
    x, W_mu, W_rho, b_mu, b_rho = linear_case((6,), 5, 4, dtype=torch.float64)
    y = lrt_linear(x, W_mu, W_rho, b_mu, b_rho, rng())
    sigma = torch.nn.functional.softplus
    v = (x**2) @ (sigma(W_rho) ** 2).t() + sigma(b_rho) ** 2
    eps = functional.normal((6, 4), rng(), dtype=torch.float64)
    torch.testing.assert_close(y, x @ W_mu.t() + b_mu + v.sqrt() * eps, rtol=1e-6, atol=1e-6)


def test_linear_strided_inputs(native: None) -> None:
    x = leaf(10, 24)
    case = [None, *posterior(7, 6), *posterior(7)]
    for view in (
        lambda: x[::2, ::4],
        lambda: x.view(10, 4, 6).transpose(0, 1),
        lambda: x[:, :6].expand(3, 10, 6),
    ):
        compare(lambda v=view: lrt_linear(v(), *case[1:], rng()), [x, *case[1:]], torch.float32)
    W = posterior(6, 7)
    compare(
        lambda: lrt_linear(x[:, :6], W[0].t(), W[1].t(), *case[3:], rng()),
        [x, *W, *case[3:]],
        torch.float32,
    )


CONV: dict[int, Callable[..., Any]] = {
    1: functional.lrt_conv1d,
    2: functional.lrt_conv2d,
    3: functional.lrt_conv3d,
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("spatial", "n", "i", "o", "kernel", "size", "options"), CONV_CASES)
def test_conv_equals_reference(
    isa: str, spatial: int, n: int, i: int, o: int, kernel: Any, size: Any, options: Any, bias: bool
) -> None:
    case = conv_case(spatial, n, i, o, kernel, size, options.get("groups", 1), bias)
    compare(lambda: CONV[spatial](*case, rng(), **options), case, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_conv_dtypes(native: None, dtype: torch.dtype) -> None:
    case = conv_case(2, 2, 3, 5, (3, 3), (8, 8), dtype=dtype)
    # A low-precision convolution of either path is off by the roundings of its products.
    compare(lambda: lrt_conv2d(*case, rng()), case, dtype, 2)


@pytest.mark.parametrize("weight_too", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_conv_channels_last(isa: str, weight_too: bool, channels: int) -> None:
    case = conv_case(2, 2, channels, 5, (3, 3), (8, 7))

    def cl(t: Tensor, wanted: bool) -> Tensor:
        return t.contiguous(memory_format=torch.channels_last) if wanted else t

    def run() -> Tensor:
        return lrt_conv2d(
            cl(case[0], True), cl(case[1], weight_too), cl(case[2], weight_too), *case[3:], rng()
        )

    compare(run, case, torch.float32)
    expected = torch.channels_last if channels > 1 else torch.contiguous_format
    assert run().is_contiguous(memory_format=expected)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_conv_of_many_channels_keeps_the_memory_format(isa: str, memory_format: torch.memory_format) -> None:
    """Also where the products run in another: output and gradients are stored as torch's are."""
    case = conv_case(2, 2, 32, 34, (3, 3), (8, 7))
    x = case[0] = case[0].detach().contiguous(memory_format=memory_format).requires_grad_()
    y = CONV[2](*case, rng(), padding=1)
    y.square().sum().backward()
    assert y.is_contiguous(memory_format=memory_format) and x.grad.is_contiguous(memory_format=memory_format)
    assert all(t.grad.is_contiguous() for t in case[1:])


def test_conv_noise_follows_the_memory_format(backend: str) -> None:
    """Index order: the output's memory order, whichever format that is."""
    x, W_mu, W_rho, b_mu, b_rho = conv_case(2, 2, 3, 5, (3, 3), (8, 7))
    for memory_format in (torch.contiguous_format, torch.channels_last):
        y = lrt_conv2d(x.contiguous(memory_format=memory_format), W_mu, W_rho, b_mu, b_rho, rng())
        sigma = torch.nn.functional.softplus
        v = torch.conv2d(x**2, sigma(W_rho) ** 2, sigma(b_rho) ** 2)
        noise = functional.normal(y.numel(), rng())
        if memory_format is torch.channels_last:
            eps = noise.view(2, 6, 5, 5).permute(0, 3, 1, 2)
        else:
            eps = noise.view(2, 5, 6, 5)
        torch.testing.assert_close(y, torch.conv2d(x, W_mu, b_mu) + v.sqrt() * eps, rtol=1e-4, atol=1e-5)


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


def test_conv_unbatched(backend: str) -> None:
    case = conv_case(2, 1, 3, 5, (3, 3), (8, 7))
    batched = lrt_conv2d(*case, rng())
    single = lrt_conv2d(case[0][0], *case[1:], rng())
    assert torch.equal(single, batched[0])


@pytest.mark.parametrize(
    ("dtype", "variance_dtype"),
    [
        (torch.float32, None),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float64),
        (torch.float16, None),
        (torch.bfloat16, torch.float32),
    ],
)
@pytest.mark.parametrize("spatial", [0, 1, 2, 3])
def test_frozen_arguments(
    native: None, spatial: int, dtype: torch.dtype, variance_dtype: torch.dtype | None
) -> None:
    """Every subset of what may want a gradient; ``spatial`` 0 is a linear layer."""
    if spatial:
        kernel, size = (3, 2, 2)[:spatial], (5, 4, 3)[:spatial]
        case = conv_case(spatial, 2, 4, 6, kernel, size, dtype=dtype, parameter_dtype=torch.float32)
        function = CONV[spatial]
    else:
        case = linear_case((4,), 6, 3, dtype=dtype, parameter_dtype=torch.float32)
        function = lrt_linear
    narrowest = torch.bfloat16 if variance_dtype is torch.bfloat16 else dtype
    for options in ({}, KL):
        run = functools.partial(function, variance_dtype=variance_dtype, **options)
        compare_subsets(lambda *args, run=run: run(*args, rng()), case, narrowest, 2)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_three_forwards_before_one_backward(native: None, kind: str) -> None:
    case, function = small(kind), op(kind)
    compare(lambda: torch.cat([function(*case, rng(stream=k)) for k in range(3)]), case, torch.float32)


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(backend: str, kind: str, bias: bool) -> None:
    if kind == "linear":
        case = linear_case((3,), 4, 2, bias, torch.float64)
        function: Callable[..., Any] = functional.lrt_linear
    else:
        case = conv_case(2, 2, 2, 3, (2, 2), (4, 3), bias=bias, dtype=torch.float64)
        function = functional.lrt_conv2d
    used = tuple(t for t in case if t is not None)
    assert torch.autograd.gradcheck(lambda *ts: function(*ts, *([None] * (5 - len(ts))), rng()), used)


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_variance(backend: str, kind: str, dtype: torch.dtype) -> None:
    """Zero input, no bias: v = 0. Noise 0, gradients finite; fp16 must not give NaN."""
    if kind == "linear":
        x, W_mu, W_rho, *_ = linear_case((4,), 6, 3, dtype=dtype)
        function: Callable[..., Any] = functional.lrt_linear
    else:
        x, W_mu, W_rho, *_ = conv_case(2, 2, 3, 4, (3, 3), (6, 6), dtype=dtype)
        function = functional.lrt_conv2d
    x = torch.zeros_like(x).requires_grad_()
    y: Any = function(x, W_mu, W_rho, None, None, rng())
    assert not y.any()
    y.sum().backward()
    for t in (x, W_mu, W_rho):
        assert t.grad is not None and t.grad.isfinite().all()


def test_thread_count_changes_nothing_in_the_passes(isa: str, threads: None) -> None:
    ops = torch.ops.bbb_fast
    m, v, rho = torch.randn(100_003), torch.rand(100_003), torch.randn(100_003)
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        y = m.clone()
        ops.lrt_sample_(y, v, rng())
        g = m.clone()
        ops.square_backward_(g, rho, v)
        results.append(
            [
                y,
                g,
                ops.square(rho, torch.bfloat16),
                ops.lrt_sample_backward(m, v, rng()),
                variance_of(rho, torch.float32),
                variance_slope(m, rho),
            ]
        )
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("m_dtype", DTYPES)
@pytest.mark.parametrize("v_dtype", DTYPES)
def test_lrt_sample_mixes_dtypes(native: None, m_dtype: torch.dtype, v_dtype: torch.dtype) -> None:
    m, v = torch.randn(7, 13).to(m_dtype), torch.rand(7, 13).to(v_dtype)
    expected = reference.lrt_sample(m, v, rng(), torch.contiguous_format)
    torch.ops.bbb_fast.lrt_sample_(m, v, rng())
    assert_same(m, expected, m_dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_variance_equals_reference(isa: str, dtype: torch.dtype) -> None:
    rho = leaf(1003, dtype=dtype, mean=-2.0, std=3.0)
    grad = torch.randn(1003).to(dtype)
    expected = reference.variance(rho, dtype)
    assert_same(variance_of(rho.detach(), dtype), expected.detach(), dtype)
    (g,) = torch.autograd.grad(expected, rho, grad)
    assert_same(variance_slope(grad, rho.detach()), g, dtype, 5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("input_dtype", DTYPES)
def test_square_equals_reference(isa: str, input_dtype: torch.dtype, dtype: torch.dtype) -> None:
    x = torch.randn(1003).to(input_dtype)
    assert_same(torch.ops.bbb_fast.square(x, dtype), reference.square(x, dtype), dtype)


def test_square_is_formed_before_it_is_rounded(native: None) -> None:
    """What float16 cannot hold, float32 can."""
    x = torch.tensor([300.0, -300.0, 1e-4, -6e-8, 0.0], dtype=torch.float16)
    square = torch.ops.bbb_fast.square
    assert torch.equal(square(x, torch.float32), x.float() ** 2)
    assert torch.equal(square(x, torch.float16), (x.float() ** 2).half())
    wide = torch.tensor([1e-30, 3e20, -1e-22])
    assert torch.equal(square(wide, torch.float64), wide.double() ** 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grad_dtype", DTYPES)
def test_square_backward_equals_reference(isa: str, dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    """Adds 2 x grad in place, x's type throughout; the factor is the gradient of reference.square."""
    x, grad_x, grad = (torch.randn(1003).to(t) for t in (dtype, dtype, grad_dtype))
    wide = x.to(reference.accumulate_dtype(x)).requires_grad_()
    (slope,) = torch.autograd.grad(reference.square(wide, wide.dtype), wide, grad.to(wide.dtype))
    expected = (grad_x.to(wide.dtype) + slope).to(dtype)
    assert torch.ops.bbb_fast.square_backward_(grad_x, x, grad) is None
    assert_same(grad_x, expected, dtype)


def test_square_keeps_the_memory_format(native: None) -> None:
    x = torch.randn(2, 3, 5, 4).contiguous(memory_format=torch.channels_last)
    y = torch.ops.bbb_fast.square(x, torch.float32)
    assert y.stride() == x.stride() and torch.equal(y, x * x)
    holes = torch.randn(6, 8)[::2, ::3]
    assert torch.equal(torch.ops.bbb_fast.square(holes, torch.float32), holes * holes)
    assert torch.ops.bbb_fast.square(torch.randn(2, 0, 3), torch.bfloat16).shape == (2, 0, 3)


@pytest.mark.parametrize("turned", [(), (0,), (1,), (2,), (0, 1), (1, 2), (0, 2), (0, 1, 2)])
def test_square_backward_pairs_elements_by_index(native: None, turned: tuple[int, ...]) -> None:
    """Whatever the strides of the three: each may be channels_last, and input and grad not even dense."""
    tensors = [torch.randn(2, 3, 5, 4) for _ in range(3)]
    grad_x, x, grad = (
        t.contiguous(memory_format=torch.channels_last) if k in turned else t for k, t in enumerate(tensors)
    )
    expected = grad_x + 2 * x * grad
    torch.ops.bbb_fast.square_backward_(grad_x, x, grad)
    torch.testing.assert_close(grad_x, expected)
    grad_x, x, grad = torch.randn(3, 4), torch.randn(4, 6)[:, ::2].t(), torch.randn(4).expand(3, 4)
    expected = grad_x + 2 * x * grad
    torch.ops.bbb_fast.square_backward_(grad_x, x, grad)
    torch.testing.assert_close(grad_x, expected)


def test_square_backward_rejects_what_it_cannot_add(native: None) -> None:
    square_backward_ = torch.ops.bbb_fast.square_backward_
    x = torch.randn(4, 5)
    with pytest.raises(TypeError, match="grad_input and input must have one dtype"):
        square_backward_(x.double(), x, x)
    for shapes in ((x[:2], x, x), (x, x[:2], x), (x, x, x[:2])):
        with pytest.raises(ValueError, match="must have one shape"):
            square_backward_(*(t.clone() for t in shapes))
    with pytest.raises(ValueError, match="grad_input must be dense"):
        square_backward_(torch.randn(4, 10)[:, ::2], x, x)
    with pytest.raises(TypeError, match="must be float32"):
        square_backward_(x.int(), x.int(), x)
    with pytest.raises(TypeError, match="must be float32"):
        torch.ops.bbb_fast.square(x, torch.int32)


def test_differentiating_an_inner_pass_raises(native: None) -> None:
    """These are only used inside ops that know their gradients; alone they must not lose one silently."""
    for op in (variance_of, torch.ops.bbb_fast.square):
        with pytest.raises(RuntimeError, match="not implemented"):
            op(leaf(5), torch.float32).sum().backward()


def test_lrt_sample_rejects_mixed_strides(native: None) -> None:
    with pytest.raises(ValueError, match="same strides"):
        torch.ops.bbb_fast.lrt_sample_(torch.randn(4, 5), torch.rand(5, 4).t(), rng())


def test_passes_ignore_the_stride_of_one_element(native: None) -> None:
    ops, strides = torch.ops.bbb_fast, (99, 1, 77, 4)
    t, v, g = torch.randn(1, 4, 1, 5), torch.rand(1, 4, 1, 5), torch.randn(1, 4, 1, 5)
    last = [x.contiguous(memory_format=torch.channels_last) for x in (t, v, g)]
    odd = [torch.empty_strided(x.shape, strides).copy_(x) for x in (t, v, g)]
    assert torch.equal(
        ops.lrt_sample_backward(odd[2], last[1], rng()), ops.lrt_sample_backward(*last[:0:-1], rng())
    )
    for one, other in ((odd[0], last[1]), (last[0].clone(), odd[1])):
        ops.lrt_sample_(one, other, rng())
        expected = reference.lrt_sample(t, v, rng(), torch.channels_last)
        torch.testing.assert_close(one, expected, rtol=1e-5, atol=1e-5)
    ops.square_backward_(odd[0], last[1], odd[2])
    expected = last[0].clone()
    ops.lrt_sample_(expected, last[1], rng())
    ops.square_backward_(expected, v, g)
    assert torch.equal(odd[0], expected)


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("used", ["both", "output", "kl"])
def test_with_kl_equals_reference(isa: str, kind: str, bias: bool, used: str) -> None:
    """The KL of the same pass, and the gradients of output and KL together or of one alone."""
    case = small(kind, bias)

    def run() -> Any:
        y, kl = op(kind)(*case, rng(), **KL)
        return {"both": [y, kl], "output": y, "kl": kl}[used]

    compare(run, case[1:] if used == "kl" else case, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_with_kl_dtypes(native: None, kind: str, dtype: torch.dtype) -> None:
    case = small(kind, dtype=dtype)
    compare(lambda: op(kind)(*case, rng(), **KL), case, dtype, 2)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_kl_is_kl_divergence(isa: str, kind: str, bias: bool) -> None:
    """And the output is the one without it, bit for bit."""
    case = small(kind, bias)
    y, kl = op(kind)(*case, rng(), **KL)
    assert torch.equal(y, op(kind)(*case, rng()))
    mu, rho = [t for t in case[1::2] if t is not None], [t for t in case[2::2] if t is not None]
    expected = functional.kl_divergence(mu, rho, KL["prior_mu"], KL["prior_sigma"])
    torch.testing.assert_close(kl, expected, rtol=1e-6, atol=0)
    fused = torch.autograd.grad(kl, [*mu, *rho])
    torch.testing.assert_close(fused, torch.autograd.grad(expected, [*mu, *rho]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_gradcheck_with_kl(native: None, kind: str) -> None:
    case = small(kind, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *t: op(kind)(*t, rng(), **KL), tuple(case))


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bfloat16_variance_equals_reference(isa: str, kind: str, bias: bool, dtype: torch.dtype) -> None:
    """Gradients too. A bfloat16 product may be added up in another order or type: a rounding of the variance
    on either side, half of that in the deviation.
    """
    if kind == "linear":
        case = linear_case((40,), 50, 20, bias, dtype)
    else:
        case = conv_case(2, 4, 6, 8, (3, 3), (9, 8), bias=bias, dtype=dtype)

    def run() -> tuple[Tensor, Tensor]:
        return op(kind)(*case, rng(), **KL, variance_dtype=torch.bfloat16)

    compare(run, case, torch.bfloat16)


def test_bfloat16_variance_rounds_operands_and_result(native: None) -> None:
    """Bit for bit where nothing is added up: x^2, sigma^2 and their product, each rounded once."""
    x, W_rho = torch.randn(50, 1), torch.randn(40, 1)
    plain = (0.0, 0.1, False, torch.bfloat16)
    _, kept, _ = torch.ops.bbb_fast.lrt_linear(x, W_rho, W_rho, None, None, rng(), *plain)
    factors = reference.square(x, torch.bfloat16), variance_of(W_rho, torch.bfloat16).t()
    assert torch.equal(kept, (factors[0].float() * factors[1].float()).bfloat16())


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_variance_dtype_rounds_the_variance(native: None, kind: str) -> None:
    """What is kept is the variance in the asked type, the reference's to one rounding of it."""
    case = [t.detach() for t in small(kind)]
    geometry = () if kind == "linear" else ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)
    run = getattr(torch.ops.bbb_fast, f"lrt_{kind}")
    for dtype in DTYPES:
        y, kept, _ = run(*case, rng(), *geometry, 0.0, 0.1, False, dtype)
        assert kept.dtype == dtype and kept.shape == y.shape and y.dtype == torch.float32
        x2 = reference.square(case[0], dtype)
        variances = [reference.variance(rho, dtype) for rho in (case[2], case[4])]
        product = torch.nn.functional.linear if kind == "linear" else torch.nn.functional.conv2d
        assert_same(kept, product(x2, *variances), dtype)


def test_opcheck(native: None) -> None:
    ops = torch.ops.bbb_fast
    plain = (0.0, 0.1, False, None)
    torch.library.opcheck(ops.lrt_linear, (*linear_case((4, 2), 6, 3), rng(), *plain))
    narrow = (0.1, 0.5, True, torch.bfloat16)
    torch.library.opcheck(ops.lrt_linear, (*linear_case((4,), 6, 3, bias=False), rng(), *narrow))
    geometry = ([2, 1], [1, 0], [1, 1], False, [0, 0], 1)
    torch.library.opcheck(ops.lrt_conv, (*conv_case(2, 2, 3, 4, (3, 3), (6, 6)), rng(), *geometry, *plain))
    mu, rho = [torch.randn(9), torch.randn(2, 3)], [torch.randn(9), torch.randn(2, 3)]
    torch.library.opcheck(ops.variance, (mu, rho, 0.1, 0.5, True, torch.bfloat16))
    outs = [torch.empty(9), torch.empty(2, 3)], [torch.empty(9), torch.empty(2, 3)]
    priors = ([0.0, 0.1], [0.1, 0.2])
    torch.library.opcheck(
        ops.posterior_backward_out, (mu, rho, torch.tensor(0.3), mu, rho, None, *priors, *outs)
    )
    torch.library.opcheck(
        ops.posterior_backward_out,
        (mu, rho, torch.tensor(0.3), mu, rho, None, *priors, *outs, torch.bfloat16),
    )
    torch.library.opcheck(ops.square, (torch.randn(9), torch.bfloat16))
    channels_last = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(ops.square, (channels_last, torch.float32))
    torch.library.opcheck(ops.square_backward_, (torch.randn(9), torch.randn(9), torch.randn(9)))
    torch.library.opcheck(ops.lrt_sample_, (torch.randn(4, 3), torch.rand(4, 3), rng()))
    torch.library.opcheck(ops.lrt_sample_backward, (torch.randn(4, 3), torch.rand(4, 3), rng()))


@pytest.mark.parametrize(
    "mask", [[True] * 5, [False, True, False, True, False], [True, False, True, False, False]]
)
def test_opcheck_backward(native: None, mask: list[bool]) -> None:
    ops = torch.ops.bbb_fast
    one = torch.tensor(1.0)
    case = [t.detach() for t in linear_case((4,), 6, 3)]
    kept: tuple[Any, ...] = (torch.rand(4, 3), rng(), 0.0, 0.1)
    torch.library.opcheck(ops.lrt_linear_backward, (torch.randn(4, 3), one, *case, *kept, mask))
    case = [t.detach() for t in conv_case(2, 2, 3, 4, (3, 3), (6, 6))]
    kept = (torch.rand(2, 4, 4, 4), rng(), [1, 1], [0, 0], [1, 1], False, [0, 0], 1, 0.0, 0.1)
    torch.library.opcheck(ops.lrt_conv_backward, (torch.randn(2, 4, 4, 4), None, *case, *kept, mask))


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_vmap_over_rng(backend: str, kind: str) -> None:
    case, function = small(kind), op(kind)
    rngs = torch.stack([rng(stream=k) for k in range(3)])
    mapped = torch.func.vmap(lambda r: function(*case, r))(rngs)
    assert_same(mapped, torch.stack([function(*case, r) for r in rngs]), torch.float32)


def test_autocast(backend: str) -> None:
    case = linear_case((9,), 31, 13)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        y = lrt_linear(*case, rng())
    assert y.dtype == torch.bfloat16
    assert_same(y, lrt_linear(*case, rng()).to(torch.bfloat16), torch.bfloat16, 2)


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("asked", [None, torch.float32, torch.float64])
def test_autocast_leaves_the_variance_its_type(backend: str, kind: str, asked: torch.dtype | None) -> None:
    """In float16 the squares of these inputs would be infinite."""
    spatial = (5, 5) if kind == "conv" else ()
    x, W = torch.full((2, 4, *spatial), 400.0), torch.zeros(3, 4, *(3 for _ in spatial))
    op: Callable[..., Any] = functional.lrt_conv2d if kind == "conv" else functional.lrt_linear
    leaves = [t.requires_grad_() for t in (x, W, torch.full_like(W, -2.0))]
    results = []
    for enabled in (True, False):
        with torch.autocast(DEVICE.type, torch.float16, enabled=enabled):
            given = leaves[0] if enabled else leaves[0].half()
            y: Any = op(given, *leaves[1:], None, None, rng(), variance_dtype=asked)
            assert y.dtype == torch.float16 and y.isfinite().all()
        results.append([y, *torch.autograd.grad(y.float().sum(), leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-4)
