"""The evidence lower bound: the KL of a model, the loss, and the schedules of the KL's weight."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from .layers.kl import kl_loss

__all__ = ["ELBO", "get_beta", "kl_loss", "kl_weight"]

SCHEDULES = ("Blundell", "Soenderby", "Standard")


class ELBO(nn.Module):
    """The negative evidence lower bound of a data set of ``train_size`` examples.

    ``forward(input, target, kl, beta)`` with ``beta=1`` is the bound itself (Blundell et al. 2015, eq. 1, on
    a minibatch); less makes the posterior colder. ``reduction``:

    - ``"mean"``: mean NLL + beta * kl / train_size, the loss of an example. It is on the scale of a point
      estimate's cross-entropy, so that learning rates carry over.
    - ``"sum"`` (PyTorch-BayesianCNN's): train_size * mean NLL + beta * kl, the loss of the data set, and so
      train_size times as large, gradients included. Adam hardly notices; SGD needs a learning rate divided
      by train_size.

    ``input`` holds log-probabilities [N, C] or [N, C, d1, ...], or with ``from_logits`` any numbers, which
    go through log_softmax; ``target`` is int64 [N] or [N, d1, ...], ``kl`` a scalar, ``beta`` >= 0.
    A NaN anywhere gives NaN. Raises ValueError for shapes that do not fit, a negative ``beta`` (a tensor's
    value is not looked at), and for input that is not log-probabilities, TypeError for wrong dtypes. That
    input is log-probabilities is looked at once, in the first forward of an ELBO, as it makes the CPU wait
    for a GPU; not under torch.compile, torch.func.vmap or in a CUDA graph.
    """

    # On the class too, for losses that were pickled before there were such options.
    reduction: str = "sum"
    from_logits: bool = False
    _looked_at_input: bool = False

    def __init__(self, train_size: int, *, reduction: str = "sum", from_logits: bool = False) -> None:
        super().__init__()
        if isinstance(train_size, bool) or not isinstance(train_size, int) or train_size < 1:
            raise ValueError(f"ELBO: train_size must be an int >= 1, got {train_size!r}")
        if reduction not in ("sum", "mean"):
            raise ValueError(f"ELBO: reduction must be 'sum' or 'mean', got {reduction!r}")
        self.train_size = train_size
        self.reduction = reduction
        self.from_logits = from_logits

    def forward(self, input: Tensor, target: Tensor, kl: Tensor | float, beta: float | Tensor) -> Tensor:
        _check_elbo(input, target, kl, beta)
        if self.from_logits:
            nll = F.cross_entropy(input, target)
        else:
            if not self._looked_at_input and not is_compiling():
                self._looked_at_input = _check_log_probs(input)
            nll = F.nll_loss(input, target)
        if self.reduction == "mean":
            return nll + beta * kl / self.train_size
        return nll * self.train_size + beta * kl

    def extra_repr(self) -> str:
        return f"{self.train_size}, reduction={self.reduction!r}, from_logits={self.from_logits}"


def _check_elbo(input: Tensor, target: Tensor, kl: Tensor | float, beta: float | Tensor) -> None:
    """What can be told without looking at a tensor's values."""
    if not input.is_floating_point():
        raise TypeError(f"ELBO: input must be floating point, got {input.dtype}")
    if target.dtype != torch.int64:
        raise TypeError(f"ELBO: target must be int64 class numbers, got {target.dtype}")
    if input.dim() < 2:
        raise ValueError(f"ELBO: input must have shape [N, C] or [N, C, ...], got {list(input.shape)}")
    expected = [*input.shape[:1], *input.shape[2:]]
    if list(target.shape) != expected:
        raise ValueError(
            f"ELBO: target must have shape {expected} for input {list(input.shape)}, got {list(target.shape)}"
        )
    if input.numel() == 0:
        raise ValueError(f"ELBO: input is empty, got shape {list(input.shape)}")
    for name, value in (("kl", kl), ("beta", beta)):
        if isinstance(value, Tensor) and value.dim() > 0:
            raise ValueError(f"ELBO: {name} must be a scalar, got shape {list(value.shape)}")
    if not isinstance(beta, Tensor) and beta < 0:
        raise ValueError(f"ELBO: beta must be >= 0, got {beta}")


# Far above what rounding does to a sum of probabilities (bfloat16, 50,000 classes: 0.03 in its logarithm),
# far below what logits give in every row of a batch.
_LOG_SUM_TOLERANCE = 0.1


def _check_log_probs(input: Tensor) -> bool:
    """Raises ValueError where rows do not sum to 1; returns False where that cannot be told now."""
    if input.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    log_sums = input.detach().float().logsumexp(1).flatten()
    try:
        worst = float(log_sums[log_sums.abs().nan_to_num(0.0).argmax()])
    except RuntimeError:  # a tensor without values: vmap, meta, fake
        return False
    if abs(worst) > _LOG_SUM_TOLERANCE:
        raise ValueError(
            f"ELBO: input must be log-probabilities, but a row of exp(input) sums to "
            f"{math.exp(min(worst, 700)):.4g} instead of 1; apply log_softmax, or make the loss with "
            "from_logits=True"
        )
    return True


def get_beta(
    batch_idx: int,
    m: int,
    beta_type: float | str,
    epoch: int | None = None,
    num_epochs: int | None = None,
) -> float:
    """The KL weight of minibatch ``batch_idx`` of ``m``, as the literature writes it.

    ``beta_type``: a float is returned as it is. ``"Blundell"``: 2^(m - i) / (2^m - 1) for i = batch_idx + 1
    (Blundell et al. 2015, section 3.4); ``"Standard"``: 1 / m (Graves 2011). These two share out *one* KL
    over an epoch's minibatches. ``"Soenderby"``: a warm-up, min(epoch / (num_epochs // 4), 1) (Soenderby et
    al. 2016). Raises ValueError for anything else.
    """
    if isinstance(beta_type, (int, float)) and not isinstance(beta_type, bool):
        return float(beta_type)
    if m < 1:
        raise ValueError(f"m must be >= 1 minibatches, got {m}")
    if beta_type == "Blundell":
        # 2^(m - i) / (2^m - 1) without forming 2^m.
        return 2.0 ** -(batch_idx + 1) / (1.0 - 2.0**-m)
    if beta_type == "Standard":
        return 1.0 / m
    if beta_type == "Soenderby":
        if epoch is None or num_epochs is None:
            raise ValueError("beta 'Soenderby' needs epoch and num_epochs")
        return min(epoch / max(num_epochs // 4, 1), 1.0)
    raise ValueError(f"unknown beta {beta_type!r}; allowed: a number, {', '.join(map(repr, SCHEDULES))}")


def kl_weight(batch_idx: int, m: int, beta_type: float | str, epoch: int, num_epochs: int) -> float:
    """The weight of KL / train_size beside the mean NLL of one minibatch: 1 is the exact bound.

    Blundell's and the standard schedule share one KL over the m minibatches of an epoch, while the mean
    NLL of a minibatch stands for the whole data set; so theirs is m times :func:`get_beta`.
    """
    beta = get_beta(batch_idx, m, beta_type, epoch, num_epochs)
    return beta * m if beta_type in ("Blundell", "Standard") else beta
