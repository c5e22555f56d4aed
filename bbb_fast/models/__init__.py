"""The three networks, Bayesian and as point-estimate twins; input [N, inputs, 32, 32]."""

from .alexnet import AlexNet, BBBAlexNet
from .lenet import BBBLeNet, LeNet
from .threeconvthreefc import BBB3Conv3FC, ThreeConvThreeFC

__all__ = ["AlexNet", "BBB3Conv3FC", "BBBAlexNet", "BBBLeNet", "LeNet", "ThreeConvThreeFC"]
