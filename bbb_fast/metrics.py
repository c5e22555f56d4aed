"""Proper scores, calibration, uncertainty decomposition and out-of-distribution scores.

Words used throughout:

- ``probs``: floating tensor ``[N, C]``, one row per example, each row a distribution over C
  classes.
- ``labels``: int64 tensor ``[N]`` of true classes, ``0 <= label < C``, on the device of ``probs``.
- ``sample_probs``: floating tensor ``[T, N, C]``, ``probs`` for each of T posterior draws.
- ``scores_in``, ``scores_out``: floating tensors ``[N_in]`` and ``[N_out]``, one score per example
  of the in-distribution and of the out-of-distribution set; **a higher score says "more likely
  out"**.

Conventions that hold for every function here:

- Inputs may be float16, bfloat16, float32 or float64, on any device, of any memory layout. All
  arithmetic is float64. Scalars come back as python floats; per-example values as float64 tensors
  on the input's device (on the CPU for MPS tensors, since MPS has no float64).
- Logarithms are natural: entropies and likelihoods are in nats.
- Results are deterministic: the same input on the same device gives the same bits.
- Nothing is differentiable: the results carry no gradient.
- Rows are used as they come, without renormalising. A row must sum to 1 within 1e-3 (within 2**-7
  for bfloat16, whose rounding alone moves a sum by up to 2**-8); a value that this tolerance lets
  exceed 1 counts as 1.
- What is not a tensor raises ``TypeError``. A wrong rank, shape, dtype or device, an empty tensor,
  NaN, infinity, a negative probability, a row that does not sum to 1, a label out of range or an
  option out of range raises ``ValueError`` that names the offending value and what is allowed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from numbers import Real
from operator import index
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "Decomposition",
    "Reliability",
    "accuracy",
    "aupr",
    "auroc",
    "brier",
    "classification_report",
    "decompose",
    "ece",
    "expected_entropy",
    "fpr_at_tpr",
    "mutual_information",
    "nll",
    "ood_report",
    "predictive_entropy",
    "reliability",
    "to_probs",
    "uncertainty",
]

# The subnormal 2**-149, not finfo.tiny: every positive float32 probability then keeps its own
# likelihood.
_SMALLEST_FLOAT32 = 2.0**-149

_FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Reliability(NamedTuple):
    """A reliability diagram; see :func:`reliability`.

    Attributes:
        edges: float64 ``[bins + 1]``; bin k holds the confidences in ``(edges[k], edges[k + 1]]``.
        confidence: float64 ``[bins]``, mean confidence in each bin; 0 where ``count`` is 0.
        accuracy: float64 ``[bins]``, fraction classified correctly in each bin; 0 where ``count``
            is 0.
        count: int64 ``[bins]``, number of examples in each bin.
    """

    edges: Tensor
    confidence: Tensor
    accuracy: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, as meant


class Decomposition(NamedTuple):
    """Predictive variance split into its two parts; see :func:`decompose`.

    Attributes:
        epistemic: float64 ``[N]``, trace of the epistemic matrix (the sum of
            ``epistemic_per_class``).
        aleatoric: float64 ``[N]``, trace of the aleatoric matrix (the sum of
            ``aleatoric_per_class``).
        epistemic_per_class: float64 ``[N, C]``, diagonal of the epistemic matrix.
        aleatoric_per_class: float64 ``[N, C]``, diagonal of the aleatoric matrix.
    """

    epistemic: Tensor
    aleatoric: Tensor
    epistemic_per_class: Tensor
    aleatoric_per_class: Tensor


# --- Checks ---------------------------------------------------------------------------------------


def _check_tensor(name: str, value: object, axes: str) -> Tensor:
    """Check type, rank, dtype and that it is not empty; ``axes`` reads like "T, N, C"."""
    if not isinstance(value, Tensor):
        kind = type(value).__name__
        raise TypeError(f"{name} must be a torch.Tensor of shape [{axes}], got {kind}")
    shape = list(value.shape)
    any_rank = axes.startswith("...")
    if value.ndim == 0 or (not any_rank and value.ndim != axes.count(",") + 1):
        raise ValueError(f"{name} must have shape [{axes}], got {shape}")
    if value.dtype not in _FLOAT_DTYPES:
        allowed = ", ".join(str(dtype) for dtype in _FLOAT_DTYPES)
        raise ValueError(f"{name} must have one of the dtypes {allowed}, got {value.dtype}")
    if value.numel() == 0:
        raise ValueError(f"{name} is empty (shape {shape}); each of [{axes}] must be at least 1")
    value = value.detach()
    return value.cpu() if value.device.type == "mps" else value


def _first(mask: Tensor) -> tuple[int, ...]:
    """Index of the first true element; only ever called to word an error."""
    flat = mask.flatten().nonzero()[0, 0]
    return tuple(int(i) for i in torch.unravel_index(flat, mask.shape))


def _check_finite(name: str, x: Tensor) -> float:
    """Raise on NaN or infinity, else return the smallest value."""
    # aminmax propagates NaN, so two numbers tell about every element, without a mask of x's size.
    low, high = torch.stack(torch.aminmax(x)).tolist()
    if not (math.isfinite(low) and math.isfinite(high)):
        at = _first(~torch.isfinite(x))
        raise ValueError(f"{name}{list(at)} is {x[at].item()}; every value must be finite")
    return float(low)


def _check_probs(name: str, value: object, axes: str) -> Tensor:
    x = _check_tensor(name, value, axes)
    if _check_finite(name, x) < 0:
        at = _first(x < 0)
        value = x[at].item()
        raise ValueError(f"{name}{list(at)} is {value:.6g}; a probability must not be negative")
    # Draw by draw, so that a float64 copy of all T draws never exists.
    draws = x if x.ndim == 3 else x.unsqueeze(0)
    sums = torch.stack([draw.sum(-1, dtype=torch.float64) for draw in draws]).view(x.shape[:-1])
    # Rounding each probability to bfloat16 may move the sum by eps / 2, more than 1e-3.
    tolerance = max(1e-3, torch.finfo(x.dtype).eps)
    error = (sums - 1).abs()
    if error.max().item() > tolerance:
        worst = _first(error == error.max())
        raise ValueError(
            f"{name}{list(worst)} sums to {sums[worst].item():.6g} (the worst row); "
            f"every row must sum to 1 within {tolerance:.3g}"
        )
    return x


def _float64(probs: Tensor) -> Tensor:
    # A row may sum to slightly more than 1; without the clamp its entropy or variance could be
    # negative.
    return probs.to(torch.float64).clamp(max=1.0).contiguous()


def _check_labels(labels: object, probs: Tensor, device: torch.device) -> Tensor:
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a torch.Tensor of shape [N], got {type(labels).__name__}")
    n, classes = probs.shape
    if list(labels.shape) != [n]:
        raise ValueError(
            f"labels must have shape [{n}] to match probs {[n, classes]}, got {list(labels.shape)}"
        )
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must have dtype torch.int64, got {labels.dtype}")
    if labels.device != device:
        raise ValueError(f"labels must be on the device of probs ({device}), got {labels.device}")
    labels = labels.to(probs.device)
    low, high = torch.stack(torch.aminmax(labels)).tolist()
    if low < 0 or high >= classes:
        at = _first((labels < 0) | (labels >= classes))
        raise ValueError(f"labels{list(at)} is {labels[at].item()}; allowed: 0 to {classes - 1}")
    return labels


def _check_classification(probs: object, labels: object) -> tuple[Tensor, Tensor]:
    x = _check_probs("probs", probs, "N, C")
    assert isinstance(probs, Tensor)
    return x, _check_labels(labels, x, probs.device)


def _check_bins(bins: object) -> int:
    try:
        number = index(bins)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"bins must be an integer of at least 1, got {bins!r}") from None
    if number < 1:
        raise ValueError(f"bins must be an integer of at least 1, got {number}")
    return number


def _check_scores(scores_in: object, scores_out: object) -> tuple[Tensor, Tensor]:
    a = _check_tensor("scores_in", scores_in, "N_in")
    b = _check_tensor("scores_out", scores_out, "N_out")
    if a.device != b.device:
        where = f"the device of scores_in ({a.device})"
        raise ValueError(f"scores_out must be on {where}, got {b.device}")
    _check_finite("scores_in", a)
    _check_finite("scores_out", b)
    # searchsorted warns about strided tensors.
    return a.to(torch.float64).contiguous(), b.to(torch.float64).contiguous()


# --- Proper scores and calibration ----------------------------------------------------------------


def _accuracy(probs: Tensor, labels: Tensor) -> float:
    return int((probs.argmax(-1) == labels).sum()) / len(labels)


def _nll(probs: Tensor, labels: Tensor) -> float:
    true = _float64(probs.gather(-1, labels.unsqueeze(-1)))
    # "0 - x" rather than "-x": a perfect score is then 0, not -0.
    return 0.0 - float(true.clamp(min=_SMALLEST_FLOAT32).log().mean())


def _brier(probs: Tensor, labels: Tensor) -> float:
    error = _float64(probs) - F.one_hot(labels, probs.shape[-1]).to(torch.float64)
    return float(error.square().sum(-1).mean())


def _bin_sums(probs: Tensor, labels: Tensor, bins: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Edges, sum of confidences, number correct and number of examples per bin, all on the CPU."""
    # [N]-sized work on the CPU: bincount with weights adds in a fixed order there, but not on a
    # GPU.
    top, predicted = probs.max(-1)
    confidence = _float64(top).cpu()
    correct = (predicted == labels).to(torch.float64).cpu()
    edges = torch.arange(bins + 1, dtype=torch.float64, device="cpu") / bins
    if probs.dtype != torch.float64:
        # The float32 number written 0.8 is a little above the float64 number 0.8. Compared with the
        # float32 edge, a confidence on an edge is in the bin below it, as (lo, hi] says.
        edges = edges.to(torch.float32).to(torch.float64)
    which = torch.searchsorted(edges[1:], confidence)
    count = torch.bincount(which, minlength=bins)
    sum_confidence = torch.bincount(which, weights=confidence, minlength=bins)
    sum_correct = torch.bincount(which, weights=correct, minlength=bins)
    return edges, sum_confidence, sum_correct, count


def _ece(probs: Tensor, labels: Tensor, bins: int) -> float:
    _, sum_confidence, sum_correct, _ = _bin_sums(probs, labels, bins)
    # |B| / n * |acc - conf| without the division by |B|, so that an empty bin needs no special
    # case.
    return float((sum_correct - sum_confidence).abs().sum()) / len(labels)


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
        ValueError: an argument breaks the rules listed at the top of this module.
    """
    return _accuracy(*_check_classification(probs, labels))


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
        ValueError: an argument breaks the rules listed at the top of this module.
    """
    return _nll(*_check_classification(probs, labels))


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
        ValueError: an argument breaks the rules listed at the top of this module.
    """
    return _brier(*_check_classification(probs, labels))


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
        ValueError: ``bins`` is not an integer of at least 1, or an argument breaks the rules listed
            at the top of this module.
    """
    bins = _check_bins(bins)
    return _ece(*_check_classification(probs, labels), bins)


@torch.no_grad()
def reliability(probs: Tensor, labels: Tensor, bins: int = 15) -> Reliability:
    """Reliability diagram: confidence and accuracy in bins of equal width.

    Bin k holds the examples whose confidence (largest probability) is above ``k / bins`` and at
    most ``(k + 1) / bins``; a confidence of 1 is in the last bin. For inputs other than float64 the
    edges are rounded to float32, so that a float32 confidence of 0.8 is in the bin that ends at
    0.8; the rounded edges are those returned.

    Source: Guo, Pleiss, Sun, Weinberger 2017, "On calibration of modern neural networks", section 2
    (the unnumbered definitions of acc(B_m) and conf(B_m)).

    Args:
        probs: floating ``[N, C]``.
        labels: int64 ``[N]``.
        bins: number of bins, at least 1.

    Returns:
        :class:`Reliability`, its tensors on the device of ``probs``.

    Raises:
        TypeError: ``probs`` or ``labels`` is not a tensor.
        ValueError: ``bins`` is not an integer of at least 1, or an argument breaks the rules listed
            at the top of this module.
    """
    bins = _check_bins(bins)
    x, y = _check_classification(probs, labels)
    edges, sum_confidence, sum_correct, count = _bin_sums(x, y, bins)
    size = count.clamp(min=1)
    diagram = (edges, sum_confidence / size, sum_correct / size, count)
    return Reliability(*(tensor.to(x.device) for tensor in diagram))


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
        ValueError: an argument breaks the rules listed at the top of this module.
    """
    x, y = _check_classification(probs, labels)
    return {
        "accuracy": _accuracy(x, y),
        "nll": _nll(x, y),
        "brier": _brier(x, y),
        "ece": _ece(x, y, 15),
    }


# --- Uncertainty decomposition --------------------------------------------------------------------


def _draws(sample_probs: Tensor) -> Iterator[Tensor]:
    # One draw in float64 at a time: memory beyond the input stays at a few [N, C], whatever T.
    return (_float64(draw) for draw in sample_probs)


def _mean(values: Iterable[Tensor]) -> Tensor:
    """Mean by running update: exact where all values are equal, which sum / T is not."""
    mean: Tensor | None = None
    for count, value in enumerate(values, start=1):
        mean = value if mean is None else mean + (value - mean) / count
    assert mean is not None
    return mean


def _entropy(probs: Tensor) -> Tensor:
    entropy: Tensor = torch.special.entr(probs).sum(-1)
    return entropy


def _decompose(draws: Iterable[Tensor]) -> Decomposition:
    # Welford's update: one pass over the draws, no cancellation as in mean(p^2) - mean(p)^2, never
    # negative, and exactly 0 where all draws are equal. Only the diagonals are ever formed.
    mean: Tensor | None = None
    squares = spread = torch.zeros(())
    count = 0
    for count, p in enumerate(draws, start=1):
        noise = p * (1 - p)
        if mean is None:
            mean, squares, spread = p, torch.zeros_like(p), noise
            continue
        delta = p - mean
        mean = mean + delta / count
        squares = squares + delta * (p - mean)
        spread = spread + (noise - spread) / count
    epistemic = squares / count
    return Decomposition(epistemic.sum(-1), spread.sum(-1), epistemic, spread)


@torch.no_grad()
def predictive_entropy(sample_probs: Tensor) -> Tensor:
    """Entropy of the mean prediction: the total uncertainty, in nats.

    ``H[p̄_n] = -sum_c p̄[n, c] ln p̄[n, c]`` with ``p̄`` the mean over the draws.

    Source: Houlsby, Huszár, Ghahramani, Lengyel 2011, "Bayesian active learning for classification
    and preference learning" (arXiv:1112.5745), eq. 2, first term.

    Args:
        sample_probs: floating ``[T, N, C]``.

    Returns:
        float64 ``[N]``, from 0 to ln C.

    Raises:
        TypeError: the argument is not a tensor.
        ValueError: the argument breaks the rules listed at the top of this module.
    """
    x = _check_probs("sample_probs", sample_probs, "T, N, C")
    return _entropy(_mean(_draws(x)))


@torch.no_grad()
def expected_entropy(sample_probs: Tensor) -> Tensor:
    """Mean over the draws of the entropy of each: the aleatoric part, in nats.

    ``1/T * sum_t H[p_t,n]``.

    Source: Houlsby, Huszár, Ghahramani, Lengyel 2011 (arXiv:1112.5745), eq. 2, second term.

    Args:
        sample_probs: floating ``[T, N, C]``.

    Returns:
        float64 ``[N]``, from 0 to ln C.

    Raises:
        TypeError: the argument is not a tensor.
        ValueError: the argument breaks the rules listed at the top of this module.
    """
    x = _check_probs("sample_probs", sample_probs, "T, N, C")
    return _mean(_entropy(draw) for draw in _draws(x))


@torch.no_grad()
def mutual_information(sample_probs: Tensor) -> Tensor:
    """Mutual information of the label and the weights (BALD): the epistemic part, in nats.

    :func:`predictive_entropy` minus :func:`expected_entropy`. The exact difference is never
    negative; a negative rounding error is set to 0. It is exactly 0 where all draws are equal.

    Source: Houlsby, Huszár, Ghahramani, Lengyel 2011 (arXiv:1112.5745), eq. 2.

    Args:
        sample_probs: floating ``[T, N, C]``.

    Returns:
        float64 ``[N]``, from 0 to ln min(T, C).

    Raises:
        TypeError: the argument is not a tensor.
        ValueError: the argument breaks the rules listed at the top of this module.
    """
    x = _check_probs("sample_probs", sample_probs, "T, N, C")
    total = _entropy(_mean(_draws(x)))
    return (total - _mean(_entropy(draw) for draw in _draws(x))).clamp(min=0.0)


@torch.no_grad()
def decompose(sample_probs: Tensor) -> Decomposition:
    """Split the covariance of the predicted one-hot label into its aleatoric and epistemic parts.

    - aleatoric: ``1/T sum_t (diag(p_t) - p_t p_t^T)``
    - epistemic: ``1/T sum_t (p_t - p̄)(p_t - p̄)^T``

    Only the diagonals and their sums over the classes (the traces) are computed; no ``[N, C, C]``
    tensor is built. Per class the two add up to ``p̄ - p̄**2``. Epistemic is exactly 0 where all
    draws are equal.

    Source: Kwon, Won, Kim, Paik 2018, "Uncertainty quantification using Bayesian neural networks in
    classification: application to ischemic stroke lesion segmentation" (MIDL), the estimator the
    paper proposes: its first term is the aleatoric part, its second the epistemic part.

    Args:
        sample_probs: floating ``[T, N, C]``.

    Returns:
        :class:`Decomposition`; variances of a 0/1 variable, so without unit, and per class from 0
        to 1/4.

    Raises:
        TypeError: the argument is not a tensor.
        ValueError: the argument breaks the rules listed at the top of this module.
    """
    return _decompose(_draws(_check_probs("sample_probs", sample_probs, "T, N, C")))


def _softmax(outputs: Tensor) -> Tensor:
    return torch.softmax(outputs, -1)


def _softplus_normalized(outputs: Tensor) -> Tensor:
    # In logarithms, since softplus underflows to 0 for outputs below -745 and a row of zeros has no
    # distribution. Below -40, ln softplus(x) is x to float64's last digit.
    # logaddexp(x, 0) is softplus without F.softplus's switch to x at 20, which would cost 7 digits.
    softplus = torch.logaddexp(outputs, torch.zeros_like(outputs))
    return torch.softmax(torch.where(outputs < -40, outputs, softplus.log()), -1)


_METHODS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": _softmax,
    "normalized": _softplus_normalized,
}


def _check_method(method: object) -> Callable[[Tensor], Tensor]:
    if not isinstance(method, str) or method not in _METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, _METHODS))}, got {method!r}")
    return _METHODS[method]


@torch.no_grad()
def to_probs(outputs: Tensor, method: str = "softmax") -> Tensor:
    """Turn network outputs (before any softmax) into probabilities.

    Args:
        outputs: floating ``[..., C]``, finite; usually ``[T, N, C]`` or ``[N, C]``.
        method: ``"softmax"``, or ``"normalized"``: softplus of the outputs divided by its sum over
            the classes (Shridhar, Laumann, Liwicki 2018, "Uncertainty estimations by softplus
            normalization in Bayesian convolutional neural networks with variational inference",
            arXiv:1806.05978).

    Returns:
        float64, of the shape of ``outputs``; every row sums to 1, however large or small the
        outputs.

    Raises:
        TypeError: ``outputs`` is not a tensor.
        ValueError: ``method`` is unknown; ``outputs`` is empty, has no dimension, is not floating
            or not finite.
    """
    function = _check_method(method)
    x = _check_tensor("outputs", outputs, "..., C")
    _check_finite("outputs", x)
    return function(x.to(torch.float64))


@torch.no_grad()
def uncertainty(outputs: Tensor, method: str = "softmax") -> Decomposition:
    """:func:`decompose` from the outputs of the network, before any softmax.

    ``uncertainty(outputs, method)`` equals ``decompose(to_probs(outputs, method))`` but holds the
    probabilities of one draw at a time.

    Source: ``"softmax"`` is Kwon et al. 2018 (see :func:`decompose`); ``"normalized"`` is Shridhar,
    Laumann, Liwicki 2018 (arXiv:1806.05978) and 2019 (arXiv:1901.02731), as in PyTorch-BayesianCNN,
    whose per-image vectors are the ``_per_class`` fields here.

    Args:
        outputs: floating ``[T, N, C]``, finite: the outputs of T draws.
        method: ``"softmax"`` or ``"normalized"``, as in :func:`to_probs`.

    Returns:
        :class:`Decomposition`.

    Raises:
        TypeError: ``outputs`` is not a tensor.
        ValueError: ``method`` is unknown; ``outputs`` is empty, not of rank 3, not floating or not
            finite.
    """
    function = _check_method(method)
    x = _check_tensor("outputs", outputs, "T, N, C")
    _check_finite("outputs", x)
    return _decompose(function(draw.to(torch.float64)) for draw in x)


# --- Out-of-distribution scores -------------------------------------------------------------------


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
        ValueError: an argument breaks the rules listed at the top of this module.
    """
    return _auroc(*_check_scores(scores_in, scores_out))


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
        ValueError: an argument breaks the rules listed at the top of this module.
    """
    return _aupr(*_check_scores(scores_in, scores_out))


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
    return _fpr_at_tpr(*_check_scores(scores_in, scores_out), float(tpr))


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
        ValueError: an argument breaks the rules listed at the top of this module.
    """
    a, b = _check_scores(scores_in, scores_out)
    return {"auroc": _auroc(a, b), "aupr": _aupr(a, b), "fpr95": _fpr_at_tpr(a, b, 0.95)}
