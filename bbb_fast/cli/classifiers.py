"""The options of the commands that train classifiers side by side, or judge those of an earlier run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ..experiments import classifiers, data
from ..experiments.checkpoint import MODELS
from ..experiments.classifiers import DEFAULTS, LEFT_OUT, METHODS, NETWORKS, SHARED, Judging, Study
from ..experiments.options import OptionError, check_int
from ..experiments.training import LR_SCHEDULES, TrainConfig, parse_device
from ..models.build import ACTIVATIONS
from . import options

__all__ = ["add_options", "settings", "study_and_judging"]


def number_or_name(text: str) -> float | str:
    """Of an option that is a number, or names a schedule."""
    try:
        return float(text)
    except ValueError:
        return text


# Of those options of a training that have one of their own; the others go by --set.
_TYPES: dict[str, dict[str, Any]] = {
    "model": {"choices": MODELS, "help": "architecture of all networks"},
    "activation": {"choices": ACTIVATIONS, "help": "between layers"},
    "epochs": {"type": int, "metavar": "N", "help": "passes over the images of each training"},
    "batch_size": {"type": int, "metavar": "N", "help": "images a step"},
    "lr": {"type": float, "help": "learning rate of Adam"},
    "lr_schedule": {"choices": LR_SCHEDULES, "help": "of the learning rate"},
    "beta": {
        "type": number_or_name, "metavar": "NUMBER|Blundell|Soenderby|Standard",
        "help": "weight of the KL: 1 is the exact bound",
    },
    "prior_sigma": {"type": float, "metavar": "S", "help": "standard deviation of the prior"},
    "posterior_rho_initial": {
        "type": float, "nargs": 2, "metavar": ("M", "S"), "help": "mean and deviation of the first rho",
    },
    "train_samples": {"type": int, "metavar": "T", "help": "draws in a training step"},
    "valid_samples": {"type": int, "metavar": "T", "help": "draws in a validation"},
}  # fmt: skip
_OF_STUDY = ("dataset", "methods", "ensemble_sizes", "seeds", "valid_size", "train_size")


# Of these, what may be another part of what an earlier run has trained.
_OF_JUDGING = ("methods", "ensemble_sizes", "seeds")


def add_options(parser: argparse.ArgumentParser, *, source: bool = False) -> None:
    """The data, the networks, how they are trained and how they are asked.

    ``source``: whether the networks may be those of an earlier run.
    """
    given = parser.add_argument_group("data")
    # None: not given. What a run in --from says must not be contradicted.
    given.add_argument("--dataset", choices=data.DATASETS, help="its name (default digits)")
    given.add_argument(
        "--data-dir", type=options.folder, metavar="FOLDER", help="its files; digits needs none"
    )
    given.add_argument("--download", action="store_true", help="fetch missing files into --data-dir first")
    given.add_argument("--valid-size", type=int, metavar="N", help="images held out (default: a tenth)")
    given.add_argument(
        "--train-size", type=int, metavar="N", help="train on so many images (default: all others)"
    )
    what = parser.add_argument_group("methods")
    if source:
        what.add_argument(
            "--from", dest="source", type=options.folder, metavar="FOLDER",
            help="judge the networks that compare, ood or shift has trained there, in place of new ones",
        )  # fmt: skip
    what.add_argument(
        "--methods", nargs="+", choices=METHODS, metavar="METHOD",
        help=f"which (default all): {', '.join(METHODS)}",
    )  # fmt: skip
    what.add_argument(
        "--ensemble-sizes", nargs="+", type=int, metavar="M", help="members of the ensembles (default 5)"
    )
    what.add_argument(
        "--seeds", type=int, metavar="N", help="train everything N times, from --seed on (default 1)"
    )
    how = parser.add_argument_group("training, the same for every method")
    for name, settings in _TYPES.items():
        default = DEFAULTS[name]
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        how.add_argument(
            f"--{name.replace('_', '-')}", **{**settings, "help": f"{settings['help']} (default {shown})"}
        )
    how.add_argument(
        "--set", dest="changes", action="append", default=[], metavar="NETWORK.OPTION=VALUE",
        help="another option of `train`, or another value, for one kind of network "
        f"({', '.join(NETWORKS)}); may be repeated: --set mc-dropout.dropout=0.2",
    )  # fmt: skip
    asked = parser.add_argument_group("judging")
    asked.add_argument(
        "--samples", type=int, default=50, metavar="T", help="draws of a prediction (default 50)"
    )
    asked.add_argument(
        "--limit", type=int, metavar="N", help="at most N test images of each set, chosen by the seed"
    )
    asked.add_argument("--device", default="cpu", help="cpu, cuda or cuda:<index> (default cpu)")


def _change(text: str) -> tuple[str, str, Any]:
    """Network, option and value of --set."""
    where, equals, value = text.partition("=")
    kind, dot, name = where.partition(".")
    if not equals or not dot:
        raise OptionError("set", f"must be NETWORK.OPTION=VALUE, got {text!r}")
    name = name.replace("-", "_")
    allowed = [field.name for field in fields(TrainConfig) if field.name not in SHARED]
    if name not in allowed:
        raise OptionError("set", f"can change {', '.join(allowed)}, got {name!r}")
    default = getattr(TrainConfig, name)
    try:
        if name == "beta":
            return kind, name, number_or_name(value)
        if isinstance(default, tuple):
            return kind, name, [float(part) for part in value.split(",")]
        return kind, name, type(default)(value)
    except ValueError:
        kind_of = "two numbers with a comma" if isinstance(default, tuple) else type(default).__name__
        raise OptionError("set", f"must give {name} as {kind_of}, got {value!r}") from None


def study_and_judging(args: argparse.Namespace) -> tuple[Study, Judging]:
    """What is to be trained and how it is judged, checked, with the data at hand.

    ``args.leave_out`` and ``args.outside`` may be missing or None.
    """
    for name in ("samples", "limit"):
        if getattr(args, name) is not None:
            check_int(name, getattr(args, name))
    parse_device(args.device)
    source, outside = getattr(args, "source", None), getattr(args, "outside", None)
    study, trained = (_new(args), None) if source is None else _earlier(args, source)
    # All data are read here, so that what is missing shows before the work; the workers read them again.
    _, test = (
        data.load(study.dataset, split, args.data_dir, download=args.download) for split in ("train", "test")
    )
    if outside == study.dataset:
        raise OptionError(
            "out_of_distribution", f"must be another set than {outside}, which is what is known"
        )
    outside_dir = getattr(args, "outside_dir", None)
    if outside in data.DATASETS:
        other = data.load(outside, "test", outside_dir or args.data_dir, download=args.download)
        if other.images.shape[1] != test.images.shape[1]:
            raise OptionError(
                "out_of_distribution",
                f"must have images of {test.images.shape[1]} channel(s), as {study.dataset}: {outside} has "
                f"{other.images.shape[1]}",
            )
    if hasattr(args, "leave_out") and outside is None:
        if source is None:
            names = args.leave_out or [test.classes[-1]]
            study = replace(study, leave_out=_labels(names, test.classes))
        elif not study.leave_out:
            raise OptionError(
                "out_of_distribution",
                f"must say which images are never seen: the networks in {source} know all classes of {study.dataset}",
            )
        outside = LEFT_OUT
    classifiers.leave_out(test, study.leave_out)
    judging = Judging(
        samples=args.samples,
        limit=args.limit,
        outside=outside,
        data_dir=None if args.data_dir is None else str(args.data_dir),
        outside_dir=None if outside_dir is None else str(outside_dir),
        device=args.device,
        trained=None if trained is None else str(trained),
    )
    return study, judging


def _labels(names: Sequence[str], classes: Sequence[str]) -> tuple[int, ...]:
    for name in names:
        if name not in classes:
            raise OptionError("leave_out", f"must name some of {', '.join(classes)}, got {name!r}")
    return tuple(sorted({classes.index(name) for name in names}))


def settings(study: Study, judging: Judging) -> dict[str, Any]:
    """What the results of a run depend on."""
    return {"seed": study.seed, "study": study.to_dict(), "judging": judging.settings()}


def _new(args: argparse.Namespace) -> Study:
    given = {name: getattr(args, name) for name in _OF_STUDY if getattr(args, name) is not None}
    own = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    options = {name: getattr(args, name) for name in _TYPES if getattr(args, name) is not None}
    overrides: dict[str, dict[str, Any]] = {}
    for kind, name, value in map(_change, args.changes):
        overrides.setdefault(kind, {})[name] = value
    study = Study(seed=args.seed, options=options, overrides=overrides, **own)
    study.validate()
    return study


def _earlier(args: argparse.Namespace, source: Path) -> tuple[Study, Path]:
    """The study of a finished run, or a part of it."""
    for name in (*_OF_STUDY, *_TYPES, "changes", "leave_out"):
        if getattr(args, name, None) and name not in _OF_JUDGING:
            option = "set" if name == "changes" else name
            raise OptionError(option, f"cannot be given with --from: {source} is trained already")
    given = {name: getattr(args, name) for name in _OF_JUDGING if getattr(args, name) is not None}
    own = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return classifiers.read_study(source, **own)
