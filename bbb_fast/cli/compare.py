"""``bbb-fast compare``: several ways to a classifier that knows how sure it is, under one budget."""

from __future__ import annotations

import argparse
from typing import Any

from ..experiments import compare
from . import classifiers, experiment

__all__ = ["add_parser", "run"]


def add_parser(subparsers: Any) -> None:
    """Registers the command and its options."""
    parser = subparsers.add_parser(
        "compare",
        help="train a classifier in several ways and compare them",
        description=(
            "Train the same network as a point estimate, an ensemble, with MC dropout, concrete dropout, a "
            "Bayesian last layer and Bayesian layers of every estimator, under one budget, and judge all of "
            "them: accuracy, NLL, Brier score, calibration, detection of never-seen images, time. The output "
            "folder receives compare.json and two figures."
        ),
    )
    classifiers.add_options(parser, source=True)
    classifiers.add_outside(parser, "rotated")
    experiment.add_options(parser, "runs/compare")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Trains, judges, prints and writes; returns 0."""
    study, judging = classifiers.study_and_judging(args)
    return experiment.carry_out(
        args, classifiers.settings(study, judging), lambda running: compare.run(running, study, judging)
    )
