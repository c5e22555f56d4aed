"""The CUDA kernels themselves: every dtype pair, length and alignment, long lists, and their barriers.

Run with ``--kernels-on-cpu LIBRARY`` (the kernels' source, block by block on the CPU) or ``--device cuda``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import product

import pytest
import torch
from helpers import DEVICE, DTYPES, KERNELS, flat, kernels, rng, variance_of, variance_slope
from torch import Tensor
from torch.distributions import Normal
from torch.distributions import kl_divergence as exact_kl
from torch.nn.functional import softplus

from bbb_fast import reference

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("native")]

ops = torch.ops.bbb_fast
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16

# A vector is 4 or 8 elements, a block's step over a chunk 1,024 or 2,048, a chunk 4,096, and the emulated
# device takes three chunks at a time.
SIZES = (0, 1, 3, 4, 5, 7, 8, 9, 255, 256, 257, 1023, 1024, 1025, 4095, 4096, 4097, 8191, 8193, 12289, 70001)
PAIRS = [(F32, F32), (F64, F64), (BF16, BF16), (F16, F16), (F32, BF16), (BF16, F32), (F16, F32), (F64, F16)]
ALL_PAIRS = list(product(DTYPES, DTYPES))
PRIOR = (0.05, 0.4)


def assert_kl(kl: Tensor, exact: Tensor, tolerance: float = 1e-6) -> None:
    """Six digits, of the KL or of the numbers of size 1 that a few weights' KL is a difference of."""
    torch.testing.assert_close(kl.double(), exact, rtol=tolerance, atol=2 * tolerance)


def wide(*tensors: Tensor) -> torch.dtype:
    return reference.accumulate_dtype(*tensors)


def assert_rounded(result: Tensor, exact: Tensor, dtype: torch.dtype, size: float = 0.0) -> None:
    """``result`` is ``exact``, which has more digits, rounded once to ``dtype``.

    Beside half a unit of the last place it may be off by what float32 mathematics and noise are, 1e-5, of the
    number itself and of ``size``, the largest summand behind it.
    """
    assert result.dtype == dtype and result.shape == exact.shape
    assert result.device.type == DEVICE.type
    half_unit = {F32: 2.0**-24, F64: 2.0**-53, BF16: 2.0**-8, F16: 2.0**-11}[dtype]
    off = (result.double() - exact.double()).abs()
    # Half the distance of float16's subnormal numbers.
    allowed = (half_unit + 1e-5) * exact.double().abs() + (2.0**-25 if dtype == F16 else 0.0)
    allowed += 2e-6 + 1e-5 * size
    assert bool((off <= allowed).all()), f"off by {float((off - allowed).max())} beyond what is allowed"


def kl_of(mu: Sequence[Tensor], rho: Sequence[Tensor], prior: Sequence[tuple[float, float]]) -> Tensor:
    """In float64, by torch.distributions."""
    total = torch.zeros((), dtype=F64)
    for m, r, numbers in zip(mu, rho, prior, strict=True):
        mean, deviation = (torch.tensor(n, dtype=F64) for n in numbers)
        p = Normal(mean, deviation)
        total = total + exact_kl(Normal(m.double(), softplus(r.double())), p).sum()
    return total


def parameters(count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return (torch.randn(count) * 0.3).to(dtype), (torch.randn(count) - 1.5).to(dtype)


def exact_gradients(
    mu: Sequence[Tensor],
    rho: Sequence[Tensor],
    grad_w: Sequence[Tensor | None],
    grad_kl: Tensor | None,
    prior: Sequence[tuple[float, float]],
) -> tuple[list[Tensor], list[Tensor]]:
    """Of mu and rho, through the reference, in the type its mathematics runs in."""
    acc = wide(*mu)
    m, r = ([t.to(acc).requires_grad_() for t in ts] for ts in (mu, rho))
    weights, _ = reference.sample_weights(m, r, rng(), dtype=acc)
    loss = sum((t.sum() * 0 for t in (*m, *r)), torch.zeros((), dtype=acc))
    for w, g in zip(weights, grad_w, strict=True):
        if g is not None:
            loss = loss + (w * g.to(acc)).sum()
    if grad_kl is not None:
        loss = loss + grad_kl * reference.kl_divergence(m, r, *zip(*prior, strict=True))
    result = torch.autograd.grad(loss, [*m, *r])
    return list(result[: len(m)]), list(result[len(m) :])


def backward(
    grad_w: Sequence[Tensor | None],
    grad_kl: Tensor | None,
    mu: Sequence[Tensor],
    rho: Sequence[Tensor],
    priors: Sequence[tuple[float, float]] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of mu and rho; the prior of each tensor is PRIOR unless given."""
    numbers = zip(*(priors or [PRIOR] * len(mu)), strict=True)
    r = rng() if any(g is not None for g in grad_w) else None
    return ops.posterior_backward(list(grad_w), grad_kl, list(mu), list(rho), r, *map(list, numbers))


class TestSizes:
    """Every length at which vectors, steps, chunks or blocks begin or end."""

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("count", SIZES)
    def test_normal(self, count: int, dtype: torch.dtype) -> None:
        noise = ops.normal([count], rng(), dtype)
        assert_rounded(noise, reference.normal((count,), rng()), dtype)

    @pytest.mark.parametrize("dtype", [F32, F64, BF16])
    @pytest.mark.parametrize("count", SIZES)
    def test_sample_weights(self, count: int, dtype: torch.dtype) -> None:
        mu, rho = parameters(count, dtype)
        (w,), kl = ops.sample_weights([mu], [rho], rng(), *PRIOR, True, None)
        acc = wide(mu)
        (exact,), _ = reference.sample_weights([mu.to(acc)], [rho.to(acc)], rng(), dtype=acc)
        assert_rounded(w, exact, dtype)
        assert_kl(kl, kl_of([mu], [rho], [PRIOR]))
        (without,), zero = ops.sample_weights([mu], [rho], rng(), *PRIOR, False, None)
        assert torch.equal(without, w)
        assert zero.dtype == kl.dtype and zero.shape == () and float(zero) == 0

        grad, grad_kl = torch.randn(count).to(dtype), torch.tensor(0.7, dtype=acc)
        g_mu, g_rho = backward([grad], grad_kl, [mu], [rho])
        exact_mu, exact_rho = exact_gradients([mu], [rho], [grad], grad_kl, [PRIOR])
        assert_rounded(g_mu[0], exact_mu[0], dtype, 10)
        assert_rounded(g_rho[0], exact_rho[0], dtype, 10)

    @pytest.mark.parametrize("dtype", [F32, F64, BF16])
    @pytest.mark.parametrize("count", SIZES)
    def test_kl_divergence(self, count: int, dtype: torch.dtype) -> None:
        mu, rho = parameters(count, dtype)
        kl = ops.kl_divergence([mu], [rho], [PRIOR[0]], [PRIOR[1]])
        assert kl.dtype == wide(mu) and kl.shape == ()
        assert_kl(kl, kl_of([mu], [rho], [PRIOR]))
        grad = torch.tensor(-1.3, dtype=kl.dtype)
        g_mu, g_rho = backward([None], grad, [mu], [rho])
        exact_mu, exact_rho = exact_gradients([mu], [rho], [None], grad, [PRIOR])
        assert_rounded(g_mu[0], exact_mu[0], dtype, 10)
        assert_rounded(g_rho[0], exact_rho[0], dtype, 10)

    @pytest.mark.parametrize("dtype", [F32, F64, BF16])
    @pytest.mark.parametrize("count", SIZES)
    def test_passes_beside_the_products(self, count: int, dtype: torch.dtype) -> None:
        check_passes(count, dtype, dtype)


def check_passes(count: int, dtype: torch.dtype, other: torch.dtype) -> None:
    """variance, square and lrt_sample, forward and backward; dtypes as in helpers.kernels."""
    _, rho = parameters(count, dtype)
    a, b, c, e = (torch.randn(count) for _ in range(4))
    x, grad_x, formed = a.to(dtype), b.to(dtype), c.to(other)
    acc = wide(x)

    leaf = rho.to(acc).requires_grad_()
    exact = reference.variance(leaf, acc)
    (slope,) = torch.autograd.grad(exact, leaf, formed.to(acc))
    assert_rounded(variance_of(rho, other), exact.detach(), other)
    assert_rounded(variance_slope(formed, rho), slope, dtype)

    assert_rounded(ops.square(x, other), x.double() ** 2, other)
    exact = grad_x.double() + 2 * x.double() * formed.double()
    ops.square_backward_(grad_x, x, formed)
    assert_rounded(grad_x, exact, dtype, 10)

    v = e.abs().to(other)
    if count > 2:
        v[count // 2] = 0.0
    exact = reference.lrt_sample(x.to(acc), v.to(acc), rng(), torch.contiguous_format)
    leaf = v.to(acc).requires_grad_()
    y = reference.lrt_sample(torch.zeros_like(leaf), leaf, rng(), torch.contiguous_format)
    (slope,) = torch.autograd.grad(y, leaf, x.to(acc))
    assert_rounded(ops.lrt_sample_backward(x, v, rng()), slope, other)
    m = x.clone()
    ops.lrt_sample_(m, v, rng())
    assert_rounded(m, exact, dtype, 5)


class TestDtypes:
    """All sixteen pairs, also those that no layer makes; more than a chunk and less than two."""

    @pytest.mark.parametrize(("dtype", "other"), ALL_PAIRS)
    @pytest.mark.parametrize("with_kl", [False, True])
    def test_sample_weights(self, dtype: torch.dtype, other: torch.dtype, with_kl: bool) -> None:
        mu, rho = parameters(4099, dtype)
        (w,), kl = ops.sample_weights([mu], [rho], rng(), *PRIOR, with_kl, other)
        acc = wide(mu)
        (exact,), _ = reference.sample_weights([mu.to(acc)], [rho.to(acc)], rng(), dtype=acc)
        assert_rounded(w, exact, other)
        assert kl.dtype == acc
        expected = kl_of([mu], [rho], [PRIOR]) if with_kl else torch.zeros((), dtype=F64)
        assert_kl(kl, expected)
        grad = torch.randn(4099).to(other)
        grad_kl = torch.tensor(0.7, dtype=acc) if with_kl else None
        g_mu, g_rho = backward([grad], grad_kl, [mu], [rho])
        exact_mu, exact_rho = exact_gradients([mu], [rho], [grad], grad_kl, [PRIOR])
        assert_rounded(g_mu[0], exact_mu[0], dtype, 10)
        assert_rounded(g_rho[0], exact_rho[0], dtype, 10)

    @pytest.mark.parametrize("dtypes", [(F32, BF16), (F16, BF16), (BF16, F64), (F32, F16, BF16)])
    def test_weights_gradients_of_several_dtypes(self, dtypes: tuple[torch.dtype, ...]) -> None:
        pairs = [parameters(301, F32) for _ in dtypes]
        mu, rho = ([p[k] for p in pairs] for k in (0, 1))
        grads = [torch.randn(301).to(t) for t in dtypes]
        g_mu, g_rho = backward(grads, None, mu, rho)
        exact = exact_gradients(mu, rho, grads, None, [PRIOR] * len(mu))
        for a, b in zip([*g_mu, *g_rho], flat(exact), strict=True):
            assert_rounded(a, b, F32, 5)

    @pytest.mark.parametrize(("dtype", "other"), ALL_PAIRS)
    def test_passes_beside_the_products(self, dtype: torch.dtype, other: torch.dtype) -> None:
        check_passes(4099, dtype, other)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("prior", [(0.0, 0.1), (0.3, 1.7), (-2.0, 0.013)])
    def test_kl_divergence(self, dtype: torch.dtype, prior: tuple[float, float]) -> None:
        mu, rho = parameters(20_011, dtype)
        kl = ops.kl_divergence([mu], [rho], [prior[0]], [prior[1]])
        tolerance = 1e-12 if dtype == F64 else 1e-6
        assert_kl(kl, kl_of([mu], [rho], [prior]), tolerance)

    @pytest.mark.parametrize("dtype", [F32, F64])
    @pytest.mark.parametrize("value", [-12.0, -3.0, -1.0, 0.5])
    def test_kl_of_equal_weights(self, dtype: torch.dtype, value: float) -> None:
        """Every rounding error has the same sign, the worst case of a sum."""
        mu, rho = torch.full((200_000,), 0.05, dtype=dtype), torch.full((200_000,), value, dtype=dtype)
        kl = ops.kl_divergence([mu], [rho], [0.0], [0.1])
        torch.testing.assert_close(kl.double(), kl_of([mu], [rho], [(0.0, 0.1)]), rtol=1e-6, atol=0)

    @pytest.mark.parametrize(
        "value", [-1e4, -200.0, -100.0, -89.0, -30.0, 30.0, 100.0, 1e4, math.inf, math.nan]
    )
    def test_extreme_rho(self, value: float) -> None:
        mu, rho = parameters(300, F32)
        rho[150] = value
        (w,), kl = ops.sample_weights([mu], [rho], rng(), *PRIOR, True, None)
        (exact,), expected = reference.sample_weights([mu], [rho], rng(), *PRIOR, True)
        torch.testing.assert_close(w, exact, rtol=1e-5, atol=1e-5, equal_nan=True)
        assert bool(kl.isfinite()) == math.isfinite(value)
        if math.isfinite(value):
            torch.testing.assert_close(kl, expected, rtol=1e-6, atol=0)
            gradients = flat(backward([w], torch.tensor(1.0), [mu], [rho]))
            assert all(g.isfinite().all() for g in gradients)


ALIGNMENT_CASES = [(name, operand) for name, operands in KERNELS.items() for operand in operands]


def misplaced(t: Tensor, offset: int, sentinel: float = -77.0) -> tuple[Tensor, Tensor]:
    """A contiguous copy of ``t`` that starts ``offset`` elements into a larger buffer; and the buffer."""
    buffer = torch.full((t.numel() + 16,), sentinel, dtype=t.dtype)
    place = buffer[offset : offset + t.numel()]
    place.copy_(t)
    assert place.is_contiguous() and place.storage_offset() == offset
    return place, buffer


class TestMemory:
    @pytest.mark.parametrize(("dtype", "other"), PAIRS)
    @pytest.mark.parametrize(("name", "operand"), ALIGNMENT_CASES)
    def test_misaligned_operand(
        self, name: str, operand: str, dtype: torch.dtype, other: torch.dtype
    ) -> None:
        """Slices that no vector can start at: the bits are those of the aligned run."""
        kernel = kernels(8197, dtype, other)[name]
        expected = kernel()
        for offset in range(1, 8):
            place, _ = misplaced(kernel.operands[operand], offset)
            for a, b in zip(kernel(**{operand: place}), expected, strict=True):
                assert torch.equal(a, b), offset

    @pytest.mark.parametrize(("dtype", "other"), PAIRS)
    @pytest.mark.parametrize("name", [n for n, operands in KERNELS.items() if operands])
    def test_all_operands_misaligned(self, name: str, dtype: torch.dtype, other: torch.dtype) -> None:
        """Alike, so that they could be vectors of each other; and each by a number of its own."""
        kernel = kernels(4100, dtype, other)[name]
        expected = kernel()
        for offsets in ((1, 1, 1), (2, 2, 2), (4, 4, 4), (1, 2, 3), (8, 4, 2), (8, 8, 8)):
            places = {
                operand: misplaced(t, offset)[0]
                for (operand, t), offset in zip(kernel.operands.items(), offsets, strict=False)
            }
            for a, b in zip(kernel(**places), expected, strict=True):
                assert torch.equal(a, b), offsets

    @pytest.mark.parametrize(("dtype", "other"), PAIRS)
    @pytest.mark.parametrize("name", ["lrt_sample_", "square_backward_"])
    @pytest.mark.parametrize("count", SIZES)
    def test_neighbours_in_memory_stay(
        self, name: str, count: int, dtype: torch.dtype, other: torch.dtype
    ) -> None:
        """Ops that write in place, on a part of a buffer; and they leave their other operands alone."""
        kernel = kernels(count, dtype, other)[name]
        assert kernel.in_place is not None
        expected = kernel()
        for offset in (1, 3, 8):
            given, buffers, before = {}, {}, {}
            for operand, t in kernel.operands.items():
                given[operand], buffers[operand] = misplaced(t, offset)
                before[operand] = buffers[operand].clone()
            (result,) = kernel(**given)
            assert torch.equal(result, expected[0])
            before[kernel.in_place][offset : offset + count] = expected[0]
            for operand, buffer in buffers.items():
                assert torch.equal(buffer, before[operand]), operand

    def test_operands_stay(self) -> None:
        """Nothing but what an op is said to write to changes."""
        for name, kernel in kernels(4100, F32, F32).items():
            given = {operand: t.clone() for operand, t in kernel.operands.items()}
            kernel(**given)
            for operand, t in given.items():
                if operand != kernel.in_place:
                    assert torch.equal(t, kernel.operands[operand]), (name, operand)

    def test_strided_rng(self) -> None:
        """Seed and stream are read where they are, not in the two places after the first."""
        table = torch.tensor([[9, 0, 3], [100, 0, 3]])
        assert not table[:, 0].is_contiguous()
        assert torch.equal(ops.normal([50], table[:, 0], F32), ops.normal([50], rng(9, 100), F32))
        mu, rho = parameters(50, F32)
        a = ops.sample_weights([mu, mu], [rho, rho], table[:, 0], *PRIOR, False, None)[0]
        b = ops.sample_weights([mu, mu], [rho, rho], rng(9, 100), *PRIOR, False, None)[0]
        assert all(map(torch.equal, a, b))
        y, z = mu.clone(), mu.clone()
        ops.lrt_sample_(y, rho.abs(), table[:, 0])
        ops.lrt_sample_(z, rho.abs(), rng(9, 100))
        assert torch.equal(y, z)

    @pytest.mark.parametrize("view", [lambda t: t.t(), lambda t: t[:, ::2], lambda t: t[::3, 1:]])
    def test_strided_operands(self, view: Callable[[Tensor], Tensor]) -> None:
        mu, rho = (view(t.reshape(60, 70)) for t in parameters(4200, F32))
        grad, one = torch.randn(90, 90)[: mu.shape[0], : mu.shape[1]], torch.tensor(1.0)
        m, r, g = (t.contiguous() for t in (mu, rho, grad))
        for a, b in (
            (
                ops.sample_weights([mu], [rho], rng(), *PRIOR, True, None),
                ops.sample_weights([m], [r], rng(), *PRIOR, True, None),
            ),
            (
                backward([grad], one, [mu], [rho]),
                backward([g], one, [m], [r]),
            ),
            (ops.kl_divergence([mu], [rho], [0.0], [0.1]), ops.kl_divergence([m], [r], [0.0], [0.1])),
            (variance_of(rho, BF16), variance_of(r, BF16)),
            (variance_slope(grad, rho), variance_slope(g, r)),
            (ops.square(mu, F32), ops.square(m, F32)),
        ):
            for x, y in zip(flat(a), flat(b), strict=True):
                assert torch.equal(x, y)


# A launch holds 30 to 80 tensors, by the op and dtype.
COUNTS = (1, 2, 3, 40, 44, 45, 63, 64, 65, 128, 150)
LENGTHS = (33, 0, 5, 4096, 1, 4097, 256, 0, 1000, 3, 8195)


def many(count: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], list[tuple[float, float]]]:
    """Tensors of mixed lengths, empty ones too, and a prior for each."""
    pairs = [parameters(LENGTHS[k % len(LENGTHS)], dtype) for k in range(count)]
    priors = [(0.01 * (k % 7), 0.2 + 0.1 * (k % 5)) for k in range(count)]
    return [m for m, _ in pairs], [r for _, r in pairs], priors


class TestLists:
    """One launch holds so many tensors; a list may be longer, and its tensors empty."""

    @pytest.mark.parametrize("dtype", [F32, BF16, F64])
    @pytest.mark.parametrize("count", COUNTS)
    def test_sample_weights(self, count: int, dtype: torch.dtype) -> None:
        mu, rho, _ = many(count, dtype)
        weights, kl = ops.sample_weights(mu, rho, rng(), *PRIOR, True, None)
        acc = wide(*mu)
        exact, _ = reference.sample_weights([m.to(acc) for m in mu], [r.to(acc) for r in rho], rng())
        for w, expected in zip(weights, exact, strict=True):
            assert_rounded(w, expected, dtype)
        assert_kl(kl, kl_of(mu, rho, [PRIOR] * count))
        without, zero = ops.sample_weights(mu, rho, rng(), *PRIOR, False, None)
        assert float(zero) == 0 and all(map(torch.equal, without, weights))

    @pytest.mark.parametrize("given", ["all", "some", "none", "first", "last"])
    @pytest.mark.parametrize("count", COUNTS)
    def test_posterior_backward(self, count: int, given: str) -> None:
        mu, rho, priors = many(count, F32)
        chosen = {
            "all": range(count),
            "some": range(0, count, 3),
            "none": (),
            "first": (0,),
            "last": (count - 1,),
        }[given]
        grads = [torch.randn_like(m) if k in chosen else None for k, m in enumerate(mu)]
        for grad_kl in (None, torch.tensor(0.7)):
            g_mu, g_rho = backward(grads, grad_kl, mu, rho, priors)
            exact = exact_gradients(mu, rho, grads, grad_kl, priors)
            for a, b in zip([*g_mu, *g_rho], flat(exact), strict=True):
                assert_rounded(a, b, F32, 10)
                if given == "none" and grad_kl is None:
                    assert not a.any()

    @pytest.mark.parametrize("dtype", [F32, BF16, F64])
    @pytest.mark.parametrize("count", COUNTS)
    def test_kl_divergence(self, count: int, dtype: torch.dtype) -> None:
        mu, rho, priors = many(count, dtype)
        numbers = [list(n) for n in zip(*priors, strict=True)]
        kl = ops.kl_divergence(mu, rho, *numbers)
        assert_kl(kl, kl_of(mu, rho, priors))
        grad = torch.tensor(0.3, dtype=kl.dtype)
        g_mu, g_rho = backward([None] * count, grad, mu, rho, priors)
        exact = exact_gradients(mu, rho, [None] * count, grad, priors)
        for a, b in zip([*g_mu, *g_rho], flat(exact), strict=True):
            assert_rounded(a, b, dtype, 10)

    @pytest.mark.parametrize("count", [1, 3, 150])
    def test_all_empty(self, count: int) -> None:
        mu = [torch.empty(0, 3 + k) for k in range(count)]
        weights, kl = ops.sample_weights(mu, mu, rng(), *PRIOR, True, BF16)
        assert [w.shape for w in weights] == [m.shape for m in mu] and float(kl) == 0
        assert float(ops.sample_weights(mu, mu, rng(), *PRIOR, False, None)[1]) == 0
        assert float(ops.kl_divergence(mu, mu, [0.0] * count, [0.1] * count)) == 0
        g_mu, g_rho = backward(mu, torch.tensor(1.0), mu, mu)
        assert [g.shape for g in (*g_mu, *g_rho)] == [m.shape for m in mu] * 2

    def test_a_tensor_s_place_in_the_list_sets_its_stream_alone(self) -> None:
        """The same weights alone, and far down a list of others."""
        mu, rho, _ = many(150, F32)
        weights, _ = ops.sample_weights(mu, rho, rng(7, 1000), *PRIOR, False, None)
        for k in (0, 3, 99, 149):
            (alone,), _ = ops.sample_weights([mu[k]], [rho[k]], rng(7, 1000 + k), *PRIOR, False, None)
            assert torch.equal(alone, weights[k])


@pytest.fixture
def scheduler() -> Iterator[torch._ops._OpNamespace]:
    """The ops that steer the emulation; afterwards it runs as before."""
    blocks = torch.ops.bbb_fast_blocks
    yield blocks
    blocks.set_order("forward")
    blocks.set_barriers(True)


ORDERS = ("forward", "reverse", "shuffled")


@pytest.mark.blocks_only
class TestOrder:
    """Threads of a block run in any order on a GPU; the bits must not depend on it."""

    @pytest.mark.parametrize(("dtype", "other"), [(F32, F32), (F32, BF16), (BF16, BF16), (F64, F64)])
    @pytest.mark.parametrize("name", KERNELS)
    def test_changes_nothing(
        self, scheduler: torch._ops._OpNamespace, name: str, dtype: torch.dtype, other: torch.dtype
    ) -> None:
        kernel = kernels(70_001, dtype, other)[name]
        results = []
        for order in (*ORDERS, "shuffled"):
            scheduler.set_order(order)
            results.append(kernel())
        for result in results[1:]:
            assert all(map(torch.equal, result, results[0]))

    @pytest.mark.parametrize("count", [1, 40, 150])
    def test_changes_no_list(self, scheduler: torch._ops._OpNamespace, count: int) -> None:
        mu, rho, priors = many(count, F32)
        numbers = [list(n) for n in zip(*priors, strict=True)]
        results = []
        for order in ORDERS:
            scheduler.set_order(order)
            results.append(
                [
                    ops.kl_divergence(mu, rho, *numbers),
                    *flat(ops.sample_weights(mu, rho, rng(), *PRIOR, True, None)),
                    *flat(backward(mu, torch.tensor(0.3), mu, rho)),
                ]
            )
        for result in results[1:]:
            assert all(map(torch.equal, result, results[0]))

    @pytest.mark.parametrize("name", ["kl_divergence", "sample_weights"])
    def test_a_missing_barrier_would_show(self, scheduler: torch._ops._OpNamespace, name: str) -> None:
        """Without the barriers the KL is wrong in some order: the tests above can fail."""
        kernel = kernels(70_001, F32, F32)[name]
        right = kernel()[-1]
        scheduler.set_barriers(False)
        wrong = []
        for order in ORDERS:
            scheduler.set_order(order)
            wrong.append(not torch.equal(kernel()[-1], right))
        assert any(wrong)
        scheduler.set_barriers(True)
        scheduler.set_order("forward")
        assert torch.equal(kernel()[-1], right)

    def test_unknown_order(self, scheduler: torch._ops._OpNamespace) -> None:
        with pytest.raises(ValueError, match="order must be forward, reverse or shuffled"):
            scheduler.set_order("sideways")

    def test_launches_are_counted(self, scheduler: torch._ops._OpNamespace) -> None:
        before = scheduler.launches()
        ops.normal([5], rng(), F32)
        assert scheduler.launches() == before + 1
        ops.normal([0], rng(), F32)
        assert scheduler.launches() == before + 1
