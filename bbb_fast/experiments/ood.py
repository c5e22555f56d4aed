"""Whether classifiers notice classes they were not trained on: the words of the ood command."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .. import metrics
from .classifiers import Judging, Results, Study, ask, draw, judge_entries, notes, open_task, train
from .document import Better, Cell, Column, Document, Figure, Table, with_error
from .judged import SCORES, Judged
from .tasks import Experiment

__all__ = ["judge_entry", "run"]

# Of the histograms of the entropy, from 0 to the logarithm of the number of classes.
_BINS = 30
_DETECTION: dict[str, tuple[str, Better]] = {
    "auroc": ("AUROC", "high"),
    "aupr": ("AUPR", "high"),
    "fpr95": ("FPR95", "low"),
}


def run(running: Experiment, study: Study, judging: Judging) -> Document:
    """Trains the networks of a study, or takes those of another run, and shows them never-seen images."""
    train(running, study, judging)
    (found,) = judge_entries(running, study, judging, judge_entry).values()
    labels = {entry.name: entry.label for entry in study.entries()}
    known, other = next(iter(found.values()))[0]["sets"]
    figures, missing = draw(lambda: _figures(labels, found, (known, other)))
    return Document(
        "ood",
        f"{known} known, {other} never seen",
        running.settings,
        [_summary(labels, found), *(_detection(key, labels, found) for key in _DETECTION)],
        figures,
        {"entries": found},
        [
            *notes(study, judging),
            "Entropies and mutual information in nats. Where all draws are equal, as of a deterministic "
            "network, mutual information and the epistemic parts are 0, their AUROC is 0.5 by construction.",
            *missing,
        ],
        running.seconds,
    )


def judge_entry(
    folder: Path, entry: str, seed: int, study: Mapping[str, Any], judging: Mapping[str, Any]
) -> dict[str, Any]:
    """The task that judges one entry of one seed."""
    opened, sets, device = open_task(folder, entry, seed, study, judging)
    assert sets.outside is not None
    known, other = (ask(opened, images, seed, device) for images in (sets.test, sets.outside))
    return {
        **metrics.classification_report(known.probs, sets.test.labels),
        "sets": [sets.test.name, sets.outside.name],
        "known": _described(known),
        "unknown": _described(other),
        "detection": {
            score: metrics.ood_report(getattr(known, score), getattr(other, score)) for score in SCORES
        },
    }


def _described(judged: Judged) -> dict[str, Any]:
    entropy = judged.predictive_entropy
    top = math.log(judged.probs.shape[1])
    return {
        "images": len(judged),
        "entropy": float(entropy.mean()),
        "mutual_information": float(judged.mutual_information.mean()),
        "confidence": float((1 - judged.doubt).mean()),
        "entropy_histogram": torch.histc(entropy.clamp(0, top), _BINS, 0, top).long().tolist(),
        "highest_entropy": top,
    }


def _summary(labels: Mapping[str, str], found: Results) -> Table:
    columns = [
        Column("method"),
        Column("accuracy %", ".2f", "high"),
        Column("NLL", ".4f", "low"),
        Column("ECE", ".4f", "low"),
        Column("entropy, known", ".4f", "low"),
        Column("entropy, never seen", ".4f", "high"),
        Column("mutual information, known", ".4f", "low"),
        Column("mutual information, never seen", ".4f", "high"),
        Column("confidence, never seen", ".4f", "low"),
    ]
    rows = []
    for name, of_seeds in found.items():
        row: list[Cell] = [labels[name], with_error([100 * one["accuracy"] for one in of_seeds], ".2f")]
        row += [with_error([one[key] for one in of_seeds], ".4f") for key in ("nll", "ece")]
        for key in ("entropy", "mutual_information"):
            row += [with_error([one[side][key] for one in of_seeds], ".4f") for side in ("known", "unknown")]
        row.append(with_error([one["unknown"]["confidence"] for one in of_seeds], ".4f"))
        rows.append(row)
    return Table("Known and never-seen images", columns, rows, "Accuracy, NLL and ECE: of the known classes.")


def _detection(key: str, labels: Mapping[str, str], found: Results) -> Table:
    title, better = _DETECTION[key]
    columns = [Column("method"), *(Column(name, ".4f", better) for name in SCORES.values())]
    rows: list[list[Cell]] = [
        [
            labels[name],
            *(with_error([one["detection"][score][key] for one in of_seeds], ".4f") for score in SCORES),
        ]
        for name, of_seeds in found.items()
    ]
    return Table(f"{title} of the never-seen images, by score", columns, rows)


def _figures(labels: Mapping[str, str], found: Results, names: tuple[str, str]) -> list[Figure]:
    from . import classifier_plots as plots

    text = (
        "The entropy of the predictions, all seeds together, as a share of each set's images: the less the "
        "two overlap, the better the never-seen images are noticed."
    )
    return [Figure("entropy.png", "Entropy", text, plots.entropies(labels, found, names))]
