"""How a layer's output is drawn: a mixin each, over the shapes of ``shapes.py``."""

from __future__ import annotations

from .base import BayesianLayer

__all__ = ["BayesByBackprop", "Flipout", "LocalReparameterization"]


class BayesByBackprop(BayesianLayer):
    """One weight draw a forward, shared by the batch (Blundell et al., ICML 2015)."""

    estimator = "bbb"


class LocalReparameterization(BayesianLayer):
    """One draw an output element (Kingma, Salimans and Welling, NeurIPS 2015)."""

    estimator = "lrt"


class Flipout(BayesianLayer):
    """One weight draw a forward, its deviation's signs drawn for each row (Wen et al., ICLR 2018)."""

    estimator = "flipout"
