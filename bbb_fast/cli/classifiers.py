"""The options of the commands that train classifiers side by side, or judge those of an earlier run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ..experiments import classifiers, data
from ..experiments.checkpoint import MODELS
from ..experiments.classifiers import DEFAULTS, LEFT_OUT, METHODS, NETWORKS, SHARED, USUAL, Judging, Study
from ..experiments.options import OptionError, check_int
from ..experiments.training import LR_SCHEDULES, TrainConfig, parse_device
from ..experiments.uncertainty import DERIVED
from ..models.build import ACTIVATIONS
from . import options

__all__ = ["add_options", "add_outside", "settings", "study_and_judging"]


# Of those options of a training that have one of their own; the others go by --set.
_TYPES: dict[str, dict[str, Any]] = {
    "model": {"choices": MODELS, "help": "architecture of all networks"},
    "activation": {"choices": ACTIVATIONS, "help": "between layers"},
    "epochs": {"type": int, "metavar": "N", "help": "passes over the images of each training"},
    "batch_size": {"type": int, "metavar": "N", "help": "images a step"},
    "lr": {"type": float, "help": "learning rate of Adam"},
    "lr_schedule": {"choices": LR_SCHEDULES, "help": "of the learning rate"},
    "beta": {
        "type": options.number_or_name, "metavar": "NUMBER|Blundell|Soenderby|Standard",
        "help": "weight of the KL: 1 is the exact bound",
    },
    "prior_sigma": {"type": float, "metavar": "S", "help": "standard deviation of the prior"},
    "posterior_rho_initial": {
        "type": float, "nargs": 2, "metavar": ("M", "S"), "help": "mean and deviation of the first rho",
    },
    "train_samples": {"type": int, "metavar": "T", "help": "draws in a training step"},
    "valid_samples": {"type": int, "metavar": "T", "help": "draws in a validation"},
}  # fmt: skip
_OF_STUDY = ("dataset", "methods", "ensemble_sizes", "scaled", "seeds", "valid_size", "train_size")
# Of these, what may be another part of what an earlier run has trained.
_OF_JUDGING = ("methods", "ensemble_sizes", "scaled", "seeds")


def add_options(
    parser: argparse.ArgumentParser,
    *,
    source: bool = False,
    methods: Sequence[str] = USUAL,
    samples: int = 50,
) -> None:
    """The data, the networks, how they are trained and how they are asked.

    ``source``: whether the networks may be those of an earlier run. ``methods``, ``samples``: the defaults.
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
    usual = "all but laplace" if set(methods) == set(USUAL) else " ".join(methods)
    what.add_argument(
        "--methods", nargs="+", choices=METHODS, metavar="METHOD",
        help=f"some of {', '.join(METHODS)} (default {usual})",
    )  # fmt: skip
    parser.set_defaults(usual_methods=tuple(methods))
    what.add_argument(
        "--ensemble-sizes", nargs="+", type=int, metavar="M", help="members of the ensembles (default 5)"
    )
    what.add_argument(
        "--scaled", action="store_true", default=None, help="judge every method under temperature scaling too"
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
        "--samples", type=int, default=samples, metavar="T", help=f"draws of a prediction (default {samples})"
    )
    asked.add_argument(
        "--limit", type=int, metavar="N", help="at most N test images of each set, chosen by the seed"
    )
    asked.add_argument("--device", default="cpu", help="cpu, cuda or cuda:<index> (default cpu)")


def add_outside(parser: argparse.ArgumentParser, default: str | None, *, leave_out: bool = False) -> None:
    """What the networks have never seen: ``--ood SET``, or classes of their own set with ``leave_out``."""
    group = parser.add_argument_group("never-seen images")
    which = group.add_mutually_exclusive_group()
    if leave_out:
        which.add_argument(
            "--leave-out", nargs="+", metavar="CLASS",
            help="names of classes to train without, which are the never-seen images (default: the last)",
        )  # fmt: skip
    usual = "" if default is None else f" (default {default})"
    which.add_argument(
        "--out-of-distribution", "--ood", dest="outside", metavar="SET", default=default,
        choices=(*data.DATASETS, *DERIVED),
        help=("train on all classes; " if leave_out else "")
        + f"another data set, or the test images made strange: {', '.join(DERIVED)}{usual}",
    )  # fmt: skip
    group.add_argument(
        "--ood-data-dir", dest="outside_dir", type=options.folder, metavar="FOLDER",
        help="its files, if elsewhere",
    )  # fmt: skip


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
            return kind, name, options.number_or_name(value)
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
    outside_dir = getattr(args, "outside_dir", None)
    if outside == study.dataset:
        raise OptionError(
            "out_of_distribution", f"must be another set than {outside}, which the networks are trained on"
        )
    if args.download:
        for split in ("train", "test"):
            data.load(study.dataset, split, args.data_dir, download=True)
        if outside in data.DATASETS:
            data.load(outside, "test", outside_dir or args.data_dir, download=True)
    if hasattr(args, "leave_out") and outside is None:
        if source is None:
            classes = data.load(study.dataset, "test", args.data_dir).classes
            study = replace(study, leave_out=_labels(args.leave_out or classes[-1:], classes))
        elif not study.leave_out:
            raise OptionError(
                "out_of_distribution",
                f"must say which images are never seen: the networks in {source} know all classes of "
                f"{study.dataset}",
            )
        outside = LEFT_OUT
    judging = Judging(
        samples=args.samples,
        limit=args.limit,
        outside=outside,
        data_dir=None if args.data_dir is None else str(args.data_dir),
        outside_dir=None if outside_dir is None else str(outside_dir),
        device=args.device,
        trained=None if trained is None else str(trained),
    )
    # What is wrong with the data shows before any work.
    classifiers.load_sets(study, study.seed, judging)
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
    given.setdefault("methods", args.usual_methods)
    own: dict[str, Any]
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
    study, trained = classifiers.read_study(source, **own)
    if args.seed not in (0, study.seed):
        raise OptionError(
            "seed", f"cannot be given with --from: the networks in {source} begin at {study.seed}"
        )
    return study, trained
