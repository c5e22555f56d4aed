"""Three small convolutions and two linear layers, for 32 x 32 images in colour on a CPU."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ..layers.misc import FlattenLayer
from .build import Architecture, BayesianModel, PointModel
from .pooling import MaxPool2d


class _SmallCNN(Architecture):
    def _build(
        self,
        outputs: int,
        inputs: int,
        conv: Callable[..., nn.Module],
        linear: Callable[..., nn.Module],
        act: Callable[[], nn.Module],
    ) -> None:
        self.conv1 = conv(inputs, 32, 3, padding=1)
        self.pool1 = MaxPool2d(2)
        self.act1 = act()
        self.conv2 = conv(32, 64, 3, padding=1)
        self.pool2 = MaxPool2d(2)
        self.act2 = act()
        self.conv3 = conv(64, 64, 3, padding=1)
        self.pool3 = MaxPool2d(2)
        self.act3 = act()
        self.flatten = FlattenLayer(4 * 4 * 64)
        self.fc1 = linear(4 * 4 * 64, 128)
        self.act4 = act()
        self.fc2 = linear(128, outputs)


class BBBSmallCNN(_SmallCNN, BayesianModel):
    __doc__ = f"Three small convolutions and two linear layers, Bayesian.\n\n{BayesianModel.__doc__}"


class SmallCNN(_SmallCNN, PointModel):
    __doc__ = f"Three small convolutions and two linear layers.\n\n{PointModel.__doc__}"
