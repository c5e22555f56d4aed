"""What the op tests share: running an op on both implementations, and comparing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import bbb_fast

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def rng(seed: int = 1234, stream: int = 5) -> Tensor:
    return torch.tensor([seed, stream])


def on(backend: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Runs a function with the given backend chosen."""
    bbb_fast.set_backend(backend)
    try:
        return function(*args, **options)
    finally:
        bbb_fast.set_backend("auto")


def flat(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [t for part in result for t in flat(part)]


def grads(
    function: Callable[[], Any], leaves: Sequence[Tensor | None], grad_outputs: Sequence[Tensor | None]
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Outputs of ``function`` and the gradients of its leaves for the given output gradients."""
    used = [leaf for leaf in leaves if leaf is not None]
    outputs = flat(function())
    pairs = [(o, g) for o, g in zip(outputs, grad_outputs, strict=True) if g is not None and o.requires_grad]
    result = torch.autograd.grad([o for o, _ in pairs], used, [g for _, g in pairs], allow_unused=True)
    return [o.detach() for o in outputs], list(result)


def leaf(*shape: int, dtype: torch.dtype = torch.float32, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """A random leaf tensor that wants a gradient."""
    return (torch.randn(shape) * std + mean).to(dtype).requires_grad_()


def posterior(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A random (mu, rho) pair with sigma around 0.1."""
    return leaf(*shape, dtype=dtype, std=0.3), leaf(*shape, dtype=dtype, mean=-2.0, std=0.7)


# float32: a few roundings on either side. Half types: one rounding of the result (2^-8, 2^-11) on either
# side and what a library product accumulates differently.
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 2e-6},
    # The noise is float32 in every dtype, and its last bit may differ.
    torch.float64: {"rtol": 1e-6, "atol": 1e-6},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
    torch.float16: {"rtol": 3e-3, "atol": 3e-3},
}


def assert_same(
    a: Tensor | None, b: Tensor | None, dtype: torch.dtype, loosen: float = 1.0, size: float = 1.0
) -> None:
    """Same shape and dtype, values within the dtype's tolerance.

    ``loosen`` widens both tolerances; ``size`` (of the summands behind a small sum) the absolute one.
    """
    assert (a is None) == (b is None)
    if a is None or b is None:
        return
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    rtol, atol = (TOLERANCE[dtype][kind] * loosen for kind in ("rtol", "atol"))
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol * size, equal_nan=False)
