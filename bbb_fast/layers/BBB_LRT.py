"""Local-reparameterization layers: each forward draws one number for each output element."""

from . import shapes
from .estimators import LocalReparameterization
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


class BBBLinear(LocalReparameterization, shapes.Linear):
    """Linear layer, y = m + sqrt(v) * eps: input [..., in_features]."""


class BBBBilinear(LocalReparameterization, shapes.Bilinear):
    """Bilinear layer: the linear one on its inputs' outer product.

    That is formed for each row of the inputs [..., in1_features] and [..., in2_features]:
    in1_features * in2_features numbers.
    """


class BBBConv1d(LocalReparameterization, shapes.Conv1d):
    """1-d convolution: input [N, C_in, L] or [C_in, L]."""


class BBBConv2d(LocalReparameterization, shapes.Conv2d):
    """2-d convolution: input [N, C_in, H, W] or [C_in, H, W]."""


class BBBConv3d(LocalReparameterization, shapes.Conv3d):
    """3-d convolution: input [N, C_in, D, H, W] or [C_in, D, H, W]."""


class BBBConvTranspose1d(LocalReparameterization, shapes.ConvTranspose1d):
    """1-d transposed convolution: input [N, C_in, L] or [C_in, L]."""


class BBBConvTranspose2d(LocalReparameterization, shapes.ConvTranspose2d):
    """2-d transposed convolution: input [N, C_in, H, W] or [C_in, H, W]."""


class BBBConvTranspose3d(LocalReparameterization, shapes.ConvTranspose3d):
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
