"""Recurrent layers in weight space: one draw a sequence, then torch's own fused kernels."""

from __future__ import annotations

from torch import nn

from .weight_space import Around

__all__ = ["BBBGRU", "BBBLSTM", "BBBRNN", "BBBGRUCell", "BBBLSTMCell", "BBBRNNCell"]


class BBBRNN(Around):
    """``torch.nn.RNN`` with a posterior over its weights, one draw for all steps of a sequence.

    ``layer(input, h)``: input [L, N, input_size], with batch_first [N, L, input_size], [L, input_size] of
    one sequence, or packed; h [D * num_layers, N, hidden_size], D = 2 where bidirectional, or None: zeros.
    Returns the output [L, N, D * hidden_size] and the last h.
    """

    kind = nn.RNN


class BBBLSTM(Around):
    """``torch.nn.LSTM`` with a posterior over its weights, one draw for all steps of a sequence.

    Shapes as of :class:`BBBRNN`; the state is a pair (h, c). With proj_size that is the width of h and of
    the output.
    """

    kind = nn.LSTM


class BBBGRU(Around):
    """``torch.nn.GRU`` with a posterior over its weights, one draw for all steps of a sequence.

    Shapes as of :class:`BBBRNN`.
    """

    kind = nn.GRU


class BBBRNNCell(Around):
    """``torch.nn.RNNCell`` with a posterior over its weights: one step, with a draw of its own.

    ``layer(input, h)``: input [N, input_size], h [N, hidden_size] or None: zeros, both also without N.
    Returns the next h. For one draw a sequence, call it under ``fixed_noise``.
    """

    kind = nn.RNNCell


class BBBLSTMCell(Around):
    """``torch.nn.LSTMCell`` with a posterior over its weights: one step, with a draw of its own.

    Shapes as of :class:`BBBRNNCell`; the state, given and returned, is a pair (h, c).
    """

    kind = nn.LSTMCell


class BBBGRUCell(Around):
    """``torch.nn.GRUCell`` with a posterior over its weights: one step, with a draw of its own.

    Shapes as of :class:`BBBRNNCell`.
    """

    kind = nn.GRUCell
