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
from PIL import Image
from torch import Tensor

from .._noise import fixed_noise
from ..models import VAE
from .drawing import BLACK, BLUE, GREEN, PINK, RED, SKY, png

__all__ = ["curves", "pictures"]

_COLUMNS = 10
_SAMPLES, _WALKS = 6, 6
_REACH = 3.0
_GREYS = 32
_SIDE = 32
_COLORS = (BLUE, RED, GREEN, SKY, PINK, BLACK)
# In pixels of the PNG: an image's own, what is left of a panel, above it, and below the last one; but _GAP,
# between images, in theirs.
_SCALE, _GAP, _LEFT, _TITLE, _BOTTOM, _DPI = 2, 2, 110, 44, 76, 150


@torch.no_grad()
def pictures(
    vae: VAE,
    images: Tensor,
    x: Tensor,
    labels: Tensor,
    classes: Sequence[str],
    activity: Sequence[float],
    seed: int,
) -> bytes:
    """A PNG: reconstructions, samples of the prior, codes between images, walks along single numbers.

    Args: ``images`` of the test set, uint8 [N, 1, 32, 32], and ``x``, what the model sees of them, with
    ``labels`` [N]; ``activity`` of each number of the code; ``seed`` of the samples.
    """
    grey = images.float() / 255
    of_class = [torch.nonzero(labels == c).flatten()[:2].tolist() for c in range(len(classes))]
    first, second = ([found[k] for found in of_class if len(found) > k][:_COLUMNS] for k in (0, 1))
    codes = vae.encode(x)[0]

    reconstructions, names = [], []
    for chosen in filter(None, (first, second)):
        reconstructions += [grey[chosen], x[chosen], _decoded(vae, codes[chosen])]
        names += ["test image", "pixels seen", "model"]

    with fixed_noise(seed, model=vae):
        samples = vae.sample(_SAMPLES * _COLUMNS).split(_COLUMNS)

    between = []
    share = torch.linspace(0, 1, _COLUMNS - 2)[:, None]
    for one, other in zip(first[: (len(first) + 1) // 2], reversed(first), strict=False):
        path = codes[one] + share * (codes[other] - codes[one])
        between.append(torch.cat([grey[[one]], _decoded(vae, path), grey[[other]]]))

    walks, numbers = [], sorted(range(len(activity)), key=lambda k: -activity[k])[:_WALKS]
    values = torch.linspace(-_REACH, _REACH, _COLUMNS - 1)
    for k, number in enumerate(numbers):
        changed = codes[[first[k % len(first)]]].repeat(_COLUMNS, 1)
        changed[1:, number] = values
        walks.append(_decoded(vae, changed))
    of_numbers = [f"$z_{{{number + 1}}}$ ({activity[number]:.2f})" for number in numbers]

    columns = (
        (
            (reconstructions, "Test images and their reconstructions", names),
            (samples, "Samples of the prior", ()),
        ),
        (
            (between, "Codes between those of two test images (at the ends)", ()),
            (walks, "A latent walk: the code, and one of its numbers changed", of_numbers),
        ),
    )
    page = _Page([[len(rows) for rows, *_ in column] for column in columns])
    panels = [page.panel(c, r, *panel) for c, column in enumerate(columns) for r, panel in enumerate(column)]
    ticks = range(0, len(values), 2)
    where = [(k + 1) * (_SIDE + _GAP) + _SIDE / 2 for k in ticks]
    panels[-1].set_xticks(where, [f"{values[k]:g}" for k in ticks], fontsize=8)
    panels[-1].set_xlabel(
        "value of the number (in brackets: variance of its mean over test images)", fontsize=8
    )
    return page.png()


def _decoded(vae: VAE, codes: Tensor) -> Tensor:
    return vae.decode(codes).sigmoid()


class _Page:
    """Columns of panels of so many rows of images, each at a whole multiple of its pixels."""

    def __init__(self, rows: Sequence[Sequence[int]]) -> None:
        self._rows = rows
        heights = [sum(_TITLE + self._length(count) for count in column) for column in rows]
        heights[-1] += _BOTTOM
        self._width, self._height = (
            len(rows) * (_LEFT + self._length(_COLUMNS)) + _GAP,
            max(heights),
        )
        self._figure = Figure(figsize=(self._width / _DPI, self._height / _DPI), dpi=_DPI)

    @staticmethod
    def _length(images: int) -> int:
        return _SCALE * (images * (_SIDE + _GAP) - _GAP)

    def panel(
        self, column: int, row: int, images: Sequence[Tensor], title: str, names: Sequence[str]
    ) -> Axes:
        """Rows of images, each [columns, 1, 32, 32], in one picture; ink is dark."""
        width, height = self._length(_COLUMNS), self._length(len(images))
        left = column * (_LEFT + width) + _LEFT
        top = sum(_TITLE + self._length(count) for count in self._rows[column][:row]) + _TITLE
        canvas = np.zeros((height // _SCALE, width // _SCALE))
        for r, of_row in enumerate(images):
            for c, image in enumerate(of_row):
                y, x = r * (_SIDE + _GAP), c * (_SIDE + _GAP)
                canvas[y : y + _SIDE, x : x + _SIDE] = image[0].numpy()
        bottom = self._height - top - height
        axis: Axes = self._figure.add_axes(
            (left / self._width, bottom / self._height, width / self._width, height / self._height)
        )
        # So many greys that nobody misses one, and the file has half the size.
        canvas = np.rint(canvas * _GREYS) / _GREYS
        axis.imshow(canvas, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
        axis.set_title(title, fontsize=9, fontweight="bold", loc="left", pad=4)
        axis.set_xticks([])
        axis.set_yticks([r * (_SIDE + _GAP) + _SIDE / 2 for r in range(len(names))], names, fontsize=8)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        return axis

    def png(self) -> bytes:
        """Without colours, of which there are none: a third of the size."""
        grey = Image.open(io.BytesIO(png(self._figure))).convert("L")
        content = io.BytesIO()
        grey.save(content, format="png", optimize=True)
        return content.getvalue()


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
    return png(figure)
