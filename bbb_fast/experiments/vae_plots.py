"""The figures of ``python -m bbb_fast vae``. They need matplotlib."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from .._noise import fixed_noise
from ..models import VAE

__all__ = ["curves", "pictures"]

_COLUMNS = 10
_WALKS = 6
_REACH = 3.0
# Between pixels of images that lie side by side.
_GAP = 2
# Okabe and Ito's palette, which colour-blind people can tell apart.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#56b4e9", "#cc79a7", "#000000")


@torch.no_grad()
def pictures(
    vae: VAE, x: Tensor, labels: Tensor, classes: Sequence[str], activity: Sequence[float], seed: int
) -> bytes:
    """A PNG: reconstructions, samples of the prior, codes between images, walks along single numbers.

    Args: ``x`` test images [N, 1, 32, 32] with ``labels`` [N]; ``activity`` of each number of the code.
    """
    # Two images of each class, as far as there are, in the order of the classes.
    of_class = [torch.nonzero(labels == c).flatten()[:2].tolist() for c in range(len(classes))]
    first = [found[0] for found in of_class if found]
    second = [found[1] for found in of_class if len(found) > 1]
    figure = Figure(figsize=(11, 7.2), layout="constrained", dpi=100)
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.05, wspace=0.03)
    left, right = figure.subfigures(1, 2)
    top, bottom = left.subplots(2, 1, height_ratios=[4, 7])
    rows, names = [], []
    for chosen in (first, second):
        if chosen:
            own = x[chosen[:_COLUMNS]]
            rows += [own, _images(vae, vae.encode(own)[0])]
            names += ["test", "model"]
    _mosaic(top, rows, "Test images and their reconstructions", names)
    with fixed_noise(seed, model=vae):
        drawn = vae.sample(7 * _COLUMNS)
    _mosaic(bottom, drawn.split(_COLUMNS), "Samples of the prior")

    top, bottom = right.subplots(2, 1, height_ratios=[5, 6])
    ends = [(first[k], first[-1 - k]) for k in range(min(5, len(first) // 2))] or [(first[0], first[0])]
    share = torch.linspace(0, 1, _COLUMNS)[:, None]
    rows = []
    for one, other in ends:
        start, end = vae.encode(x[[one, other]])[0]
        rows.append(torch.cat([x[[one]], _images(vae, start + share * (end - start)), x[[other]]]))
    _mosaic(top, rows, "Codes between those of two test images (at the ends)")

    numbers = sorted(range(len(activity)), key=lambda k: -activity[k])[:_WALKS]
    values = torch.linspace(-_REACH, _REACH, _COLUMNS + 1)
    rows = []
    for k, number in enumerate(numbers):
        code = vae.encode(x[[first[k % len(first)]]])[0].repeat(len(values), 1)
        code[:, number] = values
        rows.append(_images(vae, code))
    names = [f"$z_{{{number + 1}}}$  {activity[number]:.2f}" for number in numbers]
    _mosaic(bottom, rows, "A latent walk: one number of a test image's code changes", names)
    ticks = range(0, len(values), 2)
    side = x.shape[-1] + _GAP
    bottom.set_xticks([k * side + x.shape[-1] / 2 for k in ticks], [f"{values[k]:.1f}" for k in ticks])
    bottom.set_xlabel("value of the number; at the left which one, and its variance over the test images")
    bottom.xaxis.label.set_size(8)
    bottom.tick_params(axis="x", labelsize=8)
    return _png(figure)


def _images(vae: VAE, codes: Tensor) -> Tensor:
    return vae.decode(codes).sigmoid()


def _mosaic(axis: Axes, rows: Sequence[Tensor], title: str, names: Sequence[str] = ()) -> None:
    """Rows of images, each [columns, 1, side, side], in one picture: ink is dark."""
    side = rows[0].shape[-1]
    columns = max(len(row) for row in rows)
    canvas = np.full((len(rows) * (side + _GAP) - _GAP, columns * (side + _GAP) - _GAP), np.nan)
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            top, left = r * (side + _GAP), c * (side + _GAP)
            canvas[top : top + side, left : left + side] = image[0].cpu().numpy()
    axis.imshow(canvas, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    axis.set_title(title, fontsize=10, fontweight="bold", loc="left")
    axis.set_xticks([])
    axis.set_yticks([r * (side + _GAP) + side / 2 for r in range(len(names))], names, fontsize=8)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)


def curves(histories: Mapping[str, Sequence[Mapping[str, Any]]]) -> bytes:
    """A PNG: the bound of training and validation images over the epochs, for each beta."""
    figure = Figure(figsize=(6, 3.6), layout="constrained", dpi=100)
    axis = figure.subplots()
    for k, (beta, history) in enumerate(histories.items()):
        color = _COLORS[k % len(_COLORS)]
        epochs = range(1, len(history) + 1)
        for key, name, style in (("elbo", "training", "--"), ("valid_elbo", "validation", "-")):
            label = name if len(histories) == 1 else f"{name}, beta {beta}"
            axis.plot(epochs, [entry[key] for entry in history], style, color=color, label=label)
    # The first epochs are far below the rest, which nobody could tell apart beside them.
    levels = sorted(entry[key] for h in histories.values() for entry in h for key in ("elbo", "valid_elbo"))
    low, high = levels[len(levels) // 20], levels[-1]
    if high > low:
        axis.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    axis.set(xlabel="epoch", ylabel="ELBO (nats per image)")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()
