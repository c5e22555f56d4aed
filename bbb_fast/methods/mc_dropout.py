"""Monte Carlo dropout: a network's own dropout, or one put into it, as a posterior."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from .. import _checks
from ..conversion import rules
from ..layers import MCDropout, MCDropout1d, MCDropout2d, MCDropout3d

__all__ = ["mc_dropout", "model_precision"]

# By the number of dimensions that the layer's weight has behind [out, in].
_BEFORE: dict[int, type[MCDropout]] = {0: MCDropout, 1: MCDropout1d, 2: MCDropout2d, 3: MCDropout3d}
_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
# What an inserted dropout is registered as, in the layer that it comes before.
_NAME = "input_dropout"


def mc_dropout(model: nn.Module, p: float | None = None) -> nn.Module:
    """A copy of ``model`` whose dropout stays on in eval mode; the original is untouched.

    Gal and Ghahramani, "Dropout as a Bayesian approximation", ICML 2016 (arXiv:1506.02142): train with
    dropout (and weight decay, see ``methods.model_precision``), then let every prediction draw masks. Each
    ``nn.Dropout``, ``Dropout1d``, ``Dropout2d`` and ``Dropout3d`` becomes a ``layers.MCDropout`` of its kind,
    of its own rate or of ``p`` if that is given; one that is registered at several places becomes one for
    each, so that their masks differ. A model without any gets dropout of rate ``p`` before every linear layer
    (of elements) and convolution (of whole channels) but the first one registered, as a submodule
    ``input_dropout`` of that layer and a hook that calls it. (Attention's own layers are left out.)

    Parameters, buffers and the names of the ``state_dict`` stay, so that checkpoints load into either. The
    copy works with ``predict``, ``multi_sample`` and ``fixed_noise`` as Bayesian layers do; under
    ``posterior_means()`` it is the model without dropout.

    What cannot be reached raises ValueError, by name: the ``dropout`` number of attention and recurrent
    layers (set it to 0 to go on without), alpha dropout, which does not drop to 0, and other kinds of dropout
    module. Not seen are ``torch.nn.functional.dropout`` in a forward, and a dropout module that one forward
    calls twice: its masks are independent then, but under ``fixed_noise`` and in ``predict`` alike at both.

    Args: ``p`` in [0, 1].
    Raises TypeError for what is no module, and for one in DataParallel and its like (turn the model inside);
    ValueError also for ``p`` out of range and, without ``p``, for a model whose modules drop nothing.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"mc_dropout: model must be a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        if rules.is_wrapper(module):
            raise TypeError(f"mc_dropout: give the model inside {type(module).__name__} and wrap the result")
    if p is not None:
        p = _checks.number("mc_dropout", "p", p)
        _checks.probability("mc_dropout", "p", p)
    _refuse_unreachable(model)
    copied = rules.copy_of(model)
    own: list[Any]
    own = [m for m in copied.modules() if type(m) in rules.DROPOUT or isinstance(m, MCDropout)]
    if p is None and not any(m.p > 0 for m in own):
        has = "drop nothing (p = 0)" if own else "are none"
        raise ValueError(f"mc_dropout: the model's own dropout modules {has}: say p, for it to get some")
    if own or p is None:
        return _turned_on(copied, p)
    _insert(copied, p)
    return copied


def _refuse_unreachable(model: nn.Module) -> None:
    """Raises for dropout that would stay as it is."""
    found = []
    for name, module in model.named_modules():
        kind, label = type(module).__name__, name or "(model)"
        rate = getattr(module, "dropout", None)
        if isinstance(module, nn.modules.dropout._DropoutNd) and type(module) not in rules.DROPOUT:
            found.append(f"{label} ({kind})")
        # Between the layers of a recurrent one, if there are several.
        elif isinstance(rate, float) and rate > 0 and getattr(module, "num_layers", 2) != 1:
            found.append(f"{label} ({kind}, dropout={rate:g})")
    if found:
        raise ValueError(
            f"mc_dropout: there is dropout that cannot be turned on in eval mode: {', '.join(found)}; set "
            "its rate to 0, or take it out, to go on without"
        )


def _turned_on(model: nn.Module, p: float | None) -> nn.Module:
    """The model with each of its dropout modules replaced, or itself if that is all it is."""
    replaced: dict[int, nn.Module] = {}

    def twin(module: Any) -> MCDropout:
        kind = rules.DROPOUT.get(type(module), type(module))
        made: MCDropout = kind(module.p if p is None else p).train(module.training)
        rules.move_hooks(module, made)
        replaced.setdefault(id(module), made)
        return made

    def is_dropout(module: nn.Module | None) -> bool:
        return type(module) in rules.DROPOUT or isinstance(module, MCDropout)

    if is_dropout(model):
        return twin(model)
    parents = list(model.modules())
    for parent in parents:
        for name, child in parent._modules.items():
            if is_dropout(child):
                parent._modules[name] = made = twin(child)
                if isinstance(parent, nn.TransformerEncoderLayer):
                    # Its fused forward of eval mode, which has no dropout, is left out where there are hooks.
                    made.register_forward_pre_hook(_nothing)
    for parent in parents:
        rules.point_to(parent, replaced)
    return model


def _insert(model: nn.Module, p: float) -> None:
    within = {m for reader in model.modules() if isinstance(reader, rules.READERS) for m in reader.modules()}
    layers = [m for m in model.modules() if isinstance(m, _LAYERS) and m not in within]
    if len(layers) < 2:
        raise ValueError(
            f"mc_dropout: the model has no dropout, and of linear layers and convolutions {len(layers)}: "
            "none behind the first, to put dropout before"
        )
    for layer in layers[1:]:
        dims = len(layer.kernel_size) if isinstance(layer, nn.modules.conv._ConvNd) else 0
        layer.add_module(_NAME, _BEFORE[dims](p).train(layer.training))
        layer.register_forward_pre_hook(_drop_input)


# Hooks are functions of a module, so that copies and pickles of the layer find them again.
def _drop_input(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (getattr(layer, _NAME)(args[0]), *args[1:])


def _nothing(module: nn.Module, args: tuple[Any, ...]) -> None:
    return None


def model_precision(length_scale: float, p: float, train_size: int, weight_decay: float) -> float:
    """tau = l^2 (1 - p) / (2 N lambda), the precision of a regression's noise that dropout training implies.

    Gal and Ghahramani, "Dropout as a Bayesian approximation", ICML 2016 (arXiv:1506.02142, eq. 7, whose p is
    the probability to keep). A prediction's variance is that of the draws plus 1 / tau.

    Args: ``length_scale`` l > 0, of the prior N(0, 1 / l^2) over weights; ``p`` in [0, 1), the rate of
    dropout; ``train_size`` N >= 1; ``weight_decay`` lambda > 0, the factor of the sum of squared weights that
    is added to the mean of half the squared errors. The paper's weights are those that meet a kept input:
    W / (1 - p), as dropout scales what it keeps. For an optimizer's weight decay of W, lambda is that times
    (1 - p)^2 / 2. Raises ValueError otherwise.
    """
    for name, value in (("length_scale", length_scale), ("weight_decay", weight_decay)):
        if not 0 < value < math.inf:
            raise ValueError(f"model_precision: {name} must be finite and > 0, got {value!r}")
    if not 0 <= p < 1:
        raise ValueError(f"model_precision: p must be in [0, 1), got {p!r}")
    if train_size < 1:
        raise ValueError(f"model_precision: train_size must be >= 1, got {train_size!r}")
    return length_scale**2 * (1 - p) / (2 * train_size * weight_decay)
