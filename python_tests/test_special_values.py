"""NaN, infinities, zeros, denormals and the ends of float32's range in every argument of every pass: the
result is NaN exactly where it is on the reference path, and agrees elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from helpers import flat, rng
from torch import Tensor

from bbb_fast import functional, reference

NAN, INF = float("nan"), float("inf")
VALUES = [NAN, INF, -INF, 0.0, -0.0, 1e-40, 1e-45, -1e-45, 3e38, -3e38]
RHOS = [*VALUES, -200.0, -104.0, -90.0, -30.0, 30.0, 90.0, 1e4]
# In whole tiles of every instruction set, at their ends, and in what is left.
COUNT, PLACES = 131, [5, 40, 127, 128, 130]
PRIOR_MU, PRIOR_SIGMA = 0.05, 0.4
PRIOR = (PRIOR_MU, PRIOR_SIGMA)
PRIORS = ([PRIOR_MU], [PRIOR_SIGMA])
TYPES = [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.float32, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
]
RTOL = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 1e-4, torch.float64: 1e-4}

ops = torch.ops.bbb_fast


def with_special_values(*named: tuple[str, Tensor]) -> Iterator[tuple[str, list[Tensor]]]:
    """The tensors, every value in each of them in turn; what was put where."""
    for k, (name, tensor) in enumerate(named):
        for value in RHOS if name == "rho" else VALUES:
            tensors = [t.clone() for _, t in named]
            tensors[k] = tensor.clone()
            tensors[k][PLACES] = torch.tensor(value, dtype=torch.float64).to(tensors[k].dtype)
            yield f"{name} = {value}", tensors


def gradients(
    function: Callable[..., Sequence[Tensor]], leaves: Sequence[Tensor], grads: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Results of a reference function and the gradients of its arguments."""
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    outputs = list(function(*leaves))
    return outputs, list(torch.autograd.grad(outputs, leaves, list(grads)))


def check(what: str, got: Sequence[Tensor], expected: Sequence[Tensor], narrow: torch.dtype) -> None:
    for a, b in zip(got, expected, strict=True):
        most = torch.finfo(a.dtype).max
        a, b = a.detach().double(), b.detach().double()
        assert torch.equal(a.isnan(), b.isnan()), what
        # Near the range's end a factor in between, or a rounding, decides whether a result is infinite.
        both_end = (a.abs() > 0.1 * most) & (b.abs() > 0.1 * most) & (a.sign() == b.sign())
        atol = 1e-2 if narrow in (torch.float16, torch.bfloat16) else 1e-5
        close = torch.isclose(a, b, rtol=RTOL[narrow], atol=atol, equal_nan=True)
        assert (close | both_end).all(), (what, a[~(close | both_end)], b[~(close | both_end)])


@pytest.fixture(params=TYPES, ids=lambda pair: "-".join(str(t)[6:] for t in pair))
def types(request: pytest.FixtureRequest) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    """Types of the parameters and the mean, of weights and variances, and the coarser of the two."""
    one, other = request.param
    return one, other, max(one, other, key=lambda t: torch.finfo(t).eps)


def numbers(dtype: torch.dtype) -> Tensor:
    return torch.randn(COUNT).to(dtype)


def one(dtype: torch.dtype, value: float = 1.0) -> Tensor:
    return torch.tensor(value, dtype=torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("with_kl", [False, True])
def test_weights(isa: str, types: tuple[torch.dtype, ...], with_kl: bool) -> None:
    dtype, other, narrow = types
    named = ("mu", numbers(dtype)), ("rho", numbers(dtype) - 2), ("grad", numbers(other))
    grad_kl = one(dtype) if with_kl else None

    def expected(mu: Tensor, rho: Tensor) -> list[Tensor]:
        weights, kl = reference.sample_weights([mu], [rho], rng(), *PRIOR, with_kl, other)
        return [*weights, kl] if with_kl else weights

    for what, (mu, rho, grad) in with_special_values(*named):
        grads = [grad, one(dtype)][: 1 + with_kl]
        outputs, through = gradients(expected, (mu, rho), grads)
        weights, kl = ops.sample_weights([mu], [rho], rng(), *PRIOR, with_kl, other)
        check(what, [*weights, kl][: 1 + with_kl], outputs, narrow)
        got = ops.posterior_backward([grad], grad_kl, [mu], [rho], rng(), *PRIORS)
        check(f"{what}, backward", flat(got), through, narrow)


@pytest.mark.parametrize("with_kl", [False, True])
def test_variances(isa: str, types: tuple[torch.dtype, ...], with_kl: bool) -> None:
    dtype, other, narrow = types
    named = (
        ("mu", numbers(dtype)),
        ("rho", numbers(dtype) - 2),
        ("grad", numbers(other)),
        ("grad of the variance", numbers(other)),
    )
    grad_kl = one(dtype) if with_kl else None

    def expected(mu: Tensor, rho: Tensor) -> list[Tensor]:
        formed = [mu.to(other), reference.variance(rho, other)]
        return [*formed, reference.kl_divergence([mu], [rho], *PRIORS)][: 2 + with_kl]

    for what, (mu, rho, grad, grad_variance) in with_special_values(*named):
        outputs, through = gradients(expected, (mu, rho), [grad, grad_variance, one(dtype)][: 2 + with_kl])
        variances, kl = ops.variance([mu], [rho], *PRIOR, with_kl, other)
        check(what, [*variances, kl][: 1 + with_kl], outputs[1:], narrow)
        got = [torch.empty_like(mu)], [torch.empty_like(rho)]
        ops.posterior_backward_out([grad], [grad_variance], grad_kl, [mu], [rho], None, *PRIORS, *got)
        check(f"{what}, backward", flat(got), through, narrow)


@pytest.mark.parametrize("scale", [1.0, NAN, 0.0])
def test_kl(isa: str, types: tuple[torch.dtype, ...], scale: float) -> None:
    dtype, _, _ = types
    for what, (mu, rho) in with_special_values(("mu", numbers(dtype)), ("rho", numbers(dtype) - 2)):
        if scale == 0 and (rho == rho.new_tensor(3e38)).any():
            continue  # 0 times a derivative beyond float32, which the reference has in float64
        grad_kl = one(dtype, scale)
        outputs, through = gradients(
            lambda m, r: [reference.kl_divergence([m], [r], *PRIORS)], (mu, rho), [grad_kl]
        )
        check(what, [ops.kl_divergence([mu], [rho], *PRIORS)], outputs, torch.float32)
        got = ops.posterior_backward([None], grad_kl, [mu], [rho], None, *PRIORS)
        check(f"{what}, backward", flat(got), through, dtype)


def test_squares(isa: str, types: tuple[torch.dtype, ...]) -> None:
    dtype, other, narrow = types
    named = ("x", numbers(dtype)), ("grad", numbers(other)), ("grad of the mean", numbers(dtype))
    for what, (x, grad, grad_x) in with_special_values(*named):
        check(what, [ops.square(x, other)], [reference.square(x, other)], narrow)
        got = grad_x.clone()
        ops.square_backward_(got, x, grad)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        expected = grad_x.to(wide) + x.to(wide) * grad.to(wide) * 2
        check(f"{what}, backward", [got], [expected.to(dtype)], narrow)


def test_noise_of_local_reparameterization(isa: str, types: tuple[torch.dtype, ...]) -> None:
    dtype, other, narrow = types
    named = ("m", numbers(dtype)), ("v", numbers(other).abs()), ("grad", numbers(dtype))
    for what, (m, v, grad) in with_special_values(*named):
        outputs, (_, through) = gradients(
            lambda m, v: [reference.lrt_sample(m, v, rng(), torch.contiguous_format)], (m, v), [grad]
        )
        got = m.clone()
        ops.lrt_sample_(got, v, rng())
        check(what, [got], outputs, narrow)
        check(f"{what}, backward", [ops.lrt_sample_backward(grad, v, rng())], [through], narrow)
        if what == "v = nan":
            assert got[PLACES].isnan().all()


@pytest.mark.parametrize("name", ["bbb_linear", "lrt_linear"])
@pytest.mark.parametrize("argument", range(5))
def test_nan_reaches_the_output(backend: str, name: str, argument: int) -> None:
    """And what the argument has no part in stays finite."""
    case = [torch.randn(3, 7), torch.randn(5, 7), torch.randn(5, 7) - 2, torch.randn(5), torch.randn(5) - 2]
    case[argument].flatten()[-1] = NAN
    y = getattr(functional, name)(*case, rng())
    assert y.isnan().sum().item() == (5 if argument == 0 else 3)


def test_an_infinite_mean_has_a_gradient(isa: str) -> None:
    """1 through the weight: the KL, which nobody asked for, has no part in it."""
    mu, rho = torch.full((3,), INF, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    grad = torch.ones(3, dtype=torch.float64)
    got, _ = ops.posterior_backward([grad], None, [mu], [rho], rng(), *PRIORS)
    assert torch.equal(got[0], grad)
