"""Calibration of a classifier: do its probabilities say how often it is right?"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import integer
from ._inputs import check_classification, check_count, check_probs, float64

__all__ = ["Reliability", "adaptive_ece", "calibrated_ece", "classwise_ece", "ece", "mce", "reliability"]


class Reliability(NamedTuple):
    """A reliability diagram; see :func:`reliability`.

    Attributes:
        edges: float64 ``[bins + 1]``; bin k holds the confidences in ``(edges[k], edges[k + 1]]``,
            the first one also a confidence of 0.
        confidence: float64 ``[bins]``, mean confidence in each bin; 0 where ``count`` is 0.
        accuracy: float64 ``[bins]``, fraction classified correctly in each bin; 0 where ``count``
            is 0.
        count: int64 ``[bins]``, number of examples in each bin.
    """

    edges: Tensor
    confidence: Tensor
    accuracy: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, as meant


class _Bins(NamedTuple):
    """What falls into each bin, on the CPU: sums, from which every error here is formed."""

    edges: Tensor
    confidence: Tensor
    correct: Tensor
    size: Tensor

    def weighted_gaps(self) -> Tensor:
        """|B| * |acc - conf|: without the division by |B|, an empty bin needs no special case."""
        return (self.correct - self.confidence).abs()


def _equal_width(bins: int, dtype: torch.dtype) -> Tensor:
    edges = torch.arange(bins + 1, dtype=torch.float64, device="cpu") / bins
    if dtype != torch.float64:
        # The float32 number written 0.8 is a little above the float64 number 0.8. Compared with the
        # float32 edge, a confidence on an edge is in the bin below it, as (lo, hi] says.
        edges = edges.to(torch.float32).to(torch.float64)
    return edges


def _equal_mass(bins: int, confidence: Tensor) -> Tensor:
    """Edges at order statistics: a confidence is never split over bins, in whatever order rows come."""
    ordered = confidence.sort().values
    last = len(confidence) - 1
    inner = [ordered[last * k // bins] for k in range(1, bins)]
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64, device="cpu")
    return torch.stack([ends[0], *inner, ends[1]])


def _binned(confidence: Tensor, correct: Tensor, bins: int, adaptive: bool) -> _Bins:
    """Bins of one confidence an example, [N], and whether it came true, [N] of bool."""
    dtype = confidence.dtype
    # [N]-sized work on the CPU: bincount with weights adds in a fixed order there, but not on a
    # GPU.
    confidence = float64(confidence).cpu()
    edges = _equal_mass(bins, confidence) if adaptive else _equal_width(bins, dtype)
    which = torch.searchsorted(edges[1:], confidence)
    return _Bins(
        edges,
        torch.bincount(which, weights=confidence, minlength=bins),
        torch.bincount(which, weights=correct.to(torch.float64).cpu(), minlength=bins),
        torch.bincount(which, minlength=bins),
    )


def _top_label(probs: Tensor, labels: Tensor, bins: int, adaptive: bool) -> _Bins:
    confidence, predicted = probs.max(-1)
    return _binned(confidence, predicted == labels, bins, adaptive)


def _one_class(probs: Tensor, labels: Tensor, which: int, bins: int, adaptive: bool) -> _Bins:
    return _binned(probs[:, which], labels == which, bins, adaptive)


def top_label_error(probs: Tensor, labels: Tensor, bins: int = 15, adaptive: bool = False) -> float:
    """:func:`ece` and :func:`adaptive_ece` of arguments that have been checked."""
    return float(_top_label(probs, labels, bins, adaptive).weighted_gaps().sum()) / len(labels)


def _check_adaptive(adaptive: object) -> bool:
    if not isinstance(adaptive, bool):
        raise ValueError(f"adaptive must be True or False, got {adaptive!r}")
    return adaptive


@torch.no_grad()
def ece(probs: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error: mean gap between confidence and accuracy, weighted by bin size.

    ``sum_b |B_b| / N * |accuracy(B_b) - confidence(B_b)|`` over the bins of :func:`reliability`.

    Source: Guo, Pleiss, Sun, Weinberger 2017, "On calibration of modern neural networks", eq. 3.

    Args:
        probs: floating ``[N, C]``. Confidence is the largest probability of a row.
        labels: int64 ``[N]``.
        bins: number of bins of equal width, at least 1.

    Returns:
        A number from 0 (calibrated) to 1, without unit.

    Raises:
        TypeError: ``probs`` or ``labels`` is not a tensor.
        ValueError: ``bins`` is not an integer of at least 1, or an argument breaks the rules of
            :mod:`bbb_fast.metrics`.
    """
    bins = check_count("bins", bins)
    return top_label_error(*check_classification(probs, labels), bins)


@torch.no_grad()
def adaptive_ece(probs: Tensor, labels: Tensor, bins: int = 15) -> float:
    """:func:`ece` with bins of equal mass: as many examples in each, up to one and up to ties.

    A good classifier is nearly always sure, so that bins of equal width leave all but the last few
    almost empty; these do not. The bins are those of ``reliability(..., adaptive=True)``.

    Source: Nguyen and O'Connor 2015, "Posterior calibration and exploratory analysis for natural
    language processing models" (EMNLP), algorithm 1, the adaptive binning; Nixon, Dusenberry, Zhang,
    Jerfel, Tran 2019, "Measuring calibration in deep learning" (arXiv:1904.01685), which take it over
    with the absolute gap of :func:`ece`. (Their ACE looks at all classes:
    ``classwise_ece(..., adaptive=True)``.)

    Args:
        probs: floating ``[N, C]``. Confidence is the largest probability of a row.
        labels: int64 ``[N]``.
        bins: number of bins, at least 1; those beyond the number of examples are empty.

    Returns:
        A number from 0 (calibrated) to 1, without unit.

    Raises:
        TypeError: ``probs`` or ``labels`` is not a tensor.
        ValueError: ``bins`` is not an integer of at least 1, or an argument breaks the rules of
            :mod:`bbb_fast.metrics`.
    """
    bins = check_count("bins", bins)
    return top_label_error(*check_classification(probs, labels), bins, adaptive=True)


@torch.no_grad()
def calibrated_ece(
    probs: Tensor, bins: int = 15, *, adaptive: bool = False, repeats: int = 1000, seed: int = 0
) -> Tensor:
    """What :func:`ece` would measure of these probabilities if they were right: labels drawn from them.

    A finite number of examples has an error above 0 however well calibrated a model is, and the more so
    the more bins hold few of them. An ECE within this sample says no more than that::

        chance = calibrated_ece(probs)
        ece(probs, labels) <= chance.quantile(0.95)  # no miscalibration to be seen

    Source: consistency resampling: Bröcker and Smith 2007, "Increasing the reliability of reliability
    diagrams", section 3; Vaicenavicius et al. 2019, "Evaluating model calibration in classification"
    (arXiv:1902.06977), section 5.

    Args:
        probs: floating ``[N, C]``. The most probable class is right with its probability.
        bins: number of bins, at least 1.
        adaptive: bins of equal mass, as of :func:`adaptive_ece`, instead of equal width.
        repeats: how many times all N labels are drawn, at least 1.
        seed: of the labels, from 0 to 2**63 - 1; the global random state is not involved.

    Returns:
        float64 ``[repeats]`` on the device of ``probs``, errors from 0 to 1, in the order they were drawn.

    Raises:
        TypeError: ``probs`` is not a tensor.
        ValueError: ``bins``, ``repeats`` or ``seed`` is out of range, ``adaptive`` is not a bool, or
            ``probs`` breaks the rules of :mod:`bbb_fast.metrics`.
    """
    bins, adaptive = check_count("bins", bins), _check_adaptive(adaptive)
    repeats = check_count("repeats", repeats)
    number = integer(seed)
    if number is None or not 0 <= number < 2**63:
        raise ValueError(f"seed must be an integer from 0 to 2**63 - 1, got {seed!r}")
    x = check_probs("probs", probs, "N, C")
    # On the CPU, where the same seed draws the same labels for every device.
    confidence = x.max(-1).values.cpu()
    generator = torch.Generator("cpu").manual_seed(number)
    errors = []
    for _ in range(repeats):
        uniform = torch.rand(confidence.shape, generator=generator, dtype=torch.float64, device="cpu")
        binned = _binned(confidence, uniform < confidence, bins, adaptive)
        errors.append(binned.weighted_gaps().sum() / len(confidence))
    return torch.stack(errors).to(x.device)


@torch.no_grad()
def classwise_ece(probs: Tensor, labels: Tensor, bins: int = 15, *, adaptive: bool = False) -> float:
    """Class-wise calibration error: the mean over the classes of the error of each one's probability.

    ``1/C * sum_c sum_b |B_cb| / N * |frequency of class c in B_cb - mean probs[:, c] in B_cb|``, the
    bins being those of ``reliability(..., of_class=c)``. Unlike :func:`ece` it sees all probabilities
    of a row, not the largest alone. It shrinks with the number of classes, most of which are nearly
    ruled out in most rows, so it compares models on one data set only.

    Source: Kull et al. 2019, "Beyond temperature scaling: obtaining well-calibrated multiclass
    probabilities with Dirichlet calibration" (arXiv:1910.12656), class-wise ECE; Nixon et al. 2019
    (arXiv:1904.01685): SCE, and ACE with ``adaptive=True``.

    Args:
        probs: floating ``[N, C]``.
        labels: int64 ``[N]``.
        bins: number of bins of each class, at least 1.
        adaptive: bins of equal mass, for each class its own, instead of equal width.

    Returns:
        A number from 0 (calibrated) to 1, without unit.

    Raises:
        TypeError: ``probs`` or ``labels`` is not a tensor.
        ValueError: ``bins`` is not an integer of at least 1, ``adaptive`` is not a bool, or an argument
            breaks the rules of :mod:`bbb_fast.metrics`.
    """
    bins, adaptive = check_count("bins", bins), _check_adaptive(adaptive)
    x, y = check_classification(probs, labels)
    # Class by class, so that memory stays at a few [N].
    classes = range(x.shape[1])
    errors = (float(_one_class(x, y, c, bins, adaptive).weighted_gaps().sum()) for c in classes)
    return sum(errors) / (x.shape[0] * x.shape[1])


@torch.no_grad()
def mce(probs: Tensor, labels: Tensor, bins: int = 15, *, adaptive: bool = False) -> float:
    """Maximum calibration error: the largest gap between confidence and accuracy of any bin.

    Bins of equal width may hold a single example, which then decides; ``adaptive=True`` avoids that.

    Source: Guo, Pleiss, Sun, Weinberger 2017, "On calibration of modern neural networks", eq. 5.

    Args:
        probs: floating ``[N, C]``. Confidence is the largest probability of a row.
        labels: int64 ``[N]``.
        bins: number of bins, at least 1.
        adaptive: bins of equal mass instead of equal width.

    Returns:
        A number from 0 (calibrated) to 1, without unit. Empty bins do not count.

    Raises:
        TypeError: ``probs`` or ``labels`` is not a tensor.
        ValueError: ``bins`` is not an integer of at least 1, ``adaptive`` is not a bool, or an argument
            breaks the rules of :mod:`bbb_fast.metrics`.
    """
    bins, adaptive = check_count("bins", bins), _check_adaptive(adaptive)
    binned = _top_label(*check_classification(probs, labels), bins, adaptive)
    return float((binned.weighted_gaps() / binned.size.clamp(min=1)).max())


@torch.no_grad()
def reliability(
    probs: Tensor,
    labels: Tensor,
    bins: int = 15,
    *,
    adaptive: bool = False,
    of_class: int | None = None,
) -> Reliability:
    """Reliability diagram: confidence and accuracy in bins of equal width or equal mass.

    Equal width: bin k holds the examples whose confidence (largest probability) is above ``k / bins``
    and at most ``(k + 1) / bins``; a confidence of 1 is in the last bin, one of 0 in the first. For
    inputs other than float64 the edges are rounded to float32, so that a float32 confidence of 0.8 is
    in the bin that ends at 0.8; the rounded edges are those returned.

    Equal mass (``adaptive``): the inner edges are the confidences number ``(N - 1) * k // bins`` in
    ascending order, counted from 0. Bins differ by at most one example, but for equal confidences,
    which stay together: the result does not depend on the order of the rows, and bins may be empty.

    ``of_class=c`` draws one class's diagram: the confidence is ``probs[:, c]``, and "accuracy" is the
    fraction of the examples that are of class c.

    Source: Guo, Pleiss, Sun, Weinberger 2017, "On calibration of modern neural networks", section 2
    (the unnumbered definitions of acc(B_m) and conf(B_m)); for the other bins and the classes see
    :func:`adaptive_ece` and :func:`classwise_ece`.

    Args:
        probs: floating ``[N, C]``.
        labels: int64 ``[N]``.
        bins: number of bins, at least 1.
        adaptive: bins of equal mass instead of equal width.
        of_class: None, or a class from 0 to C - 1.

    Returns:
        :class:`Reliability`, its tensors on the device of ``probs``.

    Raises:
        TypeError: ``probs`` or ``labels`` is not a tensor.
        ValueError: ``bins`` is not an integer of at least 1, ``adaptive`` is not a bool, ``of_class``
            is not a class, or an argument breaks the rules of :mod:`bbb_fast.metrics`.
    """
    bins, adaptive = check_count("bins", bins), _check_adaptive(adaptive)
    x, y = check_classification(probs, labels)
    if of_class is None:
        binned = _top_label(x, y, bins, adaptive)
    else:
        which = integer(of_class)
        if which is None or not 0 <= which < x.shape[1]:
            raise ValueError(f"of_class must be None or a class from 0 to {x.shape[1] - 1}, got {of_class!r}")
        binned = _one_class(x, y, which, bins, adaptive)
    size = binned.size.clamp(min=1)
    diagram = (binned.edges, binned.confidence / size, binned.correct / size, binned.size)
    return Reliability(*(tensor.to(x.device) for tensor in diagram))
