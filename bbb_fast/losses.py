"""The evidence lower bound: the KL of a model, the loss, and the schedules of the KL's weight."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers.base import BayesianLayer, kl_of_layers

__all__ = ["ELBO", "get_beta", "kl_loss", "kl_weight"]

SCHEDULES = ("Blundell", "Soenderby", "Standard")


def kl_loss(model: nn.Module) -> Tensor:
    """KL(q || p) of a model, summed over every Bayesian layer in it, each counted once.

    Always that of the parameters as they are now; one call for all layers of a device and dtype. A module of
    another kind with a ``kl_loss()`` of its own speaks for itself and everything below it (the model's own is
    not asked, as it may be the caller). A model without any gives 0.
    """
    groups: dict[tuple[torch.device, torch.dtype], list[BayesianLayer]] = {}
    parts: list[Tensor] = []
    for module in _with_kl(model, set(), root=True):
        if isinstance(module, BayesianLayer):
            W_mu = module._parameters_in_order()[0]
            groups.setdefault((W_mu.device, W_mu.dtype), []).append(module)
        else:
            parts.append(module.kl_loss())
    parts += [kl_of_layers(group) for group in groups.values()]
    if not parts:
        first = next(model.parameters(), None)
        return torch.zeros((), device=None if first is None else first.device)
    total = parts[0]
    for part in parts[1:]:
        total = total + part.to(total.device)
    return total


def _with_kl(module: nn.Module, seen: set[nn.Module], root: bool = False) -> Iterator[Any]:
    """Every module that has a KL, once; nothing below one is visited. The root's own is not asked."""
    if module in seen:
        return
    seen.add(module)
    if isinstance(module, BayesianLayer) or (not root and hasattr(module, "kl_loss")):
        yield module
        return
    for child in module.children():
        yield from _with_kl(child, seen)


class ELBO(nn.Module):
    """The negative evidence lower bound of a data set of ``train_size`` examples.

    ``forward(input, target, kl, beta)`` = train_size * mean NLL + beta * kl, with ``input`` the
    log-probabilities [N, C] and ``target`` int64 [N]. ``beta=1`` is the bound itself (Blundell et al.
    2015, eq. 1, on a minibatch); less makes the posterior colder.
    """

    def __init__(self, train_size: int) -> None:
        super().__init__()
        if isinstance(train_size, bool) or not isinstance(train_size, int) or train_size < 1:
            raise ValueError(f"ELBO: train_size must be an int >= 1, got {train_size!r}")
        self.train_size = train_size

    def forward(self, input: Tensor, target: Tensor, kl: Tensor | float, beta: float | Tensor) -> Tensor:
        return F.nll_loss(input, target, reduction="mean") * self.train_size + beta * kl


def get_beta(
    batch_idx: int,
    m: int,
    beta_type: float | str,
    epoch: int | None = None,
    num_epochs: int | None = None,
) -> float:
    """The KL weight of minibatch ``batch_idx`` of ``m``, as the literature writes it.

    A float is returned as it is. ``"Blundell"``: 2^(m - i) / (2^m - 1) for i = batch_idx + 1 (Blundell et
    al. 2015, section 3.4); ``"Standard"``: 1 / m (Graves 2011). These two share out *one* KL over an
    epoch's minibatches. ``"Soenderby"``: a warm-up, min(epoch / (num_epochs // 4), 1) (Soenderby et al.
    2016). Raises ValueError for anything else.
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
