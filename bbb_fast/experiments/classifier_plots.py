"""Figures of the commands that set classifiers side by side. Needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .classifiers import Results
from .corruptions import CORRUPTIONS
from .document import mean_and_error
from .drawing import BLUE, COLORS, RED, SKY, png
from .judged import SCORES

__all__ = ["entropies", "reliability", "scores", "shifts", "shifts_of_one"]

_DPI = 130
_STYLES, _MARKERS = ("-", "--", ":"), ("o", "s", "^", "D", "v", "P", "X", "*")
_ACROSS = 5


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
        _dots(axis, places, rows, BLUE, "o")
        axis.set_title(title, fontsize=10)
    last = axes[-1]
    for score, color, marker, shift in (
        ("predictive_entropy", BLUE, "o", 0.14),
        ("mutual_information", RED, "s", -0.14),
    ):
        rows = [[one["detection"][score]["auroc"] for one in of_seeds] for of_seeds in found.values()]
        _dots(last, places + shift, rows, color, marker, SCORES[score])
    last.set_title("AUROC of never-seen images", fontsize=10)
    # Below the axes: the dots may be anywhere.
    figure.legend(fontsize=8, loc="outside lower right", ncols=2, frameon=False)
    axes[0].set_yticks(places, names)
    axes[0].set_ylim(-0.6, len(names) - 0.4)
    return png(figure, _DPI)


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
    figure, axes = _panels(len(found), 2.6, 2.6)
    for axis, (name, of_seeds) in zip(axes, found.items(), strict=True):
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
            edges[:-1][shown], accuracy[shown], np.diff(edges)[shown],
            align="edge", color=SKY, edgecolor="white", linewidth=0.6,
        )  # fmt: skip
        axis.plot([0, 1], [0, 1], color="0.4", linestyle="--", linewidth=1)
        share = counts / counts.sum()
        # A dot is as large as its bin is full: empty bins decide nothing.
        axis.scatter(confidence[shown], accuracy[shown], 6 + 90 * share[shown], color=BLUE, zorder=3)
        ece, _ = mean_and_error([one["ece"] for one in of_seeds])
        axis.set_title(f"{labels[name]}: ECE {ece:.4f}", fontsize=10)
        axis.set(xlim=(0, 1), ylim=(0, 1.02))
    figure.supxlabel("confidence (largest probability)", fontsize=10)
    figure.supylabel("fraction that is right", fontsize=10)
    return png(figure, _DPI)


def entropies(labels: Mapping[str, str], found: Results, names: tuple[str, str]) -> bytes:
    """A PNG of the entropies of known and never-seen images, all seeds together: a panel an entry."""
    figure, axes = _panels(len(found), 2.8, 2.4)
    for axis, (name, of_seeds) in zip(axes, found.items(), strict=True):
        for side, title, color in zip(("known", "unknown"), names, (BLUE, RED), strict=True):
            counts = np.sum([one[side]["entropy_histogram"] for one in of_seeds], axis=0)
            edges = np.linspace(0, of_seeds[0][side]["highest_entropy"], len(counts) + 1)
            shares = 100 * counts / counts.sum()
            axis.stairs(shares, edges, color=color, fill=True, alpha=0.45, label=title)
            axis.stairs(shares, edges, color=color, linewidth=1.2)
        auroc, _ = mean_and_error([one["detection"]["predictive_entropy"]["auroc"] for one in of_seeds])
        axis.set_title(f"{labels[name]}: AUROC {auroc:.3f}", fontsize=10)
        # Most known images sit in the first bin; on a linear axis nothing else would be seen.
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
    figure.supxlabel("entropy of the prediction (nats)", fontsize=10)
    figure.supylabel("% of the set", fontsize=10)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    return png(figure, _DPI)


def shifts(labels: Mapping[str, str], curves: Mapping[str, Results], drawn: Mapping[str, str]) -> bytes:
    """A PNG of all entries under all corruptions: a column a corruption, a row a score, a line an entry.

    Of one corruption the scores are side by side. ``drawn``: the scores and their names.
    """
    alone = len(curves) == 1
    down, across = (1, len(drawn)) if alone else (len(drawn), len(curves))
    figure = Figure(figsize=(2.9 * across + 1, 2.3 * down + 0.8), layout="constrained")
    axes = figure.subplots(down, across, sharex="col", sharey="none" if alone else "row", squeeze=False)
    axes = axes.T if alone else axes
    for column, (kind, of_kind) in zip(axes.T, curves.items(), strict=True):
        corruption = CORRUPTIONS[kind]
        for axis, key in zip(column, drawn, strict=True):
            for k, (name, of_seeds) in enumerate(of_kind.items()):
                strengths = [point["strength"] for point in of_seeds[0]]
                _curve(axis, strengths, of_seeds, key, k, labels[name])
        if not alone:
            column[0].set_title(corruption.label, fontsize=10)
        for axis in column if alone else column[-1:]:
            axis.set_xlabel(
                f"{corruption.label}, {corruption.unit}" if alone else corruption.unit, fontsize=9
            )
    for row, (key, name) in zip(axes, drawn.items(), strict=True):
        row[0].set_ylabel(name, fontsize=9)
        if key == "nll":
            # Of what is hard by far: on a linear axis nothing else would be seen.
            row[0].set_yscale("log")
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=min(5, len(labels)), frameon=False, fontsize=9)
    return png(figure, _DPI)


def shifts_of_one(
    curves: Mapping[str, Sequence[Sequence[Mapping[str, float]]]], drawn: Mapping[str, str]
) -> bytes:
    """A PNG of one entry: a panel a score, a line a corruption, over the number of its strength."""
    figure = Figure(figsize=(3.1 * len(drawn), 3.2), layout="constrained")
    axes = figure.subplots(1, len(drawn))
    for axis, (key, name) in zip(axes, drawn.items(), strict=True):
        for k, (kind, of_seeds) in enumerate(curves.items()):
            _curve(axis, range(len(of_seeds[0])), of_seeds, key, k, CORRUPTIONS[kind].label)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("strength, from none to the strongest", fontsize=9)
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=len(curves), frameon=False, fontsize=9)
    return png(figure, _DPI)


def _curve(
    axis: Axes,
    strengths: Sequence[float],
    of_seeds: Sequence[Sequence[Mapping[str, float]]],
    key: str,
    k: int,
    label: str,
) -> None:
    """Line number ``k``, with a band of one standard error."""
    values = [_mean_and_bar([points[i][key] for points in of_seeds]) for i in range(len(strengths))]
    means, errors = (np.asarray(part) for part in zip(*values, strict=True))
    # After one round through the colours another style, so that each line is told without its colour.
    color, style = COLORS[k % len(COLORS)], _STYLES[k // len(COLORS) % len(_STYLES)]
    marker = _MARKERS[k % len(_MARKERS)]
    axis.plot(
        strengths,
        means,
        color=color,
        linestyle=style,
        marker=marker,
        markersize=3.5,
        linewidth=1.3,
        label=label,
    )
    if errors.any():
        axis.fill_between(strengths, means - errors, means + errors, color=color, alpha=0.15, linewidth=0)
    axis.grid(alpha=0.3)
    axis.tick_params(labelsize=8)


def _panels(count: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels with the same axes, in rows of :data:`_ACROSS` at most."""
    down = math.ceil(count / _ACROSS)
    across = math.ceil(count / down)
    # Titles and legends need some width, also above a single panel.
    figure = Figure(figsize=(max(width * across, 5), height * down + 0.5), layout="constrained")
    axes = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).ravel()
    for k, axis in enumerate(axes):
        axis.set_visible(k < count)
        # The lowest that is shown in each column has the numbers.
        axis.tick_params(labelbottom=k < count <= k + across, labelsize=8)
    return figure, list(axes[:count])
