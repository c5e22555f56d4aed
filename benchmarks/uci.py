"""The regression sets of the literature on Bayesian networks, beside published numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from bbb_fast.experiments.document import Cell, Column, Document, Table, mean_and_error

SETS = ("yacht", "energy", "bostonHousing", "concrete", "wine-quality-red")
NUMBERS_OF_ROWS = ("predictions", "observed")
# By method: whose numbers, and RMSE and log likelihood in the order of SETS.
PUBLISHED: dict[str, tuple[str, tuple[float, ...], tuple[float, ...]]] = {
    "lrt": (
        "PBP (Hernández-Lobato and Adams 2015)",
        (1.02, 1.80, 3.01, 5.67, 0.64),
        (-1.63, -2.04, -2.57, -3.16, -0.97),
    ),
    "ensemble": (
        "ensemble of 5 (Lakshminarayanan et al. 2017)",
        (1.58, 2.09, 3.28, 6.03, 0.64),
        (-1.18, -1.38, -2.41, -3.06, -0.94),
    ),
    "mc-dropout": (
        "MC dropout (Gal and Ghahramani 2016, corrected)",
        (0.67, 0.54, 2.90, 4.82, 0.62),
        (-1.25, -1.21, -2.40, -2.93, -0.93),
    ),
}


def judged(name: str, score: str, values: list[float], published: float) -> dict[str, Any]:
    """Mean and standard error over the splits, and how many errors it is worse than what is published."""
    mean, error = mean_and_error(values)
    worse = mean - published if score == "rmse" else published - mean
    return {
        "set": name, "score": score, "mean": mean, "error": error, "published": published,
        "worse_by_errors": None if not error else worse / error,
    }  # fmt: skip


def beside_published(document: Document) -> Document:
    """A run of ``regress`` with a table for each method, without the predictions of each row."""
    methods = document.settings["methods"]
    compared = {
        method: [
            judged(name, score, [split[score] for split in of_set[method]], numbers[SETS.index(name)])
            for name, of_set in document.results.items()
            for score, numbers in zip(("rmse", "log_likelihood"), PUBLISHED[method][1:], strict=True)
        ]
        for method in methods
    }
    splits = {
        name: {
            method: [{k: v for k, v in split.items() if k not in NUMBERS_OF_ROWS} for split in of_set[method]]
            for method in methods
        }
        for name, of_set in document.results.items()
    }
    sets = {name: {**of_set, "source": None} for name, of_set in document.settings["sets"].items()}
    return replace(
        document,
        settings={**document.settings, "sets": sets},
        tables=[_table(method, compared[method], splits) for method in methods],
        results={"compared": compared, "splits": splits},
    )


def _table(method: str, rows: list[dict[str, Any]], splits: dict[str, Any]) -> Table:
    source = PUBLISHED[method][0].partition(" (")[0]
    head = [Column(method), *(Column(name) for name in ("RMSE", source, "log likelihood", source))]
    head += [Column("in 95 %", ".1f"), Column("seconds a split", ".1f")]
    lines = []
    for name in splits:
        cells: list[Cell] = [name]
        for row in (row for row in rows if row["set"] == name):
            error = "" if row["error"] is None else f" ± {row['error']:.2f}"
            cells += [f"{row['mean']:.2f}{error}", f"{row['published']:.2f}"]
        found = splits[name][method]
        cells.append(100 * sum(split["coverage"] for split in found) / len(found))
        cells.append(sum(split["train_seconds"] + split["predict_seconds"] for split in found) / len(found))
        lines.append(cells)
    return Table(f"{method}, beside {PUBLISHED[method][0]}", head, lines)
