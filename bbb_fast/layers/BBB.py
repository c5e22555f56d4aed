"""Bayes by Backprop layers: each forward draws one set of weights, shared by the batch."""

from .base import ConvBase, LinearBase, WeightSpace

__all__ = ["BBBConv1d", "BBBConv2d", "BBBConv3d", "BBBLinear"]


class BBBLinear(WeightSpace, LinearBase):
    """Linear layer, y = x (mu + sigma * eps)^T + b: input [..., in_features]."""


class BBBConv1d(WeightSpace, ConvBase):
    """1-d convolution: input [N, C_in, L] or [C_in, L]."""

    spatial = 1


class BBBConv2d(WeightSpace, ConvBase):
    """2-d convolution: input [N, C_in, H, W] or [C_in, H, W]."""

    spatial = 2


class BBBConv3d(WeightSpace, ConvBase):
    """3-d convolution: input [N, C_in, D, H, W] or [C_in, D, H, W]."""

    spatial = 3
