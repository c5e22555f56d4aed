"""``python -m bbb_fast uncertainty``: does a trained model notice what it has never seen?"""

from __future__ import annotations

import argparse

import torch

from ..experiments import checkpoint, uncertainty
from ..experiments.data import DATASETS
from ..experiments.options import MAX_SEED, MAX_THREADS, check_int
from ..experiments.training import parse_device
from ..experiments.uncertainty import DERIVED, SCORES, Comparison
from . import options


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command and its options."""
    parser = subparsers.add_parser(
        "uncertainty",
        help="compare a trained model's doubt about known and never-seen images",
        description=(
            "Draw the weights of a trained model T times, and compare what the draws say of known test "
            "images and of images unlike any it was trained on. The output folder receives "
            "uncertainty.json, uncertainty.npz and uncertainty.png."
        ),
    )
    add = parser.add_argument
    add(
        "--checkpoint", type=options.path, required=True, metavar="FILE",
        help="a .pt file that `train` wrote",
    )  # fmt: skip
    add(
        "--in", dest="inside", metavar="SET", choices=DATASETS,
        help=f"known images (default: what the model was trained on): {', '.join(DATASETS)}",
    )  # fmt: skip
    add(
        "--out-of-distribution", "--ood", dest="outside", required=True, metavar="SET",
        choices=(*DATASETS, *DERIVED),
        help=f"never-seen images: another data set, or made on the spot: {', '.join(DERIVED)}",
    )  # fmt: skip
    add("--data-dir", type=options.folder, metavar="FOLDER", help="where the data sets' files are")
    add(
        "--ood-data-dir", type=options.folder, metavar="FOLDER",
        help="where the never-seen set is, if elsewhere",
    )  # fmt: skip
    add("--download", action="store_true", help="fetch missing files first")
    add("--samples", type=int, default=50, metavar="T", help="draws of the weights (default 50)")
    add("--limit", type=int, metavar="N", help="at most N images of each set, chosen by the seed")
    add("--seed", type=int, default=0, help="of the draws, of noise and of --limit (default 0)")
    add("--batch-size", type=int, default=256, metavar="N", help="images at a time (default 256)")
    add("--device", default="cpu", help="cpu, cuda or cuda:<index> (default cpu)")
    add("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")
    add(
        "--out", type=options.path, metavar="FOLDER",
        help="where to write (default: the checkpoint's folder)",
    )  # fmt: skip
    add("--overwrite", action="store_true", help="replace the results in --out")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command; raises ValueError or OSError for what the user can put right."""
    for name in ("samples", "batch_size", "limit"):
        if getattr(args, name) is not None:
            check_int(name, getattr(args, name))
    check_int("seed", args.seed, 0, MAX_SEED)
    if args.threads is not None:
        check_int("threads", args.threads, most=MAX_THREADS)
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads or before)
    try:
        return _run(args)
    finally:
        torch.set_num_threads(before)


def _run(args: argparse.Namespace) -> int:
    device = parse_device(args.device)
    loaded = checkpoint.load_model(args.checkpoint)
    known, other, *indices = uncertainty.load_pair(
        args.inside or loaded.dataset,
        args.outside,
        data_dir=args.data_dir,
        outside_dir=args.ood_data_dir,
        download=args.download,
        limit=args.limit,
        seed=args.seed,
    )
    # Around the work: a folder that cannot be had should not cost an hour first.
    with uncertainty.own_folder(args.out or args.checkpoint.parent, args.overwrite) as folder:
        result = uncertainty.compare(
            loaded, known, other,
            samples=args.samples, seed=args.seed, batch_size=args.batch_size, device=device,
        )  # fmt: skip
        settings = {
            "checkpoint": str(args.checkpoint),
            "run": loaded.run,
            "epoch": loaded.epoch,
            "samples": args.samples if result.bayesian else 1,
            "seed": args.seed,
            "limit": args.limit,
            "batch_size": args.batch_size,
            "device": str(device),
            "kl_weight": loaded.config.get("beta") if result.bayesian else None,
            "config": loaded.config,
        }
        print(table(result))
        written, notice = uncertainty.save(result, folder, settings, (indices[0], indices[1]))
    if notice:
        print(notice)
    for path in written:
        print(f"wrote {path}")
    return 0


def table(result: Comparison) -> str:
    """The result as lines of text, 90 characters wide at most."""
    known, other = result.inside, result.outside
    quality = ", ".join(
        f"{label} {result.quality[key]:.4f}"
        for key, label in (("accuracy", "accuracy"), ("nll", "NLL"), ("brier", "Brier"), ("ece", "ECE"))
    )
    sure = [f"{100 * judged.share_above(0.9):.1f} %" for judged in (known, other)]
    columns = ("median in", "median out", "AUROC", "AUPR", "FPR95")
    lines = [
        f"in:   {known.images.name}, {len(known)} images; {quality}",
        f"out:  {other.images.name}, {len(other)} images",
        f"a probability above 0.9 for {sure[0]} of the known and {sure[1]} of the never-seen images",
        "",
        f"{'score':24s}" + "".join(f"{column:>12s}" for column in columns),
    ]
    for score, name in SCORES.items():
        medians = [float(getattr(judged, score).quantile(0.5)) for judged in (known, other)]
        numbers = (*medians, *result.detection[score].values())
        lines.append(f"{name:24s}" + "".join(f"{number:12.4f}" for number in numbers))
    return "\n".join([*lines, "", *(f"note: {note}" for note in result.notes)]).rstrip()
