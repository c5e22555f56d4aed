"""Trains LeNet on MNIST, of each kind with several seeds, judges it, and meets notMNIST with it.

    python benchmarks/mnist.py --data-dir DIR [--kinds lrt bbb] [--seeds 3] [--epochs 15] [--runs runs/mnist]
        [--threads 1] [--out PATH]

DIR holds mnist/ and notmnist/. Finished runs in the folder are kept, stopped ones resumed. Writes
results/mnist.json, which docs/mnist.md and the README quote.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

from harness import RESULTS, provenance, write_json

from bbb_fast import cli

# By name: the options of `train` beside the recipe.
KINDS = {
    "lrt": ["--layer-type", "lrt", "--beta", "0.1"],
    "lrt_bf16": ["--layer-type", "lrt", "--beta", "0.1", "--variance-dtype", "bfloat16"],
    "bbb": ["--layer-type", "bbb", "--beta", "0.1"],
}
RECIPE = (
    "--model lenet --activation relu --batch-size 128 --lr 2e-3 --lr-schedule cosine "
    "--posterior-rho-initial -5 0.1 --valid-size 2000"
).split()


def _run(arguments: list[str]) -> None:
    print("bbb-fast", " ".join(arguments), flush=True)
    if status := cli.main(arguments):
        sys.exit(status)


def judge(kind: str, seed: int, epochs: int, data_dir: Path, runs: Path, threads: int) -> dict[str, float]:
    """Trains one model (or takes up the finished run) and returns its numbers."""
    folder = runs / f"{kind}-{seed}"
    ood = runs / f"{kind}-{seed}-ood"
    common = ["--data-dir", str(data_dir), "--threads", str(threads), "--seed", str(seed)]
    if not (folder / "metrics.json").exists():
        resume = ["--resume"] if (folder / "last.pt").exists() else []
        _run(
            ["train", "--dataset", "mnist", *KINDS[kind], *RECIPE, "--epochs", str(epochs)]
            + [*common, "--out", str(folder), *resume]
        )
    if not (ood / "uncertainty.json").exists():
        _run(
            ["uncertainty", "--checkpoint", str(folder / "best.pt"), "--in", "mnist"]
            + ["--out-of-distribution", "notmnist", "--samples", "50", *common, "--out", str(ood)]
        )
    metrics = json.loads((folder / "metrics.json").read_text())
    last = metrics["history"][-1]
    detection = json.loads((ood / "uncertainty.json").read_text())["detection"]
    return {
        "seed": seed,
        "kl_weight": metrics["config"]["beta"],
        # Of the last epoch, a training image: mean NLL under the noise of training + KL / images.
        "negative_elbo": last["nll"] + last["kl"] / metrics["images"]["train"],
        **{name: metrics["test"][name] for name in ("accuracy", "nll", "brier", "ece")},
        **{f"auroc_{score}": numbers["auroc"] for score, numbers in detection.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with mnist/ and notmnist/")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["lrt", "bbb"], help="which models")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 ... of each kind (default 3)")
    parser.add_argument("--epochs", type=int, default=15, help="of training (default 15)")
    parser.add_argument("--out", type=Path, default=RESULTS / "mnist.json", help="JSON file")
    parser.add_argument("--runs", type=Path, default=Path("runs/mnist"), help="where the runs go")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    args = parser.parse_args()
    result = {
        "provenance": provenance(),
        "recipe": " ".join([*RECIPE, "--epochs", str(args.epochs)]),
        "test_draws": 100,
        "ood_draws": 50,
    }
    for kind in args.kinds:
        rows = [
            judge(kind, seed, args.epochs, args.data_dir, args.runs, args.threads)
            for seed in range(args.seeds)
        ]
        keys = [key for key in rows[0] if key != "seed"]
        mean = {key: statistics.mean(row[key] for row in rows) for key in keys}
        spread = {key: statistics.stdev(row[key] for row in rows) for key in keys}
        result[kind] = {"seeds": rows, "mean": mean, "standard_deviation": spread}
        print(kind, json.dumps(mean, indent=1))
    write_json(args.out, result)


if __name__ == "__main__":
    main()
