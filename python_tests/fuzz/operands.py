"""Tensors of a case: their values, and the many ways of storing them."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

_libc = ctypes.CDLL(None, use_errno=True)


def fenced(t: Tensor) -> Tensor:
    """A copy whose last byte is followed by a page that may not be touched: reading past the end crashes."""
    size = t.numel() * t.element_size()
    if size == 0:
        return t
    page = mmap.PAGESIZE
    length = -(-size // page) * page
    memory = mmap.mmap(-1, length + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if _libc.mprotect(ctypes.c_void_p(start + length), ctypes.c_size_t(page), 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    copy = torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=length - size)
    return copy.view(t.shape).copy_(t)


def transposed(t: Tensor) -> Tensor:
    return t if t.dim() < 2 else t.transpose(0, -1).contiguous().transpose(0, -1)


def sliced(t: Tensor) -> Tensor:
    """Every second element of a larger tensor, from its second row on."""
    if t.dim() == 0:
        return t
    base = t.new_full([t.shape[0] + 1, *t.shape[1:-1], 2 * t.shape[-1]][-t.dim() :], 7.0)
    view = base[1:, ..., 1::2] if t.dim() > 1 else base[1::2]
    return view.copy_(t)


def expanded(t: Tensor) -> Tensor:
    """The first row, as often as there are rows."""
    return t if t.dim() == 0 or t.shape[0] == 0 else t[:1].clone().expand(t.shape)


def unaligned(t: Tensor) -> Tensor:
    return t.new_empty(t.numel() + 1)[1:].view(t.shape).copy_(t)


def channels_last(t: Tensor) -> Tensor:
    memory_format = {4: torch.channels_last, 5: torch.channels_last_3d}.get(t.dim())
    return t if memory_format is None else t.contiguous(memory_format=memory_format)


def odd_ones(t: Tensor) -> Tensor:
    """Dimensions of size 1 have strides that mean nothing."""
    strides = [13 if size == 1 else stride for size, stride in zip(t.shape, t.stride(), strict=True)]
    return t.as_strided(t.shape, strides)


# The plainest first.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "fenced": fenced,
    "unaligned": unaligned,
    "transposed": transposed,
    "sliced": sliced,
    "expanded": expanded,
    "odd_ones": odd_ones,
    "channels_last": channels_last,
}


@dataclass
class Operand:
    """An argument of a call, made anew for every run."""

    values: Tensor  # contiguous
    layout: str = "contiguous"
    requires_grad: bool = False
    parameter: bool = False  # of a module
    signed: bool = True  # whether its sign is one of the summands'; rho's is not

    def make(self, magnitudes: bool = False) -> Tensor:
        """The tensor; for ``magnitudes`` in float64, without the sign."""
        values, layout = self.values, self.layout
        if magnitudes:
            values = values.double().abs() if self.signed else values.double()
            # In float64 torch's own transposed convolution refuses them.
            layout = "contiguous" if layout == "odd_ones" else layout
        t = LAYOUTS[layout](values.clone()).detach()
        if self.parameter:
            return nn.Parameter(t, requires_grad=self.requires_grad)
        return t.requires_grad_(self.requires_grad)


@dataclass
class Witness:
    """The bytes behind tensors before a call, to be found again after it."""

    tensors: Sequence[Tensor]
    before: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.before = [self._bytes(t).clone() for t in self.tensors]

    @staticmethod
    def _bytes(t: Tensor) -> Tensor:
        """The whole storage, also what lies between and beside the tensor's elements."""
        storage = t.detach().untyped_storage()
        return torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,))

    def untouched(self) -> bool:
        return all(torch.equal(self._bytes(t), b) for t, b in zip(self.tensors, self.before, strict=True))


def same_bits(a: Any, b: Any) -> bool:
    """Whether two results are the same in every bit, NaN included; None is the same as None."""
    if a is None or b is None:
        return a is b
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.detach().contiguous().view(integer), b.detach().contiguous().view(integer))
