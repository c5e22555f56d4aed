"""Transposed convolutions of every estimator: native against reference, torch's own product, and torch.nn."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, compare, compare_subsets, leaf, posterior, rng
from torch import Tensor, nn

from bbb_fast import functional, reference
from bbb_fast._layer_functions import ESTIMATORS
from bbb_fast.layers import BBB, BBB_LRT, Flipout

KL: dict[str, Any] = {"prior_mu": 0.05, "prior_sigma": 0.4, "with_kl": True}

# Spatial dimensions, batch, channels in and out, kernel, size, options.
CASES: list[tuple[int, int, int, int, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    (1, 3, 4, 6, (3,), (5,), {}),
    (1, 2, 4, 6, (4,), (5,), {"stride": 3, "padding": 1, "output_padding": 2, "groups": 2}),
    (2, 2, 3, 5, (3, 3), (4, 5), {"stride": 2, "padding": 1, "output_padding": 1}),
    (2, 3, 4, 6, (5, 2), (4, 3), {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2), "groups": 2}),
    (2, 2, 4, 4, (1, 1), (5, 5), {"groups": 4}),
    (2, 0, 3, 4, (3, 3), (6, 6), {}),
    (2, 16, 32, 33, (3, 3), (1, 1), {}),
    (2, 2, 32, 33, (3, 3), (8, 7), {"padding": 1}),
    (3, 2, 2, 3, (2, 3, 2), (3, 2, 3), {"stride": 2, "dilation": 2, "output_padding": (0, 1, 0)}),
]


def case_of(
    n: int,
    i: int,
    o: int,
    kernel: tuple[int, ...],
    size: tuple[int, ...],
    groups: int = 1,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    parameter_dtype: torch.dtype | None = None,
) -> list[Any]:
    parameter_dtype = parameter_dtype or dtype
    W = posterior(i, o // groups, *kernel, dtype=parameter_dtype)
    b = posterior(o, dtype=parameter_dtype) if bias else (None, None)
    return [leaf(n, i, *size, dtype=dtype), *W, *b]


def op(estimator: str, spatial: int) -> Callable[..., Any]:
    return getattr(functional, f"{estimator}_conv_transpose{spatial}d")


def torch_op(spatial: int) -> Callable[..., Tensor]:
    return getattr(F, f"conv_transpose{spatial}d")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("spatial", "n", "i", "o", "kernel", "size", "options"), CASES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_equals_reference(
    isa: str,
    estimator: str,
    spatial: int,
    n: int,
    i: int,
    o: int,
    kernel: Any,
    size: Any,
    options: Any,
    bias: bool,
) -> None:
    case = case_of(n, i, o, kernel, size, options.get("groups", 1), bias)
    compare(lambda: op(estimator, spatial)(*case, rng(), **options, **KL), case, torch.float32)
    unbatched = [case[0].detach()[:1].sum(0).requires_grad_(), *case[1:]]
    compare(lambda: op(estimator, spatial)(*unbatched, rng(), **options), unbatched, torch.float32)


@pytest.mark.parametrize(("spatial", "n", "i", "o", "kernel", "size", "options"), CASES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_is_torchs_own_product(
    backend: str, estimator: str, spatial: int, n: int, i: int, o: int, kernel: Any, size: Any, options: Any
) -> None:
    """The formulas, over torch.nn.functional.conv_transpose."""
    case = case_of(n, i, o, kernel, size, options.get("groups", 1), dtype=torch.float64)
    x, W_mu, W_rho, b_mu, b_rho = (t.detach() for t in case)

    def product(x: Tensor, W: Tensor, b: Tensor) -> Tensor:
        return torch_op(spatial)(x, W, b, **options)

    y = op(estimator, spatial)(x, W_mu, W_rho, b_mu, b_rho, rng(), **options)
    W, b = (
        reference.softplus(rho) * functional.normal(rho.shape, r).double()
        for rho, r in ((W_rho, rng()), (b_rho, rng(stream=6)))
    )
    mean = product(x, W_mu, b_mu)
    if estimator == "bbb":
        expected = product(x, W_mu + W, b_mu + b)
    elif estimator == "lrt":
        v = product(x * x, reference.softplus(W_rho).square(), reference.softplus(b_rho).square())
        expected = mean + v.sqrt() * functional.normal(mean.shape, rng()).double()
    else:
        s, r = reference.signs(x.shape, rng(), 2, 1), reference.signs(mean.shape, rng(), 3, 1)
        expected = mean + product(x * s, W, b) * r
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("parameters", [None, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_dtypes(native: None, estimator: str, dtype: torch.dtype, parameters: torch.dtype | None) -> None:
    if parameters is not None and dtype == torch.float64:
        return
    case = case_of(2, 3, 5, (3, 3), (6, 6), dtype=dtype, parameter_dtype=parameters)
    compare(lambda: op(estimator, 2)(*case, rng(), stride=2, **KL), case, dtype, 2)


@pytest.mark.parametrize("last_weight", [False, True])
@pytest.mark.parametrize("last_input", [False, True])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_formats(native: None, estimator: str, last_input: bool, last_weight: bool) -> None:
    case = case_of(2, 3, 4, (2, 3), (4, 5))
    for k, wanted in enumerate((last_input, last_weight, last_weight)):
        if wanted:
            case[k] = case[k].detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    compare(lambda: op(estimator, 2)(*case, rng(), stride=2, padding=1, **KL), case, torch.float32)


def test_a_variance_in_float64_of_one_column(native: None) -> None:
    """A dimension of size 1 has any stride; torch's own float64 product would refuse this one."""
    x, *parameters = case_of(1, 16, 4, (3,), (1,), groups=2)
    case = [x.detach().as_strided((1, 16, 1), (16, 1, 13)).requires_grad_(), *parameters]
    options: Any = {"stride": 3, "groups": 2, "variance_dtype": torch.float64}
    compare(lambda: op("lrt", 1)(*case, rng(), **options), case, torch.float32)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_subset_of_gradients(native: None, estimator: str) -> None:
    case = case_of(2, 3, 4, (2, 3), (3, 3))

    def run(*args: Tensor) -> Any:
        return op(estimator, 2)(*args, rng(), stride=2, **KL)

    compare_subsets(run, case, torch.float32)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradcheck(backend: str, estimator: str) -> None:
    case = case_of(2, 2, 2, (2, 2), (2, 2), dtype=torch.float64)
    function = op(estimator, 2)
    assert torch.autograd.gradcheck(lambda *args: function(*args, rng(), stride=2, **KL), case)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_opcheck(native: None, estimator: str) -> None:
    option = None if estimator == "lrt" else False
    for case in (case_of(2, 4, 6, (3, 2), (4, 5), 2), case_of(1, 2, 2, (3, 3), (1, 1), 2)):
        geometry = ([2, 1], [1, 0], [1, 2], True, [1, 0], 2)
        forward = getattr(torch.ops.bbb_fast, f"{estimator}_conv")
        torch.library.opcheck(forward, (*case, rng(), *geometry, 0.0, 0.3, True, option))


# ---------------------------------------------------------------- the layers


@pytest.fixture(params=[BBB, BBB_LRT, Flipout], ids=["bbb", "lrt", "flipout"])
def family(request: pytest.FixtureRequest) -> ModuleType:
    return request.param


LAYERS = [
    (1, (4, 6, 3), {"stride": 2}, (2, 4, 5)),
    (
        2,
        (4, 6, (3, 2)),
        {"stride": (2, 3), "padding": 1, "output_padding": (1, 0), "groups": 2},
        (2, 4, 5, 4),
    ),
    (2, (4, 6, 3), {"stride": 2, "bias": False, "dilation": 2}, (4, 5, 4)),
    (3, (2, 3, 2), {"stride": 2}, (2, 2, 3, 2, 2)),
]


@pytest.mark.parametrize(("spatial", "arguments", "options", "shape"), LAYERS)
def test_every_output_size_of_torch_nn(
    backend: str,
    family: ModuleType,
    spatial: int,
    arguments: Any,
    options: dict[str, Any],
    shape: tuple[int, ...],
) -> None:
    """At the means, for each size that torch.nn allows, given alone or with the dimensions before it."""
    layer = getattr(family, f"BBBConvTranspose{spatial}d")(*arguments, **options)
    point = getattr(nn, f"ConvTranspose{spatial}d")(*arguments, **options)
    assert layer.W_mu.shape == point.weight.shape
    named = {"weight": layer.W_mu} | ({} if layer.bias_mu is None else {"bias": layer.bias_mu})
    x = torch.randn(shape)
    least = [n - p for n, p in zip(point(x).shape[-spatial:], point.output_padding, strict=True)]
    reached = 0
    for more in (None, *product(range(-1, 4), repeat=spatial)):
        asked = None if more is None else [n + m for n, m in zip(least, more, strict=True)]
        try:
            expected = torch.func.functional_call(point, named, (x, asked))
        except ValueError:
            with pytest.raises(ValueError, match="output_size must be from"):
                layer(x, output_size=asked)
            continue
        reached += 1
        assert torch.equal(layer(x, output_size=asked, sample=False), expected)
        assert torch.equal(layer(x, asked, False), expected)
        whole = None if asked is None else expected.shape
        y = layer(x, output_size=whole)
        assert y.shape == expected.shape and not torch.equal(y, expected)
    assert reached > 1


def test_sample_as_the_second_argument(backend: str, family: ModuleType) -> None:
    layer, x = family.BBBConvTranspose2d(2, 3, 2), torch.randn(1, 2, 3, 3)
    assert torch.equal(layer(x, False), layer(x, sample=False))
    assert not torch.equal(layer(x, True), layer(x, sample=False))


def test_wrong_output_sizes(backend: str, family: ModuleType) -> None:
    layer, x = family.BBBConvTranspose2d(2, 3, 3, stride=2), torch.randn(1, 2, 3, 3)
    with pytest.raises(ValueError, match=r"output_size must be from \[7, 7\] to \[8, 8\], got \[7, 9\]"):
        layer(x, output_size=[7, 9])
    with pytest.raises(ValueError, match=r"output_size must have 2 or 4 elements, got \[7\]"):
        layer(x, output_size=[7])


def test_wrong_arguments(family: ModuleType) -> None:
    make = family.BBBConvTranspose2d
    for options, message in (
        ({"padding_mode": "circular"}, "padding_mode must be zeros, got 'circular'"),
        ({"padding": "same"}, "padding must be an int >= 0 or 2 of them, got 'same'"),
        ({"output_padding": -1}, "output_padding must be an int >= 0"),
        ({"groups": 3}, "in_channels must be positive and divisible by groups = 3"),
        ({"stride": 0}, "stride must be an int >= 1"),
    ):
        with pytest.raises(ValueError, match=f"BBBConvTranspose2d: {message}"):
            make(4, 6, 3, **options)


def test_repr(family: ModuleType) -> None:
    layer = family.BBBConvTranspose2d(4, 6, 3, 2, output_padding=1, groups=2)
    assert repr(layer) == (
        "BBBConvTranspose2d(4, 6, kernel_size=(3, 3), stride=(2, 2), padding=(0, 0), output_padding=(1, 1), "
        f"groups=2, bias=True, estimator='{layer.estimator}')"
    )
