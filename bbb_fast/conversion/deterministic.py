"""to_deterministic: torch.nn modules again, of the means or of one draw."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .. import functional
from .._noise import RandomModule, fixed_noise
from ..layers import ConcreteDropout, WeightSpace
from ..layers.base import BayesianModule
from . import rules


def to_deterministic(model: nn.Module, *, seed: int | None = None, sample: int = 0) -> nn.Module:
    """A copy of ``model`` with torch.nn's layers in the place of Bayesian ones; the original stays as it is.

    Its weights are the posterior means, or with ``seed`` those of draw ``sample`` of
    ``fixed_noise(seed, sample, model=model)``. Ties, mode, hooks, and which parameters are trained are kept.
    Monte Carlo dropout becomes torch.nn's dropout, which is off in eval mode, and concrete dropout its layer.
    Raises TypeError for what is no module, for a layer that torch.nn has no twin of and, with ``seed``, for
    dropout, whose draws are of inputs.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"to_deterministic: model must be a torch.nn.Module, got {type(model).__name__}")
    return replaced(model, None if seed is None else fixed_noise(seed, sample, model=model))


def replaced(model: nn.Module, draw: fixed_noise | None, shared: Iterable[Tensor] = ()) -> nn.Module:
    """``to_deterministic``, of a draw or the means.

    The copy has the tensors ``shared``, which are no posterior's, in common with the model.
    """
    originals = list(model.modules())
    copied = rules.copy_of(model, shared)
    work = _Replacement(draw, dict(zip(copied.modules(), originals, strict=True)))
    made = work.of(copied)
    moved = {id(old): new for old, new in work.made.items() if new is not old}
    for module in made.modules():
        rules.point_to(module, moved)
    return made


class _Replacement:
    """One call of ``to_deterministic``. ``originals``: the model's module for each of the copy's."""

    def __init__(self, draw: fixed_noise | None, originals: dict[nn.Module, nn.Module]) -> None:
        self._draw, self._originals = draw, originals
        self.made: dict[nn.Module, nn.Module] = {}

    def of(self, module: nn.Module) -> nn.Module:
        if module in self.made:
            return self.made[module]
        self.made[module] = module
        if isinstance(module, BayesianModule):
            self._take_draw(module)
            self.made[module] = (
                self._inside(module) if isinstance(module, WeightSpace) else self._twin(module)
            )
        else:
            for name, child in list(module._modules.items()):
                if child is not None:
                    module._modules[name] = self.of(child)
            if isinstance(module, RandomModule):
                self.made[module] = self._without_masks(module)
        return self.made[module]

    def _without_masks(self, module: RandomModule) -> nn.Module:
        if self._draw is not None:
            raise TypeError(
                f"to_deterministic: {type(module).__name__} draws which of its inputs it drops, and has no "
                "weights that a draw could leave in its place; leave seed out"
            )
        if isinstance(module, ConcreteDropout):
            rules.move_hooks(module, module.layer)
            return module.layer
        kind = next((k for k, twin in rules.DROPOUT.items() if twin is type(module)), None)
        if kind is None:
            raise TypeError(f"to_deterministic: there is no torch.nn layer for {type(module).__name__}")
        twin = kind(module.p).train(module.training)
        rules.move_hooks(module, twin)
        return twin

    @torch.no_grad()
    def _take_draw(self, module: BayesianModule) -> None:
        """Puts the draw, if there is one, into the place of the means, which modules may share."""
        if self._draw is None:
            return
        # Of the original: the copy's means may hold the draw already.
        original = self._originals[module]
        assert isinstance(original, BayesianModule)
        pairs = original.posterior()
        rng, streams = self._draw.rng_and_streams(original, pairs[0][0].device)
        padding = getattr(original, "padding_idx", None)
        for (mean, _), (mu, rho), stream in zip(module.posterior(), pairs, streams, strict=True):
            own = rng + torch.tensor([0, stream], device=rng.device)
            (drawn,), _ = functional.sample_weights([mu], [rho], own.to(mu.device))
            if padding is not None:
                drawn[padding] = mu[padding]
            mean.copy_(drawn)

    def _twin(self, layer: BayesianModule) -> nn.Module:
        pairs = layer.posterior()
        kind, options = rules.twin_of(layer)
        twin = kind(**options, device="meta", dtype=pairs[0][0].dtype)
        for name, (mean, _) in zip(("weight", "bias"), pairs, strict=False):
            setattr(twin, name, mean)
        twin.train(layer.training)
        rules.move_hooks(layer, twin)
        return twin

    def _inside(self, layer: WeightSpace) -> nn.Module:
        rules.move_hooks(layer, layer.module)
        return layer.module
