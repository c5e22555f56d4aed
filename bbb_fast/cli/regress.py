"""``bbb-fast regress``: methods side by side on a table of numbers, judged with their uncertainty."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from ..experiments.regress import regress, settings, sources
from ..experiments.regression import METHODS, NOISES, Training
from . import experiment, options

__all__ = ["add_parser", "run"]


def add_parser(subparsers: Any) -> None:
    """Registers the command and its options."""
    parser = subparsers.add_parser(
        "regress",
        help="compare methods on a regression: error, likelihood, calibration",
        description=(
            "Train small networks by several methods on a table of numbers, and judge the predictions and "
            "their uncertainty on test rows, over several splits. Without --data and --data-dir: the "
            "diabetes set of scikit-learn."
        ),
    )
    own = Training()
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data", type=options.path, metavar="FILE",
        help="a text table: one row a line, cells between commas, semicolons, tabs or blanks",
    )  # fmt: skip
    group.add_argument(
        "--target", metavar="COL", help="of --data: the target column's name, or its number from 1 (or -1) on"
    )
    group.add_argument(
        "--drop", nargs="+", default=[], metavar="COL", help="columns to leave out, told likewise"
    )
    group.add_argument(
        "--data-dir", type=options.folder, metavar="FOLDER",
        help="a folder of sets that have data.txt and their own splits (the layout of the UCI sets)",
    )  # fmt: skip
    group.add_argument("--sets", nargs="+", metavar="NAME", help="of --data-dir: which (default: all)")
    group.add_argument(
        "--splits", type=int, metavar="N", help="how many (default: the set's own, or 5 random ones)"
    )
    group = parser.add_argument_group("methods")
    group.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME",
        help=f"which (default: all): {', '.join(METHODS)}",
    )  # fmt: skip
    add_network_options(group, own, NOISES)
    group.add_argument(
        "--samples", type=int, default=200, metavar="T", help="draws of a prediction (default 200)"
    )
    experiment.add_options(parser, "runs/regress")
    parser.set_defaults(run=run)


def add_network_options(group: Any, own: Training, noises: Sequence[str]) -> None:
    """The options of the networks; their defaults are those of ``own``, but for the first of ``noises``."""
    group.add_argument(
        "--hidden", type=int, nargs="+", default=list(own.hidden), metavar="UNITS",
        help=f"units of each hidden layer (default {' '.join(map(str, own.hidden))})",
    )  # fmt: skip
    group.add_argument(
        "--noise", choices=noises, default=noises[0],
        help="of the targets: one number for all inputs, or one for each"
        + (", or as the method's paper has it (default)" if "own" in noises else f" (default {noises[0]})"),
    )  # fmt: skip
    group.add_argument(
        "--steps", type=int, default=own.steps, metavar="N", help=f"of training (default {own.steps})"
    )
    group.add_argument(
        "--batch-size",
        type=int,
        default=own.batch_size,
        metavar="N",
        help=f"rows a step (default {own.batch_size})",
    )
    group.add_argument(
        "--members",
        type=int,
        default=own.members,
        metavar="M",
        help=f"of an ensemble (default {own.members})",
    )


def run(args: argparse.Namespace) -> int:
    """Runs the command; raises ValueError or OSError for what the user can put right."""
    training = Training(tuple(args.hidden), args.noise, args.steps, args.batch_size, args.members)
    data_dir = None if args.data_dir is None else str(args.data_dir)
    data = None if args.data is None else str(args.data)
    where = sources(data, args.target, args.drop, data_dir, args.sets or [])
    told = settings(where, args.methods, args.splits, args.samples, args.seed, training)
    return experiment.carry_out(args, told, regress)
