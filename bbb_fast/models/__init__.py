"""The five networks, Bayesian and as point-estimate twins; input [N, inputs, 32, 32]."""

from .alexnet import AlexNet, BBBAlexNet
from .caffelenet import BBBCaffeLeNet, CaffeLeNet
from .lenet import BBBLeNet, LeNet
from .smallcnn import BBBSmallCNN, SmallCNN
from .threeconvthreefc import BBB3Conv3FC, ThreeConvThreeFC

__all__ = [
    "AlexNet", "BBB3Conv3FC", "BBBAlexNet", "BBBCaffeLeNet", "BBBLeNet", "BBBSmallCNN",
    "CaffeLeNet", "LeNet", "SmallCNN", "ThreeConvThreeFC",
]  # fmt: skip
