"""flipout_linear and flipout_conv: native against reference and the definition; the random signs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    CONV_CASES,
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
)
from torch import Tensor

from bbb_fast import functional, reference

# Their outputs are one tensor or two, by their arguments.
bbb_linear: Callable[..., Any] = functional.bbb_linear
sample_weight: Callable[..., Any] = functional.sample_weight
# Called with lists of arguments.
flipout_linear: Callable[..., Any] = functional.flipout_linear
KL: dict[str, Any] = {"prior_mu": 0.05, "prior_sigma": 0.4, "with_kl": True}
CONV: dict[int, Callable[..., Any]] = {
    1: functional.flipout_conv1d,
    2: functional.flipout_conv2d,
    3: functional.flipout_conv3d,
}
ops = torch.ops.bbb_fast


# ---------------------------------------------------------------- the signs


def test_signs_are_bits_of_philox() -> None:
    """Number q is bit q % 32 of word q / 32 % 4 of block q / 128 of the stream."""
    seed, stream = 7, 12
    signs = reference.signs((3, 100), rng(seed, stream - 2), 2, -1).flatten()
    for q in range(300):
        block = [torch.tensor(n) for n in (q // 128, 0, stream, 0)]
        word = reference.philox4x32(block, [torch.tensor(seed), torch.tensor(0)])[q // 32 % 4]
        assert signs[q] == (-1.0 if int(word) >> q % 32 & 1 else 1.0)


def test_golden_signs() -> None:
    """The same in every release."""
    bits = (1 - reference.signs((64,), rng(1, 0), 2, -1)) / 2
    assert hex(sum(int(b) << k for k, b in enumerate(bits))) == GOLDEN


# Philox4x32-10, key 1, counter (0, 0, 2, 0): words 0 and 1.
GOLDEN = "0x8cedc5d3e73404cf"


def test_signs_do_not_depend_on_where_they_are_asked_for() -> None:
    """A row's signs are those it has in a larger batch; each pixel has its channel's."""
    large, small = (reference.signs((n, 5, 3, 2), rng(), 3, 1) for n in (9, 4))
    assert large.shape == (9, 5, 1, 1) and torch.equal(large[:4], small)
    assert torch.equal(small.flatten(), reference.signs((4, 5), rng(), 3, -1).flatten())
    assert not torch.equal(small, reference.signs((4, 5, 3, 2), rng(), 2, 1))


def test_signs_are_fair_and_independent() -> None:
    """Of each channel, of each row, and of neighbours in either direction: 5 standard errors."""
    s = reference.signs((400, 300), rng(), 2, -1)
    error = 5 / math.sqrt(s.numel())
    assert abs(s.mean()) < error
    assert s.mean(0).abs().max() < 5 / math.sqrt(400) and s.mean(1).abs().max() < 5 / math.sqrt(300)
    assert abs((s[1:] * s[:-1]).mean()) < error and abs((s[:, 1:] * s[:, :-1]).mean()) < error
    assert abs((s * reference.signs(s.shape, rng(), 3, -1)).mean()) < error


SHAPES = [
    ((), 1),
    ((1,), -1),
    ((300,), -1),
    ((5, 7), -1),
    ((3, 0), -1),
    ((2, 3, 131), -1),
    ((33, 128), -1),
    ((4, 3, 5), 1),
    ((2, 5, 1, 1), 1),
    ((2, 0, 3, 3), 1),
    ((0, 2, 3, 3), 1),
    ((3, 70, 5, 7), 1),
    ((2, 6, 40, 41), 1),
    ((1, 1, 9, 9), 1),
    ((2, 300, 3, 2), 1),
    ((2, 9, 4, 5, 3), 1),
][1:]
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def in_formats(t: Tensor) -> list[Tensor]:
    formats = [t, t.repeat_interleave(2, -1)[..., ::2]]
    if t.dim() in LAST:
        formats.append(t.contiguous(memory_format=LAST[t.dim()]))
    return [*formats, t.transpose(0, -1).contiguous().transpose(0, -1)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "dim"), SHAPES)
def test_flip_signs(isa: str, shape: tuple[int, ...], dim: int, dtype: torch.dtype) -> None:
    """In every memory format the same signs, bit for bit those of the reference; NaN stays NaN."""
    x = torch.randn(shape).to(dtype)
    x.view(-1)[::7] = math.nan
    expected = x * reference.signs(shape, rng(), 2, dim).to(dtype)
    base = torch.randn(shape).to(dtype)
    total = (base.double() + expected.double()).to(dtype)
    for layout in in_formats(x):
        y = ops.flip_signs(layout, rng(), 2, dim)
        torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
        for other in in_formats(base):
            copy = other.clone(memory_format=torch.preserve_format)
            ops.add_flipped_(copy, layout, rng(), 2, dim)
            torch.testing.assert_close(copy, total, rtol=0, atol=1e-6, equal_nan=True)


def test_add_flipped_writes_where_it_is_told(native: None) -> None:
    """Into a tensor that is not dense, and nowhere else."""
    whole, x = torch.zeros(4, 10), torch.randn(4, 5)
    ops.add_flipped_(whole[:, ::2], x, rng(), 3, -1)
    assert torch.equal(whole[:, ::2], x * reference.signs((4, 5), rng(), 3, -1))
    assert not whole[:, 1::2].any()


@pytest.mark.parametrize("dim", [-1, 1])
def test_opcheck_of_signs(native: None, dim: int) -> None:
    for x in in_formats(torch.randn(2, 3, 4, 5)):
        torch.library.opcheck(ops.flip_signs, (x, rng(), 2, dim))
        torch.library.opcheck(ops.add_flipped_, (x.clone(), x, rng(), 2, dim))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"channel_dim": 0}, ValueError, "channel_dim must be -1 or 1, got 0"),
        ({"stream": -1}, ValueError, "stream must be >= 0, got -1"),
        ({"input": torch.zeros(3)}, ValueError, "input must have a dimension 1, got"),
        ({"input": torch.zeros(3, 2, dtype=torch.int32)}, TypeError, "input must be float32"),
        ({"rng": torch.zeros(3, dtype=torch.int64)}, ValueError, "rng must have shape"),
    ],
)
def test_wrong_arguments_of_signs(
    native: None, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"input": torch.zeros(3, 2), "rng": rng(), "stream": 2, "channel_dim": 1, **change}
    with pytest.raises(error, match=message):
        ops.flip_signs(*arguments.values())
    with pytest.raises(ValueError, match=r"input must have shape \[3, 3\]"):
        ops.add_flipped_(torch.zeros(3, 3), torch.zeros(3, 2), rng(), 2, 1)
    with pytest.raises(TypeError, match=r"input must be torch.float64"):
        ops.add_flipped_(torch.zeros(3, 2).double(), torch.zeros(3, 2), rng(), 2, 1)


# ---------------------------------------------------------------- sigma * eps alone


@pytest.mark.parametrize("dtype", DTYPES)
def test_deviations_are_draws_without_the_mean(isa: str, dtype: torch.dtype) -> None:
    mu, rho = (t.detach() for t in posterior(3, 701, dtype=dtype))
    zero = torch.zeros_like(mu)
    (w,), kl = ops.sample_weights([mu], [rho], rng(), 0.05, 0.4, True, None, True)
    (centered,), _ = ops.sample_weights([zero], [rho], rng(), 0.05, 0.4, True, None)
    (drawn,), kl_of_draw = ops.sample_weights([mu], [rho], rng(), 0.05, 0.4, True, None)
    assert torch.equal(w, centered) and torch.equal(kl, kl_of_draw) and not torch.equal(w, drawn)


def test_deviations_have_no_gradient_of_their_own(native: None) -> None:
    mu, rho = posterior(3, 4)
    with pytest.raises(NotImplementedError, match="with centered=True there is no gradient"):
        ops.sample_weights([mu], [rho], rng(), 0.0, 0.1, False, None, True)


# ---------------------------------------------------------------- the layers


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("batch", "i", "o"), LINEAR_CASES)
def test_linear_equals_reference(isa: str, batch: tuple[int, ...], i: int, o: int, bias: bool) -> None:
    case = linear_case(batch, i, o, bias)
    compare(lambda: flipout_linear(*case, rng()), case, torch.float32)
    compare(lambda: flipout_linear(*case, rng(), **KL), case, torch.float32)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("spatial", "n", "i", "o", "kernel", "size", "options"), CONV_CASES)
def test_conv_equals_reference(
    isa: str, spatial: int, n: int, i: int, o: int, kernel: Any, size: Any, options: Any, bias: bool
) -> None:
    case = conv_case(spatial, n, i, o, kernel, size, options.get("groups", 1), bias)
    compare(lambda: CONV[spatial](*case, rng(), **options), case, torch.float32)
    compare(lambda: CONV[spatial](*case, rng(), **options, **KL), case, torch.float32)


def small(kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> list[Any]:
    if kind == "linear":
        return linear_case((9,), 31, 13, dtype=dtype, **options)
    return conv_case(2, 2, 3, 5, (3, 3), (8, 8), dtype=dtype, **options)


def op(kind: str) -> Callable[..., Any]:
    return functional.flipout_linear if kind == "linear" else functional.flipout_conv2d


@pytest.mark.parametrize("recompute_weight", [False, True])
@pytest.mark.parametrize("parameters", [None, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_dtypes(
    native: None, kind: str, dtype: torch.dtype, parameters: torch.dtype | None, recompute_weight: bool
) -> None:
    if parameters is not None and dtype == torch.float64:
        return
    case = small(kind, dtype, parameter_dtype=parameters)

    def run() -> Any:
        return op(kind)(*case, rng(), **KL, recompute_weight=recompute_weight)

    compare(run, case, dtype, 2)


@pytest.mark.parametrize("recompute_weight", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_every_subset_of_gradients(native: None, kind: str, recompute_weight: bool) -> None:
    case = linear_case((4,), 6, 3) if kind == "linear" else conv_case(2, 2, 3, 4, (3, 3), (6, 6))

    def run(*args: Tensor) -> Any:
        return op(kind)(*args, rng(), **KL, recompute_weight=recompute_weight)

    compare_subsets(run, case, torch.float32)


@pytest.mark.parametrize("spatial", [2, 3])
def test_ones_and_formats(native: None, spatial: int) -> None:
    for case, unbatched in ones_and_formats(spatial):
        x = case[0].detach()[0].requires_grad_() if unbatched else case[0]
        arguments = [x, *case[1:]]
        compare(lambda a=arguments: CONV[spatial](*a, rng(), padding=1, **KL), arguments, torch.float32)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_recomputing_changes_no_bit(native: None, kind: str) -> None:
    case = small(kind)
    results = []
    for recompute in (False, True):
        y, kl = op(kind)(*case, rng(), **KL, recompute_weight=recompute)
        results.append([y, kl, *torch.autograd.grad(y.square().sum() + kl, case)])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_gradcheck(backend: str, kind: str) -> None:
    if kind == "linear":
        case = linear_case((3,), 4, 2, dtype=torch.float64)
    else:
        case = conv_case(2, 2, 2, 2, (2, 2), (3, 3), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *args: op(kind)(*args, rng(), **KL), case)


def test_definition(backend: str) -> None:
    """y = x mu^T + b_mu + ((x s) (sigma eps)^T + sigma_b eps_b) r, eps being that of bbb_linear."""
    x, W_mu, W_rho, b_mu, b_rho = (t.detach() for t in linear_case((6,), 5, 4, dtype=torch.float64))
    step = torch.tensor([0, 1])
    W, b = (
        sample_weight(torch.zeros_like(rho), rho, r) for rho, r in ((W_rho, rng()), (b_rho, rng() + step))
    )
    s, r = reference.signs((6, 5), rng(), 2, -1), reference.signs((6, 4), rng(), 3, -1)
    expected = x @ W_mu.t() + b_mu + ((x * s) @ W.t() + b) * r
    y = flipout_linear(x, W_mu, W_rho, b_mu, b_rho, rng())
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    # Undoing a row's signs leaves the draw that bbb_linear shares.
    bbb = bbb_linear(x * s, W_mu * 0, W_rho, b_mu * 0, b_rho, rng())
    torch.testing.assert_close((y - x @ W_mu.t() - b_mu) * r, bbb, rtol=1e-9, atol=1e-9)


def test_moments(backend: str) -> None:
    """Each output is N(m, v); different rows are uncorrelated, where under bbb they are one. 4.5 errors."""
    draws, rows = 2000, 4
    x = torch.randn(1, 7, dtype=torch.float64).expand(rows, 7)
    W = [t.detach() for t in posterior(3, 7, dtype=torch.float64)]
    b = [t.detach() for t in posterior(3, dtype=torch.float64)]
    mean = x @ W[0].t() + b[0]
    v = (x * x) @ reference.softplus(W[1]).square().t() + reference.softplus(b[1]).square()

    def standard(function: Callable[..., Any]) -> Tensor:
        y = torch.stack([function(x, *W, *b, rng(stream=8 * k)) for k in range(draws)])
        return (y - mean) / v.sqrt()

    z = standard(functional.flipout_linear)
    assert z.mean(0).abs().max() < 4.5 / math.sqrt(draws)
    assert (z.square().mean(0) - 1).abs().max() < 4.5 * math.sqrt(2 / draws)
    correlation = torch.einsum("tno,tmo->nmo", z, z) / draws
    off = correlation[~torch.eye(rows, dtype=torch.bool)]
    assert off.abs().max() < 4.5 / math.sqrt(draws)
    shared = standard(functional.bbb_linear)
    assert (torch.einsum("tno,tmo->nmo", shared, shared) / draws).min() > 0.9


def test_only_what_is_said_is_kept(native: None) -> None:
    """Neither the signs nor the flipped operands; sigma * eps, unless it is to be drawn again."""
    case = linear_case((64,), 30, 20)
    for recompute, count in ((False, 1), (True, 0)):
        kept: list[Tensor] = []

        def pack(t: Tensor, kept: list[Tensor] = kept) -> Tensor:
            kept.append(t)
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            flipout_linear(*case, rng(), recompute_weight=recompute)
        own = {t.data_ptr() for t in case}
        others = [t for t in kept if t.data_ptr() not in own and t.numel() > 2]
        assert [list(t.shape) for t in others] == [[20, 30]] * count


def test_accuracy_of_large_batches(native: None) -> None:
    """Sign blocks beyond the first, chunks and threads: a batch large enough for all of them."""
    x, mu, rho = leaf(3000, 37), *posterior(5, 37)
    y = flipout_linear(x, mu, rho, None, None, rng())
    expected: Any = reference.flipout_linear(x, mu, rho, None, None, rng())
    assert_same(y, expected, torch.float32, 4)
