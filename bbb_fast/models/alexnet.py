"""AlexNet cut down to 32 x 32 images (after Krizhevsky et al. 2012)."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ..layers.misc import FlattenLayer
from .build import Architecture, BayesianModel, PointModel
from .pooling import MaxPool2d


class _AlexNet(Architecture):
    def _build(
        self,
        outputs: int,
        inputs: int,
        conv: Callable[..., nn.Module],
        linear: Callable[..., nn.Module],
        act: Callable[[], nn.Module],
    ) -> None:
        self.conv1 = conv(inputs, 64, 11, stride=4, padding=5)
        self.pool1 = MaxPool2d(2)
        self.act1 = act()
        self.conv2 = conv(64, 192, 5, padding=2)
        self.pool2 = MaxPool2d(2)
        self.act2 = act()
        self.conv3 = conv(192, 384, 3, padding=1)
        self.act3 = act()
        self.conv4 = conv(384, 256, 3, padding=1)
        self.act4 = act()
        self.conv5 = conv(256, 128, 3, padding=1)
        self.pool3 = MaxPool2d(2)
        self.act5 = act()
        self.flatten = FlattenLayer(128)
        self.classifier = linear(128, outputs)


class BBBAlexNet(_AlexNet, BayesianModel):
    __doc__ = f"AlexNet of Bayesian layers (after Krizhevsky et al. 2012).\n\n{BayesianModel.__doc__}"


class AlexNet(_AlexNet, PointModel):
    __doc__ = f"AlexNet (after Krizhevsky et al. 2012).\n\n{PointModel.__doc__}"
