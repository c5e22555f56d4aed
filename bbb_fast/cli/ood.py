"""``bbb-fast ood``: do classifiers notice classes they were not trained on, or another set of images?"""

from __future__ import annotations

import argparse
from typing import Any

from ..experiments import ood
from . import classifiers, experiment

__all__ = ["add_parser", "run"]


def add_parser(subparsers: Any) -> None:
    """Registers the command and its options."""
    parser = subparsers.add_parser(
        "ood",
        help="train classifiers without some classes, and see whether they notice those",
        description=(
            "Train classifiers in several ways without some of the classes, or take those of an earlier run, "
            "and compare what they say of known and of never-seen images: entropy, and how well each score "
            "tells the two apart. The output folder receives ood.json and a figure."
        ),
    )
    classifiers.add_options(parser, source=True)
    classifiers.add_outside(parser, None, leave_out=True)
    experiment.add_options(parser, "runs/ood")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Trains or takes, judges, prints and writes; returns 0."""
    study, judging = classifiers.study_and_judging(args)
    return experiment.carry_out(
        args, classifiers.settings(study, judging), lambda running: ood.run(running, study, judging)
    )
