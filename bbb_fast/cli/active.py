"""``bbb-fast active``: does a model know which images are worth a label?"""

from __future__ import annotations

import argparse
from typing import Any

from ..experiments import active, data
from . import experiment, options

__all__ = ["add_parser", "run"]

# On the embedded images everything is smaller: all of it takes a minute or two.
_DEFAULTS = {"labels": 400, "seeds": 5, "pool": 2000, "steps": 160}
_DIGITS = {"labels": 150, "seeds": 3, "pool": 500, "steps": 40}


def _default(name: str) -> str:
    return f"(default {_DEFAULTS[name]}; on digits {_DIGITS[name]})"


def _power(text: str) -> float | None:
    return None if text == "highest" else float(text)


def add_parser(subparsers: Any) -> None:
    """Registers the command and its options."""
    parser = subparsers.add_parser(
        "active",
        help="active learning: which images are worth a label",
        description=(
            "Label a few images, train, let the model choose the next ones to label, and again: by mutual "
            "information (BALD), entropy or variation ratio, against images drawn at random. The output "
            "folder receives active.json and active.png."
        ),
    )
    where = parser.add_argument_group("data")
    where.add_argument("--dataset", choices=data.DATASETS, default="digits", help="its name (default digits)")
    where.add_argument(
        "--data-dir", type=options.folder, metavar="FOLDER", help="where its files are; digits needs none"
    )
    where.add_argument("--download", action="store_true", help="fetch missing files into --data-dir")
    where.add_argument(
        "--valid-size", type=int, metavar="N", help="training images that are held out (default: a tenth)"
    )
    where.add_argument(
        "--judge", choices=active.JUDGED_ON, default="test",
        help="judge on the test images (default) or on those held out, as options should be chosen",
    )  # fmt: skip
    how = parser.add_argument_group("acquisition")
    how.add_argument(
        "--acquisitions", nargs="+", choices=active.ACQUISITIONS, default=list(active.ACQUISITIONS),
        metavar="NAME",
        help=f"which to compare (default: {', '.join(active.ACQUISITIONS)})",
    )  # fmt: skip
    how.add_argument(
        "--seeds", type=int, metavar="N", help=f"runs of each, from --seed on {_default('seeds')}"
    )
    how.add_argument(
        "--start",
        type=int,
        default=20,
        metavar="N",
        help="labels at first, alike for all classes (default 20)",
    )
    how.add_argument("--step", type=int, default=10, metavar="N", help="labels more a round (default 10)")
    how.add_argument("--labels", type=int, metavar="N", help=f"labels at last {_default('labels')}")
    how.add_argument(
        "--pool", type=int, metavar="N", help=f"images to choose from in a round {_default('pool')}"
    )
    how.add_argument(
        "--power", type=_power, default=2.0, metavar="B|highest",
        help="draw images with probabilities that go with score^B (default 2), or take the highest scores",
    )  # fmt: skip
    how.add_argument("--draws", type=int, default=100, metavar="T", help="draws of the model (default 100)")
    how.add_argument(
        "--accuracies", type=float, nargs="+", default=[0.8, 0.85, 0.9, 0.92, 0.95], metavar="A",
        help="say how many labels these take (default 0.8 0.85 0.9 0.92 0.95)",
    )  # fmt: skip
    model = parser.add_argument_group("model, a LeNet")
    model.add_argument(
        "--method",
        choices=active.METHODS,
        default="mc-dropout",
        help="what makes it doubt (default mc-dropout)",
    )
    model.add_argument(
        "--first-steps", type=int, default=200, metavar="N",
        help="of the optimizer in the first round (default 200)",
    )  # fmt: skip
    model.add_argument(
        "--steps", type=int, metavar="N", help=f"in every later one, going on {_default('steps')}"
    )
    model.add_argument(
        "--from-scratch", action="store_true",
        help="train a new network in every round, with --first-steps",
    )  # fmt: skip
    model.add_argument("--batch-size", type=int, default=64, metavar="N", help="images a step (default 64)")
    model.add_argument(
        "--lr", type=float, default=2e-3, help="of Adam, falling to 0 in every round (default 0.002)"
    )
    model.add_argument("--kl-weight", type=float, default=0.03, help="of lrt, bbb and flipout (default 0.03)")
    model.add_argument("--dropout", type=float, default=0.5, metavar="P", help="of mc-dropout (default 0.5)")
    model.add_argument("--members", type=int, default=5, metavar="M", help="of an ensemble (default 5)")
    experiment.add_options(parser, "runs/active")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command; raises ValueError or OSError for what the user can put right."""
    sized = _DIGITS if args.dataset == "digits" else _DEFAULTS
    settings = {
        name: sized[name] if name in sized and getattr(args, name) is None else getattr(args, name)
        for name in (
            "dataset", "valid_size", "judge", "acquisitions", "seeds", "start", "step", "labels", "pool",
            "power", "draws", "accuracies", "method", "first_steps", "steps", "from_scratch", "batch_size",
            "lr", "kl_weight", "dropout", "members", "seed",
        )
    }  # fmt: skip
    active.check(settings)
    data_dir = None if args.data_dir is None else str(args.data_dir)
    return experiment.carry_out(args, settings, lambda running: active.run(running, data_dir, args.download))
