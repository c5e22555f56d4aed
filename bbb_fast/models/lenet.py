"""LeNet-5 for 32 x 32 images (LeCun et al. 1998)."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ..layers.misc import FlattenLayer
from .build import Architecture, BayesianModel, PointModel
from .pooling import MaxPool2d


class _LeNet(Architecture):
    def _build(
        self,
        outputs: int,
        inputs: int,
        conv: Callable[..., nn.Module],
        linear: Callable[..., nn.Module],
        act: Callable[[], nn.Module],
    ) -> None:
        self.conv1 = conv(inputs, 6, 5)
        self.pool1 = MaxPool2d(2)
        self.act1 = act()
        self.conv2 = conv(6, 16, 5)
        self.pool2 = MaxPool2d(2)
        self.act2 = act()
        self.flatten = FlattenLayer(5 * 5 * 16)
        self.fc1 = linear(5 * 5 * 16, 120)
        self.act3 = act()
        self.fc2 = linear(120, 84)
        self.act4 = act()
        self.fc3 = linear(84, outputs)


class BBBLeNet(_LeNet, BayesianModel):
    __doc__ = f"LeNet of Bayesian layers (LeCun, Bottou, Bengio and Haffner 1998).\n\n{BayesianModel.__doc__}"


class LeNet(_LeNet, PointModel):
    __doc__ = f"LeNet (LeCun, Bottou, Bengio and Haffner 1998).\n\n{PointModel.__doc__}"
