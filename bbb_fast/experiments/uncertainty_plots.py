"""The figure of ``python -m bbb_fast uncertainty``. Needs matplotlib."""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import Tensor

from .drawing import BLACK, BLUE, GREEN, PINK, RED, SKY, png
from .judged import SCORES, Comparison, Judged

__all__ = ["uncertainty_figure"]

_COLUMNS = 10
_IN, _OUT, _WRONG = "#2a6f97", "#d1495b", "#c1121f"
_STYLES = ("-", "-", "-", "--", "--", ":")
_COLORS = (BLUE, RED, GREEN, SKY, PINK, BLACK)


def uncertainty_figure(result: Comparison) -> bytes:
    """A PNG: example images with what the model says of them, histograms and ROC curves."""
    inside, outside = result.inside, result.outside
    known, other = inside.images.name, outside.images.name
    certain = inside.predictive_entropy.argsort(stable=True)
    wrong = certain[(inside.prediction != inside.images.labels)[certain]]
    strange = outside.predictive_entropy.argsort(stable=True)
    # One image a class first, else a row shows the same thing ten times.
    each = " of each class" if len(outside.images.classes) > 1 else ""
    rows = [
        (
            inside,
            _one_per_class(certain, inside.prediction),
            f"{known}: the most certain of each class",
        ),
        (inside, certain.flip(0), f"{known}: the most uncertain"),
        (inside, wrong, f"{known}: {len(wrong)} of {len(inside)} are wrong; the most certain first"),
        (
            outside,
            _one_per_class(strange, outside.images.labels),
            f"{other}: the most certain{each} (never seen and yet sure: the dangerous ones)",
        ),
        (
            outside,
            _one_per_class(strange.flip(0), outside.images.labels),
            f"{other}: the most uncertain{each}",
        ),
    ]
    layout = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.08)
    figure = Figure(figsize=(15, 17.8), layout=layout, dpi=100)
    kind = "Bayesian" if result.bayesian else "point-estimate"
    figure.suptitle(
        f"What a {kind} model says of {known} ({100 * result.quality['accuracy']:.1f} % right) "
        f"and of {other}, which it has never seen",
        fontsize=15,
        fontweight="bold",
    )
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=[2.6 * len(rows), 4.5]).flat
    for part, (judged, order, title) in zip(
        top.subfigures(len(rows), 1, squeeze=False).flat, rows, strict=True
    ):
        _image_row(part, judged, order, title, result.classes, truth=judged is inside)
    entropy, information, roc = bottom.subplots(1, 3)
    _histogram(entropy, result, "predictive_entropy", "Predictive entropy: all doubt")
    _histogram(information, result, "mutual_information", "Mutual information: doubt in the weights")
    _roc(roc, result)
    return png(figure)


def _one_per_class(order: Tensor, classes: Tensor) -> Tensor:
    """``order`` rearranged: the first image of each class (int64 [N]) before all others."""
    seen: set[int] = set()
    first: list[int] = []
    rest: list[int] = []
    for i, c in zip(order.tolist(), classes[order].tolist(), strict=True):
        (rest if c in seen else first).append(i)
        seen.add(c)
    return torch.tensor(first + rest)


def _image_row(
    part: SubFigure,
    judged: Judged,
    order: Tensor,
    title: str,
    classes: tuple[str, ...],
    truth: bool,
) -> None:
    """The first images of ``order``; with ``truth`` their labels mean something and are shown."""
    part.suptitle(title, x=0.012, ha="left", fontsize=12, fontweight="bold", color=_IN if truth else _OUT)
    chosen = order[:_COLUMNS].tolist()
    for axis in part.subplots(1, _COLUMNS):
        if not chosen:
            axis.set_axis_off()
            continue
        i = chosen.pop(0)
        pixels = judged.images.images[i].permute(1, 2, 0).squeeze(-1).numpy()
        axis.imshow(pixels, cmap="gray", vmin=0, vmax=255)
        axis.set(xticks=[], yticks=[])
        said, label = int(judged.prediction[i]), int(judged.images.labels[i])
        wrong = truth and said != label
        axis.set_title(
            f"says {classes[said]}" + (f"\nis {classes[label]}" if wrong else ""),
            fontsize=9.5,
            fontweight="bold" if wrong else "normal",
            color=_WRONG if wrong else "black",
        )
        axis.set_xlabel(
            f"probability {1 - judged.doubt[i]:.3f}\n"
            f"epistemic {judged.epistemic_softmax[i]:.3f}\n"
            f"aleatoric {judged.aleatoric_softmax[i]:.3f}",
            fontsize=8,
        )


def _histogram(axis: Axes, result: Comparison, score: str, title: str) -> None:
    sides = ((result.inside, _IN), (result.outside, _OUT))
    top = max(float(getattr(judged, score).max()) for judged, _ in sides)
    edges = np.linspace(0.0, top or 1.0, 31).tolist()
    for judged, color in sides:
        values = getattr(judged, score).numpy()
        weights = np.full(len(values), 100.0 / len(values))
        axis.hist(values, edges, weights=weights, color=color, alpha=0.55, label=judged.images.name)
    # Most known images sit in the first bin; on a linear axis nothing else would be seen.
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.set_title(title, fontsize=11)
    axis.set_xlabel("nats")
    axis.set_ylabel("% of the set")
    axis.legend(loc="upper right", fontsize=9)
    if top == 0:
        axis.text(0.5, 0.5, "0 for every image:\nall draws are equal", transform=axis.transAxes, ha="center")


def _roc(axis: Axes, result: Comparison) -> None:
    for (score, name), color, style in zip(SCORES.items(), _COLORS, _STYLES, strict=True):
        false, true = _roc_points(getattr(result.inside, score), getattr(result.outside, score))
        label = f"{name}: {result.detection[score]['auroc']:.3f}"
        axis.plot(false, true, color=color, linestyle=style, linewidth=1.6, label=label)
    axis.plot([0, 1], [0, 1], color="0.75", linewidth=1, zorder=0)
    axis.set_title(f"Telling {result.outside.images.name} from {result.inside.images.name}", fontsize=11)
    axis.set_xlabel(f"{result.inside.images.name} called never seen (FPR)")
    axis.set_ylabel(f"{result.outside.images.name} noticed (TPR)")
    axis.legend(loc="lower right", fontsize=8, title="AUROC", title_fontsize=9)


def _roc_points(scores_in: Tensor, scores_out: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """False- and true-positive rates at every threshold, from none called out to all."""
    thresholds = torch.cat([scores_in, scores_out]).unique()
    rates = []
    for scores in (scores_in, scores_out):
        below = torch.searchsorted(scores.sort().values, thresholds)
        rates.append(np.append(1 - below.numpy() / len(scores), 0.0)[::-1])
    return rates[0], rates[1]
