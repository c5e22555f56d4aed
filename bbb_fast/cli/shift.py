"""``bbb-fast shift``: do classifiers get less sure as their images get harder?"""

from __future__ import annotations

import argparse
from typing import Any

from ..experiments import shift
from ..experiments.classifiers import check_names
from ..experiments.corruptions import CORRUPTIONS
from . import classifiers, experiment

__all__ = ["add_parser", "run"]

# Those that differ most: every one is asked at every strength of every corruption.
_METHODS = ("deterministic", "temperature", "ensemble", "mc-dropout", "bbb", "lrt")
_DEFAULT = ("rotation", "noise", "blur", "contrast", "pixelate")


def add_parser(subparsers: Any) -> None:
    """Registers the command and its options."""
    parser = subparsers.add_parser(
        "shift",
        help="judge classifiers under corruptions of rising strength",
        description=(
            "Train classifiers in several ways, or take those of an earlier run, and judge them on test "
            "images that are rotated, blurred, noisy and so on, more and more: accuracy, NLL, calibration "
            "and entropy against the strength. The output folder receives shift.json, a figure of all "
            "methods and one of each."
        ),
    )
    classifiers.add_options(parser, source=True, methods=_METHODS, samples=20)
    parser.add_argument_group("corruptions").add_argument(
        "--corruptions", nargs="+", choices=CORRUPTIONS, default=list(_DEFAULT), metavar="KIND",
        help=f"some of {', '.join(CORRUPTIONS)} (default {' '.join(_DEFAULT)})",
    )  # fmt: skip
    experiment.add_options(parser, "runs/shift")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Trains or takes, judges, prints and writes; returns 0."""
    check_names("corruptions", args.corruptions, CORRUPTIONS)
    study, judging = classifiers.study_and_judging(args)
    settings = {**classifiers.settings(study, judging), "corruptions": args.corruptions}
    return experiment.carry_out(
        args, settings, lambda running: shift.run(running, study, judging, args.corruptions)
    )
