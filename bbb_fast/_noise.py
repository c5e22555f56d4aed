"""Where layers get their ``rng`` from: PyTorch's generator, or a draw pinned by ``fixed_noise``."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from types import FrameType, TracebackType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.compiler import is_compiling

from . import _checks, _recompute
from ._recompute import Place, graph_task

_INT64_MAX = (1 << 63) - 1
_MAX_SAMPLE = (1 << 31) - 1
# The noise of one module takes streams from a multiple of this on.
STREAMS_A_BLOCK = 1 << 8
# 2^64 over the golden ratio: multiples of it lie far apart modulo 2^64.
_RANK_STEP = 0x9E3779B97F4A7C15


_DISTRIBUTED = torch.distributed.is_available()


class Draw(NamedTuple):
    """What layers use: their posterior means, a pinned draw or, without either, a fresh one."""

    pinned: fixed_noise | None = None
    means: bool = False


FREE = Draw()


class _State(threading.local):
    def __init__(self) -> None:
        # On the instance, not the class: torch.compile recompiles for a change of the former only.
        self.draw = FREE
        self.place = Place()
        self.outer: list[tuple[Draw, Place]] = []


_state = _State()


def _draws_again_in_backward() -> bool:
    from torch._functorch import config
    from torch.fx import traceback

    # Of torch.autograd.graph.region_activation_memory_budget, where there is such.
    own = (traceback.current_meta.get("custom") or {}).get("_region_activation_memory_budget")
    return (
        (config.activation_memory_budget if own is None else own) < 1
        or config.aggressive_recomputation
        or not config.ban_recompute_not_in_allowlist
    )


# What torch.compiler.assume_constant_result sets, which imports the whole of torch._dynamo (a second) first.
_draws_again_in_backward._dynamo_marked_constant = True  # type: ignore[attr-defined]


def draw_rng(device: torch.device | str | None = None) -> Tensor:
    """A fresh ``rng`` (int64 [2]: seed, stream) from PyTorch's generator of ``device``.

    Ranks of an initialised ``torch.distributed`` group get different ones, also where every rank was
    seeded alike. Raises RuntimeError under torch.compile where that would draw again in backward.
    """
    if is_compiling() and torch.is_grad_enabled() and _draws_again_in_backward():
        raise RuntimeError(
            "torch.compile would draw again in backward what forward drew, for torch._functorch.config says "
            "activation_memory_budget < 1, aggressive_recomputation or ban_recompute_not_in_allowlist=False, "
            "or region_activation_memory_budget is below 1; use torch.utils.checkpoint, or fixed_noise"
        )
    rng = torch.randint(0, _INT64_MAX, (2,), dtype=torch.int64, device=device)
    offset = rank_offset()
    return rng + offset if offset else rng


def rank_offset() -> int:
    """What a rank adds to its draws of an ``rng`` (int64, wrapping around); 0 without torch.distributed."""
    if _DISTRIBUTED and torch.distributed.is_initialized():
        # Modulo 2^64, into int64's range.
        return (torch.distributed.get_rank() * _RANK_STEP + (1 << 63)) % (1 << 64) - (1 << 63)
    return 0


def draw_seed() -> int:
    """A fresh seed from PyTorch's default generator, another on each rank."""
    seed = int(torch.randint(0, _INT64_MAX, ()).item()) + rank_offset()
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)


class RandomModule(nn.Module):
    """A module that draws noise. ``fixed_noise`` numbers a model's, and reaches their replicas."""

    # Whether the last forward drew freely; and of a replica, what it was made under, and of which module.
    _drew_freely: bool = True
    _origin: tuple[Draw, RandomModule] | None = None

    def _drawn_parameters(self) -> Sequence[Tensor]:
        """The means that it draws, each with a stream of its own; those that modules share are one draw."""
        return ()

    def _replicate_for_data_parallel(self) -> RandomModule:
        replicate: Any = super()._replicate_for_data_parallel
        replica: RandomModule = replicate()
        draw = self.wanted_draw()
        if draw.pinned is not None:
            # In this thread, where the model around the layer can be told.
            draw.pinned._place(self)
        replica.__dict__.update(_drew_freely=False, _origin=(draw, self))
        return replica

    def wanted_draw(self) -> Draw:
        """What the module's forward, which asks once, has to use."""
        if is_compiling():
            return _state.draw
        if self._drew_freely and _state.draw is FREE and graph_task() == -1:
            return FREE
        draw = _current_draw(self)
        noted = draw is not FREE and _leave(draw)
        self.__dict__["_drew_freely"] = not noted and self._origin is None
        return draw


def _current_draw(module: RandomModule | None = None) -> Draw:
    task = graph_task()
    # A context that was entered in this backward pass is one that the forward itself enters again.
    if task != -1 and _state.place.graph_task != task:
        forward = _recompute.recomputed()
        if forward is not None and forward.draw is not None:
            left: Draw = forward.draw
            return left
        if forward is not None and not forward.preserves_rng_state and module is not None:
            raise RuntimeError(
                f"{type(module).__name__}: a checkpoint with preserve_rng_state=False would draw other noise "
                "in backward than forward drew; leave it True, or run the forward under fixed_noise"
            )
        if forward is not None:
            return FREE
        # A checkpoint's recomputation records gradients; a hook's own call of a layer seldom does.
        unknown = module is not None and not module._drew_freely and module._origin is None
        if unknown and _state.draw is FREE and torch.is_grad_enabled():
            raise RuntimeError(
                f"{type(module).__name__}: runs again in backward, and what its forward drew in a context of "
                "fixed_noise or posterior_means is not known here; call backward in the same one"
            )
    if _state.draw is FREE and module is not None and module._origin is not None:
        return module._origin[0]
    return _state.draw


def _leave(draw: Draw) -> bool:
    """Tells the checkpoints that the forward is in what it uses, if a backward may follow."""
    if draw.pinned is not None and not draw.pinned.differentiable:
        return False
    _recompute.leave(draw, _state.place)
    return True


_Context = TypeVar("_Context", bound="_DrawContext")


class _DrawContext:
    """A context that says what layers use. Thread-local; contexts may be nested."""

    # Whether a backward may follow.
    differentiable = True

    def _inside(self, outer: Draw) -> Draw:
        raise NotImplementedError

    def __enter__(self: _Context) -> _Context:
        _state.outer.append((_state.draw, _state.place))
        if is_compiling():
            _state.draw = self._inside(_state.draw)
        else:
            outer = _current_draw()
            if outer is not FREE:
                _leave(outer)
            place = _recompute.here(sys._getframe(1)) if self.differentiable else Place(graph_task())
            _state.draw, _state.place = self._inside(outer), place
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _state.draw, _state.place = _state.outer.pop()


class posterior_means(_DrawContext):
    """Context manager: inside, no forward of this package draws.

    Every Bayesian layer uses its posterior means, dropout of this package drops nothing, an ``Ensemble``
    gives its members' mean output, ``SampledSoftmax`` takes the mean logits, a ``VAE``'s code is its mean.
    """

    def _inside(self, outer: Draw) -> Draw:
        return Draw(outer.pinned, True)


_CALL = nn.Module.__call__.__code__
# Of all contexts: models are numbered rarely.
_numbering = threading.Lock()


def _outermost_call(since: FrameType | None) -> nn.Module | None:
    """The module whose call this thread is in and that was called first, within the frame ``since``."""
    found = None
    at: FrameType | None = sys._getframe(1)
    while at is not None and at is not since:
        if at.f_code is _CALL:
            found = at.f_locals["self"]
        at = at.f_back
    return found


class _Place(NamedTuple):
    """A module's streams: the first of the block that is its own, and those of the means it draws."""

    own: int
    streams: tuple[int, ...]


def _rows(seed: int, stream: int, first: int, count: int, device: torch.device) -> tuple[Tensor, ...]:
    """The ``rng`` of a stream for each of ``count`` samples from ``first`` on."""
    if device.type == "cpu":
        numbers = [[seed, (k << 32) + stream] for k in range(first, first + count)]
        return torch.tensor(numbers, device=device).unbind()
    # Formed on the device: a copy from the host would wait for it, and could not be captured in a CUDA graph.
    rows = torch.empty(count, 2, dtype=torch.int64, device=device)
    rows[:, 0].fill_(seed)
    if count == 1:
        rows[:, 1].fill_((first << 32) + stream)
    else:
        torch.arange(first, first + count, out=rows[:, 1]).mul_(1 << 32).add_(stream)
    return rows.unbind()


class Repeated(NamedTuple):
    """A tensor, and one that holds its rows once for each draw."""

    once: Tensor
    all: Tensor

    @classmethod
    def of(cls, t: Tensor, count: int) -> Repeated:
        # torch.cat keeps the memory format, which numbers noise; Tensor.repeat does not.
        repeated = torch.cat([t] * count)
        same_order = t.layout is torch.strided and t.stride() == repeated.stride()
        return cls(t if same_order else repeated[: t.shape[0]], repeated)

    def part_of(self, t: Tensor) -> Tensor | None:
        """One draw's part of ``t``, if that is ``all`` or shows its memory in the same order.

        None also where nobody counts what was written to a tensor: in graphs, transforms and inference mode.
        """
        if type(t) is not Tensor or is_compiling() or t.is_inference() or is_functorch_wrapped_tensor(t):
            return None
        if t._version != 0:
            return None
        if t is self.all:
            return self.once
        if t.requires_grad or self.all.requires_grad or t.numel() != self.all.numel() or t.numel() == 0:
            return None
        if t.dtype != self.all.dtype or t.device != self.all.device or t.storage_offset() != 0:
            return None
        rows = t.shape[0] * len(self.once) // len(self.all)
        if t.stride(0) * t.shape[0] != t.numel() or rows * len(self.all) != t.shape[0] * len(self.once):
            return None
        if t.untyped_storage().data_ptr() != self.all.untyped_storage().data_ptr():
            return None
        return self.once.as_strided((rows, *t.shape[1:]), t.stride(), self.once.storage_offset())


class fixed_noise(_DrawContext):
    """Context manager that pins the draw: inside, every layer uses one function sample.

    ``fixed_noise(seed, sample=k)`` names a draw of all weights of a model: within the context (and in
    any later context with the same two numbers, on any device, for any batch size) each layer sees the
    same weights at every forward. Layers of every estimator draw their weights in weight space here,
    w = mu + sigma * eps: it is the same posterior, and the only form in which one draw is one function.

    Layers are told apart by their place in the model (in the order of ``model.modules()``), so which of
    them run, and when, changes nothing. The model is ``model`` or, without it, what is called first within
    the context; a layer outside it is counted on when its own model is first called. (A function compiled
    around the model, or ``model.forward`` called past ``model(...)``, hides it: layers are numbered in the
    order of their first use then, so give ``model`` where they run in another order than they are
    registered in.) A weight that several layers share is one draw.

    ``draw="activations"`` lets each layer use its own estimator instead: the noise is pinned, but that of
    local reparameterization and Flipout belongs to the rows of a batch, so that one draw is no function.

    Args: ``seed`` any int64; ``sample`` 0 ... 2^31 - 1. Raises TypeError or ValueError otherwise.
    Contexts may be nested, the inner one counts. They hold in the thread that enters them, in replicas
    that it makes (``torch.nn.DataParallel``) and where a checkpoint (``torch.utils.checkpoint``) runs a
    forward again, in whatever thread and after the context (docs/noise.md says what is not seen). A thread
    of your own enters the context itself; one object may be entered by several at once.
    """

    # Of one prediction: how many draws it has, and each layer's rows [seed, stream] of all of them.
    _count_of_samples: int = 0
    _rngs: dict[tuple[int, torch.device], tuple[Tensor, ...]] | None = None

    def __init__(
        self, seed: int, sample: int = 0, *, model: nn.Module | None = None, draw: str = "weights"
    ) -> None:
        if draw not in ("weights", "activations"):
            raise ValueError(f"fixed_noise: draw must be 'weights' or 'activations', got {draw!r}")
        self.draw = draw
        numbers: list[int] = []
        for name, value in (("seed", seed), ("sample", sample)):
            number = _checks.integer(value)
            if number is None:
                raise TypeError(f"fixed_noise: {name} must be an int, got {type(value).__name__}")
            numbers.append(number)
        seed, sample = numbers
        if not -(1 << 63) <= seed <= _INT64_MAX:
            raise ValueError(f"fixed_noise: seed must fit in int64, got {seed}")
        if not 0 <= sample <= _MAX_SAMPLE:
            raise ValueError(f"fixed_noise: sample must be in 0 ... {_MAX_SAMPLE}, got {sample}")
        self.seed = seed
        self.sample = sample
        # A tensor, so that one torch.compile graph serves every seed and sample.
        self._rng = torch.tensor([seed, sample << 32], device="cpu")
        # By id, for which torch.compile guards: by module it would take one layer's number for all.
        self._places: dict[int, _Place] = {}
        self._of_mean: dict[int, int] = {}
        self._seen: list[tuple[nn.Module, Sequence[Tensor]]] = []
        self._next = 0
        if model is not None:
            if not isinstance(model, nn.Module):
                raise TypeError(f"fixed_noise: model must be a torch.nn.Module, got {type(model).__name__}")
            self._add(model)

    # Whether all draws are taken in one forward, of equal parts of the rows; and what is the same in each.
    at_once: bool = False
    _inputs: tuple[Repeated, ...] = ()

    def all_samples(self, count: int, inputs: Sequence[Repeated] = ()) -> fixed_noise:
        """The draws 0 ... count - 1 of the seed in one forward, whose rows come in as many equal parts.

        ``inputs``: of which all parts are the same.
        """
        draw = object.__new__(fixed_noise)
        draw.__dict__.update(
            self.__dict__, at_once=True, _count_of_samples=count, _rngs={}, _inputs=tuple(inputs)
        )
        return draw

    def once(self, input: Tensor) -> Tensor | None:
        """One draw's part of a layer's input, if it is known to be that of all draws."""
        for repeated in self._inputs:
            part = repeated.part_of(input)
            if part is not None:
                return part
        return None

    def rngs(self, module: RandomModule, device: torch.device) -> Tensor:
        """As ``rng`` of the module, of each draw: [count, 2]."""
        return torch.stack(_rows(self.seed, self._place(module).own, 0, self._count_of_samples, device))

    def samples(self, count: int) -> Iterator[fixed_noise]:
        """The draws 0 ... count - 1 of the seed, for predictions: no backward follows."""
        cpu = torch.device("cpu")
        shared = {**self.__dict__, "differentiable": False, "_count_of_samples": count, "_rngs": {}}
        for k, rng in enumerate(_rows(self.seed, 0, 0, count, cpu)):
            draw = object.__new__(fixed_noise)
            draw.__dict__.update(shared, sample=k, _rng=rng)
            yield draw

    def _row(self, stream: int, device: torch.device) -> Tensor:
        if is_compiling():
            return (self._rng + torch.tensor([0, stream], device="cpu")).to(device)
        if self._rngs is None:
            return _rows(self.seed, stream, self.sample, 1, device)[0]
        # A tensor from numbers takes longer than a small layer's product; here all draws' are formed at once.
        key = stream, device
        if key not in self._rngs:
            self._rngs[key] = _rows(self.seed, stream, 0, self._count_of_samples, device)
        return self._rngs[key][self.sample]

    def _inside(self, outer: Draw) -> Draw:
        return Draw(self, outer.means)

    def _add(self, model: nn.Module) -> None:
        with _numbering:
            for module in model.modules():
                if isinstance(module, RandomModule):
                    self._count(module)

    def _count(self, module: RandomModule) -> None:
        if id(module) in self._places:
            return
        means = module._drawn_parameters()
        own = self._next
        for k, mean in enumerate(means):
            self._of_mean.setdefault(id(mean), own + k)
        # As long as they are here, no other module or parameter has their id.
        self._seen.append((module, means))
        self._next = own + STREAMS_A_BLOCK * max(1, -(-len(means) // STREAMS_A_BLOCK))
        streams = tuple(self._of_mean[id(mean)] for mean in means)
        self._places[id(module)] = _Place(own, streams)

    def _place(self, module: RandomModule) -> _Place:
        if is_compiling():
            self._count(module)
            return self._places[id(module)]
        if module._origin is not None:
            module = module._origin[1]
        if id(module) not in self._places:
            self._add(_outermost_call(_state.place.caller) or module)
            # A layer that is no registered part of what is called.
            self._count(module)
        return self._places[id(module)]

    def before(self, module: RandomModule) -> Iterator[nn.Module]:
        """The modules that draw and stand before this ``module`` in the model that it is a part of."""
        own = self._place(module).own
        return (other for other, _ in self._seen if self._places[id(other)].own < own)

    def number(self, module: RandomModule) -> int:
        """The module's place among those that draw, in the model that it is a part of."""
        return self._place(module).own // STREAMS_A_BLOCK

    def rng(self, module: RandomModule, device: torch.device) -> Tensor:
        """The ``rng`` of what the module draws for itself: activations, masks."""
        return self._row(self._place(module).own, device)

    def rng_and_streams(self, module: RandomModule, device: torch.device) -> tuple[Tensor, tuple[int, ...]]:
        """The ``rng`` of the module's first weight, and the streams of all from there on.

        0, 1, 2 and so on, but for weights that another module has too, which have the streams of there.
        """
        streams = self._place(module).streams
        return self._row(streams[0], device), tuple(s - streams[0] for s in streams)
