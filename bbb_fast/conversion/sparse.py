"""Sparse variational dropout: which weights are noise, and setting them to 0."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..layers.base import BayesianModule
from ..priors import LogUniform

# Of a weight that is pruned: sigma is 0 to every type.
_NO_NOISE = -200.0


@dataclass(frozen=True)
class Sparsity:
    """How many weights are noise, of each module and in all; biases are not counted.

    Attributes:
        layers: by the module's name, how many of its weights are pruned, and how many it has.
    """

    layers: dict[str, tuple[int, int]]

    @property
    def pruned(self) -> int:
        """Of all modules together."""
        return sum(pruned for pruned, _ in self.layers.values())

    @property
    def total(self) -> int:
        """All weights, pruned or not."""
        return sum(total for _, total in self.layers.values())

    @property
    def fraction(self) -> float:
        """Pruned of all, 0 ... 1."""
        return self.pruned / max(self.total, 1)

    def __str__(self) -> str:
        lines = [f"{name or '(model)'}: {p / max(n, 1):.2%} of {n:,}" for name, (p, n) in self.layers.items()]
        return "\n".join([*lines, f"in all {self.fraction:.2%} of {self.total:,} weights"])


def _noise(model: nn.Module, threshold: float) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """Name, mu, rho and which are noise, of each weight (not of biases)."""
    for name, module in model.named_modules():
        if isinstance(module, BayesianModule):
            for k, (mu, rho) in enumerate(module.posterior()):
                if mu.dim() >= 2:
                    label = name if k == 0 else f"{name}[{k}]"
                    pruned = (mu == 0) & (rho <= _NO_NOISE)
                    yield label, mu, rho, pruned | (LogUniform().log_alpha(mu, rho) > threshold)


@torch.no_grad()
def sparsity(model: nn.Module, threshold: float = 3.0) -> Sparsity:
    """Counts the weights of ``model`` that are noise: ln alpha = ln(sigma^2 / mu^2) is above ``threshold``.

    Molchanov, Ashukha and Vetrov, "Variational dropout sparsifies deep neural networks", ICML 2017, who take
    3 (a dropout rate of 0.95). Meant for models trained with the :class:`bbb_fast.priors.LogUniform` prior.
    """
    return Sparsity({name: (int(m.sum()), m.numel()) for name, _, _, m in _noise(model, threshold)})


@torch.no_grad()
def prune(model: nn.Module, threshold: float = 3.0) -> Sparsity:
    """Sets the weights of ``model`` that are noise, by :func:`sparsity`, to 0 and without noise, in place.

    What is trained on afterwards moves them again. Their sigma is 0, so that the KL is huge from then on and
    means nothing. Returns what was set, by the same ``threshold``.
    """
    found = {}
    for name, mu, rho, noise in _noise(model, threshold):
        mu[noise] = 0.0
        rho[noise] = _NO_NOISE
        found[name] = (int(noise.sum()), noise.numel())
    return Sparsity(found)
