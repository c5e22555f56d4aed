"""Bayes by Backprop layers: each forward draws one set of weights, shared by the batch."""

from . import shapes
from .attention import BBBMultiheadAttention
from .embedding import BBBEmbedding, BBBEmbeddingBag
from .estimators import BayesByBackprop
from .lazy import Lazy
from .recurrent import BBBGRU, BBBLSTM, BBBRNN, BBBGRUCell, BBBLSTMCell, BBBRNNCell

__all__ = [
    "BBBGRU",
    "BBBLSTM",
    "BBBRNN",
    "BBBBilinear",
    "BBBConv1d",
    "BBBConv2d",
    "BBBConv3d",
    "BBBConvTranspose1d",
    "BBBConvTranspose2d",
    "BBBConvTranspose3d",
    "BBBEmbedding",
    "BBBEmbeddingBag",
    "BBBGRUCell",
    "BBBLSTMCell",
    "BBBLazyConv1d",
    "BBBLazyConv2d",
    "BBBLazyConv3d",
    "BBBLazyConvTranspose1d",
    "BBBLazyConvTranspose2d",
    "BBBLazyConvTranspose3d",
    "BBBLazyLinear",
    "BBBLinear",
    "BBBMultiheadAttention",
    "BBBRNNCell",
]


class BBBLinear(BayesByBackprop, shapes.Linear):
    """Linear layer, y = x (mu + sigma * eps)^T + b: input [..., in_features]."""


class BBBBilinear(BayesByBackprop, shapes.Bilinear):
    """Bilinear layer, y_k = x1^T W_k x2 + b_k: inputs [..., in1_features] and [..., in2_features]."""


class BBBConv1d(BayesByBackprop, shapes.Conv1d):
    """1-d convolution: input [N, C_in, L] or [C_in, L]."""


class BBBConv2d(BayesByBackprop, shapes.Conv2d):
    """2-d convolution: input [N, C_in, H, W] or [C_in, H, W]."""


class BBBConv3d(BayesByBackprop, shapes.Conv3d):
    """3-d convolution: input [N, C_in, D, H, W] or [C_in, D, H, W]."""


class BBBConvTranspose1d(BayesByBackprop, shapes.ConvTranspose1d):
    """1-d transposed convolution: input [N, C_in, L] or [C_in, L]."""


class BBBConvTranspose2d(BayesByBackprop, shapes.ConvTranspose2d):
    """2-d transposed convolution: input [N, C_in, H, W] or [C_in, H, W]."""


class BBBConvTranspose3d(BayesByBackprop, shapes.ConvTranspose3d):
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
