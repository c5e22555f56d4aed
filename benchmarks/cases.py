"""The one table of layer cases."""

from __future__ import annotations

from dataclasses import dataclass

import eager
import torch
from torch import Tensor, nn

from bbb_fast.layers import BBB, BBB_LRT


@dataclass(frozen=True)
class Case:
    """A layer and its input: ``kernel`` 0 means linear, else a 2-d convolution on ``size``^2 images."""

    name: str
    inputs: int
    outputs: int
    batch: int
    kernel: int = 0
    padding: int = 0
    size: int = 0

    def input(self) -> Tensor:
        shape = (self.inputs, self.size, self.size) if self.kernel else (self.inputs,)
        return torch.randn(self.batch, *shape)

    def layers(self) -> dict[str, nn.Module]:
        """Contender name -> layer; "nn" is the one the others are measured against."""
        i, o, k, p = self.inputs, self.outputs, self.kernel, self.padding
        if k:
            return {
                "nn": nn.Conv2d(i, o, k, padding=p),
                "bbb": BBB.BBBConv2d(i, o, k, padding=p),
                "lrt": BBB_LRT.BBBConv2d(i, o, k, padding=p),
                "eager_bbb": eager.conv2d(i, o, k, p, "bbb"),
                "eager_lrt": eager.conv2d(i, o, k, p, "lrt"),
            }
        return {
            "nn": nn.Linear(i, o),
            "bbb": BBB.BBBLinear(i, o),
            "lrt": BBB_LRT.BBBLinear(i, o),
            "eager_bbb": eager.linear(i, o, "bbb"),
            "eager_lrt": eager.linear(i, o, "lrt"),
        }


CASES = (
    Case("linear 1200x1200, batch 128", 1200, 1200, 128),
    Case("linear 784x400, batch 128", 784, 400, 128),
    Case("linear 1024x1024, batch 512", 1024, 1024, 512),
    Case("conv 6-16 k5, 14^2, batch 256", 6, 16, 256, kernel=5, size=14),
    Case("conv 32-64 k5 p2, 15^2, batch 256", 32, 64, 256, kernel=5, padding=2, size=15),
    Case("conv 64-64 k3 p1, 32^2, batch 128", 64, 64, 128, kernel=3, padding=1, size=32),
)
