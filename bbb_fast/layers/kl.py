"""The KL of everything Bayesian in a model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .base import BayesianLayer, kl_of_layers

__all__ = ["kl_loss"]


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
