"""Sparse variational dropout of LeNet-300-100: how many weights are noise, and what is lost without them.

    python benchmarks/sparse.py [--data-dir DIR] [--seeds 0 1 2] [--epochs 200] [--threads 1] [--out PATH]

Molchanov, Ashukha and Vetrov, "Variational dropout sparsifies deep neural networks", ICML 2017, section 5.1:
a net 784-300-100-10 with ReLU under local reparameterization and a log-uniform prior; Adam, its learning rate
falling from 1e-3 to 0, batch 100; weights with ln alpha > 3 are set to 0, and the test error is that of the
remaining means. The weight of the KL rises to 1 within the first epochs (--warm-up). DIR holds MNIST's files;
without it the images are scikit-learn's digits, which show that it runs.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from harness import RESULTS, SCRATCH, provenance, threads, write_json
from torch import Tensor, nn

from bbb_fast import kl_loss, posterior_means, prune, sparsity
from bbb_fast.experiments.data import batches, channel_stats, load, normalize
from bbb_fast.layers.BBB_LRT import BBBLinear
from bbb_fast.priors import LogUniform

WIDTHS = (784, 300, 100, 10)
BATCH = 100
LEARNING_RATE = 1e-3
# The paper starts from ln sigma^2 = -10.
SIGMA = math.exp(-5)


def load_data(name: str, data_dir: Path | None) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Normalized images of 28 x 28 pixels, flat, and labels: to train and to test."""
    sets = [load(name, split, data_dir) for split in ("train", "test")]
    images = [s.images[:, :, 2:-2, 2:-2] for s in sets]
    stats = channel_stats(images[0])
    train, test = ((normalize(i, *stats).flatten(1), s.labels) for i, s in zip(images, sets, strict=True))
    return train, test


def build() -> nn.Sequential:
    modules: list[nn.Module] = []
    for inputs, outputs in pairwise(WIDTHS):
        priors = {
            "prior": LogUniform(),
            "posterior_mu_initial": (0.0, math.sqrt(2 / inputs)),
            "posterior_rho_initial": (math.log(math.expm1(SIGMA)), 0.0),
        }
        modules += [BBBLinear(inputs, outputs, priors=priors), nn.ReLU()]
    return nn.Sequential(*modules[:-1])


@torch.no_grad()
def error(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Of the means."""
    with posterior_means():
        return (net(x).argmax(-1) != y).double().mean().item()


def run(seed: int, epochs: int, warm_up: int, train: Any, test: Any) -> dict[str, Any]:
    """One training, and what is left of it."""
    torch.manual_seed(seed)
    net, (x, y) = build(), train
    optimizer = torch.optim.Adam(net.parameters(), lr=LEARNING_RATE)
    shuffle = torch.Generator().manual_seed(seed)
    begin = time.perf_counter()
    curve = []
    for epoch in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 - epoch / epochs)
        weight = min(1.0, (epoch + 1) / max(warm_up, 1)) / len(y)
        for index in batches(len(y), BATCH, shuffle):
            loss = F.cross_entropy(net(x[index]), y[index]) + weight * kl_loss(net)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if (epoch + 1) % max(epochs // 10, 1) == 0:
            curve.append({"epoch": epoch + 1, "error": error(net, *test), "pruned": sparsity(net).fraction})
            print(
                f"  seed {seed}, epoch {epoch + 1}: error {curve[-1]['error']:.2%}, "
                f"{curve[-1]['pruned']:.2%} of the weights are noise ({time.perf_counter() - begin:.0f} s)",
                flush=True,
            )
    before = error(net, *test)
    found = prune(net)
    return {
        "seed": seed,
        "error": error(net, *test),
        "error_before_pruning": before,
        "pruned": found.fraction,
        "pruned_of_each_layer": [pruned / total for pruned, total in found.layers.values()],
        "seconds": time.perf_counter() - begin,
        "curve": curve,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help="folder with MNIST's files (default: digits instead)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="a run each (default 0 1 2)")
    parser.add_argument("--epochs", type=int, default=200, help="of each run (default 200)")
    parser.add_argument("--warm-up", type=int, default=10, help="epochs of rising KL weight (default 10)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    parser.add_argument("--out", type=Path, help="JSON file (default results/sparse.json)")
    args = parser.parse_args()
    name = "digits" if args.data_dir is None else "mnist"
    # Digits never replace a result.
    out = args.out or (SCRATCH if name == "digits" else RESULTS) / "sparse.json"
    train, test = load_data(name, args.data_dir)
    result: dict[str, Any] = {
        "provenance": provenance(),
        "dataset": name,
        "widths": WIDTHS,
        "batch": BATCH,
        "learning_rate": LEARNING_RATE,
        "epochs": args.epochs,
        "warm_up": args.warm_up,
        "runs": [],
    }
    with threads(args.threads):
        for seed in args.seeds:
            result["runs"].append(run(seed, args.epochs, args.warm_up, train, test))
            last = result["runs"][-1]
            layers = " - ".join(f"{p:.1%}" for p in last["pruned_of_each_layer"])
            line = f"seed {seed}: error {last['error']:.2%} with {last['pruned']:.2%} pruned ({layers})"
            print(line, flush=True)
            write_json(out, result)
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
