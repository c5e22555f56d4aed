"""Attention in weight space."""

from __future__ import annotations

from torch import nn

from .weight_space import Around

__all__ = ["BBBMultiheadAttention"]


class BBBMultiheadAttention(Around):
    """``torch.nn.MultiheadAttention`` with a posterior over its weights.

    ``layer(query, key, value, ...)``: query [L, N, embed_dim], key [S, N, kdim] and value [S, N, vdim], with
    batch_first [N, L, embed_dim] and so on; returns the output, shaped as the query, and the attention's
    weights [N, L, S] or, with ``need_weights=False``, None: then the product inside is
    ``scaled_dot_product_attention``.
    """

    kind = nn.MultiheadAttention
