"""Containers that keep PyTorch-BayesianCNN's way of writing models."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from .._noise import posterior_means
from .base import BayesianModule
from .kl import kl_loss

__all__ = ["FlattenLayer", "ModuleWrapper"]


class ModuleWrapper(nn.Module):
    """Runs its registered modules in order and returns ``(output, kl)``.

    Subclass it, assign layers in ``__init__``, write no ``forward``. A module assigned under two names
    runs twice. A nested ModuleWrapper contributes its output; the KL, a scalar, counts every Bayesian layer
    below once. ``model(x, sample=False)`` uses the posterior means.
    """

    def set_flag(self, name: str, value: Any) -> None:
        """Sets attribute ``name`` to ``value`` on this module and every wrapper and Bayesian layer below."""
        for module in self.modules():
            if isinstance(module, (ModuleWrapper, BayesianModule)):
                setattr(module, name, value)

    def forward(self, x: Tensor, sample: bool = True) -> tuple[Tensor, Tensor]:
        """Returns (output, kl); ``sample=False`` uses the posterior means of every layer below."""
        if sample:
            return self._run(x), kl_loss(self)
        with posterior_means():
            return self._run(x), kl_loss(self)

    def _run(self, x: Tensor) -> Tensor:
        # Not self.children(): that drops the second of two names for one module.
        for module in self._modules.values():
            if isinstance(module, ModuleWrapper):
                plain = type(module).forward is ModuleWrapper.forward
                x = module._run(x) if plain else module(x)[0]
            elif module is not None:
                x = module(x)
        return x


class FlattenLayer(nn.Module):
    """Reshapes [N, ...] to [N, num_features]; raises ValueError where a row has another size."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, x: Tensor) -> Tensor:
        # reshape(-1, ...) would turn images of another size into another number of rows.
        if math.prod(x.shape[1:]) != self.num_features:
            raise ValueError(
                f"FlattenLayer: a row of the input must have {self.num_features} elements, got input "
                f"{list(x.shape)}"
            )
        return x.reshape(x.shape[0], self.num_features)

    def extra_repr(self) -> str:
        return str(self.num_features)
