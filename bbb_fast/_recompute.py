"""What a checkpointed forward drew under a context, for its recomputation.

``torch.utils.checkpoint`` runs a forward again in backward: perhaps after the context is left, perhaps in
another thread. What is one object in both runs is the frame of a non-reentrant checkpoint, which its
saved-tensor hooks hold, and the node (``ctx``) of an autograd.Function whose backward runs its forward again,
as the reentrant checkpoint's does. A layer that draws under a context leaves the draw on those around it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from types import FrameType, FunctionType
from typing import Any, NamedTuple

import torch
import torch.utils.checkpoint
from torch.autograd.function import FunctionCtx

_ATTRIBUTE = "_bbb_fast_draw"
_hooks = torch._C._autograd
# The backward pass that runs in this thread, or -1.
graph_task = getattr(torch._C, "_current_graph_task_id", lambda: -1)


class Place(NamedTuple):
    """Where a context was entered. A checkpoint that was open there enters the context again by itself."""

    graph_task: int = -1
    caller: FrameType | None = None
    checkpoints: tuple[Any, ...] = ()


def here(caller: FrameType) -> Place:
    return Place(graph_task(), caller, tuple(frame for frame, _ in _checkpoints()))


def _checkpoints() -> Iterator[tuple[Any, bool]]:
    """The non-reentrant checkpoints open in this thread, innermost first; whether each is recomputed."""
    hooks = _hooks._top_saved_tensors_default_hooks(True)
    if hooks is None:
        return
    # There is no other way to those below the top.
    popped = []
    try:
        while hooks is not None:
            popped.append(hooks)
            _hooks._pop_saved_tensors_default_hooks()
            hooks = _hooks._top_saved_tensors_default_hooks(True)
    finally:
        for pack, unpack in reversed(popped):
            _hooks._push_saved_tensors_default_hooks(pack, unpack)
    for pack, _ in popped:
        pack = inspect.unwrap(pack)
        if not isinstance(pack, FunctionType) or pack.__module__ != torch.utils.checkpoint.__name__:
            continue
        recomputed, frame = _enclosed(pack, "target_frame_ref"), _enclosed(pack, "frame")
        if recomputed is not None:
            yield recomputed(), True
        elif frame is not None:
            yield frame, False
        else:
            raise RuntimeError(
                f"bbb_fast does not know the checkpoints of torch {torch.__version__} and could not repeat a "
                "draw in backward; give them use_reentrant=True"
            )


def _enclosed(function: Any, name: str) -> Any:
    """A variable of the function around ``function``, or None."""
    for variable, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        if variable == name:
            return cell.cell_contents
    return None


def _functions(caller: FrameType | None) -> Iterator[Any]:
    """The nodes whose autograd.Function.forward this thread is in, up to the frame ``caller``."""
    at: FrameType | None = sys._getframe(1)
    while at is not None and at is not caller:
        if at.f_code.co_varnames[:1] == ("ctx",):
            node = at.f_locals.get("ctx")
            if isinstance(node, FunctionCtx):
                yield node
        at = at.f_back


def leave(draw: Any, place: Place) -> None:
    """Leaves what a layer is about to use on the checkpoints around it that were entered after ``place``."""
    for frame, recomputed in _checkpoints():
        if recomputed or any(frame is other for other in place.checkpoints):
            break
        setattr(frame, _ATTRIBUTE, draw)
    # An autograd.Function's forward runs without.
    if not torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        for node in _functions(place.caller):
            setattr(node, _ATTRIBUTE, draw)


class Recomputed(NamedTuple):
    """A forward that runs again: what it drew under a context, or None; whether its random state is kept."""

    draw: Any
    preserves_rng_state: bool


def recomputed() -> Recomputed | None:
    """The forward that the backward pass of this thread runs again, or None where it is not known to."""
    for frame, again in _checkpoints():
        if again:
            preserves = _enclosed(frame.recompute_fn, "preserve_rng_state")
            return Recomputed(getattr(frame, _ATTRIBUTE, None), preserves is not False)
    node = torch._C._current_autograd_node()
    draw = getattr(node, _ATTRIBUTE, None)
    if draw is None and getattr(node, "_forward_cls", None) is not torch.utils.checkpoint.CheckpointFunction:
        return None
    return Recomputed(draw, getattr(node, "preserve_rng_state", True))
