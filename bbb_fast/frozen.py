"""frozen_ensemble: several draws of a model as one module without noise, to be exported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ._checks import integer
from ._noise import _INT64_MAX, RandomModule, fixed_noise
from .conversion import rules
from .conversion.deterministic import replaced
from .inference import _output
from .layers.base import BayesianModule

__all__ = ["FrozenEnsemble", "frozen_ensemble"]


class FrozenEnsemble(nn.Module):
    """Models whose outputs are one answer: their mean, and their variance. :func:`frozen_ensemble` makes it.

    ``members``: the models, each a ``torch.nn.Module`` by itself. They and the arithmetic are PyTorch's own
    ops, so that ``torch.export`` and ONNX take the whole, and what they write runs without this package.
    ``class_dim``, ``call``: as in :func:`frozen_ensemble`. It returns mean and variance, each [N, ...].
    """

    def __init__(
        self,
        members: list[nn.Module],
        class_dim: int | None = None,
        call: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.class_dim = class_dim
        self.call = call

    def forward(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """Mean and variance over the members, each of an output's shape [N, ...] and dtype.

        The variance is that of the members themselves, divided by their number: 0 of one.
        """
        draws = torch.stack([self._answer(member, args, options) for member in self.members])
        variance, mean = torch.var_mean(draws, 0, correction=0)
        return mean, variance

    def _answer(self, member: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
        result = member(*args, **options) if self.call is None else self.call(member, *args, **options)
        output = _output(result, "frozen_ensemble")
        return output if self.class_dim is None else output.softmax(self.class_dim)

    def extra_repr(self) -> str:
        return "" if self.class_dim is None else f"class_dim={self.class_dim}"


def frozen_ensemble(
    model: nn.Module,
    samples: int = 10,
    *,
    seed: int | None = None,
    class_dim: int | None = None,
    call: Callable[..., Any] | None = None,
) -> FrozenEnsemble:
    """``samples`` pinned draws of a model as one module, which answers with their mean and variance.

    Member k is ``to_deterministic(model, seed=seed, sample=k)`` in eval mode, so the mean and variance are
    those of ``predict(model, x, samples, seed=seed)`` over its draws. It has no noise, no gradients, and none
    of this package's ops; ``model`` stays as it is. Drawn weights are there ``samples`` times, all else
    (batch norms, layers that are not Bayesian) once. docs/export.md shows its way to ONNX.

    Args: ``seed`` as in ``predict``; ``class_dim``, the dimension of an output that holds the classes'
    logits: mean and variance are then those of the probabilities; ``call(member, *args, **options)``, which
    says how a member is called and what of its result is the output, as in ``predict``.
    Raises TypeError for what is no module, for a Bayesian layer that torch.nn has no twin of, and for a
    module that draws something else than weights; ValueError for samples < 1. A forward raises TypeError for
    an output that is no dense tensor, as ``predict`` does.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"frozen_ensemble: model must be a torch.nn.Module, got {type(model).__name__}")
    count = integer(samples)
    if count is None or count < 1:
        raise ValueError(f"frozen_ensemble: samples must be an int >= 1, got {samples!r}")
    if class_dim is not None and integer(class_dim) is None:
        raise TypeError(f"frozen_ensemble: class_dim must be an int or None, got {class_dim!r}")
    for module in model.modules():
        if isinstance(module, RandomModule) and not isinstance(module, BayesianModule):
            raise TypeError(
                f"frozen_ensemble: {type(module).__name__} draws at each forward, and not its weights, which "
                "could be kept"
            )
    if seed is None:
        seed = int(torch.randint(0, _INT64_MAX, ()).item())
    own = rules.copy_of(model).eval().requires_grad_(False)
    shared = _without_posterior(own)
    members = [replaced(own, fixed_noise(seed, k, model=own), shared) for k in range(count)]
    return FrozenEnsemble(members, class_dim, call).eval()


def _without_posterior(model: nn.Module) -> list[Tensor]:
    """The parameters and buffers that are the same under every draw."""
    pairs = [pair for m in model.modules() if isinstance(m, BayesianModule) for pair in m.posterior()]
    drawn = {id(t) for pair in pairs for t in pair}
    return [t for t in (*model.parameters(), *model.buffers()) if id(t) not in drawn]
