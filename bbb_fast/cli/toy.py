"""``bbb-fast toy``: one input, a gap in the data: which uncertainty is which, method by method."""

from __future__ import annotations

import argparse
from typing import Any

from ..experiments.regression import METHODS, Training
from ..experiments.toy import settings, toy
from . import experiment
from .regress import add_network_options

__all__ = ["add_parser", "run"]

_DEFAULTS = Training(hidden=(20, 20), steps=5_000)


def add_parser(subparsers: Any) -> None:
    """Registers the command and its options."""
    parser = subparsers.add_parser(
        "toy",
        help="a regression of one input: epistemic uncertainty widens off the data, aleatoric does not",
        description=(
            "Train each method on points of a curve with a gap, and draw its mean with a band of its "
            "epistemic and one of all its uncertainty."
        ),
    )
    group = parser.add_argument_group("methods and data")
    group.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME",
        help=f"which (default: all): {', '.join(METHODS)}",
    )  # fmt: skip
    group.add_argument("--points", type=int, default=200, metavar="N", help="of the data (default 200)")
    add_network_options(group, _DEFAULTS, ("constant", "heteroscedastic"))
    group.add_argument(
        "--samples", type=int, default=200, metavar="T", help="draws of a prediction (default 200)"
    )
    experiment.add_options(parser, "runs/toy")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command; raises ValueError or OSError for what the user can put right."""
    training = Training(tuple(args.hidden), args.noise, args.steps, args.batch_size, args.members)
    told = settings(args.methods, args.points, args.noise, args.samples, args.seed, training)
    return experiment.carry_out(args, told, toy)
