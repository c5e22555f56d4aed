"""Checks of what the metrics are given; each returns the tensors that the arithmetic uses."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._checks import FLOAT_DTYPES, integer


def check_tensor(name: str, value: object, *axes: str) -> Tensor:
    """Check type, rank, dtype and that it is not empty; each of ``axes`` reads like "T, N, C"."""
    allowed_shapes = " or ".join(f"[{names}]" for names in axes)
    if not isinstance(value, Tensor):
        kind = type(value).__name__
        raise TypeError(f"{name} must be a torch.Tensor of shape {allowed_shapes}, got {kind}")
    shape = list(value.shape)
    fits = any(names.startswith("...") or value.ndim == names.count(",") + 1 for names in axes)
    if value.ndim == 0 or not fits:
        raise ValueError(f"{name} must have shape {allowed_shapes}, got {shape}")
    if value.dtype not in FLOAT_DTYPES:
        allowed = ", ".join(str(dtype) for dtype in FLOAT_DTYPES)
        raise ValueError(f"{name} must have one of the dtypes {allowed}, got {value.dtype}")
    if value.numel() == 0:
        raise ValueError(f"{name} is empty (shape {shape}); each of {allowed_shapes} must be at least 1")
    value = value.detach()
    return value.cpu() if value.device.type == "mps" else value


def first(mask: Tensor) -> tuple[int, ...]:
    """Index of the first true element; only ever called to word an error."""
    flat = mask.flatten().nonzero()[0, 0]
    return tuple(int(i) for i in torch.unravel_index(flat, mask.shape))


def check_finite(name: str, x: Tensor) -> float:
    """Raise on NaN or infinity, else return the smallest value."""
    # aminmax propagates NaN, so two numbers tell about every element, without a mask of x's size.
    low, high = torch.stack(torch.aminmax(x)).tolist()
    if not (math.isfinite(low) and math.isfinite(high)):
        at = first(~torch.isfinite(x))
        raise ValueError(f"{name}{list(at)} is {x[at].item()}; every value must be finite")
    return float(low)


def check_probs(name: str, value: object, axes: str) -> Tensor:
    x = check_tensor(name, value, axes)
    if check_finite(name, x) < 0:
        at = first(x < 0)
        value = x[at].item()
        raise ValueError(f"{name}{list(at)} is {value:.6g}; a probability must not be negative")
    # Draw by draw, so that a float64 copy of all T draws never exists.
    draws = x if x.ndim == 3 else x.unsqueeze(0)
    sums = torch.stack([draw.sum(-1, dtype=torch.float64) for draw in draws]).view(x.shape[:-1])
    # Rounding each probability to bfloat16 may move the sum by eps / 2, more than 1e-3.
    tolerance = max(1e-3, torch.finfo(x.dtype).eps)
    error = (sums - 1).abs()
    if error.max().item() > tolerance:
        worst = first(error == error.max())
        raise ValueError(
            f"{name}{list(worst)} sums to {sums[worst].item():.6g} (the worst row); "
            f"every row must sum to 1 within {tolerance:.3g}"
        )
    return x


def float64(probs: Tensor) -> Tensor:
    # A row may sum to slightly more than 1; without the clamp its entropy or variance could be
    # negative.
    return probs.to(torch.float64).clamp(max=1.0).contiguous()


def check_labels(labels: object, probs: Tensor, device: torch.device, name: str = "probs") -> Tensor:
    """``device``: that of ``probs``, which is called ``name``, as the caller gave it."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a torch.Tensor of shape [N], got {type(labels).__name__}")
    n, classes = probs.shape
    if list(labels.shape) != [n]:
        raise ValueError(
            f"labels must have shape [{n}] to match {name} {[n, classes]}, got {list(labels.shape)}"
        )
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must have dtype torch.int64, got {labels.dtype}")
    if labels.device != device:
        raise ValueError(f"labels must be on the device of {name} ({device}), got {labels.device}")
    labels = labels.to(probs.device)
    low, high = torch.stack(torch.aminmax(labels)).tolist()
    if low < 0 or high >= classes:
        at = first((labels < 0) | (labels >= classes))
        raise ValueError(f"labels{list(at)} is {labels[at].item()}; allowed: 0 to {classes - 1}")
    return labels


def check_classification(probs: object, labels: object) -> tuple[Tensor, Tensor]:
    x = check_probs("probs", probs, "N, C")
    assert isinstance(probs, Tensor)
    return x, check_labels(labels, x, probs.device)


def check_count(name: str, value: object) -> int:
    number = integer(value)
    if number is None or number < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    return number


def check_like(name: str, value: object, other_name: str, other: Tensor, *axes: str) -> Tensor:
    """Check a finite tensor that must have the shape and device of ``other``, as the caller gave it."""
    x = check_tensor(name, value, *axes)
    assert isinstance(value, Tensor)
    if value.shape != other.shape:
        raise ValueError(
            f"{name} must have shape {list(other.shape)} like {other_name}, got {list(value.shape)}"
        )
    check_device(name, value, other_name, other)
    check_finite(name, x)
    return x


def check_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name} ({other.device}), got {value.device}")


def check_scores(scores_in: object, scores_out: object) -> tuple[Tensor, Tensor]:
    a = check_tensor("scores_in", scores_in, "N_in")
    b = check_tensor("scores_out", scores_out, "N_out")
    check_device("scores_out", b, "scores_in", a)
    check_finite("scores_in", a)
    check_finite("scores_out", b)
    # searchsorted warns about strided tensors.
    return a.to(torch.float64).contiguous(), b.to(torch.float64).contiguous()
