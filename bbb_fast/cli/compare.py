"""``bbb-fast compare``: several ways to a classifier that knows how sure it is, under one budget."""

from __future__ import annotations

import argparse
from typing import Any

from ..experiments import compare
from ..experiments.data import DATASETS
from ..experiments.uncertainty import DERIVED
from . import classifiers, experiment, options

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
    judging = parser.add_argument_group("never-seen images")
    judging.add_argument(
        "--out-of-distribution", "--ood", dest="outside", metavar="SET", default="rotated",
        choices=(*DATASETS, *DERIVED),
        help=f"another data set, or the test images made strange: {', '.join(DERIVED)} (default rotated)",
    )  # fmt: skip
    judging.add_argument(
        "--ood-data-dir",
        dest="outside_dir",
        type=options.folder,
        metavar="FOLDER",
        help="its files, if elsewhere",
    )
    experiment.add_options(parser, "runs/compare")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Trains, judges, prints and writes; returns 0."""
    study, judging = classifiers.study_and_judging(args)
    return experiment.carry_out(
        args, classifiers.settings(study, judging), lambda running: compare.run(running, study, judging)
    )
