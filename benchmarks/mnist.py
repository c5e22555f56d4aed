"""Trains LeNet on MNIST under both estimators with three seeds, judges it, and meets notMNIST with it.

    python benchmarks/mnist.py --data-dir DIR [--runs runs/mnist] [--threads 1]

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

SEEDS = (0, 1, 2)
# KL weight by estimator.
BETA = {"lrt": 0.1, "bbb": 0.1}
RECIPE = (
    "--model lenet --activation relu --epochs 15 --batch-size 128 --lr 2e-3 --lr-schedule cosine "
    "--posterior-rho-initial -5 0.1 --valid-size 2000"
).split()


def _run(arguments: list[str]) -> None:
    print("bbb-fast", " ".join(arguments), flush=True)
    if status := cli.main(arguments):
        sys.exit(status)


def judge(layer_type: str, seed: int, data_dir: Path, runs: Path, threads: int) -> dict[str, float]:
    """Trains one model (or takes up the finished run) and returns its numbers."""
    folder = runs / f"{layer_type}-{seed}"
    ood = runs / f"{layer_type}-{seed}-ood"
    common = ["--data-dir", str(data_dir), "--threads", str(threads), "--seed", str(seed)]
    if not (folder / "metrics.json").exists():
        resume = ["--resume"] if (folder / "last.pt").exists() else []
        _run(
            ["train", "--dataset", "mnist", "--layer-type", layer_type, "--beta", str(BETA[layer_type])]
            + [*RECIPE, *common, "--out", str(folder), *resume]
        )
    if not (ood / "uncertainty.json").exists():
        _run(
            ["uncertainty", "--checkpoint", str(folder / "best.pt"), "--in", "mnist"]
            + ["--out-of-distribution", "notmnist", "--samples", "50", *common, "--out", str(ood)]
        )
    metrics = json.loads((folder / "metrics.json").read_text())
    detection = json.loads((ood / "uncertainty.json").read_text())["detection"]
    return {
        "seed": seed,
        "kl_weight": metrics["config"]["beta"],
        **{name: metrics["test"][name] for name in ("accuracy", "nll", "brier", "ece")},
        **{f"auroc_{score}": numbers["auroc"] for score, numbers in detection.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with mnist/ and notmnist/")
    parser.add_argument("--runs", type=Path, default=Path("runs/mnist"), help="where the runs go")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    args = parser.parse_args()
    result = {
        "provenance": provenance(),
        "recipe": " ".join(RECIPE),
        "test_draws": 100,
        "ood_draws": 50,
    }
    for layer_type in BETA:
        rows = [judge(layer_type, seed, args.data_dir, args.runs, args.threads) for seed in SEEDS]
        mean = {key: statistics.mean(row[key] for row in rows) for key in rows[0] if key != "seed"}
        result[layer_type] = {"seeds": rows, "mean": mean}
        print(layer_type, json.dumps(mean, indent=1))
    write_json(RESULTS / "mnist.json", result)


if __name__ == "__main__":
    main()
