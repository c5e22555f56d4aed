"""Noise of the data, learned: heads that say how noisy each target is, and the losses that train them.

A model of Gaussian targets returns, in its **last dimension of 2**, the mean and the logarithm of the
variance of each target: [N, 2] for targets [N], [N, D, 2] for targets [N, D]. ``HeteroscedasticHead`` makes
such outputs from features, ``GaussianNoise`` from a mean; ``gaussian_nll`` is the loss of both.

A classifier with noisy logits returns the same for each logit, [N, C, 2]; ``SampledSoftmax`` turns that into
log-probabilities, and ``sampled_logits_nll`` is its loss.

Kendall and Gal 2017, "What uncertainties do we need in Bayesian deep learning for computer vision?"
(arXiv:1703.04977).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import functional
from .._checks import FLOAT_DTYPES, integer
from .._noise import RandomModule, draw_rng
from ..reference import accumulate_dtype

__all__ = [
    "GaussianNoise",
    "HeteroscedasticHead",
    "SampledSoftmax",
    "gaussian_nll",
    "sampled_logits_nll",
]

_REDUCTIONS = ("mean", "sum", "none")


def _count(caller: str, name: str, value: object) -> int:
    number = integer(value)
    if number is None or number < 1:
        raise ValueError(f"{caller}: {name} must be an int >= 1, got {value!r}")
    return number


def _check_output(caller: str, output: object, *axes: str) -> Tensor:
    """An output of at least the dimensions ``axes`` and, after them, the one of mean and log variance."""
    if not isinstance(output, Tensor):
        raise TypeError(f"{caller}: output must be a torch.Tensor, got {type(output).__name__}")
    if output.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{caller}: output must be float32, float64, bfloat16 or float16, got {output.dtype}")
    if output.dim() <= len(axes) or output.shape[-1] != 2:
        raise ValueError(
            f"{caller}: output must have shape [{', '.join((*axes, '2'))}], mean and log variance in its "
            f"last dimension, got {list(output.shape)}"
        )
    return output


def _check_target(caller: str, y: object, output: Tensor, axes: int, integral: bool) -> Tensor:
    """A target of the output's shape without its last ``axes`` dimensions."""
    if not isinstance(y, Tensor):
        raise TypeError(f"{caller}: y must be a torch.Tensor, got {type(y).__name__}")
    if integral and y.dtype != torch.int64:
        raise TypeError(f"{caller}: y must be int64, got {y.dtype}")
    if not integral and y.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{caller}: y must be float32, float64, bfloat16 or float16, got {y.dtype}")
    shape = output.shape[:-axes]
    if y.shape != shape:
        raise ValueError(
            f"{caller}: y must have shape {list(shape)} for output {list(output.shape)}, got {list(y.shape)}"
        )
    if y.device != output.device:
        raise ValueError(f"{caller}: y is on {y.device}, expected {output.device}")
    return y


def _parts(output: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log variance, in float32 at least."""
    mean, log_variance = output.to(accumulate_dtype(output)).unbind(-1)
    return mean, log_variance


def _check_reduction(caller: str, reduction: object) -> None:
    if reduction not in _REDUCTIONS:
        allowed = ", ".join(map(repr, _REDUCTIONS))
        raise ValueError(f"{caller}: reduction must be one of {allowed}, got {reduction!r}")


def _reduced(losses: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else total / losses.shape[0]


def gaussian_nll(output: Tensor, y: Tensor, *, beta: float = 0.0, reduction: str = "mean") -> Tensor:
    """Negative log likelihood of targets under the Gaussians that a model predicts, in nats.

    ``1/2 (ln(2 pi) + s + (y - mean)**2 exp(-s))`` of each target, s the log variance: the attenuated loss of
    Kendall and Gal 2017 (arXiv:1703.04977), eq. 8, with the constant. The squared error is formed as
    ``((y - mean) exp(-s / 2))**2``, without a division or a floor of the variance; it is exact wherever it
    and its factors are in the type's range. The arithmetic is float32 (float64 for float64).

    ``beta`` multiplies each target's loss by ``variance**beta``, through which no gradient goes: 0 is the
    likelihood, 1 gives the mean the gradients of a squared error, and 0.5 keeps a model from giving up on
    targets by calling them noise (Seitzer, Tavakoli, Antic, Martius 2022, "On the pitfalls of
    heteroscedastic uncertainty estimation with probabilistic neural networks", arXiv:2203.09168).

    Args:
        output: floating ``[N, ..., 2]``: mean and log variance.
        y: floating ``[N, ...]``, output's shape without the last dimension.
        beta: from 0 to 1.
        reduction: ``"mean"``, over the N rows of the sum within each: minus a row's log density, to which
            an evidence lower bound adds ``kl / train_size``; ``"sum"``; or ``"none"``, of y's shape.

    Returns:
        A scalar, or ``[N, ...]``; float32 (float64 for float64); differentiable in output and y.

    Raises:
        TypeError: an argument is no tensor, or of another dtype.
        ValueError: shapes or devices do not fit (a y of [N, 1] needs an output of [N, 1, 2]), ``beta`` or
            ``reduction`` is none of those allowed.
    """
    output = _check_output("gaussian_nll", output, "N")
    y = _check_target("gaussian_nll", y, output, 1, integral=False)
    _check_reduction("gaussian_nll", reduction)
    if isinstance(beta, bool) or not isinstance(beta, (int, float)) or not 0 <= beta <= 1:
        raise ValueError(f"gaussian_nll: beta must be a number from 0 to 1, got {beta!r}")
    mean, log_variance = _parts(output)
    z = (y.to(mean.dtype) - mean) * torch.exp(-0.5 * log_variance)
    losses = 0.5 * (math.log(2 * math.pi) + log_variance + z.square())
    if beta:
        losses = losses * torch.exp(beta * log_variance.detach())
    return _reduced(losses, reduction)


class HeteroscedasticHead(nn.Module):
    """A last layer that gives the mean and the log variance of each target: [..., in_features] to [..., 2].

    With ``targets`` = D > 1, to [..., D, 2]: D regression targets, or the logits of D classes for
    ``SampledSoftmax``. ``layer(in_features, 2 * targets)`` makes the layer inside: ``nn.Linear``, or a
    Bayesian one such as ``layers.BBB_LRT.BBBLinear``. Raises ValueError for sizes below 1.
    """

    def __init__(
        self, in_features: int, targets: int = 1, *, layer: Callable[[int, int], nn.Module] = nn.Linear
    ) -> None:
        super().__init__()
        self.in_features = _count("HeteroscedasticHead", "in_features", in_features)
        self.targets = _count("HeteroscedasticHead", "targets", targets)
        self.layer = layer(self.in_features, 2 * self.targets)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x)
        return output if self.targets == 1 else output.unflatten(-1, (self.targets, 2))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, targets={self.targets}"


class GaussianNoise(nn.Module):
    """Noise that is the same for every input, learned with the model: mean [N, ...] to [N, ..., 2].

    It puts the log variance beside a model's mean, so that ``gaussian_nll`` trains both:
    ``nn.Sequential(net, GaussianNoise())``. ``log_std``, the parameter, is the logarithm of the standard
    deviation: one for all targets or, with ``targets`` = D, one for each, means then being [N, ..., D].

    Args: ``std``, where it starts, > 0, in the unit of the targets. Raises ValueError for other numbers, and
    in forward for a mean whose last dimension is not ``targets``.
    """

    def __init__(self, std: float = 1.0, targets: int | None = None) -> None:
        super().__init__()
        if isinstance(std, bool) or not isinstance(std, (int, float)) or not 0 < std < math.inf:
            raise ValueError(f"GaussianNoise: std must be a finite number > 0, got {std!r}")
        self.targets = None if targets is None else _count("GaussianNoise", "targets", targets)
        size = () if self.targets is None else (self.targets,)
        self.log_std = nn.Parameter(torch.full(size, math.log(std)))

    @property
    def std(self) -> Tensor:
        """The standard deviation of the noise, differentiable: a scalar or [targets]."""
        return self.log_std.exp()

    def forward(self, mean: Tensor) -> Tensor:
        if self.targets is not None and (mean.dim() == 0 or mean.shape[-1] != self.targets):
            raise ValueError(
                f"GaussianNoise: the last dimension of the mean must be targets = {self.targets}, got "
                f"{list(mean.shape)}"
            )
        dtype = torch.promote_types(mean.dtype, self.log_std.dtype)
        log_variance = (2 * self.log_std).expand(mean.shape)
        return torch.stack((mean.to(dtype), log_variance.to(dtype)), -1)

    def extra_repr(self) -> str:
        return "" if self.targets is None else f"targets={self.targets}"


def _log_mean_softmax(output: Tensor, samples: int, rng: Tensor, of_each_row: bool) -> Tensor:
    """ln(1/S sum_s softmax(mean + std * eps_s)), [..., C]; eps_s of each row its own, or one for all."""
    mean, log_variance = _parts(output)
    rows = mean.shape[:-1] if of_each_row else (1,) * (mean.dim() - 1)
    noise = functional.normal((samples, *rows, mean.shape[-1]), rng, dtype=mean.dtype)
    logits = mean + torch.exp(0.5 * log_variance) * noise
    return torch.logsumexp(torch.log_softmax(logits, -1), 0) - math.log(samples)


def sampled_logits_nll(
    output: Tensor,
    y: Tensor,
    samples: int = 100,
    *,
    rng: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Negative log likelihood of classes whose logits are noisy, in nats, by sampling the logits.

    ``-ln(1/S sum_s softmax(mean + exp(log_variance / 2) * eps_s)[y])``, each row with noise of its own:
    Kendall and Gal 2017 (arXiv:1703.04977), eq. 12 (there without the minus). Noise lets a model lower what a
    wrong label costs it, at the price of being unsure. Memory goes with S * N * C.

    Args:
        output: floating ``[N, ..., C, 2]``: mean and log variance of each logit.
        y: int64 ``[N, ...]``, 0 ... C - 1; others raise PyTorch's error of an index.
        samples: S, at least 1. With few of them the loss is too high on average (the logarithm of a mean).
        rng: what the noise is drawn with (``functional.draw_rng``), int64 [seed, stream] on output's
            device. None draws a fresh one, so that ``torch.manual_seed`` governs it.
        reduction: as in :func:`gaussian_nll`.

    Returns:
        A scalar, or ``[N, ...]``; float32 (float64 for float64); differentiable in output.

    Raises:
        TypeError: an argument is no tensor, or of another dtype.
        ValueError: shapes or devices do not fit, ``samples`` or ``reduction`` is none of those allowed.
    """
    output = _check_output("sampled_logits_nll", output, "N", "C")
    y = _check_target("sampled_logits_nll", y, output, 2, integral=True)
    samples = _count("sampled_logits_nll", "samples", samples)
    _check_reduction("sampled_logits_nll", reduction)
    rng = draw_rng(output.device) if rng is None else rng
    log_probs = _log_mean_softmax(output, samples, rng, of_each_row=True)
    return _reduced(-log_probs.gather(-1, y.unsqueeze(-1)).squeeze(-1), reduction)


class SampledSoftmax(RandomModule):
    """Noisy logits to log-probabilities: [..., C, 2], mean and log variance, to [..., C].

    The logarithm of ``1/S sum_s softmax(mean + exp(log_variance / 2) * eps_s)``. As log-probabilities are
    logits of themselves, the model answers like any classifier: ``softmax`` of its output, ``predict``,
    ``ELBO`` and ``cross_entropy`` (which then is :func:`sampled_logits_nll`) mean the same probabilities.
    Put it behind a ``HeteroscedasticHead(features, classes)``.

    Each row draws its own noise. Under ``fixed_noise`` all rows share one, so that the draw is one function,
    whatever the batch. Under ``posterior_means`` nothing is drawn: it is the softmax of the means.

    Args: ``samples``, S, at least 1. Raises ValueError otherwise, and in forward for an input of another
    shape; TypeError for one of another dtype.

    Kendall and Gal 2017 (arXiv:1703.04977), section 3.3, eq. 12.
    """

    def __init__(self, samples: int = 100) -> None:
        super().__init__()
        self.samples = _count("SampledSoftmax", "samples", samples)

    def forward(self, output: Tensor) -> Tensor:
        output = _check_output("SampledSoftmax", output, "C")
        draw = self.wanted_draw()
        if draw.means:
            return torch.log_softmax(_parts(output)[0], -1)
        if draw.pinned is None:
            return _log_mean_softmax(output, self.samples, draw_rng(output.device), of_each_row=True)
        rng = draw.pinned.rng(self, output.device)
        of_each_row = draw.pinned.draw == "activations"
        return _log_mean_softmax(output, self.samples, rng, of_each_row)

    def extra_repr(self) -> str:
        return f"samples={self.samples}"
