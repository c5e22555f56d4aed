"""Selective prediction: what a classifier's errors cost if it may decline the examples it is unsure of."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._inputs import check_classification, check_device, check_finite, check_tensor

__all__ = ["RiskCoverage", "aurc", "excess_aurc", "risk_coverage"]


class RiskCoverage(NamedTuple):
    """A risk-coverage curve, a point for each distinct confidence; see :func:`risk_coverage`.

    Attributes:
        coverage: float64 ``[K]``, fraction of the examples accepted, ascending to 1.
        risk: float64 ``[K]``, fraction of the accepted examples that are classified wrongly.
        threshold: float64 ``[K]``, descending: accepted are the examples at or above it.
    """

    coverage: Tensor
    risk: Tensor
    threshold: Tensor


def _check(probs: object, labels: object, confidence: object) -> tuple[Tensor, Tensor]:
    """The confidences in descending order, float64 [N], and the 0/1 loss of each of these examples, int64."""
    x, y = check_classification(probs, labels)
    top, predicted = x.max(-1)
    wrong = predicted != y
    if confidence is None:
        scores = top
    else:
        scores = check_tensor("confidence", confidence, "N")
        assert isinstance(probs, Tensor) and isinstance(confidence, Tensor)
        if len(scores) != len(x):
            raise ValueError(
                f"confidence must have shape [{len(x)}] to match probs {list(x.shape)}, got "
                f"{list(scores.shape)}"
            )
        check_device("confidence", confidence, "probs", probs)
        check_finite("confidence", scores)
    scores, order = scores.to(torch.float64).sort(descending=True)
    return scores, wrong[order].to(torch.int64)


def _running_risk(losses: Tensor) -> Tensor:
    """The mean loss of the first 1, 2, ..., N."""
    count = torch.arange(1, len(losses) + 1, device=losses.device)
    return losses.cumsum(0).to(torch.float64) / count


def _group_ends(scores: Tensor) -> Tensor:
    """For each distinct score, the index of its last example; no threshold parts equal scores."""
    last = torch.ones_like(scores, dtype=torch.bool)
    last[:-1] = scores[1:] != scores[:-1]
    return last.nonzero().squeeze(-1)


def _risk_at_own_threshold(scores: Tensor, losses: Tensor) -> Tensor:
    """For each example the risk if it is the last kind to be accepted, [N]."""
    ends = _group_ends(scores)
    sizes = torch.diff(ends, prepend=ends.new_tensor([-1]))
    return _running_risk(losses)[ends].repeat_interleave(sizes)


@torch.no_grad()
def risk_coverage(probs: Tensor, labels: Tensor, confidence: Tensor | None = None) -> RiskCoverage:
    """Risk-coverage curve: the error rate among the examples that are surest, for each share of them.

    Accepted are all examples whose confidence is at or above a threshold; the curve has a point for
    each threshold that makes a difference. Equal confidences are accepted together, so the curve does
    not depend on the order of the rows.

    Source: El-Yaniv and Wiener 2010, "On the foundations of noise-free selective classification",
    JMLR 11; Geifman, Uziel, El-Yaniv 2019, "Bias-reduced uncertainty estimation for deep neural
    classifiers" (arXiv:1805.08206).

    Args:
        probs: floating ``[N, C]``, whose most probable class is the prediction.
        labels: int64 ``[N]``.
        confidence: floating ``[N]``, finite, higher for surer; the largest probability of a row where
            it is None. Negate an uncertainty: ``confidence=-mutual_information(sample_probs)``.

    Returns:
        :class:`RiskCoverage`, its tensors on the device of ``probs``.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: an argument breaks the rules of :mod:`bbb_fast.metrics`.
    """
    scores, losses = _check(probs, labels, confidence)
    ends = _group_ends(scores)
    coverage = (ends + 1).to(torch.float64) / len(scores)
    return RiskCoverage(coverage, _running_risk(losses)[ends], scores[ends])


@torch.no_grad()
def aurc(probs: Tensor, labels: Tensor, confidence: Tensor | None = None) -> float:
    """Area under the risk-coverage curve: small if predictions are right, and the wrong ones unsure.

    ``1/N * sum_n risk(threshold = confidence[n])``, the mean over the examples of the risk when each
    is the least sure one accepted.

    Source: Geifman, Uziel, El-Yaniv 2019 (arXiv:1805.08206), the empirical AURC.

    Args:
        probs: floating ``[N, C]``.
        labels: int64 ``[N]``.
        confidence: as in :func:`risk_coverage`.

    Returns:
        A number from 0 (best) to 1. With a confidence that says nothing it is about the error rate.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: an argument breaks the rules of :mod:`bbb_fast.metrics`.
    """
    return float(_risk_at_own_threshold(*_check(probs, labels, confidence)).mean())


@torch.no_grad()
def excess_aurc(probs: Tensor, labels: Tensor, confidence: Tensor | None = None) -> float:
    """Excess AURC: :func:`aurc` minus that of the best confidence this classifier could have.

    The best confidence puts all right predictions before all wrong ones, whose number m is fixed by
    the classifier: its area is ``1/N * sum_(j=1..m) j / (N - m + j)``. So the excess judges the
    confidence alone, and compares classifiers of different accuracy. (The paper also gives
    ``r + (1 - r) ln(1 - r)``, r = m / N, which that sum tends to; the sum itself is used here.)

    Source: Geifman, Uziel, El-Yaniv 2019 (arXiv:1805.08206), E-AURC.

    Args:
        probs: floating ``[N, C]``.
        labels: int64 ``[N]``.
        confidence: as in :func:`risk_coverage`.

    Returns:
        A number from 0 (all right predictions are surer than all wrong ones, which are not tied) to 1.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: an argument breaks the rules of :mod:`bbb_fast.metrics`.
    """
    scores, losses = _check(probs, labels, confidence)
    # The same sum over risks, none of which is below the best one: exactly 0 for the best confidence.
    best = _running_risk(losses.sort().values)
    return float(_risk_at_own_threshold(scores, losses).mean()) - float(best.mean())
