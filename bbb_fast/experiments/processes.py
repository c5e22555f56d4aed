"""The processes that train one model together, and what they exchange."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Processes"]

T = TypeVar("T")


@contextmanager
def _exchange() -> Iterator[None]:
    """Says of a failed exchange what it means."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition(". ")[0]
        raise RuntimeError(f"another process of this run has ended or cannot be reached: {reason}") from error


class Processes:
    """Those of ``torch.distributed``'s default group, if it is initialised; otherwise this one alone.

    All methods but :meth:`part` are collectives: every process calls them, in the same order. They raise
    RuntimeError where another process is gone. A process alone exchanges nothing.

    Attributes:
        rank: this process's number, from 0 on.
        size: how many there are.
        local_rank: the number among those on this machine: LOCAL_RANK as torchrun sets it, or else ``rank``.
    """

    def __init__(self) -> None:
        self.rank, self.size = 0, 1
        if dist.is_available() and dist.is_initialized():
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.local_rank = int(os.environ.get("LOCAL_RANK", self.rank))

    def part(self, count: int) -> slice:
        """Which of ``count`` rows are this process's: no two processes differ by more than one row."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def add(self, tensor: Tensor) -> None:
        """Replaces ``tensor``, of the same shape and dtype everywhere, by the sum over the processes.

        The sum is the same everywhere, bit for bit.
        """
        if self.size > 1:
            with _exchange():
                dist.all_reduce(tensor)

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replaces ``tensors``, all of one dtype and device, by their means over the processes."""
        if self.size == 1:
            return
        flat = torch.cat([t.reshape(-1) for t in tensors])
        self.add(flat)
        flat /= self.size
        for t, mean in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            t.copy_(mean.view_as(t))

    def first(self, call: Callable[[], T]) -> T:
        """Calls ``call`` in process 0; what it returns there, or the exception it raises, is everyone's.

        Both must be picklable, without tensors on a GPU.
        """
        if self.size == 1:
            return call()
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = call()
            except Exception as error:
                outcome[1] = error
        with _exchange():
            dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        result: T = outcome[0]
        return result

    def gather(self, value: T) -> list[T]:
        """The picklable ``value`` of every process, in the order of their ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _exchange():
            dist.all_gather_object(values, value)
        return values

    def in_turn(self, call: Callable[[], T]) -> T:
        """Calls ``call`` in one process after the other; returns its result of this one."""
        for turn in range(self.size):
            if turn == self.rank:
                result = call()
            self.gather(None)  # nobody passes before all are here
        return result
