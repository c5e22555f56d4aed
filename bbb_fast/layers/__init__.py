"""Bayesian layers, of three estimators.

``BBB``, ``BBB_LRT`` and ``Flipout`` hold the same class names, one module for each estimator; what draws by
dropping inputs is beside them.
"""

from . import BBB, BBB_LRT, Flipout
from .BBB import BBBConv2d as BBB_Conv2d
from .BBB import BBBLinear as BBB_Linear
from .BBB_LRT import BBBConv2d as BBB_LRT_Conv2d
from .BBB_LRT import BBBLinear as BBB_LRT_Linear
from .dropout import ConcreteDropout, MCDropout, MCDropout1d, MCDropout2d, MCDropout3d
from .misc import FlattenLayer, ModuleWrapper
from .weight_space import WeightSpace

__all__ = [
    "BBB",
    "BBB_LRT",
    "BBB_Conv2d",
    "BBB_LRT_Conv2d",
    "BBB_LRT_Linear",
    "BBB_Linear",
    "ConcreteDropout",
    "FlattenLayer",
    "Flipout",
    "MCDropout",
    "MCDropout1d",
    "MCDropout2d",
    "MCDropout3d",
    "ModuleWrapper",
    "WeightSpace",
]
