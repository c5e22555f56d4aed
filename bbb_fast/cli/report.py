"""``bbb-fast report``: one HTML page over finished runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..experiments import report
from . import options

__all__ = ["add_parser", "run"]


def add_parser(subparsers: Any) -> None:
    """Registers the command and its options."""
    parser = subparsers.add_parser(
        "report",
        help="one HTML page over finished runs",
        description=(
            "Find the finished runs in folders and those below them, and write their tables, figures, "
            "settings and versions as one HTML page that needs no network and no other file."
        ),
    )
    add = parser.add_argument
    add("folders", nargs="+", type=options.folder, metavar="FOLDER", help="where runs are")
    add(
        "--out", type=options.path, default=Path("report.html"), metavar="FILE",
        help="the page (default report.html); an earlier report of that name is replaced",
    )  # fmt: skip
    add("--title", default="Runs of bbb_fast", help='of the page (default "Runs of bbb_fast")')
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Writes the page; raises ValueError or OSError for what the user can put right."""
    sections, unfinished = report.find(args.folders)
    size = report.write(args.out, sections, args.title)
    for folder in unfinished:
        print(f"note: {folder} holds a run that is not finished, which is left out")
    print(f"wrote {args.out} ({len(sections)} run{'s' if len(sections) != 1 else ''}, {size / 1e6:.1f} MB)")
    return 0
