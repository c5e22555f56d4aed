"""What is said of images by a model that was asked many times: the words of the uncertainty command."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from .data import ImageSet

__all__ = ["SCORES", "Comparison", "Judged"]

# Fields of Judged that say "more likely never seen" the higher they are, with their printed names.
SCORES: dict[str, str] = {
    "predictive_entropy": "predictive entropy",
    "mutual_information": "mutual information",
    "epistemic_softmax": "epistemic (softmax)",
    "epistemic_normalized": "epistemic (normalized)",
    "aleatoric_softmax": "aleatoric",
    "doubt": "1 - max probability",
}


@dataclass(frozen=True, eq=False)
class Judged:
    """One set of images as a model sees it; all tensors float64 on the CPU unless said otherwise.

    Attributes:
        images: the set of N images itself.
        probs: ``[N, C]``, softmax probabilities averaged over the draws.
        prediction: int64 ``[N]``, the most probable class.
        doubt: ``[N]``, 1 - the largest probability.
        predictive_entropy, expected_entropy, mutual_information: ``[N]``, in nats; the first is the sum
            of the other two.
        epistemic_softmax, aleatoric_softmax, epistemic_normalized, aleatoric_normalized: ``[N]``, the
            two parts of the predictive variance by both methods of :func:`metrics.uncertainty`.
    """

    images: ImageSet
    probs: Tensor
    prediction: Tensor
    doubt: Tensor
    predictive_entropy: Tensor
    expected_entropy: Tensor
    mutual_information: Tensor
    epistemic_softmax: Tensor
    aleatoric_softmax: Tensor
    epistemic_normalized: Tensor
    aleatoric_normalized: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def share_above(self, probability: float) -> float:
        """The fraction of the images whose most probable class gets more than ``probability``."""
        return float((1 - self.doubt > probability).double().mean())

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything per image, by name: the labels and all fields but the images."""
        fields = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return {name: value.numpy() for name, value in {"labels": self.images.labels, **fields}.items()}


@dataclass(frozen=True, eq=False)
class Comparison:
    """What a model knows against what it has never seen.

    Attributes:
        inside, outside: the two sets, judged under the same draws.
        quality: accuracy, NLL, Brier score and ECE of ``inside``.
        classes: the model's class names.
        detection: for each of :data:`SCORES`, how well it tells the sets apart: auroc, aupr, fpr95.
        bayesian: whether the model has any Bayesian layer.
        notes: what a reader of the numbers must know, one sentence each.
    """

    inside: Judged
    outside: Judged
    classes: tuple[str, ...]
    quality: dict[str, float]
    detection: dict[str, dict[str, float]]
    bayesian: bool
    notes: tuple[str, ...]
