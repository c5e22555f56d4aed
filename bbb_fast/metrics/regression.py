"""Regression: scores and calibration of Gaussian predictions, and the CRPS of samples."""

from __future__ import annotations

import math
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from ._inputs import check_count, check_device, check_finite, check_like, check_tensor, first

__all__ = [
    "RegressionCalibration",
    "crps_gaussian",
    "crps_samples",
    "gaussian_log_density",
    "interval_width",
    "picp",
    "regression_calibration",
    "regression_report",
    "rmse",
]

_TARGETS = ("N", "N, D")


class RegressionCalibration(NamedTuple):
    """A calibration curve of regression; see :func:`regression_calibration`.

    Attributes:
        expected: float64 ``[levels]``, ascending probabilities.
        observed: float64 ``[levels]``, fraction of the targets at or below the quantile that the model
            gives each of these probabilities.
        error: the mean over the levels of ``(observed - expected)**2``.
    """

    expected: Tensor
    observed: Tensor
    error: float


class _Gaussian(NamedTuple):
    """Predictions and what came, float64 of one shape: the standard deviation, and (y - mean) / std."""

    std: Tensor
    z: Tensor


def _check_mean(mean: object, y: object) -> tuple[Tensor, Tensor]:
    m = check_tensor("mean", mean, *_TARGETS)
    check_finite("mean", m)
    assert isinstance(mean, Tensor)
    t = check_like("y", y, "mean", mean, *_TARGETS)
    return m.to(torch.float64), t.to(torch.float64)


def _check_variance(variance: Tensor) -> Tensor:
    """The standard deviation, of a variance whose type and shape have been checked."""
    if check_finite("variance", variance) <= 0:
        at = first(variance <= 0)
        value = variance[at].item()
        raise ValueError(f"variance{list(at)} is {value:.6g}; a variance must be positive")
    return variance.to(torch.float64).sqrt()


def _check_gaussian(mean: object, variance: object, y: object) -> _Gaussian:
    m, t = _check_mean(mean, y)
    assert isinstance(mean, Tensor)
    std = _check_variance(check_like("variance", variance, "mean", mean, *_TARGETS))
    return _Gaussian(std, (t - m) / std)


def _check_level(level: object) -> float:
    value = float(level) if isinstance(level, Real) and not isinstance(level, bool) else math.nan
    if not 0.0 < value < 1.0:
        raise ValueError(f"level must be a number above 0 and below 1, got {level!r}")
    return value


def _half_width(level: float) -> float:
    """Half the width of the central interval that holds the fraction ``level`` of N(0, 1)."""
    # From the lower tail: (1 + level) / 2 would round to 1 for levels near 1.
    tail = torch.tensor((1.0 - level) / 2, dtype=torch.float64, device="cpu")
    return -float(torch.special.ndtri(tail))


def _log_density(prediction: _Gaussian) -> Tensor:
    std, z = prediction
    density = -0.5 * (math.log(2 * math.pi) + z.square()) - std.log()
    return density if density.ndim == 1 else density.sum(-1)


def _crps_gaussian(prediction: _Gaussian) -> float:
    std, z = prediction
    density = torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
    # 2 Phi(z) - 1 = erf(z / sqrt(2)), which does not cancel near z = 0.
    spread = z * torch.special.erf(z / math.sqrt(2)) + 2 * density - 1 / math.sqrt(math.pi)
    return float((std * spread).mean())


def _picp(prediction: _Gaussian, level: float) -> float:
    inside = prediction.z.abs() <= _half_width(level)
    return int(inside.sum()) / inside.numel()


def _interval_width(std: Tensor, level: float) -> float:
    return float(2 * _half_width(level) * std.mean())


def _calibration(prediction: _Gaussian, levels: int) -> RegressionCalibration:
    z = prediction.z.flatten()
    expected = torch.arange(1, levels + 1, dtype=torch.float64, device=z.device) / (levels + 1)
    below = torch.searchsorted(z.sort().values, torch.special.ndtri(expected), right=True)
    observed = below.to(torch.float64) / len(z)
    return RegressionCalibration(expected, observed, float((observed - expected).square().mean()))


@torch.no_grad()
def rmse(mean: Tensor, y: Tensor) -> float:
    """Root of the mean squared error, over all rows and targets.

    ``sqrt(1/(N D) * sum_nd (y[n, d] - mean[n, d])**2)``. Shapes must be equal: a ``y`` of ``[N, 1]``
    beside a mean of ``[N]`` is refused, where broadcasting would compare every row with every other.

    Args:
        mean: floating ``[N]`` or ``[N, D]``.
        y: floating, of the shape of ``mean``.

    Returns:
        A number of at least 0, in the unit of ``y``.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: an argument breaks the rules of :mod:`bbb_fast.metrics`.
    """
    m, t = _check_mean(mean, y)
    return math.sqrt(float((t - m).square().mean()))


@torch.no_grad()
def gaussian_log_density(mean: Tensor, variance: Tensor, y: Tensor) -> Tensor:
    """Log density of each row's targets under the predicted Gaussian, in nats.

    ``-1/2 * sum_d (ln(2 pi variance[n, d]) + (y[n, d] - mean[n, d])**2 / variance[n, d])``. Its mean
    over the rows is the test log likelihood that papers report (the logarithmic score). It depends on
    the unit of ``y``: for standardised targets subtract the logarithm of the scale.

    Source: Gneiting and Raftery 2007, "Strictly proper scoring rules, prediction, and estimation",
    section 4.1; Hernández-Lobato and Adams 2015 (arXiv:1502.05336), section 5.

    Args:
        mean: floating ``[N]`` or ``[N, D]``.
        variance: floating, of the shape of ``mean``, above 0.
        y: floating, of the shape of ``mean``.

    Returns:
        float64 ``[N]``.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: an argument breaks the rules of :mod:`bbb_fast.metrics`.
    """
    return _log_density(_check_gaussian(mean, variance, y))


@torch.no_grad()
def crps_gaussian(mean: Tensor, variance: Tensor, y: Tensor) -> float:
    """Continuous ranked probability score of Gaussian predictions, mean over rows and targets.

    ``std * (z (2 Phi(z) - 1) + 2 phi(z) - 1/sqrt(pi))`` with ``z = (y - mean) / std``: the integral of
    the squared difference of the predicted distribution function and the step at ``y``. A proper
    score in the unit of ``y``, gentler to outliers than the log density.

    Source: Gneiting and Raftery 2007, "Strictly proper scoring rules, prediction, and estimation",
    section 4.2; the closed form of Gneiting, Raftery, Westveld, Goldman 2005.

    Args:
        mean: floating ``[N]`` or ``[N, D]``.
        variance: floating, of the shape of ``mean``, above 0.
        y: floating, of the shape of ``mean``.

    Returns:
        A number above 0, lower is better.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: an argument breaks the rules of :mod:`bbb_fast.metrics`.
    """
    return _crps_gaussian(_check_gaussian(mean, variance, y))


@torch.no_grad()
def crps_samples(samples: Tensor, y: Tensor) -> float:
    """Continuous ranked probability score of T predicted samples, mean over rows and targets.

    ``1/T sum_t |x_t - y| - 1/(2 T**2) sum_st |x_s - x_t|``: the score of the empirical distribution of
    the samples. It goes with O(T log T): the second sum is formed from the sorted samples. Samples are
    of the observation, its noise included; of one sample it is the absolute error.

    Source: Gneiting and Raftery 2007, "Strictly proper scoring rules, prediction, and estimation",
    eq. 21 (the kernel form), for an ensemble.

    Args:
        samples: floating ``[T, N]`` or ``[T, N, D]``.
        y: floating ``[N]`` or ``[N, D]``.

    Returns:
        A number of at least 0, in the unit of ``y``, lower is better.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: an argument breaks the rules of :mod:`bbb_fast.metrics`.
    """
    x = check_tensor("samples", samples, "T, N", "T, N, D")
    check_finite("samples", x)
    t = check_tensor("y", y, *_TARGETS)
    if x.shape[1:] != t.shape:
        raise ValueError(
            f"y must have shape {list(x.shape[1:])} to match samples {list(x.shape)}, got {list(t.shape)}"
        )
    check_device("y", y, "samples", samples)
    check_finite("y", t)
    error = (x.to(torch.float64) - t.to(torch.float64)).sort(0).values
    draws = len(error)
    # In sum_st |x_s - x_t| / 2 the k-th smallest of T is added k - 1 times and subtracted T - k times.
    rank = torch.arange(1 - draws, draws, 2, dtype=torch.float64, device=error.device)
    spread = torch.tensordot(rank, error, 1) / draws**2
    return max(0.0, float((error.abs().mean(0) - spread).mean()))


@torch.no_grad()
def picp(mean: Tensor, variance: Tensor, y: Tensor, level: float = 0.95) -> float:
    """Prediction interval coverage probability: the fraction of the targets in their central interval.

    The interval of probability ``level`` around the mean of each Gaussian, ends included. A calibrated
    model covers ``level``; more says that it is too unsure, less that it is too sure. Read it together
    with :func:`interval_width`.

    Source: Khosravi, Nahavandi, Creighton, Atiya 2011, "Lower upper bound estimation method for
    construction of neural network-based prediction intervals", IEEE Trans. Neural Networks 22(3).

    Args:
        mean: floating ``[N]`` or ``[N, D]``.
        variance: floating, of the shape of ``mean``, above 0.
        y: floating, of the shape of ``mean``.
        level: above 0 and below 1.

    Returns:
        A fraction from 0 to 1, over all rows and targets.

    Raises:
        TypeError: ``mean``, ``variance`` or ``y`` is not a tensor.
        ValueError: ``level`` is out of range, or an argument breaks the rules of
            :mod:`bbb_fast.metrics`.
    """
    level = _check_level(level)
    return _picp(_check_gaussian(mean, variance, y), level)


@torch.no_grad()
def interval_width(variance: Tensor, level: float = 0.95) -> float:
    """Mean prediction interval width (MPIW) of central Gaussian intervals, over all rows and targets.

    ``2 Phi^-1((1 + level) / 2) * mean std``: how sharp the predictions are. Of two models that cover
    alike (:func:`picp`), the one with narrower intervals says more.

    Source: Khosravi et al. 2011, see :func:`picp`; there divided by the range of the targets, here not.

    Args:
        variance: floating ``[N]`` or ``[N, D]``, above 0.
        level: above 0 and below 1.

    Returns:
        A number above 0, in the unit of the targets.

    Raises:
        TypeError: ``variance`` is not a tensor.
        ValueError: ``level`` is out of range, or ``variance`` breaks the rules of
            :mod:`bbb_fast.metrics`.
    """
    level = _check_level(level)
    return _interval_width(_check_variance(check_tensor("variance", variance, *_TARGETS)), level)


@torch.no_grad()
def regression_calibration(
    mean: Tensor, variance: Tensor, y: Tensor, levels: int = 19
) -> RegressionCalibration:
    """Calibration of regression: how many targets are below each predicted quantile.

    ``observed[k]``, the fraction of the targets with ``Phi((y - mean) / std) <= expected[k]``, against
    ``expected[k] = k / (levels + 1)``, k = 1 ... levels. Plotted, a calibrated model is on the diagonal;
    one that is too sure is above it at low levels and below it at high ones. All targets of all rows
    count alike.

    Source: Kuleshov, Fenner, Ermon 2018, "Accurate uncertainties for deep learning using calibrated
    regression" (arXiv:1807.00263), the calibration plot and error of "diagnostic tools", the error's weights
    being equal and summing to 1, so that it does not grow with the number of levels.

    Args:
        mean: floating ``[N]`` or ``[N, D]``.
        variance: floating, of the shape of ``mean``, above 0.
        y: floating, of the shape of ``mean``.
        levels: how many probabilities, at least 1.

    Returns:
        :class:`RegressionCalibration`, its tensors on the device of ``mean``.

    Raises:
        TypeError: ``mean``, ``variance`` or ``y`` is not a tensor.
        ValueError: ``levels`` is not an integer of at least 1, or an argument breaks the rules of
            :mod:`bbb_fast.metrics`.
    """
    levels = check_count("levels", levels)
    return _calibration(_check_gaussian(mean, variance, y), levels)


@torch.no_grad()
def regression_report(mean: Tensor, variance: Tensor, y: Tensor) -> dict[str, float]:
    """The scores of Gaussian predictions at once.

    Args:
        mean: floating ``[N]`` or ``[N, D]``.
        variance: floating, of the shape of ``mean``, above 0.
        y: floating, of the shape of ``mean``.

    Returns:
        ``{"rmse", "log_density", "crps", "picp", "interval_width", "calibration"}``: :func:`rmse`, the
        mean over the rows of :func:`gaussian_log_density`, :func:`crps_gaussian`, :func:`picp` and
        :func:`interval_width` at 0.95, and the error of :func:`regression_calibration`.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: an argument breaks the rules of :mod:`bbb_fast.metrics`.
    """
    prediction = _check_gaussian(mean, variance, y)
    return {
        "rmse": rmse(mean, y),
        "log_density": float(_log_density(prediction).mean()),
        "crps": _crps_gaussian(prediction),
        "picp": _picp(prediction, 0.95),
        "interval_width": _interval_width(prediction.std, 0.95),
        "calibration": _calibration(prediction, 19).error,
    }
