"""Attention in weight space."""

from __future__ import annotations

from torch import nn

from .weight_space import Around

__all__ = ["BBBMultiheadAttention"]


class BBBMultiheadAttention(Around):
    """``torch.nn.MultiheadAttention`` with a posterior over its weights: its arguments, and ``priors``.

    One draw a forward for the whole batch; the product inside is ``scaled_dot_product_attention``
    (``need_weights=False``). The means start as torch.nn's weights, unless ``priors`` has a
    ``posterior_mu_initial``.
    """

    kind = nn.MultiheadAttention
