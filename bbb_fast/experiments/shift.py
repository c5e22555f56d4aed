"""Classifiers under images that get harder step by step: the words of the shift command.

After Ovadia et al. 2019, "Can you trust your model's uncertainty? Evaluating predictive uncertainty under
dataset shift" (arXiv:1906.02530): a good method gets less sure as it gets less right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import metrics
from .classifiers import (
    Judging,
    Results,
    Study,
    ask,
    draw,
    judge_entries,
    notes,
    open_task,
    train,
)
from .corruptions import CORRUPTIONS, corrupt
from .document import Cell, Column, Document, Figure, Table, with_error
from .tasks import Experiment

__all__ = ["CURVES", "judge_entry", "run"]

# What is drawn against the strength: name and which is better, by the key in a result.
CURVES = {"accuracy": "accuracy", "nll": "NLL (nats)", "ece": "ECE", "entropy": "entropy (nats)"}
_CLEAN = "clean"


def run(running: Experiment, study: Study, judging: Judging, kinds: Sequence[str]) -> Document:
    """Trains the networks of a study, or takes those of another run, and judges them under corruptions.

    ``kinds``: some of :data:`CORRUPTIONS`, each once.
    """
    train(running, study, judging)
    parts: dict[str, dict[str, Any]] = {_CLEAN: {"kind": None}, **{kind: {"kind": kind} for kind in kinds}}
    found = judge_entries(running, study, judging, judge_entry, parts)
    labels = {entry.name: entry.label for entry in study.entries()}
    curves = {
        kind: {name: _from_clean(found[_CLEAN][name], found[kind][name]) for name in labels} for kind in kinds
    }
    tables = [_summary(labels, curves)]
    for kind in kinds:
        tables += [_by_strength(kind, key, labels, curves[kind]) for key in ("accuracy", "ece")]
    figures, missing = draw(lambda: _figures(labels, curves))
    return Document(
        "shift",
        f"{len(labels)} classifiers of {study.dataset} under corruptions",
        running.settings,
        tables,
        figures,
        {"curves": curves},
        [
            *notes(study, judging),
            "A method that knows what it does not know gets less sure as it gets less right: its ECE stays "
            "low.",
            *missing,
        ],
        running.seconds,
    )


def judge_entry(
    folder: Path,
    entry: str,
    seed: int,
    study: Mapping[str, Any],
    judging: Mapping[str, Any],
    kind: str | None,
) -> dict[str, Any]:
    """The task that judges one entry of one seed under one corruption of every strength; None: under none."""
    opened, sets, device = open_task(folder, entry, seed, study, judging)
    strengths = (0.0,) if kind is None else CORRUPTIONS[kind].strengths
    points = []
    for strength in strengths:
        images = sets.test
        if kind is not None:
            # The same for all networks of a study, whatever their seed.
            images = corrupt(images, kind, strength, Study.from_dict(study).seed, sets.numbers)
        said = ask(opened, images, seed, device)
        report = metrics.classification_report(said.probs, images.labels)
        points.append(
            {
                "strength": strength,
                **{key: report[key] for key in ("accuracy", "nll", "ece")},
                "entropy": float(said.predictive_entropy.mean()),
            }
        )
    return {"points": points}


def _from_clean(clean: Sequence[Mapping[str, Any]], shifted: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """Of each seed the points from strength 0 on."""
    return [[*a["points"], *b["points"]] for a, b in zip(clean, shifted, strict=True)]


def _summary(labels: Mapping[str, str], curves: Mapping[str, Results]) -> Table:
    """Without corruption, and the mean over all kinds and strengths."""
    columns, rows = [Column("method")], []
    for key, name in CURVES.items():
        better: Any = {"accuracy": "high", "entropy": None}.get(key, "low")
        columns += [Column(f"{name}, {side}", ".4f", better) for side in ("clean", "corrupted")]
    for name, label in labels.items():
        row: list[Cell] = [label]
        of_seeds = list(zip(*(of_kind[name] for of_kind in curves.values()), strict=True))
        for key in CURVES:
            row.append(with_error([kinds[0][0][key] for kinds in of_seeds], ".4f"))
            harder = [[point[key] for points in kinds for point in points[1:]] for kinds in of_seeds]
            row.append(with_error([sum(values) / len(values) for values in harder], ".4f"))
        rows.append(row)
    return Table(
        "Clean and corrupted images", columns, rows, "Corrupted: the mean over all corruptions and strengths."
    )


def _by_strength(kind: str, key: str, labels: Mapping[str, str], curves: Results) -> Table:
    corruption = CORRUPTIONS[kind]
    better: Any = "high" if key == "accuracy" else "low"
    strengths = [point["strength"] for point in next(iter(curves.values()))[0]]
    columns = [Column("method"), *(Column(f"{strength:g}", ".4f", better) for strength in strengths)]
    rows: list[list[Cell]] = [
        [label, *(with_error(list(values), ".4f") for values in _by_point(curves[name], key))]
        for name, label in labels.items()
    ]
    title = f"{CURVES[key]} under {corruption.label}"
    return Table(title[0].upper() + title[1:], columns, rows, f"Columns: {corruption.unit}.")


def _by_point(of_seeds: Sequence[Sequence[Mapping[str, float]]], key: str) -> list[list[float]]:
    """The values of all seeds at each strength."""
    return [[point[key] for point in points] for points in zip(*of_seeds, strict=True)]


def _figures(labels: Mapping[str, str], curves: Mapping[str, Results]) -> list[Figure]:
    from . import classifier_plots as plots

    figures = [
        Figure(
            "shift.png", "All methods",
            "Accuracy, NLL, ECE and entropy of every method against the strength of each corruption; bands "
            "are standard errors over the seeds.",
            plots.shifts(labels, curves, CURVES),
        )
    ]  # fmt: skip
    for name, label in labels.items():
        text = f"{label}: accuracy, NLL, ECE and entropy against the strength of each corruption."
        png = plots.shifts_of_one({kind: of_kind[name] for kind, of_kind in curves.items()}, CURVES)
        figures.append(Figure(f"shift-{name}.png", label, text, png))
    return figures
