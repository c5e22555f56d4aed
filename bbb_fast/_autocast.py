"""torch.autocast: where it is on, products run in its dtype, and the parameters stay as they are."""

from __future__ import annotations

import torch
from torch import Tensor

# Asked once, here: torch.compile of some releases cannot trace the question.
_DEVICES = frozenset(k for k in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(k))


def enabled(device: torch.device) -> bool:
    """Whether it is on for a device's products."""
    return device.type in _DEVICES and torch.is_autocast_enabled(device.type)


def narrowed(input: Tensor) -> Tensor:
    """``input`` in the type that a product of it runs in."""
    if enabled(input.device) and input.dtype != torch.float64:
        return input.to(torch.get_autocast_dtype(input.device.type))
    return input
