"""Figures of the commands that set classifiers side by side. Needs matplotlib."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .classifiers import Results
from .document import mean_and_error
from .judged import SCORES

__all__ = ["reliability", "scores"]

# Okabe and Ito's palette, which colour-blind people can tell apart.
_BLUE, _RED, _GREEN, _SKY, _PINK, _ORANGE = "#0072b2", "#d55e00", "#009e73", "#56b4e9", "#cc79a7", "#e69f00"
_ACROSS = 5


def _png(figure: Figure) -> bytes:
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=130)
    return png.getvalue()


def _mean_and_bar(values: Sequence[float]) -> tuple[float, float]:
    mean, error = mean_and_error(values)
    return mean, error or 0.0


def scores(labels: Mapping[str, str], found: Results) -> bytes:
    """A PNG of a compare run's scores: a panel a score, a row an entry, bars of one standard error."""
    names = [labels[name] for name in found]
    panels: dict[str, list[list[float]]] = {
        "accuracy (%)": [[100 * one["accuracy"] for one in of_seeds] for of_seeds in found.values()],
        "NLL (nats)": [[one["nll"] for one in of_seeds] for of_seeds in found.values()],
        "ECE": [[one["ece"] for one in of_seeds] for of_seeds in found.values()],
    }
    figure = Figure(figsize=(13, 1.3 + 0.34 * len(names)), layout="constrained")
    axes = figure.subplots(1, len(panels) + 1, sharey=True)
    places = np.arange(len(names))[::-1]
    for axis, (title, rows) in zip(axes, panels.items(), strict=False):
        _dots(axis, places, rows, _BLUE, "o")
        axis.set_title(title, fontsize=10)
    last = axes[-1]
    for score, color, marker, shift in (
        ("predictive_entropy", _BLUE, "o", 0.14),
        ("mutual_information", _RED, "s", -0.14),
    ):
        rows = [[one["detection"][score]["auroc"] for one in of_seeds] for of_seeds in found.values()]
        _dots(last, places + shift, rows, color, marker, SCORES[score])
    last.set_title("AUROC of never-seen images", fontsize=10)
    # Below the axes: the dots may be anywhere.
    last.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.09), ncols=2, frameon=False)
    axes[0].set_yticks(places, names)
    return _png(figure)


def _dots(
    axis: Axes, places: np.ndarray, rows: Sequence[Sequence[float]], color: str, marker: str, label: str = ""
) -> None:
    means, errors = zip(*map(_mean_and_bar, rows), strict=True)
    axis.errorbar(
        means, places, xerr=errors if any(errors) else None, fmt=marker, color=color, markersize=5,
        capsize=2, linewidth=1.2, label=label or None,
    )  # fmt: skip
    axis.grid(alpha=0.3)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def reliability(labels: Mapping[str, str], found: Results) -> bytes:
    """A PNG of a compare run's reliability diagrams, all seeds together: a panel an entry."""
    down = math.ceil(len(found) / _ACROSS)
    figure = Figure(figsize=(2.6 * _ACROSS, 2.6 * down), layout="constrained")
    axes = figure.subplots(down, _ACROSS, sharex=True, sharey=True, squeeze=False).ravel()
    for axis, (name, of_seeds) in zip(axes, found.items(), strict=False):
        diagrams = [one["reliability"] for one in of_seeds]
        counts = np.sum([d["count"] for d in diagrams], axis=0)
        size = np.maximum(counts, 1)
        accuracy, confidence = (
            np.sum([np.multiply(d[key], d["count"]) for d in diagrams], axis=0) / size
            for key in ("accuracy", "confidence")
        )
        edges = np.asarray(diagrams[0]["edges"])
        shown = counts > 0
        axis.bar(
            edges[:-1][shown], accuracy[shown], np.diff(edges)[shown], align="edge", color=_SKY, edgecolor="white",
            linewidth=0.6,
        )  # fmt: skip
        axis.plot([0, 1], [0, 1], color="0.4", linestyle="--", linewidth=1)
        share = counts / counts.sum()
        # A dot is as large as its bin is full: empty bins decide nothing.
        axis.scatter(confidence[shown], accuracy[shown], 6 + 90 * share[shown], color=_BLUE, zorder=3)
        ece, _ = mean_and_error([one["ece"] for one in of_seeds])
        axis.set_title(f"{labels[name]}: ECE {ece:.4f}", fontsize=10)
        axis.set(xlim=(0, 1), ylim=(0, 1.02))
    for k, axis in enumerate(axes):
        axis.set_visible(k < len(found))
        # The lowest that is shown in each column.
        axis.tick_params(labelbottom=k < len(found) <= k + _ACROSS)
    figure.supxlabel("confidence (largest probability)", fontsize=10)
    figure.supylabel("fraction that is right", fontsize=10)
    return _png(figure)
