"""Colours of figures that stand for one thing each."""

from __future__ import annotations

__all__ = ["COLORS"]

# Okabe and Ito's, which colour-blind people can tell apart.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
