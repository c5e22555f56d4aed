"""Several ways to a classifier side by side, under one budget: the words of the compare command."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .. import metrics
from .classifiers import Judging, Results, Study, ask, draw, judge_entries, notes, open_task, train
from .document import Cell, Column, Document, Figure, Table, with_error
from .judged import SCORES
from .tasks import Experiment

__all__ = ["judge_entry", "run"]

_BINS = 15


class _Quality(NamedTuple):
    """A column of the table; its numbers are ``factor`` times those of the results."""

    column: Column
    factor: float = 1.0


_QUALITY: dict[str, _Quality] = {
    "accuracy": _Quality(Column("accuracy %", ".2f", "high"), 100.0),
    "nll": _Quality(Column("NLL", ".4f", "low")),
    "brier": _Quality(Column("Brier", ".4f", "low")),
    "ece": _Quality(Column("ECE", ".4f", "low")),
}


def run(running: Experiment, study: Study, judging: Judging) -> Document:
    """Trains the networks of a study, or takes those of another run, and judges its entries side by side."""
    trained = train(running, study, judging)
    (found,) = judge_entries(running, study, judging, judge_entry).values()
    for entry in study.entries():
        for seed, one in zip(study.all_seeds(), found[entry.name], strict=True):
            networks = [trained[n.task] for n in entry.networks(seed)]
            one |= {key: sum(n[key] for n in networks) for key in ("train_seconds", "parameters")}
    labels = {entry.name: entry.label for entry in study.entries()}
    figures, missing = draw(lambda: _figures(labels, found))
    config = study.config(study.networks()[0])
    seeds = f"{study.seeds} seed{'s' if study.seeds > 1 else ''}"
    return Document(
        "compare",
        f"{len(labels)} classifiers of {study.dataset}: {config.model}, {config.epochs} epochs, {seeds}",
        running.settings,
        [_table(labels, found, judging)],
        figures,
        {"networks": trained, "entries": found},
        [
            *notes(study, judging),
            "The best score is the best one on these images: a bound, not a choice made beforehand.",
            "Training: the steps of all networks of an entry, one after the other; prediction: of the known "
            "test images.",
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
    start = time.perf_counter()
    known = ask(opened, sets.test, seed, device)
    seconds = time.perf_counter() - start
    other = ask(opened, sets.outside, seed, device)
    diagram = metrics.reliability(known.probs, sets.test.labels, _BINS)
    return {
        **metrics.classification_report(known.probs, sets.test.labels),
        "detection": {
            score: metrics.ood_report(getattr(known, score), getattr(other, score)) for score in SCORES
        },
        "reliability": {name: value.tolist() for name, value in diagram._asdict().items()},
        "images": [len(known), len(other)],
        "draws": opened.draws,
        "temperature": opened.temperature,
        "predict_seconds": seconds,
    }


def _table(labels: Mapping[str, str], found: Results, judging: Judging) -> Table:
    columns = [
        Column("method"),
        *(column for column, _ in _QUALITY.values()),
        *(Column(f"AUROC, {name}", ".4f", "high") for name in ("entropy", "mutual information", "best")),
        Column("best score"),
        *(Column(f"{what}, s", ".1f", "low") for what in ("training", "prediction")),
    ]
    rows = []
    for name, of_seeds in found.items():
        row: list[Cell] = [labels[name]]
        for key, (column, factor) in _QUALITY.items():
            row.append(with_error([factor * one[key] for one in of_seeds], column.format))
        by_score = {score: [one["detection"][score]["auroc"] for one in of_seeds] for score in SCORES}
        best = max(by_score, key=lambda score: sum(by_score[score]))
        for score in ("predictive_entropy", "mutual_information", best):
            row.append(with_error(by_score[score], ".4f"))
        row.append(SCORES[best])
        for key in ("train_seconds", "predict_seconds"):
            row.append(sum(one[key] for one in of_seeds) / len(of_seeds))
        rows.append(row)
    return Table("Methods under one budget", columns, rows, f"AUROC: against {judging.outside}.")


def _figures(labels: Mapping[str, str], found: Results) -> list[Figure]:
    from . import classifier_plots as plots

    return [
        Figure(
            "scores.png", "Scores",
            "Accuracy, NLL, ECE and AUROC of every method; bars are standard errors over the seeds.",
            plots.scores(labels, found),
        ),
        Figure(
            "reliability.png", "Reliability",
            "How often predictions of each confidence are right: on the diagonal a method is as sure as it "
            "is right. A dot's size is the share of the images in its bin.",
            plots.reliability(labels, found),
        ),
    ]  # fmt: skip
