"""Flipout layers: each forward draws one set of weights, and each row the signs of its deviations."""

from . import shapes
from .estimators import Flipout
from .lazy import Lazy

__all__ = [
    "BBBBilinear",
    "BBBConv1d",
    "BBBConv2d",
    "BBBConv3d",
    "BBBConvTranspose1d",
    "BBBConvTranspose2d",
    "BBBConvTranspose3d",
    "BBBLazyConv1d",
    "BBBLazyConv2d",
    "BBBLazyConv3d",
    "BBBLazyConvTranspose1d",
    "BBBLazyConvTranspose2d",
    "BBBLazyConvTranspose3d",
    "BBBLazyLinear",
    "BBBLinear",
]


class BBBLinear(Flipout, shapes.Linear):
    """Linear layer, y = x mu^T + b + ((x * s) (sigma * eps)^T) * r: input [..., in_features]."""


class BBBBilinear(Flipout, shapes.Bilinear):
    """Bilinear layer: the linear one on its inputs' outer product.

    That is formed for each row of the inputs [..., in1_features] and [..., in2_features]:
    in1_features * in2_features numbers.
    """


class BBBConv1d(Flipout, shapes.Conv1d):
    """1-d convolution: input [N, C_in, L] or [C_in, L]."""


class BBBConv2d(Flipout, shapes.Conv2d):
    """2-d convolution: input [N, C_in, H, W] or [C_in, H, W]."""


class BBBConv3d(Flipout, shapes.Conv3d):
    """3-d convolution: input [N, C_in, D, H, W] or [C_in, D, H, W]."""


class BBBConvTranspose1d(Flipout, shapes.ConvTranspose1d):
    """1-d transposed convolution: input [N, C_in, L] or [C_in, L]."""


class BBBConvTranspose2d(Flipout, shapes.ConvTranspose2d):
    """2-d transposed convolution: input [N, C_in, H, W] or [C_in, H, W]."""


class BBBConvTranspose3d(Flipout, shapes.ConvTranspose3d):
    """3-d transposed convolution: input [N, C_in, D, H, W] or [C_in, D, H, W]."""


class BBBLazyLinear(Lazy, BBBLinear):
    """``BBBLinear`` without its first argument, in_features: that is the first input's."""


class BBBLazyConv1d(Lazy, BBBConv1d):
    """``BBBConv1d`` without its first argument, in_channels: that is the first input's."""


class BBBLazyConv2d(Lazy, BBBConv2d):
    """``BBBConv2d`` without its first argument, in_channels: that is the first input's."""


class BBBLazyConv3d(Lazy, BBBConv3d):
    """``BBBConv3d`` without its first argument, in_channels: that is the first input's."""


class BBBLazyConvTranspose1d(Lazy, BBBConvTranspose1d):
    """``BBBConvTranspose1d`` without its first argument, in_channels: that is the first input's."""


class BBBLazyConvTranspose2d(Lazy, BBBConvTranspose2d):
    """``BBBConvTranspose2d`` without its first argument, in_channels: that is the first input's."""


class BBBLazyConvTranspose3d(Lazy, BBBConvTranspose3d):
    """``BBBConvTranspose3d`` without its first argument, in_channels: that is the first input's."""
