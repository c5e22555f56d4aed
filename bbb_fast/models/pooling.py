"""Max pooling of the models: PyTorch's, over images in the memory format it is fastest for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

_ops = torch.ops.aten
# Below, what is saved is less than what Python takes.
_LEAST = 1 << 15


class _Rearranged(torch.autograd.Function):
    """Over contiguous images, PyTorch's pooling takes the elements one by one; over channels_last, vectors of
    them. Its backward is the faster one over contiguous images."""

    @staticmethod
    def forward(x: Tensor, *geometry: Any) -> tuple[Tensor, Tensor]:
        last = x.contiguous(memory_format=torch.channels_last)
        y, where = _ops.max_pool2d_with_indices(last, *geometry)
        return y.contiguous(), where.contiguous()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, *ctx.geometry = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, where = ctx.saved_tensors
        g = _ops.max_pool2d_with_indices_backward(grad.contiguous(), x, *ctx.geometry, where)
        return (g, *[None] * len(ctx.geometry))


class MaxPool2d(nn.MaxPool2d):
    """``torch.nn.MaxPool2d``, with the same numbers and gradients.

    Over contiguous images on a CPU it takes less than half of the time (docs/performance.md).
    """

    def forward(self, input: Tensor) -> Tensor:
        y: Tensor
        if not self._is_faster_rearranged(input):
            y = super().forward(input)
        elif not (torch.is_grad_enabled() and input.requires_grad):
            y = super().forward(input.contiguous(memory_format=torch.channels_last)).contiguous()
        else:
            geometry = (self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode)
            pairs = ([n, n] if type(n) is int else n for n in geometry)
            y, _ = _Rearranged.apply(input, *pairs)  # type: ignore[no-untyped-call]  # torch gives it no types
        return y

    def _is_faster_rearranged(self, x: Tensor) -> bool:
        return (
            # Graphs and transforms see the one op; a graph with no question of the batch's size.
            not is_compiling()
            and type(x) is Tensor
            and x.device.type == "cpu"
            and x.dtype in (torch.float32, torch.bfloat16)
            and x.dim() == 4
            and x.numel() >= _LEAST
            and x.is_contiguous()
            and not x.is_contiguous(memory_format=torch.channels_last)
            and not self.return_indices
            and not torch.jit.is_tracing()
            and not torch._C._functorch.is_functorch_wrapped_tensor(x)
            and torch.autograd.forward_ad._current_level < 0
        )
