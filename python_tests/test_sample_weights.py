"""sample_weights: native against reference, gradients, the KL in the same pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from helpers import DTYPES, assert_same, grads, leaf, on, posterior, rng
from torch import Tensor

from bbb_fast import functional

# Their outputs are one tensor or two, by their arguments.
sample_weight: Callable[..., Any] = functional.sample_weight
SHAPES = [(), (1,), (3,), (7, 5), (64,), (65,), (4096,), (4097,), (33, 3, 5, 5), (0,), (3, 0, 2)]


def both(leaves: list[Tensor], run: Any, grad_outputs: Sequence[Tensor | None], dtype: torch.dtype) -> None:
    native = on("native", grads, run, leaves, grad_outputs)
    expected = on("reference", grads, run, leaves, grad_outputs)
    for a, b in zip(native[0] + native[1], expected[0] + expected[1], strict=True):
        assert_same(a, b, dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_reference(isa: str, shape: tuple[int, ...]) -> None:
    mu, rho = posterior(*shape)
    both([mu, rho], lambda: sample_weight(mu, rho, rng()), [torch.randn(shape)], torch.float32)


@pytest.mark.parametrize("shape", SHAPES)
def test_with_kl_equals_reference(isa: str, shape: tuple[int, ...]) -> None:
    mu, rho = posterior(*shape)
    both(
        [mu, rho],
        lambda: sample_weight(mu, rho, rng(), 0.05, 0.3, with_kl=True),
        [torch.randn(shape), torch.tensor(0.7)],
        torch.float32,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_kl", [False, True])
def test_dtypes(native: None, dtype: torch.dtype, with_kl: bool) -> None:
    mu, rho = posterior(31, 9, dtype=dtype)
    grad = [torch.randn(31, 9).to(dtype)]
    if with_kl:
        grad.append(torch.tensor(0.7, dtype=torch.float64 if dtype == torch.float64 else torch.float32))
    both([mu, rho], lambda: sample_weight(mu, rho, rng(), with_kl=with_kl), grad, dtype)


@pytest.mark.parametrize("out", DTYPES)
def test_output_dtype(backend: str, out: torch.dtype) -> None:
    mu, rho = posterior(300)
    w: Any = sample_weight(mu, rho, rng(), dtype=out)
    assert w.dtype == out
    assert_same(w, sample_weight(mu, rho, rng()).to(out), out)
    w.sum().backward()
    assert mu.grad is not None and mu.grad.dtype == torch.float32


def test_a_list_takes_consecutive_streams(backend: str) -> None:
    (m0, r0), (m1, r1) = posterior(8, 3), posterior(8)
    weights, kl = functional.sample_weights([m0, m1], [r0, r1], rng(9, 100), with_kl=True)
    assert torch.equal(weights[0], sample_weight(m0, r0, rng(9, 100)))
    assert torch.equal(weights[1], sample_weight(m1, r1, rng(9, 101)))
    torch.testing.assert_close(kl, functional.kl_divergence([m0, m1], [r0, r1]))


def test_list_gradients_equal_reference(isa: str) -> None:
    pairs = [posterior(17, 5), posterior(17), posterior(1)]
    mus, rhos = [p[0] for p in pairs], [p[1] for p in pairs]
    grad = [torch.randn_like(m) for m in mus] + [torch.tensor(1.3)]
    both(
        mus + rhos,
        lambda: functional.sample_weights(mus, rhos, rng(), 0.1, 0.2, with_kl=True),
        grad,
        torch.float32,
    )


@pytest.mark.parametrize("used", ["weight", "kl", "second"])
def test_gradient_of_one_output_alone(backend: str, used: str) -> None:
    """An output that the loss does not use contributes nothing."""
    (m0, r0), (m1, r1) = posterior(40), posterior(6)
    weights, kl = functional.sample_weights([m0, m1], [r0, r1], rng(), with_kl=True)
    {"weight": weights[0].sum(), "kl": kl, "second": weights[1].sum()}[used].backward()
    if used == "weight":
        torch.testing.assert_close(m0.grad, torch.ones(40))
        assert m1.grad is None or not m1.grad.any()
    elif used == "second":
        torch.testing.assert_close(m1.grad, torch.ones(6))
        assert m0.grad is None or not m0.grad.any()
    else:
        torch.testing.assert_close(m0.grad, m0.detach() / 0.01)


def test_strided_parameters(backend: str) -> None:
    mu, rho = posterior(12, 10)
    w: Any = sample_weight(mu.t(), rho.t(), rng())
    assert_same(w, sample_weight(mu.t().contiguous(), rho.t().contiguous(), rng()), torch.float32)
    w.square().sum().backward()
    assert mu.grad is not None and mu.grad.shape == (12, 10)
    channels_last = leaf(4, 3, 5, 5).detach().to(memory_format=torch.channels_last)
    w = sample_weight(channels_last, channels_last, rng())
    assert w.is_contiguous()
    contiguous = channels_last.contiguous()
    assert_same(w, sample_weight(contiguous, contiguous, rng()), torch.float32)


def test_three_forwards_before_one_backward(native: None) -> None:
    mu, rho = posterior(50, 4)

    def run() -> list[Tensor]:
        return [sample_weight(mu, rho, rng(stream=k)) for k in range(3)]

    both([mu, rho], run, [torch.randn(50, 4) for _ in range(3)], torch.float32)


@pytest.mark.parametrize("with_kl", [False, True])
def test_gradcheck(backend: str, with_kl: bool) -> None:
    mu, rho = posterior(4, 3, dtype=torch.float64)
    bias_mu, bias_rho = posterior(4, dtype=torch.float64)

    def run(*args: Tensor) -> tuple[Tensor, ...]:
        weights, kl = functional.sample_weights(args[:2], args[2:], rng(), 0.1, 0.4, with_kl=with_kl)
        return (*weights, kl) if with_kl else tuple(weights)

    assert torch.autograd.gradcheck(run, (mu, bias_mu, rho, bias_rho))


def test_second_derivative_raises(native: None) -> None:
    mu, rho = posterior(3)
    (g,) = torch.autograd.grad(sample_weight(mu, rho, rng()).square().sum(), rho, create_graph=True)
    with pytest.raises(RuntimeError, match="not implemented"):
        g.sum().backward()


@pytest.mark.parametrize("value", [-1e4, -200.0, -100.0, -90.0, -30.0, 0.0, 30.0, 100.0, 1e4])
def test_extreme_rho(isa: str, value: float) -> None:
    """sigma is stable at every rho: never 0 or inf where float32 can hold it, gradients finite."""
    rho = torch.full((70,), value, requires_grad=True)
    mu = torch.zeros(70, requires_grad=True)
    w, kl = sample_weight(mu, rho, rng(), with_kl=True)
    sigma = torch.nn.functional.softplus(torch.tensor(value, dtype=torch.float64))
    expected = (sigma * functional.normal(70, rng()).double()).float()
    torch.testing.assert_close(w.detach(), expected, rtol=1e-5, atol=1.5e-45)
    (w.sum() + kl).backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in (mu, rho))
    exact_kl = on("reference", functional.kl_divergence, mu, rho)
    torch.testing.assert_close(kl, exact_kl, rtol=1e-6, atol=0)


def test_non_finite_parameters_show(backend: str) -> None:
    """NaN and inf propagate; they are not hidden."""
    bad = torch.tensor([float("nan"), float("inf"), 0.0])
    w: Any = sample_weight(torch.zeros(3), bad, rng())
    assert torch.isnan(w[0]) and torch.isinf(w[1]) and torch.isfinite(w[2])
    assert not torch.isfinite(functional.kl_divergence(torch.zeros(3), bad))


def test_thread_count_changes_nothing(isa: str, threads: None) -> None:
    mu, rho = posterior(100_003)
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        outputs, gradients = grads(
            lambda: sample_weight(mu, rho, rng(), with_kl=True),
            [mu, rho],
            [mu.detach(), torch.tensor(0.3)],
        )
        results.append([*outputs, *gradients])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("with_kl", [False, True])
def test_opcheck(native: None, with_kl: bool) -> None:
    (m0, r0), (m1, r1) = posterior(4, 3), posterior(4)
    torch.library.opcheck(
        torch.ops.bbb_fast.sample_weights, ([m0, m1], [r0, r1], rng(), 0.0, 0.1, with_kl, None)
    )
    mu, rho = [m0.detach(), m1.detach()], [r0.detach(), r1.detach()]
    arguments = (mu, rho, rng(), [0.0, 0.1], [0.1, 0.2])
    torch.library.opcheck(
        torch.ops.bbb_fast.posterior_backward, ([torch.randn(4, 3), None], torch.tensor(1.0), *arguments)
    )
    torch.library.opcheck(torch.ops.bbb_fast.posterior_backward, ([None, torch.randn(4)], None, *arguments))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("other", DTYPES)
@pytest.mark.parametrize("shape", [(3, 2), (5000,), (0,)])
def test_backward_forms_again_what_the_forward_formed(
    isa: str, shape: tuple[int, ...], dtype: torch.dtype, other: torch.dtype
) -> None:
    ops, priors = torch.ops.bbb_fast, ([0.0, 0.0], [0.1, 0.1])
    mu = [torch.randn(shape).to(dtype) for _ in range(2)]
    rho = [(torch.randn(shape) - 3).to(dtype) for _ in range(2)]
    grad = [torch.randn(shape).to(other) for _ in range(2)]
    out = [torch.empty_like(m) for m in mu], [torch.empty_like(m) for m in mu]
    weights, _ = ops.sample_weights(mu, rho, rng(), 0.0, 0.1, False, other)
    again = ops.posterior_backward_out(grad, [], None, mu, rho, rng(), *priors, *out, other)
    assert again.dtype == other and torch.equal(again, weights[0])
    variances, _ = ops.variance(mu, rho, 0.0, 0.1, False, other)
    again = ops.posterior_backward_out(grad, grad, None, mu, rho, None, *priors, *out, other)
    assert again.dtype == other and torch.equal(again, variances[0])
    assert ops.posterior_backward_out(grad, grad, None, mu, rho, None, *priors, *out).numel() == 0


def test_backward_rejects_what_does_not_fit(native: None) -> None:
    """Reached by autograd alone, but an op all the same."""
    mu, g, one = [torch.zeros(3, 2)], [torch.ones(3, 2)], torch.tensor(1.0)

    def backward(grad_w: Any, grad_kl: Any, r: Any = None, prior_mu: Any = (0.0,)) -> Any:
        return torch.ops.bbb_fast.posterior_backward(grad_w, grad_kl, mu, mu, r, list(prior_mu), [0.1])

    with pytest.raises(ValueError, match="need the rng they were drawn with"):
        backward(g, one)
    with pytest.raises(ValueError, match="got 2 grad_w for 1 tensors"):
        backward(g * 2, one, rng())
    with pytest.raises(ValueError, match="grad_w 0 must have shape"):
        backward([torch.ones(2, 3)], one, rng())
    with pytest.raises(ValueError, match="grad_kl must be a scalar"):
        backward(g, torch.ones(2), rng())
    with pytest.raises(ValueError, match="1 tensors need 1 priors, got 2 prior_mu"):
        backward(g, one, rng(), (0.0, 0.0))
    with pytest.raises(TypeError, match="rng must be int64"):
        backward(g, one, rng().float())
    with pytest.raises(TypeError, match="grad_w must be float32"):
        backward([g[0].int()], one, rng())
    for gradients in backward([None], None):
        assert not gradients[0].any()
    outs = [torch.zeros(3, 2)], [torch.zeros(3, 2)]
    with pytest.raises(ValueError, match="is formed again with its gradient only"):
        torch.ops.bbb_fast.posterior_backward_out(
            [None], [], one, mu, mu, rng(), [0.0], [0.1], *outs, torch.float32
        )
    with pytest.raises(TypeError, match="again must be float32"):
        torch.ops.bbb_fast.posterior_backward_out(g, [], one, mu, mu, rng(), [0.0], [0.1], *outs, torch.int32)


def test_vmap_over_rng(backend: str) -> None:
    mu, rho = posterior(6, 5)
    rngs = torch.stack([rng(stream=k) for k in range(3)])
    mapped: Any = torch.func.vmap(lambda r: sample_weight(mu, rho, r))(rngs)
    assert_same(mapped, torch.stack([sample_weight(mu, rho, r) for r in rngs]), torch.float32)
