"""Several draws of a model: predictions, and one forward for all draws in training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ._checks import initialised, integer
from ._eval_mode import in_eval_mode
from ._noise import _INT64_MAX, RandomModule, Repeated, draw_seed, fixed_noise
from .layers import BBB
from .layers.base import BayesianLayer

__all__ = ["multi_sample", "predict"]


def _map(function: Callable[[Any], Any], x: Any) -> Any:
    """``x``, tuples, lists and dicts and what they hold, with ``function`` of everything else in it."""
    if isinstance(x, Mapping):
        items = {key: _map(function, value) for key, value in x.items()}
        kind: Any = type(x)
        return items if kind is dict else kind(items)
    if isinstance(x, (tuple, list)):
        values = [_map(function, value) for value in x]
        return type(x)(*values) if hasattr(x, "_fields") else type(x)(values)
    return function(x)


def _leaves(x: Any) -> list[Any]:
    if isinstance(x, Mapping):
        return _leaves(list(x.values()))
    return [leaf for value in x for leaf in _leaves(value)] if isinstance(x, (tuple, list)) else [x]


def _tensors_for(model: nn.Module, x: Any, caller: str, *, to_device: bool = True) -> Any:
    """``x`` with NumPy arrays as tensors on the model's device, floating numbers in its parameters' type."""
    if not any(isinstance(leaf, np.ndarray) for leaf in _leaves(x)):
        return x
    of_model = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))

    def tensor(leaf: Any) -> Any:
        if not isinstance(leaf, np.ndarray):
            return leaf
        try:
            t = torch.as_tensor(leaf)
        except TypeError as error:
            raise TypeError(f"{caller}: x must hold numbers, got a NumPy array of {leaf.dtype}") from error
        dtype = of_model.dtype if t.is_floating_point() else t.dtype
        return t.to(of_model.device if to_device else t.device, dtype)

    return _map(tensor, x)


def _rows(x: Any, caller: str) -> int:
    """The number of rows that batches are made of; ``caller`` is who says that there is none."""
    rows = set()
    for leaf in _leaves(x):
        if isinstance(leaf, Tensor) and leaf.dim() > 0:
            rows.add(leaf.shape[0])
        elif not (leaf is None or isinstance(leaf, (Tensor, bool, int, float))):
            raise TypeError(f"{caller}: x must hold tensors and numbers, got {type(leaf).__name__}")
    if len(rows) != 1:
        raise ValueError(
            f"{caller}: the tensors of x must have the same number of rows, got "
            f"{sorted(rows) or 'no tensor'}"
        )
    return rows.pop()


def _part(x: Any, start: int, stop: int) -> Any:
    return _map(lambda t: t[start:stop] if isinstance(t, Tensor) and t.dim() > 0 else t, x)


def _output(result: Any, caller: str = "predict") -> Tensor:
    """The tensor in what a model returns; ``caller`` is who says that there is none."""
    if isinstance(result, tuple) and result:
        result = result[0]
    if isinstance(result, Tensor):
        if result.layout is not torch.strided or result.is_nested:
            raise TypeError(f"{caller}: the model's output must be a dense tensor, got {result.layout}")
        return result
    what, fields = type(result).__name__, []
    if isinstance(result, Mapping):
        fields = list(result)
    elif dataclasses.is_dataclass(result):
        fields = [field.name for field in dataclasses.fields(result)]
    if fields:
        what += f" of {', '.join(map(str, fields))}"
    raise TypeError(
        f"{caller}: the model must return a tensor, or a tuple whose first element is one, got "
        f"{what}; say what to take of it with call=lambda model, x: ..."
    )


class _Outputs:
    """All draws in one tensor, of the first output's type and device; ``rows``: x's, if it comes in parts."""

    all: Tensor

    def __init__(self, samples: int, rows: int | None) -> None:
        self._samples, self._rows = samples, rows

    def put(self, k: int, output: Tensor, start: int, size: int) -> None:
        """Of draw ``k`` the part that begins with x's row ``start`` and has ``size`` rows, or fewer.

        The two say nothing where x comes as a whole.
        """
        shape: tuple[int, ...] = output.shape
        if self._rows is not None:
            rows = min(size, self._rows - start)
            if not shape or shape[0] % rows:
                raise ValueError(
                    "predict: with batch_size, the first dimension of the output must be that of the rows, "
                    f"got output {list(shape)} for {rows} rows; leave batch_size out"
                )
            # A row of x may become several.
            start *= shape[0] // rows
            shape = (self._rows * (shape[0] // rows), *shape[1:])
        if not hasattr(self, "all"):
            self.all = output.new_empty((self._samples, *shape))
            self._draws = self.all.unbind()
        if self.all.shape[1:] != shape or self.all.dtype != output.dtype:
            raise ValueError(
                "predict: the output must keep its shape and type from draw to draw and batch to batch, "
                f"got {list(shape)} {output.dtype} after {list(self.all.shape[1:])} {self.all.dtype}"
            )
        of_draw = self._draws[k]
        (of_draw if self._rows is None else of_draw[start : start + len(output)]).copy_(output)


@torch.no_grad()
def predict(
    model: nn.Module,
    x: Any,
    samples: int = 10,
    *,
    seed: int | None = None,
    batch_size: int | None = None,
    call: Callable[[nn.Module, Any], Any] | None = None,
) -> Tensor:
    """The model's outputs under ``samples`` independent draws of all its weights.

    Each draw is one function: the same weights for every row of ``x``, whatever ``batch_size`` splits it
    into. Layers of every estimator draw in weight space, one product a layer. The same ``seed``
    gives the same draws (draw k is that of ``fixed_noise(seed, sample=k, model=model)``); without one it
    comes from PyTorch's default generator.

    The model runs in eval mode and is not written to: other threads may predict with it, or train it, at
    the same time. What runs is a copy of its module objects around the same parameters and buffers, so
    that what a forward stores in attributes of its module is gone afterwards. Compiled and scripted models,
    and those whose modules are reached by closures or other objects, run themselves, in eval mode until the
    last prediction ends: another thread must not train them meanwhile.

    Args: x, a tensor [N, ...], a NumPy array (which goes to the model's device and type), or tuples, lists
    and dicts of tensors, which the model gets as they are and ``batch_size`` splits along their first
    dimension. ``call(model, x)`` says how the model is called and what of its result is the output, if not
    ``model(x)``: for example ``lambda model, x: model(**x).logits``.
    Returns [samples, N, ...], what the model returns (before any softmax), or its first element if it
    returns a tuple. Raises ValueError for samples < 1 or batch_size < 1, and for outputs whose shape
    changes or does not follow the rows that ``batch_size`` gives them; TypeError for an output that is no
    tensor.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"predict: model must be a torch.nn.Module, got {type(model).__name__}")
    count = integer(samples)
    if count is None or count < 1:
        raise ValueError(f"predict: samples must be an int >= 1, got {samples!r}")
    size = None if batch_size is None else integer(batch_size)
    if batch_size is not None and (size is None or size < 1):
        raise ValueError(f"predict: batch_size must be >= 1, got {batch_size!r}")
    initialised("predict", model)
    if seed is None:
        seed = int(torch.randint(0, _INT64_MAX, ()).item())
    x = _tensors_for(model, x, "predict")
    parts, rows = [(0, x)], None
    if size is not None and size < (total := _rows(x, "predict")):
        parts, rows = [(start, _part(x, start, start + size)) for start in range(0, total, size)], total
    outputs = _Outputs(count, rows)
    with in_eval_mode(model) as running:
        for k, draw in enumerate(fixed_noise(seed, model=running).samples(count)):
            with draw:
                for start, part in parts:
                    result = running(part) if call is None else call(running, part)
                    outputs.put(k, _output(result), start, size or 0)
    return outputs.all


def multi_sample(
    model: nn.Module,
    x: Any,
    samples: int,
    *,
    seed: int | None = None,
    call: Callable[[nn.Module, Any], Any] | None = None,
) -> Tensor:
    """The model's outputs under ``samples`` draws, [samples, N, ...], with gradients, in one forward.

    Element k is what the model returns under ``fixed_noise(seed, sample=k, model=model,
    draw="activations")``: each layer uses its own estimator. The rows of x are repeated for each draw, so
    modules of other kinds see samples * N rows at once. On the CPU a layer reads its parameters once for all
    draws, and local reparameterization forms its products for all of them together: one for all of them, in
    a layer that the input reaches unchanged (or as a view).

    A model whose rows do not go through it side by side runs ``samples`` times instead: one in which batch
    norms are in training mode, or with modules in weight space that are not linear layers, convolutions or
    embeddings. (What mixes rows in another way is not seen.)

    Args: x, a tensor [N, ...] or tuples, lists and dicts of tensors; ``call`` as in ``predict``; without a
    ``seed`` it comes from PyTorch's default generator, and ranks of ``torch.distributed`` draw differently. A
    model that returns a tuple gives its first element. Raises TypeError and ValueError as ``predict`` does,
    and ValueError for an output whose rows are not x's.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"multi_sample: model must be a torch.nn.Module, got {type(model).__name__}")
    count = integer(samples)
    if count is None or count < 1:
        raise ValueError(f"multi_sample: samples must be an int >= 1, got {samples!r}")
    initialised("multi_sample", model)
    if seed is None:
        seed = draw_seed()
    x = _tensors_for(model, x, "multi_sample")
    run = model if call is None else partial(call, model)
    if not _side_by_side(model):
        outputs = []
        for k in range(count):
            with fixed_noise(seed, k, model=model, draw="activations"):
                outputs.append(_output(run(x)))
        return torch.stack(outputs)
    rows = _rows(x, "multi_sample")
    repeated: list[Repeated] = []

    def of_each_draw(t: Any) -> Any:
        if not isinstance(t, Tensor) or t.dim() == 0:
            return t
        repeated.append(Repeated.of(t, count))
        return repeated[-1].all

    inputs = _map(of_each_draw, x)
    with fixed_noise(seed, model=model, draw="activations").all_samples(count, repeated):
        output = _output(run(inputs))
    if output.dim() == 0 or output.shape[0] % (count * max(rows, 1)):
        raise ValueError(
            "multi_sample: the first dimension of the output must be that of the rows, got output "
            f"{list(output.shape)} for {count} draws of {rows} rows"
        )
    return output.unflatten(0, (count, -1)) if rows else output.new_empty((count, *output.shape))


def _side_by_side(model: nn.Module) -> bool:
    """Whether the draws of a forward may be parts of one batch."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            return False
        if isinstance(module, RandomModule) and (
            not isinstance(module, BayesianLayer) or isinstance(module, BBB.BBBEmbeddingBag)
        ):
            return False
    return True
