"""Out-of-distribution detection: how well a score tells the in set from the out set."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from ._inputs import check_scores

__all__ = ["aupr", "auroc", "fpr_at_tpr", "ood_report"]


def _at_least(sorted_scores: Tensor, thresholds: Tensor) -> Tensor:
    """How many of ``sorted_scores`` (ascending) are at or above each threshold."""
    return len(sorted_scores) - torch.searchsorted(sorted_scores, thresholds)


def _auroc(scores_in: Tensor, scores_out: Tensor) -> float:
    ordered = scores_in.sort().values
    # below + not-above is twice the number of pairs won, a tie counting as half a win: whole
    # numbers, so that the statistic is exact and swapping the sets gives exactly the remaining
    # pairs.
    below = torch.searchsorted(ordered, scores_out)
    not_above = torch.searchsorted(ordered, scores_out, right=True)
    return int((below + not_above).sum()) / (2 * len(scores_in) * len(scores_out))


def _aupr(scores_in: Tensor, scores_out: Tensor) -> float:
    # Recall rises at a threshold by 1 / N_out for each out example that has this score, so the sum
    # over thresholds of recall steps times precision is the mean, over the out examples, of the
    # precision at their own score.
    true_positive = _at_least(scores_out.sort().values, scores_out)
    false_positive = _at_least(scores_in.sort().values, scores_out)
    precision = true_positive.to(torch.float64) / (true_positive + false_positive)
    return float(precision.mean())


def _fpr_at_tpr(scores_in: Tensor, scores_out: Tensor, tpr: float) -> float:
    n = len(scores_out)
    # The fewest out examples that make up tpr. The loops undo the rounding of tpr * n: 0.07 * 100
    # is above 7 in floating point, and 7 / 100 >= 0.07 is nevertheless true.
    needed = max(1, math.ceil(tpr * n))
    while needed > 1 and (needed - 1) / n >= tpr:
        needed -= 1
    while needed / n < tpr:
        needed += 1
    # The false-positive rate falls as the threshold rises, so the best one is the highest allowed.
    threshold = scores_out.sort(descending=True).values[needed - 1]
    return int((scores_in >= threshold).sum()) / len(scores_in)


@torch.no_grad()
def auroc(scores_in: Tensor, scores_out: Tensor) -> float:
    """Area under the ROC curve: the chance that an out example scores above an in example.

    The Mann-Whitney statistic over all pairs, a tie counting one half (the same as midranks),
    divided by the number of pairs. Exact up to the one final division, in time O(n log n).

    Source: Hanley and McNeil 1982, "The meaning and use of the area under a receiver operating
    characteristic (ROC) curve", Radiology 143(1); Mann and Whitney 1947; for out-of-distribution
    detection, Hendrycks and Gimpel 2017 (arXiv:1610.02136).

    Args:
        scores_in: floating ``[N_in]``, finite.
        scores_out: floating ``[N_out]``, finite; higher means "more likely out".

    Returns:
        A number from 0 to 1; 1 separates the sets, 1/2 is chance. Swapping the sets gives
        ``1 - auroc``, up to float rounding.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: an argument breaks the rules of :mod:`bbb_fast.metrics`.
    """
    return _auroc(*check_scores(scores_in, scores_out))


@torch.no_grad()
def aupr(scores_in: Tensor, scores_out: Tensor) -> float:
    """Area under the precision-recall curve (average precision), the out set being positive.

    ``sum_k (R_k - R_{k-1}) P_k`` over the distinct scores from the highest down, equal scores
    forming one threshold, without interpolation: what scikit-learn's ``average_precision_score``
    computes. Chance level is ``N_out / (N_in + N_out)``.

    Source: Davis and Goadrich 2006, "The relationship between precision-recall and ROC curves" (why
    not to interpolate linearly); for out-of-distribution detection, Hendrycks and Gimpel 2017
    (arXiv:1610.02136), "AUPR Out".

    Args:
        scores_in: floating ``[N_in]``, finite.
        scores_out: floating ``[N_out]``, finite; higher means "more likely out".

    Returns:
        A number above 0, at most 1.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: an argument breaks the rules of :mod:`bbb_fast.metrics`.
    """
    return _aupr(*check_scores(scores_in, scores_out))


@torch.no_grad()
def fpr_at_tpr(scores_in: Tensor, scores_out: Tensor, tpr: float = 0.95) -> float:
    """False-positive rate at a given true-positive rate, the out set being the positive class.

    A threshold declares "out" every example that scores at or above it. Among the thresholds that
    catch at least the fraction ``tpr`` of the out set, the result is the lowest fraction of the in
    set declared out. No interpolation between thresholds.

    Source: Liang, Li, Srikant 2018, "Enhancing the reliability of out-of-distribution image
    detection in neural networks" (arXiv:1706.02690), "FPR at 95% TPR". That paper takes the *in*
    set as the positive class; for its convention pass ``fpr_at_tpr(-scores_out, -scores_in)``.

    Args:
        scores_in: floating ``[N_in]``, finite.
        scores_out: floating ``[N_out]``, finite; higher means "more likely out".
        tpr: in (0, 1].

    Returns:
        A fraction from 0 (best) to 1.

    Raises:
        TypeError: ``scores_in`` or ``scores_out`` is not a tensor.
        ValueError: ``tpr`` is not a number in (0, 1], or an argument breaks the rules listed at the
            top of this module.
    """
    if not isinstance(tpr, Real) or not 0.0 < tpr <= 1.0:
        raise ValueError(f"tpr must be a number in (0, 1], got {tpr!r}")
    return _fpr_at_tpr(*check_scores(scores_in, scores_out), float(tpr))


@torch.no_grad()
def ood_report(scores_in: Tensor, scores_out: Tensor) -> dict[str, float]:
    """The three out-of-distribution scores at once.

    Args:
        scores_in: floating ``[N_in]``, finite.
        scores_out: floating ``[N_out]``, finite; higher means "more likely out".

    Returns:
        ``{"auroc", "aupr", "fpr95"}``: :func:`auroc`, :func:`aupr`, and :func:`fpr_at_tpr` at 0.95.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: an argument breaks the rules of :mod:`bbb_fast.metrics`.
    """
    a, b = check_scores(scores_in, scores_out)
    return {"auroc": _auroc(a, b), "aupr": _aupr(a, b), "fpr95": _fpr_at_tpr(a, b, 0.95)}
