"""Local-reparameterization layers: each forward draws one number for each output element."""

from .base import ConvBase, LinearBase, LocalReparameterization

__all__ = ["BBBConv1d", "BBBConv2d", "BBBConv3d", "BBBLinear"]


class BBBLinear(LocalReparameterization, LinearBase):
    """Linear layer, y = m + sqrt(v) * eps: input [..., in_features]."""


class BBBConv1d(LocalReparameterization, ConvBase):
    """1-d convolution: input [N, C_in, L] or [C_in, L]."""

    spatial = 1


class BBBConv2d(LocalReparameterization, ConvBase):
    """2-d convolution: input [N, C_in, H, W] or [C_in, H, W]."""

    spatial = 2


class BBBConv3d(LocalReparameterization, ConvBase):
    """3-d convolution: input [N, C_in, D, H, W] or [C_in, D, H, W]."""

    spatial = 3
