"""The regression sets of the literature on Bayesian networks, 20 splits each, beside published numbers.

    python benchmarks/uci.py --data-dir DIR [--methods lrt ensemble mc-dropout] [--splits N] [--jobs N]
        [--runs FOLDER] [--out PATH]

DIR holds yacht, energy, bostonHousing, concrete and wine-quality-red. Runs `bbb-fast regress` once a method
by the protocol of docs/regression.md, each in a folder of FOLDER; what is there already is not done again, so
that the same command goes on where it was interrupted. `readme.py` puts the tables into docs/regression.md.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness import RESULTS, SCRATCH, provenance, write_json

from bbb_fast.cli import main as bbb_fast
from bbb_fast.experiments.document import Column, Document, Table, mean_and_error, read

SETS = ("yacht", "energy", "bostonHousing", "concrete", "wine-quality-red")
METHODS = ("lrt", "ensemble", "mc-dropout")
OPTIONS = ("--steps", "10000", "--samples", "1000")

# RMSE and log likelihood by set, in the order of SETS.
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


def judged(name: str, score: str, better: str, values: list[float], published: float) -> dict[str, Any]:
    """Mean and standard error over the splits, and how many errors it is worse than what is published."""
    mean, error = mean_and_error(values)
    worse = mean - published if better == "low" else published - mean
    return {
        "set": name, "score": score, "mean": mean, "error": error, "published": published,
        "worse_by_errors": None if not error else worse / error,
    }  # fmt: skip


def compare(method: str, document: Document) -> list[dict[str, Any]]:
    """Both scores of every set of a finished run."""
    _, rmse, likelihood = PUBLISHED[method]
    rows = []
    for name, of_set in document.results.items():
        place = SETS.index(name)
        for score, better, published in (("rmse", "low", rmse), ("log_likelihood", "high", likelihood)):
            values = [split[score] for split in of_set[method]]
            rows.append(judged(name, score, better, values, published[place]))
    return rows


def table(method: str, rows: list[dict[str, Any]], document: Document) -> Table:
    """The table of docs/regression.md for one method."""
    source = PUBLISHED[method][0].partition(" (")[0]
    head = [Column(method), *(Column(name) for name in ("RMSE", source, "log likelihood", source))]
    head += [Column("in 95 %", ".1f"), Column("seconds a split", ".1f")]
    lines = []
    for name, of_set in document.results.items():
        cells: list[Any] = [name]
        for row in rows:
            if row["set"] == name:
                error = "" if row["error"] is None else f" ± {row['error']:.2f}"
                cells += [f"{row['mean']:.2f}{error}", f"{row['published']:.2f}"]
        splits = of_set[method]
        cells.append(100 * sum(split["coverage"] for split in splits) / len(splits))
        cells.append(sum(split["train_seconds"] + split["predict_seconds"] for split in splits) / len(splits))
        lines.append(cells)
    return Table(f"{method}, beside {PUBLISHED[method][0]}", head, lines)


def without(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    """The other fields: a result file has no paths of this machine, and no prediction of each row."""
    return {key: value for key, value in fields.items() if key not in names}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--splits", type=int)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=SCRATCH / "uci")
    parser.add_argument("--out", type=Path, default=RESULTS / "uci-regression.json")
    args = parser.parse_args()
    found: dict[str, Any] = {}
    tables = []
    for method in args.methods:
        run = args.runs / method
        command = [
            "regress", "--data-dir", args.data_dir, "--sets", *SETS, "--methods", method, *OPTIONS,
            "--jobs", str(args.jobs), "--threads", str(args.threads), "--out", str(run),
        ]  # fmt: skip
        command += [] if args.splits is None else ["--splits", str(args.splits)]
        command += ["--resume"] if (run / "settings.json").exists() else []
        if bbb_fast(command) != 0:
            return 1
        document = read(run / "regress.json")
        rows = compare(method, document)
        tables.append(table(method, rows, document))
        splits = {
            name: [without(split, "predictions", "observed") for split in of_set[method]]
            for name, of_set in document.results.items()
        }
        found[method] = {
            "published": PUBLISHED[method][0],
            "compared": rows,
            "splits": splits,
            "settings": {
                **document.settings,
                "sets": {
                    name: without(of_set, "source") for name, of_set in document.settings["sets"].items()
                },
            },
            "build": document.build,
            "seconds": document.seconds,
        }
    write_json(args.out, {"provenance": provenance(), "tables": list(map(asdict, tables)), "methods": found})
    print("\n\n".join(table.text() for table in tables))
    print(f"\nwrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
