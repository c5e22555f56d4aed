"""``bbb-fast vae``: train a variational autoencoder, judge it, and look at what it has learned."""

from __future__ import annotations

import argparse
from dataclasses import fields

from ..experiments import data, vae
from ..experiments.vae import DATASETS, PIXELS, VaeConfig
from . import experiment, options

__all__ = ["add_parser", "run"]


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command and its options; their defaults are those of ``VaeConfig``."""
    parser = subparsers.add_parser(
        "vae",
        help="train a variational autoencoder: its bound, its samples, a walk through its codes",
        description=(
            "Train a variational autoencoder on grey images, and judge it on test images by its bound and by "
            "importance sampling. The output folder receives vae.json, vae.png (reconstructions, samples, "
            "walks through the codes) and vae-curves.png. A run that was killed goes on from its last epoch."
        ),
    )
    default = VaeConfig()

    where = parser.add_argument_group("data")
    where.add_argument(
        "--dataset", choices=DATASETS, default=default.dataset, help=f"its name (default {default.dataset})"
    )
    where.add_argument(
        "--data-dir", type=options.folder, metavar="FOLDER", help="folder with its files; digits needs none"
    )
    where.add_argument("--download", action="store_true", help="fetch missing files into --data-dir")
    where.add_argument(
        "--pixels", choices=PIXELS, default=default.pixels,
        help="what makes them black and white: a coin that shows ink with the probability of the grey value, "
        f"or a threshold at one half (default {default.pixels})",
    )  # fmt: skip
    for name, what in (
        ("valid", "images held out to choose the epoch (default: a tenth)"),
        ("train", "images to train on (default: all that are not held out)"),
        ("test", "test images (default: all)"),
    ):
        where.add_argument(f"--{name}-size", type=int, metavar="N", help=what)

    model = parser.add_argument_group("model")
    model.add_argument(
        "--latent", type=int, default=default.latent, metavar="N",
        help=f"numbers a code (default {default.latent})",
    )  # fmt: skip
    model.add_argument(
        "--width", type=int, default=default.width, metavar="N",
        help=f"channels of the first convolution (default {default.width})",
    )  # fmt: skip

    how = parser.add_argument_group("training")
    how.add_argument(
        "--beta", type=float, nargs="+", default=list(default.beta), metavar="B",
        help="weight of the KL, one model for each (default 1: the bound itself)",
    )  # fmt: skip
    how.add_argument(
        "--epochs", type=int, metavar="N", help="passes over the images (default: 80 of digits, else 20)"
    )
    how.add_argument(
        "--batch-size", type=int, default=default.batch_size, metavar="N",
        help=f"images a step (default {default.batch_size})",
    )  # fmt: skip
    how.add_argument(
        "--lr", type=float, default=default.lr, help=f"learning rate of Adam (default {default.lr})"
    )
    how.add_argument(
        "--samples", type=int, default=default.samples, metavar="K",
        help=f"draws of the importance-weighted log likelihood (default {default.samples})",
    )  # fmt: skip
    how.add_argument("--device", default=default.device, help="cpu, cuda or cuda:<index> (default cpu)")
    experiment.add_options(parser, "runs/vae")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command; raises ValueError or OSError for what the user can put right."""
    given = {field.name: getattr(args, field.name) for field in fields(VaeConfig)}
    config = VaeConfig(**{**given, "beta": tuple(args.beta)})
    config.validate()  # before any download
    if args.download:
        for split in ("train", "test"):
            data.load(config.dataset, split, args.data_dir, download=True)
    # Epochs of models that are trained side by side would be told in a muddle.
    progress = not args.quiet and args.jobs == 1
    return experiment.carry_out(
        args, config.settings(), lambda running: vae.run(running, config, args.data_dir, progress=progress)
    )
