"""to_deterministic: torch.nn modules again, of the means or of one draw."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from .. import functional
from .._noise import fixed_noise
from ..layers import WeightSpace
from ..layers.base import BayesianLayer, BayesianModule
from . import rules


def to_deterministic(model: nn.Module, *, seed: int | None = None, sample: int = 0) -> nn.Module:
    """A copy of ``model`` with torch.nn's layers in the place of Bayesian ones; the original stays as it is.

    Its weights are the posterior means, or with ``seed`` those of draw ``sample`` of
    ``fixed_noise(seed, sample, model=model)``. Ties, mode, hooks, and which parameters are trained are kept.
    Raises TypeError for what is no module, and for a Bayesian layer that torch.nn has no twin of.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"to_deterministic: model must be a torch.nn.Module, got {type(model).__name__}")
    draw = None if seed is None else fixed_noise(seed, sample, model=model)
    originals = list(model.modules())
    copied = copy.deepcopy(model)
    work = _Replacement(draw, dict(zip(copied.modules(), originals, strict=True)))
    return work.of(copied)


class _Replacement:
    """One call of ``to_deterministic``. ``originals``: the model's module for each of the copy's."""

    def __init__(self, draw: fixed_noise | None, originals: dict[nn.Module, nn.Module]) -> None:
        self._draw, self._originals = draw, originals
        self._made: dict[nn.Module, nn.Module] = {}
        # By the id of a mean in the copy: the parameter in its place.
        self._weights: dict[int, nn.Parameter] = {}

    def of(self, module: nn.Module) -> nn.Module:
        if module in self._made:
            return self._made[module]
        if isinstance(module, WeightSpace):
            self._made[module] = self._inside(module)
        elif isinstance(module, BayesianLayer):
            self._made[module] = self._twin(module)
        else:
            self._made[module] = module
            for name, child in list(module._modules.items()):
                if child is not None:
                    module._modules[name] = self.of(child)
        return self._made[module]

    def _drawn(self, module: BayesianModule) -> list[Tensor]:
        """The weights in the place of the means, in their order."""
        pairs = module.posterior()
        if self._draw is None:
            return [mu.detach() for mu, _ in pairs]
        original = self._originals[module]
        with torch.no_grad():
            rng = self._draw.rng(original, pairs[0][0].device)
            if isinstance(module, WeightSpace):
                return list(module.draw(rng).values())
            mus, rhos = zip(*pairs, strict=True)
            drawn, _ = functional.sample_weights(mus, rhos, rng)
            if getattr(module, "padding_idx", None) is not None:
                drawn[0][module.padding_idx] = mus[0][module.padding_idx]
            return drawn

    def _parameter(self, mean: nn.Parameter, value: Tensor) -> nn.Parameter:
        if id(mean) not in self._weights:
            if self._draw is None:
                self._weights[id(mean)] = mean
            else:
                like = torch.empty_like(mean).copy_(value)
                self._weights[id(mean)] = nn.Parameter(like, requires_grad=mean.requires_grad)
        return self._weights[id(mean)]

    def _twin(self, layer: BayesianLayer) -> nn.Module:
        kind, options = rules.twin_of(layer)
        twin = kind(**options, device="meta", dtype=layer.W_mu.dtype)
        names = ("weight", "bias")
        for name, (mean, _), value in zip(names, layer.posterior(), self._drawn(layer), strict=False):
            setattr(twin, name, self._parameter(mean, value))
        twin.train(layer.training)
        rules.move_hooks(layer, twin)
        return twin

    def _inside(self, layer: WeightSpace) -> nn.Module:
        module = layer.module
        if self._draw is not None:
            with torch.no_grad():
                for (mean, _), value in zip(layer.posterior(), self._drawn(layer), strict=True):
                    mean.copy_(value)
        return module
