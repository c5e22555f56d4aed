"""What the commands that run experiments have in common: options, the folder, and what is printed."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..experiments.document import Document
from ..experiments.tasks import Experiment, experiment
from . import options

__all__ = ["add_options", "carry_out"]


def add_options(parser: argparse.ArgumentParser, out: str) -> None:
    """The options of every experiment; ``out`` is the default folder."""
    group = parser.add_argument_group("run")
    group.add_argument("--seed", type=int, default=0, help="the same seed gives the same results (default 0)")
    group.add_argument(
        "--out",
        type=options.path,
        default=Path(out),
        metavar="FOLDER",
        help=f"where to write (default {out})",
    )
    again = group.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="do what is left of the run in --out")
    again.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    group.add_argument("--jobs", type=int, default=1, metavar="N", help="processes side by side (default 1)")
    group.add_argument(
        "--threads", type=int, metavar="N", help="CPU threads in all (default: PyTorch's choice)"
    )
    group.add_argument("--quiet", action="store_true", help="print the tables only")


def carry_out(
    args: argparse.Namespace, settings: Mapping[str, Any], run: Callable[[Experiment], Document]
) -> int:
    """Runs an experiment in the folder of the options, prints its tables, writes its files; returns 0."""
    with experiment(
        args.out, args.command, settings,
        jobs=args.jobs, threads=args.threads, resume=args.resume, overwrite=args.overwrite,
        progress=not args.quiet,
    ) as running:  # fmt: skip
        try:
            document = run(running)
            written = running.finish(document)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"interrupted; {args.out} holds every finished task, and the same command with --resume "
                "continues from there"
            ) from None
    for table in document.tables:
        print(f"\n{table.text()}")
    print()
    for note in document.notes:
        print(f"note: {note}")
    for path in written:
        print(f"wrote {path}")
    return 0
