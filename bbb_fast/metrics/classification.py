"""Accuracy and proper scores of a classifier's probabilities."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._inputs import check_classification, float64
from .calibration import top_label_error

__all__ = ["accuracy", "brier", "classification_report", "nll"]

# The subnormal 2**-149, not finfo.tiny: every positive float32 probability then keeps its own
# likelihood.
_SMALLEST_FLOAT32 = 2.0**-149


def _accuracy(probs: Tensor, labels: Tensor) -> float:
    return int((probs.argmax(-1) == labels).sum()) / len(labels)


def _nll(probs: Tensor, labels: Tensor) -> float:
    true = float64(probs.gather(-1, labels.unsqueeze(-1)))
    # "0 - x" rather than "-x": a perfect score is then 0, not -0.
    return 0.0 - float(true.clamp(min=_SMALLEST_FLOAT32).log().mean())


def _brier(probs: Tensor, labels: Tensor) -> float:
    error = float64(probs) - F.one_hot(labels, probs.shape[-1]).to(torch.float64)
    return float(error.square().sum(-1).mean())


@torch.no_grad()
def accuracy(probs: Tensor, labels: Tensor) -> float:
    """Fraction of the examples whose most probable class is the true one.

    Args:
        probs: floating ``[N, C]``. Among equally probable classes the lowest index is the
            prediction.
        labels: int64 ``[N]``.

    Returns:
        A fraction from 0 to 1.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: an argument breaks the rules of :mod:`bbb_fast.metrics`.
    """
    return _accuracy(*check_classification(probs, labels))


@torch.no_grad()
def nll(probs: Tensor, labels: Tensor) -> float:
    """Mean negative log likelihood of the true classes, in nats (the logarithmic score).

    ``-1/N * sum_n ln probs[n, labels[n]]``. A probability of the true class below 2**-149, the
    smallest positive float32, counts as 2**-149: a model that rules out what happens pays 103.28
    nats for that example and the mean stays finite.

    Source: Good 1952, "Rational decisions", J. R. Stat. Soc. B 14(1); Gneiting and Raftery 2007,
    "Strictly proper scoring rules, prediction, and estimation", section 3.

    Args:
        probs: floating ``[N, C]``.
        labels: int64 ``[N]``.

    Returns:
        Nats per example, from 0 (best) to 103.28.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: an argument breaks the rules of :mod:`bbb_fast.metrics`.
    """
    return _nll(*check_classification(probs, labels))


@torch.no_grad()
def brier(probs: Tensor, labels: Tensor) -> float:
    """Brier score: mean over examples of the squared differences summed over classes.

    ``1/N * sum_n sum_c (probs[n, c] - [c == labels[n]])**2``. This is the original definition, from
    0 to 2; for two classes it is twice the score that looks at one of the classes only.

    Source: Brier 1950, "Verification of forecasts expressed in terms of probability", Monthly
    Weather Review 78(1), the score P.

    Args:
        probs: floating ``[N, C]``.
        labels: int64 ``[N]``.

    Returns:
        A number from 0 (best) to 2, without unit.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: an argument breaks the rules of :mod:`bbb_fast.metrics`.
    """
    return _brier(*check_classification(probs, labels))


@torch.no_grad()
def classification_report(probs: Tensor, labels: Tensor) -> dict[str, float]:
    """The four scores of a classifier at once.

    Args:
        probs: floating ``[N, C]``.
        labels: int64 ``[N]``.

    Returns:
        ``{"accuracy", "nll", "brier", "ece"}``: what the functions of these names return, ``ece``
        with its default number of bins.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: an argument breaks the rules of :mod:`bbb_fast.metrics`.
    """
    x, y = check_classification(probs, labels)
    return {
        "accuracy": _accuracy(x, y),
        "nll": _nll(x, y),
        "brier": _brier(x, y),
        "ece": top_label_error(x, y),
    }
