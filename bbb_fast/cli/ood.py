"""``bbb-fast ood``: do classifiers notice classes they were not trained on, or another set of images?"""

from __future__ import annotations

import argparse
from typing import Any

from ..experiments import ood
from ..experiments.data import DATASETS
from ..experiments.uncertainty import DERIVED
from . import classifiers, experiment, options

__all__ = ["add_parser", "run"]


def add_parser(subparsers: Any) -> None:
    """Registers the command and its options."""
    parser = subparsers.add_parser(
        "ood",
        help="train classifiers without some classes, and see whether they notice those",
        description=(
            "Train classifiers in several ways without some of the classes, or take those of an earlier run, and "
            "compare what they say of known and of never-seen images: entropy, and how well each score tells the "
            "two apart. The output folder receives ood.json and a figure."
        ),
    )
    classifiers.add_options(parser, source=True)
    what = parser.add_argument_group("never-seen images")
    which = what.add_mutually_exclusive_group()
    which.add_argument(
        "--leave-out", nargs="+", metavar="CLASS",
        help="names of classes to train without, which are the never-seen images (default: the last)",
    )  # fmt: skip
    which.add_argument(
        "--out-of-distribution", "--ood", dest="outside", metavar="SET", choices=(*DATASETS, *DERIVED),
        help=f"train on all classes; another data set, or the test images made strange: {', '.join(DERIVED)}",
    )  # fmt: skip
    what.add_argument(
        "--ood-data-dir",
        dest="outside_dir",
        type=options.folder,
        metavar="FOLDER",
        help="its files, if elsewhere",
    )
    experiment.add_options(parser, "runs/ood")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Trains or takes, judges, prints and writes; returns 0."""
    study, judging = classifiers.study_and_judging(args)
    return experiment.carry_out(
        args, classifiers.settings(study, judging), lambda running: ood.run(running, study, judging)
    )
