"""``bbb-fast tune``: measure which routes the products of a model's layers should take on this machine."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from .. import routes, tuning
from ..experiments import checkpoint
from ..experiments.options import OptionError
from ..tuning import Measured

__all__ = ["add_parser", "run"]


def add_parser(subparsers: Any) -> None:
    """Registers the command and its options."""
    parser = subparsers.add_parser(
        "tune",
        help="measure the fastest way to compute a model's layers on this machine",
        description=(
            "Time every way to compute each layer's products, and keep what is clearly faster than the rule "
            "where bbb_fast finds it when it is imported. Results change by rounding only."
        ),
    )
    add = parser.add_argument
    add(
        "--model", nargs="+", choices=checkpoint.MODELS, default=list(checkpoint.MODELS),
        help="whose layers (default: all)",
    )  # fmt: skip
    add("--inputs", type=int, default=3, metavar="C", help="channels of an image (default 3)")
    add("--outputs", type=int, default=10, metavar="K", help="classes (default 10)")
    add("--batch-size", type=int, default=128, metavar="N", help="images a step (default 128)")
    add("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")
    add("--seconds", type=float, default=0.5, help="for each choice, about (default 0.5)")
    add("--out", metavar="FILE", help="keep it there (default: where bbb_fast looks when it is imported)")
    add("--dry-run", action="store_true", help="measure and print, keep nothing")
    add("--forget", action="store_true", help="remove what was kept for this machine, measure nothing")


def run(args: argparse.Namespace) -> int:
    """Measures and prints; returns 0."""
    for option in ("inputs", "outputs", "batch_size", "threads"):
        value = getattr(args, option)
        if value is not None and not 1 <= value <= 1 << 16:
            raise OptionError(option, f"must be in 1 ... {1 << 16}, got {value}")
    if not 0 < args.seconds <= 3600:
        raise OptionError("seconds", f"must be more than 0 and at most 3600, got {args.seconds}")
    file = routes.cache_file()
    if args.forget:
        existed = file.exists()
        file.unlink(missing_ok=True)
        print(f"removed {file}" if existed else f"nothing was kept: there is no {file}")
        return 0
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads or before)
    try:
        return _run(args)
    finally:
        torch.set_num_threads(before)


def _run(args: argparse.Namespace) -> int:
    print(f"rules {routes.rules_of_this_cpu()}; {torch.get_num_threads()} thread(s)", flush=True)
    table = None if args.out else routes.load()
    done: list[Measured] = []
    for name in args.model:
        with torch.random.fork_rng(devices=[]):
            model = checkpoint.MODELS[name][0](args.outputs, args.inputs, layer_type="lrt")
            x = torch.randn(args.batch_size, args.inputs, 32, 32)
            places = tuning.places(model, x)
            print(f"\n{name}, {args.inputs} x 32 x 32, batch {args.batch_size}", flush=True)
            table, found = tuning.tune(places, seconds=args.seconds, start=table, report=_print)
        done += found
    assert table is not None  # one model at least
    if args.dry_run:
        print("\nnothing was kept (--dry-run)")
    else:
        print(f"\nwrote {tuning.save(table, done, args.out)}")
    return 0


def _print(measured: Measured) -> None:
    times = "  ".join(f"{name} {1e3 * seconds:.3g} ms" for name, seconds in measured.seconds.items())
    choice = (
        measured.choice if measured.choice == measured.rule else f"{measured.choice}, not {measured.rule}"
    )
    print(f"  {measured.name:6} {measured.what:14} {choice:26} {times}", flush=True)
