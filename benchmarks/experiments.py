"""The experiments of docs/ on real data: what a run of the command line leaves in benchmarks/results.

    python benchmarks/experiments.py NAME ... --data-dir DIR [--jobs N] [--threads N] [--runs FOLDER]
        [--set OPTION=VALUE ...]

DIR holds the files of the data sets. Every experiment is one command of RECIPES, run in a folder of FOLDER;
what is there already is not done again, so that the same command goes on where it was interrupted. Its
document goes to benchmarks/results/NAME.json, with the machine and the commit, and a figure to
docs/figures/NAME.png; `readme.py` puts the tables into the documents. A change, as of `--set epochs=100` or
`--set device=cuda`, is part of the command and of the settings in the file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from harness import RESULTS, SCRATCH, provenance, write_json
from uci import SETS, beside_published

from bbb_fast.cli import main as bbb_fast
from bbb_fast.experiments.document import Document, read

FIGURES = Path(__file__).parent.parent / "docs" / "figures"

MNIST = ("--dataset", "mnist", "--batch-size", "128", "--valid-size", "2000", "--seeds", "3")
COMPARED = ("compare", *MNIST, "--ood", "notmnist", "--samples", "100")
VARIANCE = (*COMPARED, "--epochs", "6", "--seeds", "5", "--methods", "lrt")
ROTATED = ("shift", "--corruptions", "rotation", "--samples", "50", "--limit", "2000")
# LRT with a larger weight of the KL than everywhere else; 1 is the exact bound.
ROTATED_LRT = (*ROTATED, *MNIST, "--methods", "lrt", "--epochs", "15", "--beta")


class Recipe(NamedTuple):
    """``command``: of the command line, without data, jobs and folders. ``source``: whose networks it judges.
    ``figure``: which of its figures the documents show. ``finish``: what is made of its document."""

    command: tuple[str, ...]
    source: str | None = None
    figure: str | None = None
    finish: Callable[[Document], Document] = lambda document: document


RECIPES: dict[str, Recipe] = {
    "compare-mnist": Recipe(
        (
            *COMPARED, "--epochs", "30", "--ensemble-sizes", "5", "10",
            "--set", "mc-dropout.model=caffe-lenet", "--set", "mc-dropout.dropout=0.5",
            "--set", "concrete-dropout.beta=1",
        ),
        figure="reliability.png",
    ),
    # The two tables of docs/mnist.md.
    "mnist": Recipe((*COMPARED, "--epochs", "15", "--methods", "lrt", "bbb")),
    "variance-float32": Recipe(VARIANCE),
    "variance-bfloat16": Recipe((*VARIANCE, "--set", "lrt.variance_dtype=bfloat16")),
    "shift-mnist": Recipe(ROTATED, "compare-mnist", "shift.png"),
    "shift-mnist-beta1": Recipe((*ROTATED_LRT, "1")),
    "shift-mnist-beta2": Recipe((*ROTATED_LRT, "2")),
    "ood-cifar10": Recipe(
        (
            "ood", "--dataset", "cifar10", "--model", "smallcnn", "--leave-out", "truck", "--batch-size",
            "128", "--valid-size", "2000", "--epochs", "8", "--samples", "50", "--methods", "deterministic",
            "ensemble", "mc-dropout", "lrt",
        ),
        figure="entropy.png",
    ),
    "active-mnist": Recipe(
        ("active", "--dataset", "mnist", "--seed", "10", "--seeds", "5"), figure="active.png"
    ),
    "uci-regression": Recipe(
        (
            "regress", "--sets", *SETS, "--methods", "lrt", "ensemble", "mc-dropout", "--steps", "10000",
            "--samples", "1000",
        ),
        finish=beside_published,
    ),
}  # fmt: skip


def kept(document: Document) -> dict[str, Any]:
    """What a result file says of a run: no folders of a machine."""
    fields = asdict(document)
    if "judging" in fields["settings"]:
        del fields["settings"]["judging"]["trained"]
    del fields["figures"]
    return {"provenance": provenance(), **fields}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="+", choices=RECIPES, metavar="NAME", help=", ".join(RECIPES))
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--jobs", default="1")
    parser.add_argument("--threads", default="1")
    parser.add_argument("--runs", type=Path, default=SCRATCH / "experiments")
    parser.add_argument("--set", action="append", default=[], metavar="OPTION=VALUE", dest="changes")
    args = parser.parse_args()
    for name in args.names:
        recipe, run = RECIPES[name], args.runs / name
        command = [
            *recipe.command, "--data-dir", args.data_dir, "--jobs", args.jobs, "--threads", args.threads,
            "--out", str(run),
        ]  # fmt: skip
        command += [] if recipe.source is None else ["--from", str(args.runs / recipe.source)]
        for change in args.changes:
            option, _, value = change.partition("=")
            command += [f"--{option}", value]
        command += ["--resume"] if (run / "settings.json").exists() else []
        if bbb_fast(command) != 0:
            return 1
        document = recipe.finish(read(run / f"{recipe.command[0]}.json"))
        write_json(RESULTS / f"{name}.json", kept(document))
        for figure in document.figures:
            if figure.file == recipe.figure:
                (FIGURES / f"{name}.png").write_bytes(figure.png)
    return 0


if __name__ == "__main__":
    sys.exit(main())
