"""The figure of ``active``. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from .document import mean_and_error
from .drawing import BLACK, BLUE, GREEN, RED, png

__all__ = ["curves"]

# Dashes tell them apart without colour.
_STYLES = {
    "mutual-information": (BLUE, "-"),
    "entropy": (RED, "--"),
    "variation-ratio": (GREEN, "-."),
    "random": (BLACK, ":"),
}


def curves(
    sizes: Sequence[int], rounds: Mapping[str, Sequence[Sequence[float]]], title: str, label: str
) -> bytes:
    """A PNG: for each acquisition the mean of the seeds against ``sizes``, and a band of one standard error.

    ``rounds``: by acquisition, for each size, the number of every seed.
    """
    figure = Figure(figsize=(7, 4.3), layout="constrained", dpi=120)
    axis = figure.subplots()
    for name, of_rounds in rounds.items():
        color, style = _STYLES[name]
        pairs = [mean_and_error(values) for values in of_rounds]
        means = [mean for mean, _ in pairs]
        axis.plot(sizes, means, style, color=color, linewidth=1.8, label=name.replace("-", " "))
        low, high = ([mean + side * (error or 0.0) for mean, error in pairs] for side in (-1, 1))
        axis.fill_between(sizes, low, high, color=color, alpha=0.15, linewidth=0)
    axis.set(title=title, xlabel="labels", ylabel=label)
    axis.set_xlim(sizes[0], max(sizes[-1], sizes[0] + 1))
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right", title="chosen by")
    return png(figure)
