"""What all figures share: their colours, and how one becomes a file."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["BLACK", "BLUE", "COLORS", "GREEN", "ORANGE", "PINK", "RED", "SKY", "png"]

# Okabe and Ito's palette, which colour-blind people can tell apart.
BLUE, RED, GREEN, PINK = "#0072b2", "#d55e00", "#009e73", "#cc79a7"
ORANGE, SKY, BLACK = "#e69f00", "#56b4e9", "#000000"
# Of things that have no colour of their own, in this order.
COLORS = (BLUE, RED, GREEN, PINK, ORANGE, SKY, BLACK)


def png(figure: Figure, dpi: float | None = None) -> bytes:
    """The figure as a PNG, at ``dpi`` dots an inch or (None) at its own."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi="figure" if dpi is None else dpi)
    return buffer.getvalue()
