"""What a step keeps for its backward, and what it has at its peak."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor


def saved_for_backward(forward: Callable[[], Any], kept_anyway: Iterable[Tensor]) -> int:
    """Bytes that autograd holds between ``forward`` and its backward, each storage counted once.

    Storages of ``kept_anyway`` (the parameters and the layer's input, which are there in any case) do not
    count. Tensors that C++ autograd functions save are counted like any others.
    """
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = forward()
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    for t in kept_anyway:
        sizes.pop(t.untyped_storage().data_ptr(), None)
    del result
    return sum(sizes.values())


def peak_bytes(step: Callable[[], Any]) -> int:
    """The most bytes of tensors that ``step`` itself allocated and had at one time.

    From the allocations and releases that torch.profiler records; releases of older tensors do not count.
    Scratch space that oneDNN and MKL take past torch's allocator is not in it.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as run:
        step()
    sizes: dict[int, int] = {}
    now = peak = 0
    for event in sorted(_allocations(run), key=lambda e: e.start_time_ns):
        address, size = event.extra_fields.ptr, event.extra_fields.alloc_size
        if size > 0:
            sizes[address] = size
            now += size
        else:
            now -= sizes.pop(address, 0)
        peak = max(peak, now)
    return peak


def _allocations(run: torch.profiler.profile) -> Iterator[Any]:
    pending = list(run.profiler.kineto_results.experimental_event_tree())
    while pending:
        event = pending.pop()
        pending += event.children
        if event.tag == torch._C._profiler._EventType.Allocation:
            yield event
