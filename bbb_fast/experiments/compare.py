"""Several ways to a classifier side by side, under one budget: the words of the compare command."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import metrics
from .classifiers import Study, ask, load_sets, open_entry
from .document import Cell, Column, Document, Figure, Table, mean_and_error
from .judged import SCORES
from .tasks import Experiment, Task

__all__ = ["run"]

_BINS = 15
# Of the tables: name, format, factor and which is better, by the key in a task's result.
_QUALITY: dict[str, tuple[str, str, float, str]] = {
    "accuracy": ("accuracy %", ".2f", 100.0, "high"),
    "nll": ("NLL", ".4f", 1.0, "low"),
    "brier": ("Brier", ".4f", 1.0, "low"),
    "ece": ("ECE", ".4f", 1.0, "low"),
}


def run(
    running: Experiment,
    study: Study,
    *,
    outside: str,
    samples: int,
    limit: int | None = None,
    data_dir: str | None = None,
    outside_dir: str | None = None,
    device: str = "cpu",
) -> Document:
    """Trains the networks of a study, judges its entries, and says what came out.

    Args: ``outside``: the never-seen images (:func:`classifiers.load_sets`); ``samples``: draws of what
    answers at random; ``limit``: at most so many test images of each set.
    """
    trained = running.run(study.tasks(data_dir, device), "training")
    how = {
        "study": study.to_dict(), "outside": outside, "samples": samples, "limit": limit,
        "data_dir": data_dir, "outside_dir": outside_dir, "device": device,
    }  # fmt: skip
    entries, seeds = study.entries(), study.all_seeds()
    names = {(entry.name, seed): f"judge-{entry.name}-seed{seed}" for entry in entries for seed in seeds}
    found = running.run(
        [
            Task(name, judge_entry, {"entry": entry, "seed": seed, **how})
            for (entry, seed), name in names.items()
        ],
        "judging",
    )
    results = {
        entry.name: {
            "label": entry.label,
            "networks": [[n.task for n in entry.networks(seed)] for seed in seeds],
            "seeds": [
                {
                    **found[names[entry.name, seed]],
                    "train_seconds": sum(trained[n.task]["train_seconds"] for n in entry.networks(seed)),
                    "parameters": sum(trained[n.task]["parameters"] for n in entry.networks(seed)),
                }
                for seed in seeds
            ],
        }
        for entry in entries
    }
    figures, notes = _figures(results)
    return Document(
        "compare",
        f"{len(entries)} ways to a classifier of {study.dataset}, {_options_of(study)}",
        running.settings,
        _tables(results),
        figures,
        {"trained": trained, "entries": results},
        [*_notes(study, outside, samples), *notes],
        running.seconds,
    )


def judge_entry(
    folder: Path, entry: str, seed: int, study: Mapping[str, Any], outside: str, samples: int,
    limit: int | None, data_dir: str | None, outside_dir: str | None, device: str,
) -> dict[str, Any]:  # fmt: skip
    """The task that judges one entry of one seed."""
    plan = Study.from_dict(study)
    own = next(e for e in plan.entries() if e.name == entry)
    sets = load_sets(plan, seed, data_dir=data_dir, outside=outside, outside_dir=outside_dir, limit=limit)
    assert sets.outside is not None
    opened = open_entry(folder.parent, own, seed, samples, sets.valid, device)
    start = time.perf_counter()
    known = ask(opened, sets.test, seed, device)
    seconds = time.perf_counter() - start
    other = ask(opened, sets.outside, seed, device)
    diagram = metrics.reliability(known.probs, sets.test.labels, _BINS)
    return {
        **metrics.classification_report(known.probs, sets.test.labels),
        "entropy": float(known.predictive_entropy.mean()),
        "outside_entropy": float(other.predictive_entropy.mean()),
        "detection": {
            score: metrics.ood_report(getattr(known, score), getattr(other, score)) for score in SCORES
        },
        "reliability": {name: value.tolist() for name, value in diagram._asdict().items()},
        "images": [len(known), len(other)],
        "draws": opened.draws,
        "temperature": opened.temperature,
        "predict_seconds": seconds,
    }


def _options_of(study: Study) -> str:
    config = study.config(study.networks()[0])
    return f"{config.model}, {config.epochs} epochs, {study.seeds} seed{'s' if study.seeds > 1 else ''}"


def _notes(study: Study, outside: str, samples: int) -> list[str]:
    notes = [
        f"Entries that answer at random are asked {samples} times, an ensemble once for each member.",
        "The best score of an AUROC is the best one on these images: a bound, not a choice made beforehand.",
        "Training seconds are those of the training steps of all networks of an entry, one after the other; "
        "prediction seconds are for the known test images.",
    ]
    if study.seeds > 1:
        notes.append(f"± is the standard error of the mean over {study.seeds} seeds.")
    return notes


def _cells(values: Sequence[float], factor: float, errors: bool) -> list[Cell]:
    mean, error = mean_and_error([factor * value for value in values])
    return [mean, error] if errors else [mean]


def _columns(name: str, form: str, better: Any, errors: bool) -> list[Column]:
    return [Column(name, form, better), *([Column(f"± {name}", form)] if errors else [])]


def _tables(results: Mapping[str, Any]) -> list[Table]:
    errors = any(len(entry["seeds"]) > 1 for entry in results.values())
    columns = [Column("method")]
    for name, form, _, better in _QUALITY.values():
        columns += _columns(name, form, better, errors)
    columns += _columns("AUROC, entropy", ".4f", "high", errors)
    columns += _columns("AUROC, mutual information", ".4f", "high", errors)
    columns += [*_columns("AUROC, best", ".4f", "high", errors), Column("best score")]
    columns += [Column("training s", ".1f", "low"), Column("prediction s", ".1f", "low")]
    rows = []
    for entry in results.values():
        of_seeds = entry["seeds"]
        row: list[Cell] = [entry["label"]]
        for key, (_, _, factor, _) in _QUALITY.items():
            row += _cells([one[key] for one in of_seeds], factor, errors)
        by_score = {score: [one["detection"][score]["auroc"] for one in of_seeds] for score in SCORES}
        best = max(by_score, key=lambda score: sum(by_score[score]))
        for score in ("predictive_entropy", "mutual_information", best):
            row += _cells(by_score[score], 1.0, errors)
        row.append(SCORES[best])
        for key in ("train_seconds", "predict_seconds"):
            row += _cells([one[key] for one in of_seeds], 1.0, False)
        rows.append(row)
    return [Table("Methods under one budget", columns, rows)]


def _figures(results: Mapping[str, Any]) -> tuple[list[Figure], list[str]]:
    try:
        from . import classifier_plots
    except ImportError as error:
        return [], [f"No figures: matplotlib is missing ({error}); pip install bbb_fast[experiments]."]
    return [
        Figure(
            "scores.png", "Scores",
            "Accuracy, NLL, ECE and AUROC of every method, with standard errors over the seeds.",
            classifier_plots.scores(results),
        ),
        Figure(
            "reliability.png", "Reliability",
            "How often predictions of each confidence are right; on the diagonal a method is as sure as it is right.",
            classifier_plots.reliability(results),
        ),
    ], []  # fmt: skip
