"""Containers that keep PyTorch-BayesianCNN's way of writing models."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from ..losses import kl_loss
from .base import BayesianLayer

__all__ = ["FlattenLayer", "ModuleWrapper"]


class ModuleWrapper(nn.Module):
    """Runs its registered modules in order and returns ``(output, kl)``.

    Subclass it, assign layers in ``__init__``, write no ``forward``. A module assigned under two names
    runs twice. A nested ModuleWrapper contributes its output; the KL counts every Bayesian layer below
    once.
    """

    def set_flag(self, name: str, value: Any) -> None:
        """Sets attribute ``name`` on this module and on every wrapper and Bayesian layer below."""
        for module in self.modules():
            if isinstance(module, (ModuleWrapper, BayesianLayer)):
                setattr(module, name, value)

    def forward(self, x: Tensor, sample: bool = True) -> tuple[Tensor, Tensor]:
        """Returns (output, kl); ``sample=False`` uses the posterior means of the direct children."""
        return self.run(x, sample), kl_loss(self)

    def run(self, x: Tensor, sample: bool = True) -> Tensor:
        """The output alone, without the KL."""
        # Not self.children(): that drops the second of two names for one module.
        for module in self._modules.values():
            if isinstance(module, ModuleWrapper):
                x = (
                    module.run(x, sample)
                    if type(module).forward is ModuleWrapper.forward
                    else module(x, sample)[0]
                )
            elif isinstance(module, BayesianLayer):
                x = module(x, sample)
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
