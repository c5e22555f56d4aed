"""Caffe's LeNet, the network of Gal and Ghahramani 2015 (arXiv:1506.02158), for 32 x 32 images."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ..layers.misc import FlattenLayer
from .build import Architecture, BayesianModel, PointModel
from .pooling import MaxPool2d


class _CaffeLeNet(Architecture):
    def _build(
        self,
        outputs: int,
        inputs: int,
        conv: Callable[..., nn.Module],
        linear: Callable[..., nn.Module],
        act: Callable[[], nn.Module],
    ) -> None:
        self.conv1 = conv(inputs, 20, 5)
        self.dropout1 = nn.Dropout(0.0)
        self.pool1 = MaxPool2d(2)
        self.act1 = act()
        self.conv2 = conv(20, 50, 5)
        self.dropout2 = nn.Dropout(0.0)
        self.pool2 = MaxPool2d(2)
        self.act2 = act()
        self.flatten = FlattenLayer(5 * 5 * 50)
        self.fc1 = linear(5 * 5 * 50, 500)
        self.act3 = act()
        self.dropout3 = nn.Dropout(0.0)
        self.fc2 = linear(500, outputs)


class BBBCaffeLeNet(_CaffeLeNet, BayesianModel):
    __doc__ = f"Caffe's LeNet of Bayesian layers.\n\n{BayesianModel.__doc__}"


class CaffeLeNet(_CaffeLeNet, PointModel):
    __doc__ = f"""Caffe's LeNet, with dropout behind both convolutions and the first linear layer.

    {PointModel.__doc__}

    The rate is 0 until it is set: ``mc_dropout(CaffeLeNet(10, 1), p=0.5)`` is the network "LeNet-all" of Gal
    and Ghahramani 2015 (arXiv:1506.02158), which drops single elements behind a convolution, before the
    pooling. Unlike theirs it has an activation behind each pooling, as the other models here.
    """
