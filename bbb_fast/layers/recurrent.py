"""Recurrent layers in weight space: one draw a sequence, then torch's own fused kernels."""

from __future__ import annotations

from torch import nn

from .weight_space import Around

__all__ = ["BBBGRU", "BBBLSTM", "BBBRNN", "BBBGRUCell", "BBBLSTMCell", "BBBRNNCell"]


class BBBRNN(Around):
    """``torch.nn.RNN`` with a posterior over its weights: the same arguments, and ``priors``.

    One draw a forward, for all steps of the sequence and the whole batch, which may be packed. The means
    start as torch.nn's weights, unless ``priors`` has a ``posterior_mu_initial``.
    """

    kind = nn.RNN


class BBBLSTM(Around):
    """``torch.nn.LSTM`` with a posterior over its weights: as :class:`BBBRNN`."""

    kind = nn.LSTM


class BBBGRU(Around):
    """``torch.nn.GRU`` with a posterior over its weights: as :class:`BBBRNN`."""

    kind = nn.GRU


class BBBRNNCell(Around):
    """``torch.nn.RNNCell`` with a posterior over its weights.

    Each call is a draw of its own: for one draw a sequence, call it under ``fixed_noise``.
    """

    kind = nn.RNNCell


class BBBLSTMCell(Around):
    """``torch.nn.LSTMCell`` with a posterior over its weights: as :class:`BBBRNNCell`."""

    kind = nn.LSTMCell


class BBBGRUCell(Around):
    """``torch.nn.GRUCell`` with a posterior over its weights: as :class:`BBBRNNCell`."""

    kind = nn.GRUCell
