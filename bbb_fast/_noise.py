"""Where layers get their ``rng`` from: PyTorch's generator, or a draw pinned by ``fixed_noise``."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import torch
from torch import Tensor, nn

_INT64_MAX = (1 << 63) - 1
_MAX_SAMPLE = (1 << 31) - 1
# 2^64 over the golden ratio: multiples of it lie far apart modulo 2^64.
_RANK_STEP = 0x9E3779B97F4A7C15


_DISTRIBUTED = torch.distributed.is_available()


class _State(threading.local):
    def __init__(self) -> None:
        # On the instance, not the class: torch.compile recompiles for a change of the former only.
        self.pinned: fixed_noise | None = None
        self.outer: list[fixed_noise | None] = []
        self.means = False


_state = _State()


def draw_rng(device: torch.device | str | None = None) -> Tensor:
    """A fresh ``rng`` (int64 [2]: seed, stream) from PyTorch's generator of ``device``.

    Ranks of an initialised ``torch.distributed`` group get different ones, also where every rank was
    seeded alike.
    """
    rng = torch.randint(0, _INT64_MAX, (2,), dtype=torch.int64, device=device)
    offset = rank_offset()
    return rng + offset if offset else rng


def rank_offset() -> int:
    """What a rank adds to its draws of an ``rng`` (int64, wrapping around); 0 without torch.distributed."""
    if _DISTRIBUTED and torch.distributed.is_initialized():
        # Modulo 2^64, into int64's range.
        return (torch.distributed.get_rank() * _RANK_STEP + (1 << 63)) % (1 << 64) - (1 << 63)
    return 0


@contextmanager
def posterior_means() -> Iterator[None]:
    """Inside, every Bayesian layer uses its posterior means and draws nothing."""
    before = _state.means
    _state.means = True
    try:
        yield
    finally:
        _state.means = before


def means_wanted() -> bool:
    """Whether a :func:`posterior_means` context is open in this thread."""
    return _state.means


def draws_freely() -> bool:
    """Whether a layer's draw is a fresh one: no context asks for the means or for a pinned draw."""
    return _state.pinned is None and not _state.means


def layer_rng(layer: nn.Module, device: torch.device) -> tuple[Tensor, bool]:
    """The ``rng`` of a layer's next forward, and whether ``fixed_noise`` pinned it."""
    pinned = _state.pinned
    if pinned is None:
        return draw_rng(device), False
    return pinned._rng_for(layer, device), True


class fixed_noise:
    """Context manager that pins the draw: inside, every layer uses one function sample.

    ``fixed_noise(seed, sample=k)`` names a draw of all weights of a model: within the context (and in
    any later context with the same two numbers, on any device, for any batch size) each layer sees the
    same weights at every forward. Layers are told apart by the order in which they first run. Layers of
    every estimator draw their weights in weight space here, w = mu + sigma * eps: it is the same
    posterior, and the only form in which one draw is one function.

    Args: ``seed`` any int64; ``sample`` 0 ... 2^31 - 1. Raises TypeError or ValueError otherwise.
    Thread-local; contexts may be nested, the inner one counts.
    """

    def __init__(self, seed: int, sample: int = 0) -> None:
        for name, value in (("seed", seed), ("sample", sample)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"fixed_noise: {name} must be an int, got {type(value).__name__}")
        if not -(1 << 63) <= seed <= _INT64_MAX:
            raise ValueError(f"fixed_noise: seed must fit in int64, got {seed}")
        if not 0 <= sample <= _MAX_SAMPLE:
            raise ValueError(f"fixed_noise: sample must be in 0 ... {_MAX_SAMPLE}, got {sample}")
        self.seed = seed
        self.sample = sample
        # A tensor, so that one torch.compile graph serves every seed and sample.
        self._rng = torch.tensor([seed, sample << 32], device="cpu")
        self._order: dict[nn.Module, int] = {}

    def _rng_for(self, layer: nn.Module, device: torch.device) -> Tensor:
        index = self._order.setdefault(layer, len(self._order))
        # 2^8 streams a layer: its tensors take consecutive ones.
        if torch.compiler.is_compiling():
            return (self._rng + torch.tensor([0, index << 8], device="cpu")).to(device)
        if device.type == "cpu":
            return torch.tensor([self.seed, (self.sample << 32) + (index << 8)], device="cpu")
        # Filled in on the device: a copy from the host would wait for it, and could not be captured in a
        # CUDA graph.
        rng = torch.empty(2, dtype=torch.int64, device=device)
        rng[0].fill_(self.seed)
        rng[1].fill_((self.sample << 32) + (index << 8))
        return rng

    def __enter__(self) -> fixed_noise:
        _state.outer.append(_state.pinned)
        _state.pinned = self
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _state.pinned = _state.outer.pop()
