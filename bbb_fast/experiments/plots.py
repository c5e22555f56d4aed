"""Figures of a training run; they need matplotlib (``pip install matplotlib``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["training_curves"]


def training_curves(history: Sequence[Mapping[str, Any]]) -> Figure:
    """NLL, accuracy and, of a Bayesian model, the KL over the epochs of ``metrics["history"]``.

    Raises ImportError without matplotlib, ValueError for a history with nothing to draw.
    """
    # The class itself, not pyplot: no global state, no display, whatever backend the user has chosen.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    panels = {
        "negative log-likelihood (nats)": {"training": "nll", "validation": "valid_nll"},
        "accuracy": {"training": "accuracy", "validation": "valid_accuracy"},
        "KL(q || p) (nats)": {"posterior": "kl"},
    }
    panels = {
        title: lines
        for title, lines in panels.items()
        if all(key in entry for key in lines.values() for entry in history)
    }
    if not history or not panels:
        raise ValueError("the history has no epochs with an nll, an accuracy or a kl to draw")
    epochs = [entry["epoch"] for entry in history]
    figure = Figure(figsize=(4 * len(panels), 3.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        for label, key in lines.items():
            axis.plot(epochs, [entry[key] for entry in history], label=label, marker=".")
        axis.set(title=title, xlabel="epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        if len(lines) > 1:
            axis.legend()
    return figure
