"""Three convolutions and three linear layers, for 32 x 32 images."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ..layers.misc import FlattenLayer
from .build import Architecture, BayesianModel, PointModel
from .pooling import MaxPool2d


class _ThreeConvThreeFC(Architecture):
    def _build(
        self,
        outputs: int,
        inputs: int,
        conv: Callable[..., nn.Module],
        linear: Callable[..., nn.Module],
        act: Callable[[], nn.Module],
    ) -> None:
        self.conv1 = conv(inputs, 32, 5, padding=2)
        self.pool1 = MaxPool2d(3, stride=2)
        self.act1 = act()
        self.conv2 = conv(32, 64, 5, padding=2)
        self.pool2 = MaxPool2d(3, stride=2)
        self.act2 = act()
        self.conv3 = conv(64, 128, 5, padding=1)
        self.pool3 = MaxPool2d(3, stride=2)
        self.act3 = act()
        self.flatten = FlattenLayer(2 * 2 * 128)
        self.fc1 = linear(2 * 2 * 128, 1000)
        self.act4 = act()
        self.fc2 = linear(1000, 1000)
        self.act5 = act()
        self.fc3 = linear(1000, outputs)


class BBB3Conv3FC(_ThreeConvThreeFC, BayesianModel):
    __doc__ = f"Three convolutions and three linear layers, Bayesian.\n\n{BayesianModel.__doc__}"


class ThreeConvThreeFC(_ThreeConvThreeFC, PointModel):
    __doc__ = f"Three convolutions and three linear layers.\n\n{PointModel.__doc__}"
