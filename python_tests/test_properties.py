"""Native against reference over shapes, memory layouts, dtypes and extreme values that hypothesis draws.

In every run a few examples, the same each time; ``HYPOTHESIS_PROFILE=long`` draws many, others each time. A
failure prints the smallest arguments that show it. (``make fuzz`` draws whole calls of every op and layer.)
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from fuzz.operands import LAYOUTS
from helpers import DTYPES, flat, on
from torch import Tensor

from bbb_fast import functional

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, given, settings, strategies as st  # noqa: E402, I001

pytestmark = [
    pytest.mark.usefixtures("native"),
    pytest.mark.cpu_only("both implementations are the CPU's"),
]

LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"
EXAMPLES = settings(
    max_examples=2000 if LONG else 25,
    derandomize=not LONG,
    database=None,
    deadline=None,
    print_blob=LONG,
    # The fixture only skips.
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

NAN, INF = float("nan"), float("inf")
# Ends of the types, what is denormal in them, and what is none of their numbers.
ANYTHING = (0.0, -0.0, 1e-40, -1e-45, 6e-8, 1e-3, 3e38, -3e38, 6e4, INF, -INF, NAN)
ANY_RHO = (*ANYTHING, -1e4, -200.0, -104.0, -30.0, 30.0, 90.0, 1e4)
# Whose squares, sigmas and sums are numbers of the type: what is infinite spreads as the library likes.
FINITE = (0.0, 1e-40, -1e-45, 1e-3, 8.0)
FINITE_RHO = {
    torch.float16: (-1e4, -30.0, -10.0, 0.0, 3.0),
    torch.bfloat16: (-1e4, -200.0, -30.0, 30.0, 1e4),
    torch.float32: (-1e4, -200.0, -104.0, -30.0, 30.0, 1e4),
    torch.float64: (-1e4, -800.0, -200.0, 30.0, 1e4),
}
# Of the largest result; the noise of both sides differs by 1e-5.
TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 6e-2, torch.float32: 2e-4, torch.float64: 2e-4}

dtypes = st.sampled_from(DTYPES)
lengths = st.integers(0, 5) | st.sampled_from((15, 16, 17, 33))
rngs = st.tuples(*2 * [st.integers(-(1 << 63), (1 << 63) - 1)]).map(torch.tensor)


@st.composite
def tensors(
    draw: st.DrawFn,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    extremes: tuple[float, ...],
    mean: float = 0.0,
) -> Tensor:
    """Normal numbers, some of which are replaced by extremes, in any layout."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9), label="numbers"))
    t = (torch.randn(shape, generator=generator) + mean).to(dtype)
    places = st.integers(0, max(t.numel() - 1, 0))
    for place, value in draw(st.lists(st.tuples(places, st.sampled_from(extremes)), max_size=4)):
        if t.numel():
            # float64 first: the number nearest in the type, or its infinity.
            t.view(-1)[place] = torch.tensor(value, dtype=torch.float64).to(dtype)
    return LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)), label="layout")](t)


def both(function: Any, *args: Any, leaves: list[Tensor], **options: Any) -> list[tuple[Tensor, Tensor]]:
    """Results, and gradients of their sum: (native, reference) of each."""

    def run() -> list[Tensor]:
        for t in leaves:
            t.requires_grad_()
        results = [t for t in flat(function(*args, **options)) if t.requires_grad]
        return [*results, *torch.autograd.grad([t.sum() for t in results], leaves)]

    pairs = zip(on("native", run), on("reference", run), strict=True)
    return [(a.detach(), b.detach()) for a, b in pairs]


def same_shape(a: Tensor, b: Tensor) -> None:
    assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


def close(pairs: list[tuple[Tensor, Tensor]], dtype: torch.dtype) -> None:
    """Numbers that agree, but for rounding; the same NaN, and infinities but for the last finite numbers."""
    for a, b in pairs:
        same_shape(a, b)
        most = torch.finfo(a.dtype).max
        a, b = a.double(), b.double()
        assert torch.equal(a.isnan(), b.isnan())
        at_the_end = (a.abs() > 0.1 * most) & (b.abs() > 0.1 * most) & (a.sign() == b.sign())
        atol = 1e-2 if dtype in (torch.float16, torch.bfloat16) else 1e-5
        near = torch.isclose(a, b, rtol=TOLERANCE[dtype], atol=atol, equal_nan=True)
        assert (near | at_the_end).all(), (a[~(near | at_the_end)], b[~(near | at_the_end)])


def close_sums(pairs: list[tuple[Tensor, Tensor]], dtype: torch.dtype) -> None:
    """Sums of products: an entry that cancels keeps the rounding of its largest summand."""
    for a, b in pairs:
        same_shape(a, b)
        a, b = a.double(), b.double()
        assert b.isfinite().all() and a.isfinite().all()
        size = max(1.0, float(b.abs().max())) if b.numel() else 1.0
        torch.testing.assert_close(a, b, rtol=0.0, atol=10 * TOLERANCE[dtype] * size)


@given(st.data(), st.lists(lengths, max_size=3).map(tuple), dtypes, rngs, st.booleans())
@EXAMPLES
def test_sample_weights(
    data: st.DataObject, shape: tuple[int, ...], dtype: torch.dtype, rng: Tensor, with_kl: bool
) -> None:
    mu = data.draw(tensors(shape, dtype, ANYTHING), label="mu")
    rho = data.draw(tensors(shape, dtype, ANY_RHO, -2.0), label="rho")
    # A gradient beyond the type meets factors that one path has in a wider one.
    leaves = [mu, rho] if torch.cat((mu.flatten(), rho.flatten())).isfinite().all() else [mu]
    weights, *rest = both(functional.sample_weights, [mu], [rho], rng, 0.05, 0.4, with_kl, leaves=leaves)
    close([weights], dtype)
    close(rest[:1] if with_kl else [], torch.float32)


@given(st.data(), st.lists(lengths, max_size=3).map(tuple), dtypes, st.sampled_from((1e-3, 0.1, 1.0, 1e3)))
@EXAMPLES
def test_kl_divergence(
    data: st.DataObject, shape: tuple[int, ...], dtype: torch.dtype, prior_sigma: float
) -> None:
    mu = data.draw(tensors(shape, dtype, ANYTHING), label="mu")
    rho = data.draw(tensors(shape, dtype, ANY_RHO, -2.0), label="rho")
    kls = [on(name, functional.kl_divergence, mu, rho, 0.05, prior_sigma) for name in ("native", "reference")]
    close([(kls[0], kls[1])], torch.float32)


@given(
    st.data(),
    st.lists(lengths, min_size=1, max_size=4).map(tuple),
    dtypes,
    rngs,
    st.floats(0, 1) | st.sampled_from((0.0, 0.5, 1.0)),
    st.booleans(),
    st.booleans(),
)
@EXAMPLES
def test_dropout(
    data: st.DataObject,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    rng: Tensor,
    p: float,
    channels: bool,
    one_mask: bool,
) -> None:
    x = data.draw(tensors(shape, dtype, ANYTHING), label="input")
    way = {"channels": channels and x.dim() >= 2, "one_mask": one_mask}
    for a, b in both(functional.dropout, x, rng, p, leaves=[x], **way):
        same_shape(a, b)
        assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(0.0), b.nan_to_num(0.0))


def parameters(
    data: st.DataObject, weight: tuple[int, ...], out: int, dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor | None]]:
    """W_mu, W_rho and, with a bias, bias_mu and bias_rho; and the same four with None for no bias."""
    shapes = [weight, (out,)] if data.draw(st.booleans(), label="bias") else [weight]
    found: list[Tensor] = []
    for shape in shapes:
        found.append(data.draw(tensors(shape, dtype, FINITE), label="mu"))
        found.append(data.draw(tensors(shape, dtype, FINITE_RHO[dtype], -2.0), label="rho"))
    return found, [*found, None, None][:4]


@pytest.mark.parametrize("estimator", ["bbb", "lrt", "flipout"])
@given(st.data(), st.lists(lengths, max_size=2).map(tuple), lengths, lengths, dtypes, rngs, st.booleans())
@EXAMPLES
def test_linear(
    estimator: str,
    data: st.DataObject,
    batch: tuple[int, ...],
    inputs: int,
    outputs: int,
    dtype: torch.dtype,
    rng: Tensor,
    with_kl: bool,
) -> None:
    x = data.draw(tensors((*batch, inputs), dtype, FINITE), label="input")
    leaves, given_ = parameters(data, (outputs, inputs), outputs, dtype)
    function = getattr(functional, f"{estimator}_linear")
    close_sums(both(function, x, *given_, rng, leaves=[x, *leaves], prior_sigma=1.0, with_kl=with_kl), dtype)


@pytest.mark.parametrize("estimator", ["bbb", "lrt", "flipout"])
@given(
    st.data(),
    st.tuples(st.integers(0, 3), st.integers(1, 2), st.integers(1, 4), st.integers(1, 4)),
    st.tuples(*4 * [st.integers(1, 3)]),
    st.tuples(*2 * [st.integers(0, 5)]),
    dtypes,
    rngs,
)
@EXAMPLES
def test_conv2d(
    estimator: str,
    data: st.DataObject,
    sizes: tuple[int, int, int, int],
    geometry: tuple[int, int, int, int],
    more: tuple[int, int],
    dtype: torch.dtype,
    rng: Tensor,
) -> None:
    count, groups, inputs, outputs = sizes
    height, width, stride, dilation = geometry
    image = tuple(dilation * (kernel - 1) + 1 + m for kernel, m in zip((height, width), more, strict=True))
    x = data.draw(tensors((count, groups * inputs, *image), dtype, FINITE), label="input")
    weight = (groups * outputs, inputs, height, width)
    leaves, given_ = parameters(data, weight, groups * outputs, dtype)
    function = getattr(functional, f"{estimator}_conv2d")
    options = {"stride": stride, "padding": 1, "dilation": dilation, "groups": groups}
    close_sums(both(function, x, *given_, rng, leaves=[x, *leaves], **options), dtype)
