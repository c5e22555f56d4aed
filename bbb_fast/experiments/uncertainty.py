"""How sure a trained model is, and whether it notices inputs unlike any it was trained on.

``judge`` describes one set of images under T independent draws of the weights, ``compare`` sets a known
and a never-seen set side by side, ``save`` writes the result as JSON, npz and a figure.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import metrics
from .._backend import build_info
from .._noise import RandomModule
from ..predictive import predictive
from .checkpoint import LoadedModel
from .data import DATASETS, ImageSet, load, normalize
from .folder import OwnedFolder
from .judged import SCORES, Comparison, Judged

__all__ = [
    "DERIVED", "SCORES", "Comparison", "Judged", "compare", "is_bayesian", "judge", "load_pair",
    "own_folder", "pick", "save", "unseen",
]  # fmt: skip

# The files that `save` writes.
FILES = SUMMARY, ARRAYS, FIGURE = "uncertainty.json", "uncertainty.npz", "uncertainty.png"

# Sets of never-seen images that need no files.
DERIVED: tuple[str, ...] = ("noise", "rotated", "inverted")


def is_bayesian(model: nn.Module) -> bool:
    """Whether anything in the model answers at random: Bayesian layers, Monte Carlo dropout."""
    return any(isinstance(module, RandomModule) for module in model.modules())


def pick(images: ImageSet, limit: int | None, seed: int) -> Tensor:
    """Indices of ``limit`` images chosen by ``seed``, ascending: int64 ``[min(limit, N)]``.

    Data sets are often sorted, so the first few would not be a fair sample. None picks all. Raises
    ValueError for a limit below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    if limit is None or limit >= len(images):
        return torch.arange(len(images))
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(len(images), generator=generator)[:limit].sort().values


def unseen(kind: str, inside: ImageSet, seed: int) -> ImageSet:
    """Never-seen images made from a known set, as many and of the same shape.

    ``"noise"``: every pixel uniform in 0..255, by ``seed``; ``"rotated"``: turned by 90 degrees;
    ``"inverted"``: 255 - pixel. Raises ValueError for another kind.
    """
    if kind == "noise":
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.randint(0, 256, inside.images.shape, dtype=torch.uint8, generator=generator)
        return ImageSet(pixels, torch.zeros_like(inside.labels), ("noise",), kind)
    if kind == "rotated":
        pixels = inside.images.rot90(1, (2, 3)).contiguous()
    elif kind == "inverted":
        pixels = 255 - inside.images
    else:
        raise ValueError(f"unknown kind {kind!r}: allowed are {', '.join(DERIVED)}")
    return ImageSet(pixels, inside.labels, inside.classes, f"{kind} {inside.name}")


def load_pair(
    inside: str,
    outside: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    outside_dir: str | os.PathLike[str] | None = None,
    download: bool = False,
    limit: int | None = None,
    seed: int = 0,
) -> tuple[ImageSet, ImageSet, Tensor, Tensor]:
    """The test images of a known and of a never-seen set, at most ``limit`` of each.

    Args: ``inside`` one of ``data.DATASETS``; ``outside`` another of them or one of :data:`DERIVED`;
    ``outside_dir`` where it is not in ``data_dir``. Returns both sets and the indices, in their test
    splits, of the images picked. Raises ValueError (``DataError`` for what is wrong with the data).
    """
    allowed = (*DATASETS, *DERIVED)
    if outside not in allowed:
        raise ValueError(f"unknown out-of-distribution set {outside!r}: allowed are {', '.join(allowed)}")
    if outside == inside:
        raise ValueError(f"{inside} cannot be out of distribution of itself: choose another set")
    known = load(inside, "test", data_dir, download=download)
    known_index = pick(known, limit, seed)
    known = known.subset(known_index)
    if outside in DERIVED:
        return known, unseen(outside, known, seed), known_index, known_index
    other = load(outside, "test", outside_dir or data_dir, download=download)
    other_index = pick(other, limit, seed)
    return known, other.subset(other_index), known_index, other_index


def judge(
    model: nn.Module,
    images: ImageSet,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    samples: int = 50,
    seed: int = 0,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
) -> Judged:
    """What ``samples`` independent draws of all weights say about each image.

    Draw k is the same function for every image, here and in any other call with the same seed
    (:func:`bbb_fast.predictive`). A model in which nothing is random always says the same and is asked once.

    Args: ``mean``, ``std`` of the normalisation the model was trained with, C numbers each; the model
    must be on ``device``. Raises ValueError for numbers out of range, images of another number of
    channels, or outputs that are not finite.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if len(images) < 1:
        raise ValueError(f"{images.name} has no images to judge")
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    draws = samples if is_bayesian(model) else 1
    parts = (normalize(part.to(device), mean, std) for part in images.images.split(batch_size))
    found = predictive(model, parts, draws, seed=seed)
    top, prediction = found.probs.max(-1)
    return Judged(
        images,
        probs=found.probs,
        prediction=prediction,
        doubt=1 - top,
        predictive_entropy=found.entropy,
        expected_entropy=found.expected_entropy,
        mutual_information=found.mutual_information,
        epistemic_softmax=found.epistemic,
        aleatoric_softmax=found.aleatoric,
        epistemic_normalized=found.epistemic_normalized,
        aleatoric_normalized=found.aleatoric_normalized,
    )


def compare(
    loaded: LoadedModel,
    inside: ImageSet,
    outside: ImageSet,
    *,
    samples: int = 50,
    seed: int = 0,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
) -> Comparison:
    """Judges a known and a never-seen set under the same draws (see :func:`judge`).

    The model is moved to ``device``. Raises ValueError where the images do not fit the checkpoint.
    """
    channels = len(loaded.mean)
    for images in (inside, outside):
        if images.images.shape[1] != channels:
            raise ValueError(
                f"the checkpoint was trained on {loaded.dataset}, images of {channels} channel(s), "
                f"but {images.name} has {images.images.shape[1]}"
            )
    if len(inside.classes) != len(loaded.classes):
        raise ValueError(
            f"the checkpoint was trained on {loaded.dataset} with {len(loaded.classes)} classes, "
            f"but {inside.name} has {len(inside.classes)}"
        )
    notes = []
    if tuple(inside.classes) != tuple(loaded.classes):
        notes.append(
            f"The classes of {inside.name} have other names than those of {loaded.dataset}, which the "
            "model was trained on: accuracy compares their numbers."
        )
    bayesian = is_bayesian(loaded.model)
    if not bayesian:
        notes.append(
            "This model has one fixed set of weights, so all draws are equal: mutual information and "
            "both epistemic parts are 0, and their AUROC is 0.5 by construction."
        )
    model = loaded.model.to(device)
    known, other = (
        judge(
            model, images, loaded.mean, loaded.std,
            samples=samples, seed=seed, batch_size=batch_size, device=device,
        )
        for images in (inside, outside)
    )  # fmt: skip
    detection = {score: metrics.ood_report(getattr(known, score), getattr(other, score)) for score in SCORES}
    quality = metrics.classification_report(known.probs, inside.labels)
    return Comparison(known, other, tuple(loaded.classes), quality, detection, bayesian, tuple(notes))


def _summary(judged: Judged) -> dict[str, Any]:
    names = (*SCORES, "expected_entropy", "aleatoric_normalized")
    quantiles = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
    scores = {}
    for name in names:
        values = getattr(judged, name)
        low, median, high = values.quantile(quantiles).tolist()
        scores[name] = {"mean": float(values.mean()), "p05": low, "median": median, "p95": high}
    return {
        "name": judged.images.name,
        "images": len(judged),
        "share_above_0.9": judged.share_above(0.9),
        "scores": scores,
    }


@contextmanager
def own_folder(path: str | os.PathLike[str], overwrite: bool = False) -> Iterator[OwnedFolder]:
    """A folder for :func:`save`, made if needed, which no other judgement writes to meanwhile.

    Raises FileExistsError where it holds results already, without ``overwrite``, and OSError where it
    cannot be written or another process is writing results to it.
    """
    with OwnedFolder(Path(path), "uncertainty", FILES) as folder:
        found = [name for name in FILES if (folder.path / name).exists()]
        if found and not overwrite:
            raise FileExistsError(
                f"{folder.path} already holds results ({', '.join(found)}): replace them with --overwrite, "
                "or choose another folder with --out"
            )
        yield folder


def save(
    result: Comparison,
    folder: OwnedFolder,
    settings: Mapping[str, Any],
    indices: tuple[Tensor, Tensor] | None = None,
) -> tuple[list[Path], str | None]:
    """Writes :data:`FILES` into a folder of :func:`own_folder`.

    The JSON holds summaries, detection scores, ``settings`` (anything JSON can say) and versions. The
    npz holds ``in_*`` and ``out_*`` arrays, one row an image; with ``indices`` (int64 ``[N_in]`` and
    ``[N_out]``) also each image's place in its test split.

    Returns the files written and, where matplotlib is missing and the figure was left out, one line
    that says so. Raises OSError where a file cannot be written.
    """
    document = {
        **settings,
        "in": {**_summary(result.inside), **result.quality},
        "out": _summary(result.outside),
        "detection": result.detection,
        "bayesian": result.bayesian,
        "notes": list(result.notes),
        "build": build_info(),
    }
    arrays: dict[str, Any] = {}
    for k, (prefix, judged) in enumerate((("in", result.inside), ("out", result.outside))):
        arrays |= {f"{prefix}_{name}": value for name, value in judged.arrays().items()}
        if indices is not None:
            arrays[f"{prefix}_index"] = indices[k].numpy()
    packed = io.BytesIO()
    np.savez_compressed(packed, **arrays)
    contents = {
        SUMMARY: (json.dumps(document, indent=2, allow_nan=False) + "\n").encode(),
        ARRAYS: packed.getvalue(),
    }
    notice = None
    try:
        from .uncertainty_plots import uncertainty_figure
    except ImportError as error:
        notice = f"no figure: matplotlib is missing ({error}): pip install matplotlib"
    else:
        contents[FIGURE] = uncertainty_figure(result)
    for name in FILES:
        if name in contents:
            folder.write(name, contents[name])
        else:  # of the results that these replace
            (folder.path / name).unlink(missing_ok=True)
    return [folder.path / name for name in contents], notice
