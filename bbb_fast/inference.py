"""Prediction with T independent draws of the weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ._noise import _INT64_MAX, fixed_noise

__all__ = ["predict"]


def _output(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


@torch.no_grad()
def predict(
    model: nn.Module,
    x: Tensor,
    samples: int = 10,
    *,
    seed: int | None = None,
    batch_size: int | None = None,
) -> Tensor:
    """The model's outputs under ``samples`` independent draws of all its weights.

    Each draw is one function: the same weights for every row of ``x``, whatever ``batch_size`` splits it
    into. Layers of every estimator draw in weight space, one product a layer. The same ``seed``
    gives the same draws; without one it comes from PyTorch's default generator. The model runs in eval
    mode and gets its modes back.

    Args: x [N, ...]. Returns [samples, N, ...], what the model returns (before any softmax), or its first
    element if it returns a tuple. Raises ValueError for samples < 1 or batch_size < 1.
    """
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ValueError(f"predict: samples must be an int >= 1, got {samples!r}")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"predict: batch_size must be >= 1, got {batch_size!r}")
    if seed is None:
        seed = int(torch.randint(0, _INT64_MAX, ()).item())
    batches = (x,) if batch_size is None else x.split(batch_size)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        draws = []
        for k in range(samples):
            with fixed_noise(seed, sample=k):
                parts = [_output(model(batch)) for batch in batches]
            draws.append(torch.cat(parts) if len(parts) > 1 else parts[0])
        return torch.stack(draws)
    finally:
        for module, mode in modes:
            module.training = mode
