"""Learned noise: losses against closed forms and other libraries, gradients, noise that is found again."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, DTYPES, rng
from torch import Tensor, nn

from bbb_fast import ELBO, convert, fixed_noise, kl_loss, metrics, multi_sample, posterior_means, predict
from bbb_fast.functional import normal
from bbb_fast.layers import BBB_LRT
from bbb_fast.methods import (
    GaussianNoise,
    HeteroscedasticHead,
    SampledSoftmax,
    gaussian_nll,
    sampled_logits_nll,
)

F64 = torch.float64


def outputs(*shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, 2, dtype=F64).to(dtype)


# --- Regression -----------------------------------------------------------------------------------


def test_gaussian_nll_by_hand() -> None:
    output = torch.tensor([[1.0, 0.0], [2.0, math.log(4.0)]])
    y = torch.tensor([1.0, 0.0])  # z = 0 and -1
    half = 0.5 * math.log(2 * math.pi)
    expected = torch.tensor([half, half + math.log(2.0) + 0.5])
    torch.testing.assert_close(gaussian_nll(output, y, reduction="none"), expected)
    assert gaussian_nll(output, y).item() == pytest.approx(expected.mean().item())
    assert gaussian_nll(output, y, reduction="sum").item() == pytest.approx(expected.sum().item())


@pytest.mark.parametrize("shape", [(20,), (20, 3), (20, 2, 4)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gaussian_nll_is_minus_the_log_density(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    output, y = outputs(*shape, dtype=dtype), torch.randn(shape, dtype=F64).to(dtype)
    mean, log_variance = output.double().unbind(-1)
    expected = -torch.distributions.Normal(mean, (log_variance / 2).exp()).log_prob(y.double())
    losses = gaussian_nll(output, y, reduction="none")
    assert losses.shape == shape and losses.dtype == (F64 if dtype == F64 else torch.float32)
    tolerance = 1e-12 if dtype == F64 else 2e-5
    torch.testing.assert_close(losses.double(), expected, rtol=tolerance, atol=tolerance)
    rows = expected.flatten(1).sum(1) if len(shape) > 1 else expected
    assert gaussian_nll(output, y).item() == pytest.approx(rows.mean().item(), rel=1e-5)
    assert gaussian_nll(output, y, reduction="sum").item() == pytest.approx(rows.sum().item(), rel=1e-5)
    if len(shape) < 3:
        density = metrics.gaussian_log_density(mean, log_variance.exp(), y)
        assert gaussian_nll(output, y).item() == pytest.approx(-density.mean().item(), rel=1e-5)


def test_gaussian_nll_against_torch() -> None:
    output, y = outputs(30, 4), torch.randn(30, 4, dtype=F64)
    mean, log_variance = output.unbind(-1)
    expected = F.gaussian_nll_loss(mean, y, log_variance.exp(), full=True, reduction="sum")
    torch.testing.assert_close(gaussian_nll(output, y, reduction="sum"), expected)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradients_of_gaussian_nll(beta: float, reduction: str) -> None:
    output, y = outputs(5, 3).requires_grad_(), torch.randn(5, 3, dtype=F64).requires_grad_()
    weights = output.detach()[..., 1].mul(beta).exp()

    # The factor of beta has no gradient, so that the loss with it fixed is what the gradient is of.
    def fixed(output: Tensor, y: Tensor) -> Tensor:
        losses = gaussian_nll(output, y, reduction="none") * weights
        return losses if reduction == "none" else losses.sum() / (5 if reduction == "mean" else 1)

    assert torch.autograd.gradcheck(fixed, (output, y))
    loss = gaussian_nll(output, y, beta=beta, reduction=reduction)
    torch.testing.assert_close(loss, fixed(output, y))
    for ours, expected in zip(
        torch.autograd.grad(loss.sum(), (output, y)),
        torch.autograd.grad(fixed(output, y).sum(), (output, y)),
        strict=True,
    ):
        torch.testing.assert_close(ours, expected)
    if beta == 0.0:
        assert torch.autograd.gradgradcheck(lambda o, t: gaussian_nll(o, t, reduction=reduction), (output, y))


def test_beta_one_gives_the_mean_the_gradient_of_a_squared_error() -> None:
    output, y = outputs(6).requires_grad_(), torch.randn(6, dtype=F64)
    (grad,) = torch.autograd.grad(gaussian_nll(output, y, beta=1.0, reduction="sum"), output)
    torch.testing.assert_close(grad[:, 0], (output - y.unsqueeze(-1)).detach()[:, 0])


def test_extreme_variances_have_no_floor() -> None:
    # Standard deviations of e^-40 and e^40 in float32, at errors of their own size.
    output = torch.tensor([[0.0, -80.0], [0.0, 80.0]], requires_grad=True)
    y = torch.tensor([math.exp(-40.0), math.exp(40.0)])
    losses = gaussian_nll(output, y, reduction="none")
    half = 0.5 * math.log(2 * math.pi) + 0.5
    torch.testing.assert_close(losses, torch.tensor([half - 40, half + 40]))
    (grad,) = torch.autograd.grad(losses.sum(), output)
    torch.testing.assert_close(grad[:, 1], torch.zeros(2), rtol=0, atol=1e-5)  # at the best variance
    assert gaussian_nll(torch.tensor([[0.0, -160.0]]), torch.zeros(1)).item() == pytest.approx(half - 80.5)


def noisy_line(rows: int = 400) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.rand(rows, 1) * 4 - 2
    std = 0.1 + 0.4 * (x.squeeze(-1) > 0)
    return x, 2 * x.squeeze(-1) - 1 + std * torch.randn(rows), std


@pytest.mark.parametrize("layer", [nn.Linear, BBB_LRT.BBBLinear])
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_a_head_learns_where_the_noise_is(layer: Callable[[int, int], nn.Module], beta: float) -> None:
    x, y, _ = noisy_line()
    model = nn.Sequential(nn.Linear(1, 30), nn.Tanh(), HeteroscedasticHead(30, layer=layer))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(400):
        optimizer.zero_grad()
        loss = gaussian_nll(model(x), y, beta=beta)
        if layer is not nn.Linear:
            loss = loss + kl_loss(model) / 20_000
        loss.backward()
        optimizer.step()
    at = torch.tensor([[-1.5], [-1.0], [1.0], [1.5]])
    mean, log_variance = predict(model, at, 50).mean(0).unbind(-1)
    torch.testing.assert_close(mean, 2 * at.squeeze(-1) - 1, rtol=0, atol=0.25)
    std = (log_variance / 2).exp().tolist()
    assert std[:2] == pytest.approx([0.1, 0.1], rel=0.6)
    assert std[2:] == pytest.approx([0.5, 0.5], rel=0.35)


def test_shapes_of_the_head() -> None:
    for targets, shape in ((1, (5, 2)), (3, (5, 3, 2))):
        head = HeteroscedasticHead(4, targets)
        assert head(torch.randn(5, 4)).shape == shape
        assert gaussian_nll(head(torch.randn(5, 4)), torch.randn(shape[:-1])).dim() == 0
    assert HeteroscedasticHead(4, 3)(torch.randn(2, 7, 4)).shape == (2, 7, 3, 2)
    # A target's two numbers lie side by side in the layer's output.
    head = HeteroscedasticHead(4, 3)
    x = torch.randn(5, 4)
    torch.testing.assert_close(head(x).flatten(1), head.layer(x))
    assert "targets=3" in repr(head)
    converted = convert(head)
    assert isinstance(converted.layer, BBB_LRT.BBBLinear) and converted(x).shape == (5, 3, 2)


def test_gaussian_noise_is_the_root_mean_squared_error() -> None:
    """The maximum likelihood of the noise around given means has a closed form."""
    mean, y = torch.randn(200, 3), torch.randn(200, 3) * torch.tensor([0.1, 1.0, 5.0])
    for noise, expected in (
        (GaussianNoise(0.5), (y - mean).square().mean().sqrt()),
        (GaussianNoise(0.5, targets=3), (y - mean).square().mean(0).sqrt()),
    ):
        optimizer = torch.optim.LBFGS(noise.parameters(), max_iter=50, line_search_fn="strong_wolfe")

        def closure(noise: GaussianNoise = noise, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = gaussian_nll(noise(mean), y)
            loss.backward()
            return loss

        optimizer.step(closure)
        torch.testing.assert_close(noise.std.detach(), expected, rtol=1e-3, atol=0)


def test_gaussian_noise_is_learned_with_the_model() -> None:
    x = torch.randn(500, 2)
    y = x @ torch.tensor([[1.0], [-2.0]]) + 0.3 * torch.randn(500, 1)
    model: Any = nn.Sequential(nn.Linear(2, 1), GaussianNoise())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        gaussian_nll(model(x), y).backward()
        optimizer.step()
    assert model[1].std.item() == pytest.approx(0.3, rel=0.1)
    mean, log_variance = model(x).unbind(-1)
    assert mean.shape == y.shape and log_variance.unique().numel() == 1
    report = metrics.regression_report(mean, log_variance.exp(), y)
    assert report["picp"] == pytest.approx(0.95, abs=0.03) and report["rmse"] == pytest.approx(0.3, rel=0.1)


def test_gaussian_noise_keeps_shape_and_dtype() -> None:
    noise = GaussianNoise(2.0)
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (F64, F64)):
        for shape in ((4,), (4, 3), (0, 2), (2, 3, 5)):
            output = noise(torch.ones(shape, dtype=dtype))
            assert output.shape == (*shape, 2) and output.dtype == expected
            torch.testing.assert_close(output[..., 1], torch.full_like(output[..., 1], math.log(4.0)))
    twin = copy.deepcopy(noise)
    assert list(noise.state_dict()) == ["log_std"] and twin.std == noise.std
    assert "targets=2" in repr(GaussianNoise(targets=2))


# --- Classification -------------------------------------------------------------------------------


def by_loop(output: Tensor, samples: int, seed_stream: Tensor, *, of_each_row: bool) -> Tensor:
    """The mean softmax of the noisy logits, written out."""
    mean, log_variance = output.double().unbind(-1)
    shape = (samples, *mean.shape) if of_each_row else (samples, mean.shape[-1])
    noise = normal(shape, seed_stream).double()
    probs = [torch.softmax(mean + (log_variance / 2).exp() * noise[s], -1) for s in range(samples)]
    return torch.stack(probs).mean(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(6, 3), (2, 4, 5)])
def test_sampled_logits_nll_is_its_formula(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    output = outputs(*shape, dtype=dtype)
    y = torch.randint(shape[-1], shape[:-1])
    probs = by_loop(output, 11, rng(), of_each_row=True)
    expected = -probs.gather(-1, y.unsqueeze(-1)).squeeze(-1).log()
    losses = sampled_logits_nll(output, y, 11, rng=rng(), reduction="none")
    assert losses.dtype == (F64 if dtype == F64 else torch.float32)
    torch.testing.assert_close(losses.double(), expected, rtol=2e-5, atol=1e-5)
    mean = sampled_logits_nll(output, y, 11, rng=rng())
    assert mean.item() == pytest.approx(expected.sum().item() / shape[0], rel=1e-4)
    total = sampled_logits_nll(output, y, 11, rng=rng(), reduction="sum")
    assert total.item() == pytest.approx(expected.sum().item(), rel=1e-4)


def test_without_noise_it_is_the_cross_entropy() -> None:
    output, y = outputs(8, 4), torch.arange(8) % 4
    output[..., 1] = -200
    expected = F.cross_entropy(output[..., 0], y)
    torch.testing.assert_close(sampled_logits_nll(output, y, 3), expected)
    probs = SampledSoftmax(3)(output).exp()
    torch.testing.assert_close(probs, output[..., 0].softmax(-1))


def test_many_samples_are_the_integral() -> None:
    """Two classes with noise on one logit: the mean of a sigmoid under a Gaussian, by quadrature."""
    integrate = pytest.importorskip("scipy.integrate")
    mean, std = 0.7, 1.8

    def weighted(e: float) -> float:
        return math.exp(-e * e / 2) / math.sqrt(2 * math.pi) / (1 + math.exp(-(mean + std * e)))

    expected = integrate.quad(weighted, -12, 12)[0]
    output = torch.tensor([[[mean, 2 * math.log(std)], [0.0, -200.0]]], dtype=F64)
    nll = sampled_logits_nll(output, torch.tensor([0]), 200_000, rng=rng())
    assert math.exp(-nll.item()) == pytest.approx(expected, abs=3e-3)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradients_of_sampled_logits_nll(backend: str, reduction: str) -> None:
    output, y = outputs(4, 3).requires_grad_(), torch.tensor([0, 1, 2, 1])
    assert torch.autograd.gradcheck(
        lambda o: sampled_logits_nll(o, y, 7, rng=rng(), reduction=reduction), (output,)
    )


def test_extreme_logits_stay_finite() -> None:
    output = torch.tensor([[[5000.0, 2.0], [-5000.0, 2.0]]], requires_grad=True)
    loss = sampled_logits_nll(output, torch.tensor([1]), 5)
    assert loss.item() == pytest.approx(10_000, rel=1e-2)
    loss.backward()
    assert output.grad is not None and output.grad.isfinite().all()


def test_the_seed_governs_the_noise(backend: str) -> None:
    output, y = outputs(5, 3), torch.arange(5) % 3
    softmax = SampledSoftmax(20)
    for run in (lambda: sampled_logits_nll(output, y, 20), lambda: softmax(output)):
        torch.manual_seed(3)
        first, second = run(), run()
        torch.manual_seed(3)
        assert torch.equal(run(), first) and torch.equal(run(), second)
        assert not torch.equal(first, second)
    # What the module returns are logits of the loss's probabilities.
    torch.manual_seed(3)
    expected = sampled_logits_nll(output, y, 20)
    for loss in (
        lambda: F.cross_entropy(softmax(output), y),
        lambda: ELBO(5, reduction="mean")(softmax(output), y, 0.0, 1.0),
        lambda: ELBO(5, reduction="mean", from_logits=True)(softmax(output), y, 0.0, 1.0),
    ):
        torch.manual_seed(3)
        torch.testing.assert_close(loss(), expected)


def test_each_row_draws_its_own_noise() -> None:
    output = outputs(1, 3).expand(50, 3, 2)
    noise = SampledSoftmax(1)(output)
    assert noise.unique(dim=0).shape[0] == 50


class Classifier(nn.Sequential):
    def __init__(self, layer: Callable[[int, int], nn.Module] = nn.Linear) -> None:
        super().__init__(
            nn.Linear(4, 8), nn.Tanh(), HeteroscedasticHead(8, 3, layer=layer), SampledSoftmax(16)
        )


@pytest.mark.parametrize("layer", [nn.Linear, BBB_LRT.BBBLinear])
def test_predictions_are_functions(backend: str, layer: Callable[[int, int], nn.Module]) -> None:
    model = Classifier(layer)
    x = torch.randn(12, 4)
    draws = predict(model, x, 6, seed=5)
    torch.testing.assert_close(draws.exp().sum(-1), torch.ones(6, 12))
    for batch_size in (1, 5, 12):
        torch.testing.assert_close(predict(model, x, 6, seed=5, batch_size=batch_size), draws)
    order = torch.randperm(12)
    torch.testing.assert_close(predict(model, x[order], 6, seed=5), draws[:, order])
    for k in range(6):
        with fixed_noise(5, k, model=model):
            torch.testing.assert_close(model(x), draws[k])
    assert draws.std(0).min() > 0


def test_multi_sample_is_as_many_forwards(backend: str) -> None:
    model, x = Classifier(BBB_LRT.BBBLinear), torch.randn(6, 4)
    draws = multi_sample(model, x, 3, seed=2)
    for k in range(3):
        with fixed_noise(2, k, model=model, draw="activations"):
            torch.testing.assert_close(model(x), draws[k])


def test_pinned_noise_is_the_formula(backend: str) -> None:
    softmax, output = SampledSoftmax(9), outputs(5, 3)
    for draw, of_each_row in (("weights", False), ("activations", True)):
        context = fixed_noise(7, 2, model=softmax, draw=draw)
        with context:
            log_probs = softmax(output)
        seed_stream = torch.tensor([7, 2 << 32])
        expected = by_loop(output, 9, seed_stream, of_each_row=of_each_row)
        torch.testing.assert_close(log_probs.exp(), expected, rtol=1e-5, atol=1e-6)


def test_posterior_means_draw_nothing() -> None:
    model, x = Classifier(), torch.randn(5, 4)
    with posterior_means():
        before = torch.get_rng_state()
        log_probs = model(x)
        assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(log_probs, model[2](model[1](model[0](x)))[..., 0].log_softmax(-1))


def test_gradients_of_the_module() -> None:
    softmax, output = SampledSoftmax(5), outputs(4, 3).requires_grad_()

    def run(output: Tensor) -> Tensor:
        with fixed_noise(1, model=softmax):
            return softmax(output)

    assert torch.autograd.gradcheck(run, (output,))


def test_a_classifier_learns_which_labels_are_noise() -> None:
    # Rows of the one kind have labels drawn at random, those of the other have one label.
    kind = torch.arange(400) % 2
    x = F.one_hot(kind, 2).float()
    y = torch.where(kind == 0, 1, torch.randint(3, (400,)))
    model = nn.Sequential(HeteroscedasticHead(2, 3), SampledSoftmax(30))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    probs = predict(model, torch.eye(2), 200).exp().mean(0)
    assert probs[0, 1] > 0.95
    frequency = torch.bincount(y[kind == 1], minlength=3) / 200
    torch.testing.assert_close(probs[1], frequency, rtol=0, atol=0.06)


# --- Errors ---------------------------------------------------------------------------------------


def test_bad_arguments_of_gaussian_nll() -> None:
    output, y = outputs(4, 3), torch.randn(4, 3)
    for bad, message in [
        (
            output[..., :1],
            r"output must have shape \[N, 2\], mean and log variance in its last dimension, got",
        ),
        (output[0, 0], r"output must have shape \[N, 2\].*got \[2\]"),
        (output[:, :2], r"y must have shape \[4, 2\] for output \[4, 2, 2\], got \[4, 3\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            gaussian_nll(bad, y)
    with pytest.raises(ValueError, match=r"y must have shape \[4\] for output \[4, 2\], got \[4, 1\]"):
        gaussian_nll(output[:, 0], y[:, :1])
    with pytest.raises(ValueError, match="y is on meta, expected"):
        gaussian_nll(output, y.to("meta"))
    for arguments, message in [
        ((output.tolist(), y), "output must be a torch.Tensor, got list"),
        ((output, y.tolist()), "y must be a torch.Tensor, got list"),
        ((output.long(), y), "output must be float32, .*, got torch.int64"),
        ((output, y.long()), "y must be float32, .*, got torch.int64"),
    ]:
        with pytest.raises(TypeError, match=message):
            gaussian_nll(*cast(Any, arguments))
    for beta in (-0.1, 1.1, math.nan, "0.5", None, True):
        with pytest.raises(ValueError, match="beta must be a number from 0 to 1, got"):
            gaussian_nll(output, y, beta=cast(Any, beta))
    for loss in (gaussian_nll, lambda o, t, **k: sampled_logits_nll(o, t[:, 0].long(), **k)):
        for reduction in ("avg", None, 1):
            with pytest.raises(ValueError, match="reduction must be one of 'mean', 'sum', 'none', got"):
                loss(output, y, reduction=cast(Any, reduction))


def test_bad_arguments_of_sampled_logits_nll() -> None:
    output, y = outputs(4, 3), torch.tensor([0, 1, 2, 1])
    for arguments, message in [
        ((output[0], y), r"output must have shape \[N, C, 2\].*, got \[3, 2\]"),
        ((output[..., 0], y), r"output must have shape \[N, C, 2\].*, got \[4, 3\]"),
        ((output, y[:3]), r"y must have shape \[4\] for output \[4, 3, 2\], got \[3\]"),
        ((output, y.to("meta")), "y is on meta, expected"),
        ((output, y, 0), "samples must be an int >= 1, got 0"),
        ((output, y, 2.5), "samples must be an int >= 1, got 2.5"),
    ]:
        with pytest.raises(ValueError, match=message):
            sampled_logits_nll(*cast(Any, arguments))
    for bad_y in (y.int(), y.float()):
        with pytest.raises(TypeError, match="y must be int64, got"):
            sampled_logits_nll(output, bad_y)
    with pytest.raises(TypeError, match="rng must be int64"):
        sampled_logits_nll(output, y, rng=torch.zeros(2))
    if DEVICE.type == "cpu":
        for bad_y in (y - 1, y + 1, y - 100):
            with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
                sampled_logits_nll(output, bad_y)


def test_bad_arguments_of_the_modules() -> None:
    for arguments, message in [
        ((0,), "in_features must be an int >= 1, got 0"),
        ((3, 1.5), "targets must be"),
    ]:
        with pytest.raises(ValueError, match=f"HeteroscedasticHead: {message}"):
            HeteroscedasticHead(*cast(Any, arguments))
    for samples in (0, -1, 2.5, "9", None, True):
        with pytest.raises(ValueError, match="SampledSoftmax: samples must be an int >= 1, got"):
            SampledSoftmax(cast(Any, samples))
    with pytest.raises(ValueError, match=r"SampledSoftmax: output must have shape \[C, 2\].*got \[4, 3\]"):
        SampledSoftmax()(torch.randn(4, 3))
    for std in (0, -1.0, math.inf, math.nan, "1", True):
        with pytest.raises(ValueError, match="GaussianNoise: std must be a finite number > 0, got"):
            GaussianNoise(cast(Any, std))
    with pytest.raises(ValueError, match="GaussianNoise: targets must be an int >= 1, got 0"):
        GaussianNoise(targets=0)
    with pytest.raises(ValueError, match=r"last dimension of the mean must be targets = 3, got \[4\]"):
        GaussianNoise(targets=3)(torch.randn(4))
