"""The KL of everything Bayesian in a model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .._noise import RandomModule
from .base import BayesianLayer, BayesianModule, Term, kl_of_layers, kl_of_terms

__all__ = ["kl_loss"]


def kl_loss(model: nn.Module) -> Tensor:
    """KL(q || p) of a model, summed over every Bayesian layer in it, each counted once.

    Always that of the parameters as they are now; one call for all layers of a device and dtype. Parameters
    that several layers share count once. A module of another kind with a ``kl_loss()`` of its own speaks for
    itself and everything below it (the model's own is not asked, as it may be the caller, unless the model is
    a layer such as ``ConcreteDropout``). A model without
    any gives 0.
    """
    groups: dict[tuple[torch.device, torch.dtype], list[BayesianLayer]] = {}
    terms: list[Term] = []
    parts: list[Tensor] = []
    # By id, of tensors that are kept meanwhile: a parametrized layer forms its means when it is asked.
    counted: dict[int, Tensor] = {}
    # Layers that leave rows out come last: another that shares their weight may count all.
    for module in sorted(_with_kl(model, set(), root=True), key=_leaves_rows_out):
        if not isinstance(module, BayesianModule):
            parts.append(module.kl_loss())
            continue
        means = [mu for mu, _ in module.posterior()]
        if isinstance(module, BayesianLayer) and not any(id(mu) in counted for mu in means):
            groups.setdefault((means[0].device, means[0].dtype), []).append(module)
        else:
            # Tied parameters, as of an embedding and the output's layer.
            terms += [term for term in module.terms() if id(_owner(term.mu)) not in counted]
        counted.update((id(mu), mu) for mu in means)
    parts += [kl_of_layers(group) for group in groups.values()]
    if terms:
        parts.append(kl_of_terms(terms))
    if not parts:
        first = next(model.parameters(), None)
        return torch.zeros((), device=None if first is None else first.device)
    total = parts[0]
    for part in parts[1:]:
        total = total + part.to(total.device)
    return total


def _owner(mu: Tensor) -> Tensor:
    """The parameter that a term is of, or a part of."""
    return mu if mu._base is None else mu._base


def _leaves_rows_out(module: Any) -> bool:
    return getattr(module, "padding_idx", None) is not None


def _has_kl(module: nn.Module) -> bool:
    """Whether it has a ``kl_loss()`` of its own, and not a loss of that name."""
    found = getattr(module, "kl_loss", None)
    return callable(found) and not isinstance(found, nn.Module)


def _with_kl(module: nn.Module, seen: set[nn.Module], root: bool = False) -> Iterator[Any]:
    """Every module that has a KL, once; nothing below one is visited. The root's own is not asked."""
    if module in seen:
        return
    seen.add(module)
    own = isinstance(module, BayesianModule) or (isinstance(module, RandomModule) and _has_kl(module))
    if own or (not root and _has_kl(module)):
        yield module
        return
    for child in module.children():
        yield from _with_kl(child, seen)
