"""Flipout layers: each forward draws one set of weights, and each row the signs of its deviations."""

from . import shapes
from .estimators import Flipout

__all__ = [
    "BBBBilinear",
    "BBBConv1d",
    "BBBConv2d",
    "BBBConv3d",
    "BBBConvTranspose1d",
    "BBBConvTranspose2d",
    "BBBConvTranspose3d",
    "BBBLinear",
]


class BBBLinear(Flipout, shapes.Linear):
    """Linear layer, y = x mu^T + b + ((x * s) (sigma * eps)^T) * r: input [..., in_features]."""


class BBBBilinear(Flipout, shapes.Bilinear):
    """Bilinear layer: the linear one on its inputs' outer product, formed for each row of the inputs
    [..., in1_features] and [..., in2_features]: in1_features * in2_features numbers."""


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
