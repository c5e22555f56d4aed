"""Uncertainty of a classifier's draws, split into its aleatoric and epistemic parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ._inputs import check_finite, check_probs, check_tensor, float64

__all__ = [
    "Decomposition",
    "decompose",
    "expected_entropy",
    "mutual_information",
    "predictive_entropy",
    "to_probs",
    "uncertainty",
]


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


def _draws(sample_probs: Tensor) -> Iterator[Tensor]:
    # One draw in float64 at a time: memory beyond the input stays at a few [N, C], whatever T.
    return (float64(draw) for draw in sample_probs)


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
        ValueError: the argument breaks the rules of :mod:`bbb_fast.metrics`.
    """
    x = check_probs("sample_probs", sample_probs, "T, N, C")
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
        ValueError: the argument breaks the rules of :mod:`bbb_fast.metrics`.
    """
    x = check_probs("sample_probs", sample_probs, "T, N, C")
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
        ValueError: the argument breaks the rules of :mod:`bbb_fast.metrics`.
    """
    x = check_probs("sample_probs", sample_probs, "T, N, C")
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
        ValueError: the argument breaks the rules of :mod:`bbb_fast.metrics`.
    """
    return _decompose(_draws(check_probs("sample_probs", sample_probs, "T, N, C")))


def _softmax(outputs: Tensor) -> Tensor:
    return torch.softmax(outputs, -1)


def softplus_normalized(outputs: Tensor) -> Tensor:
    # In logarithms, since softplus underflows to 0 for outputs below -745 and a row of zeros has no
    # distribution. Below -40, ln softplus(x) is x to float64's last digit.
    # logaddexp(x, 0) is softplus without F.softplus's switch to x at 20, which would cost 7 digits.
    softplus = torch.logaddexp(outputs, torch.zeros_like(outputs))
    return torch.softmax(torch.where(outputs < -40, outputs, softplus.log()), -1)


_METHODS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": _softmax,
    "normalized": softplus_normalized,
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
    x = check_tensor("outputs", outputs, "..., C")
    check_finite("outputs", x)
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
    x = check_tensor("outputs", outputs, "T, N, C")
    check_finite("outputs", x)
    return _decompose(function(draw.to(torch.float64)) for draw in x)
