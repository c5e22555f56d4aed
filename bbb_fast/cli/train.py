"""``bbb-fast train``: train a classifier, Bayesian or not, and judge it on the test set."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..experiments import data
from ..experiments.checkpoint import MODEL_LAYER_TYPES, MODELS, VARIANCE_DTYPES
from ..experiments.training import LAST, LR_SCHEDULES, TrainConfig, fit
from ..models.build import ACTIVATIONS
from . import options

__all__ = ["add_parser", "run"]


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default of every option that has one to tell."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def _number_or_name(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def add_parser(subparsers: Any) -> None:
    """Registers the command and its options; their defaults are those of ``TrainConfig``."""
    parser = subparsers.add_parser(
        "train",
        help="train a classifier and judge it on the test set",
        description=(
            "Train an image classifier and judge the best epoch's weights on the test set. The output "
            "folder receives last.pt, best.pt, metrics.json and curves.png. Started by torchrun, as "
            "`torchrun --nproc-per-node N -m bbb_fast train ...`, N processes share every step."
        ),
        formatter_class=_Help,
    )
    default = TrainConfig()

    where = parser.add_argument_group("data")
    where.add_argument("--dataset", choices=data.DATASETS, default=default.dataset, help="its name")
    where.add_argument("--data-dir", type=options.folder, help="folder with its files; digits needs none")
    where.add_argument("--download", action="store_true", help="fetch missing files into --data-dir")
    where.add_argument(
        "--valid-size", type=int, help="images held out of the training set (default: a tenth)"
    )
    where.add_argument(
        "--train-size", type=int, help="train on so many images (default: all that are not held out)"
    )

    model = parser.add_argument_group("model")
    model.add_argument("--model", choices=MODELS, default=default.model, help="architecture")
    model.add_argument(
        "--layer-type",
        choices=MODEL_LAYER_TYPES,
        default=default.layer_type,
        help="estimator of the Bayesian layers; or, of the point-estimate twin, last (Bayesian last layer), "
        "dropout (Monte Carlo dropout), concrete (dropout of learned rates), none (as it is)",
    )
    model.add_argument("--activation", choices=ACTIVATIONS, default=default.activation, help="between layers")
    model.add_argument(
        "--variance-dtype",
        choices=VARIANCE_DTYPES,
        default=default.variance_dtype,
        help="of the variance products under --layer-type lrt; bfloat16 is faster where the machine "
        "multiplies it faster",
    )
    model.add_argument(
        "--dropout",
        type=float,
        default=default.dropout,
        help="rate under --layer-type dropout, first rate under concrete",
    )
    model.add_argument("--prior-mu", type=float, default=default.prior_mu, help="mean of the prior")
    model.add_argument(
        "--prior-sigma", type=float, default=default.prior_sigma, help="standard deviation of the prior"
    )
    for name, of in (("mu", "means"), ("rho", "rho; sigma = softplus(rho)")):
        model.add_argument(
            f"--posterior-{name}-initial",
            type=float,
            nargs=2,
            metavar=("M", "S"),
            default=getattr(default, f"posterior_{name}_initial"),
            help=f"normal distribution (mean, deviation) of the posterior's first {of}",
        )

    how = parser.add_argument_group("training")
    how.add_argument("--epochs", type=int, default=default.epochs, help="passes over the images")
    how.add_argument("--batch-size", type=int, default=default.batch_size, help="images a step")
    for name, what in (("train", "a training step"), ("valid", "a validation"), ("test", "the test")):
        how.add_argument(
            f"--{name}-samples",
            type=int,
            default=getattr(default, f"{name}_samples"),
            help=f"draws of the weights for {what}",
        )
    how.add_argument(
        "--beta",
        type=_number_or_name,
        default=default.beta,
        metavar="NUMBER|Blundell|Soenderby|Standard",
        help="weight of the KL: a step minimizes mean NLL + beta * KL / N with N training images, so 1 "
        "is the exact ELBO, and less trusts the data more; or a schedule of that weight",
    )
    how.add_argument("--lr", type=float, default=default.lr, help="learning rate of Adam")
    how.add_argument(
        "--lr-schedule",
        choices=LR_SCHEDULES,
        default=default.lr_schedule,
        help="cosine: down to 0; plateau: halved when the validation NLL stalls",
    )
    how.add_argument(
        "--weight-decay",
        type=float,
        default=default.weight_decay,
        help="for --layer-type none and dropout only",
    )
    how.add_argument(
        "--adversarial",
        type=float,
        default=default.adversarial,
        help="train on images moved against the model too, each pixel by this part of the range",
    )
    how.add_argument("--seed", type=int, default=default.seed, help="the same seed gives the same run")
    how.add_argument("--device", default=default.device, help="cpu, cuda or cuda:<index>")
    how.add_argument("--threads", type=int, help="CPU threads of a process (default: PyTorch's choice)")

    output = parser.add_argument_group("output")
    output.add_argument(
        "--out", type=options.path, help="folder (default: runs/<dataset>-<model>-<layer-type>-seed<seed>)"
    )
    again = output.add_mutually_exclusive_group()
    again.add_argument(
        "--resume", action="store_true", help="continue the run in --out as if it had never stopped"
    )
    again.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    output.add_argument("--quiet", action="store_true", help="print the final scores only")


def run(args: argparse.Namespace) -> int:
    """Trains and prints the test scores; returns 0.

    Raises KeyboardInterrupt, with what to do next where there is something to resume.
    """
    given = {field.name: getattr(args, field.name) for field in fields(TrainConfig)}
    pairs = {key: tuple(value) for key, value in given.items() if isinstance(value, list)}
    config = TrainConfig(**{**given, **pairs})
    config.validate(args.launch.size)  # before any download
    out = args.out or Path(f"runs/{config.dataset}-{config.model}-{config.layer_type}-seed{config.seed}")
    processes = args.launch.join(config.device)

    def load() -> list[data.ImageSet]:
        splits = ("train", "test")
        return [data.load(config.dataset, s, args.data_dir, download=args.download) for s in splits]

    # Two downloads at once would be in each other's way; the second finds the files of the first.
    whole, test = processes.in_turn(load) if args.download else load()
    valid_size = len(whole) // 10 if config.valid_size is None else config.valid_size
    train, valid = data.split_validation(whole, valid_size, config.seed, config.train_size)
    how = {"overwrite": args.overwrite, "name": args.launch.run_name()}
    try:
        metrics = fit(config, train, valid, test, out, args.resume, not args.quiet, **how)
    except KeyboardInterrupt:
        if not (out / LAST).exists():
            raise
        raise KeyboardInterrupt(
            f"interrupted; {out} holds every completed epoch, and the same command with --resume continues "
            "from there"
        ) from None
    scores = metrics["test"]
    print(
        f"{config.dataset} test set: {len(test)} images, {scores['samples']} draws, weights of epoch "
        f"{metrics['best']['epoch']}"
    )
    for key, name in (("accuracy", "accuracy"), ("nll", "NLL"), ("brier", "Brier"), ("ece", "ECE")):
        print(f"  {name:8}  {scores[key]:.4f}")
    print(f"results in {out}")
    return 0
