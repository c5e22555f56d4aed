"""The bilinear layer in weight space."""

from __future__ import annotations

from torch import nn

from .weight_space import Around

__all__ = ["BBBBilinear"]


class BBBBilinear(Around):
    """``torch.nn.Bilinear`` with a posterior over its weights: its arguments, and ``priors``.

    One draw a forward for the whole batch. The means start as torch.nn's weights, unless ``priors`` has a
    ``posterior_mu_initial``.
    """

    kind = nn.Bilinear
