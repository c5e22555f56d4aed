"""How much the gradient of a minibatch varies with the noise, under each estimator.

    python benchmarks/gradient_variance.py [--data-dir DIR] [--epochs 5] [--batch 1000] [--draws 100]
        [--seed 0] [--threads 1] [--out PATH]

After table 1 of Kingma, Salimans and Welling, "Variational dropout and the local reparameterization trick",
NeurIPS 2015: a net 784-1000-1000-1000-10 with ReLU, and the variance of the gradient of W_mu of its first and
of its last layer, averaged over the elements, before and after training. DIR holds MNIST's files; without it
the images are scikit-learn's digits, which show that it runs.

Other than in the paper, the posterior is any Gaussian, the minibatch is fixed, so that the noise alone
varies, and after training under one estimator every estimator is measured at the parameters that were found.
The gradient is that of the loss of an example, mean NLL + KL / N; the KL's part has no noise and is left out.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from harness import RESULTS, SCRATCH, provenance, threads, write_json
from torch import Tensor, nn

from bbb_fast import ELBO, kl_loss, predict
from bbb_fast.experiments.data import batches, channel_stats, load, normalize
from bbb_fast.layers import BBB, BBB_LRT, Flipout

ESTIMATORS = {"bbb": BBB, "flipout": Flipout, "lrt": BBB_LRT}
LAYERS = ("first", "last")
WIDTHS = (784, 1000, 1000, 1000, 10)
# 0.36 to 0.40 of the initial mu's: as much noise as of Gaussian dropout with a rate of 0.11 to 0.14.
SIGMA = 0.018
PRIOR_SIGMA = 0.1
# At 1 the KL of 2.8 million weights outweighs the NLL of a few epochs.
KL_WEIGHT = 0.01
LEARNING_RATE = 1e-3
# Variances are taken over this many draws and then averaged, whose spread tells how sure they are.
GROUP = 5


class Data(NamedTuple):
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def load_data(name: str, data_dir: Path | None) -> Data:
    """Normalized images of 28 x 28 pixels, flat, and labels."""
    sets = [load(name, split, data_dir) for split in ("train", "test")]
    images = [s.images[:, :, 2:-2, 2:-2] for s in sets]
    stats = channel_stats(images[0])
    return Data(*((normalize(i, *stats).flatten(1), s.labels) for i, s in zip(images, sets, strict=True)))


def build(estimator: str) -> nn.Sequential:
    modules: list[nn.Module] = []
    for inputs, outputs in pairwise(WIDTHS):
        priors = {
            "prior_sigma": PRIOR_SIGMA,
            "posterior_mu_initial": (0.0, math.sqrt(2 / inputs)),
            "posterior_rho_initial": (math.log(math.expm1(SIGMA)), 0.0),
        }
        modules += [ESTIMATORS[estimator].BBBLinear(inputs, outputs, priors=priors), nn.ReLU()]
    return nn.Sequential(*modules[:-1])


def train(net: nn.Module, x: Tensor, y: Tensor, epochs: int, batch: int, seed: int) -> None:
    loss_of = ELBO(len(y), reduction="mean", from_logits=True)
    optimizer = torch.optim.Adam(net.parameters(), lr=LEARNING_RATE)
    # Of the noise: the parameters found do not depend on what was measured before.
    torch.manual_seed(seed)
    shuffle = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for index in batches(len(y), batch, shuffle):
            output = net(x[index])
            loss = loss_of(output, y[index], kl_loss(net), KL_WEIGHT)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Of the mean of ten draws' probabilities."""
    probs = predict(net, x, samples=10, seed=0, batch_size=1000).softmax(-1).mean(0)
    return (probs.argmax(-1) == y).float().mean().item()


def gradient_variance(net: nn.Sequential, x: Tensor, y: Tensor, draws: int) -> dict[str, dict[str, float]]:
    """Of the first and the last layer's W_mu, the mean over its elements, and its standard error."""
    weights = [net[0].W_mu, net[-1].W_mu]
    groups = []
    for _ in range(draws // GROUP):
        drawn = [torch.autograd.grad(F.cross_entropy(net(x), y), weights) for _ in range(GROUP)]
        groups.append([torch.stack(g).var(0).mean().item() for g in zip(*drawn, strict=True)])
    return {
        layer: {
            "variance": statistics.mean(values),
            "standard_error": statistics.stdev(values) / math.sqrt(len(values)),
        }
        for layer, values in zip(LAYERS, zip(*groups, strict=True), strict=True)
    }


def measure(
    parameters: str, state: dict[str, Tensor], data: Data, fixed: Tensor, draws: int
) -> dict[str, Any]:
    """A row of the result: every estimator at the same parameters, for the same minibatch."""
    x, y = data.train
    variance = {}
    for name in ESTIMATORS:
        net = build(name)
        net.load_state_dict(state)
        variance[name] = gradient_variance(net, x[fixed], y[fixed], draws)
    return {"parameters": parameters, "accuracy": accuracy(net, *data.test), "variance": variance}


def show(row: dict[str, Any]) -> None:
    """Two lines of the table: each variance, its standard error, and how many times LRT's it is."""
    label = f"{row['parameters']} ({row['accuracy']:.1%})"
    for layer in LAYERS:
        base = row["variance"]["lrt"][layer]["variance"]
        line = f"{label:32}{layer:6}"
        for estimates in row["variance"].values():
            value, error = estimates[layer].values()
            line += f"{value:11.2e} +-{error / value:4.0%}{value / base:6.2f}"
        print(line, flush=True)
        label = ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help="folder with MNIST's files (default: digits instead)")
    parser.add_argument("--epochs", type=int, default=5, help="of training (default 5)")
    parser.add_argument("--batch", type=int, default=1000, help="images a minibatch (default 1000)")
    parser.add_argument("--draws", type=int, default=100, help=f"{GROUP} x 2, 3, ... (default 100)")
    parser.add_argument("--seed", type=int, default=0, help="of everything (default 0)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    parser.add_argument("--out", type=Path, help="JSON file (default results/gradient_variance.json)")
    args = parser.parse_args()
    if args.draws < 2 * GROUP or args.draws % GROUP:
        parser.error(f"--draws must be a multiple of {GROUP}, {2 * GROUP} or more, got {args.draws}")
    name = "digits" if args.data_dir is None else "mnist"
    # Digits never replace a result.
    out = args.out or (SCRATCH if name == "digits" else RESULTS) / "gradient_variance.json"
    data = load_data(name, args.data_dir)
    with threads(args.threads):
        result: dict[str, Any] = {
            "provenance": provenance(),
            "dataset": name,
            "widths": WIDTHS,
            "initial_sigma": SIGMA,
            "prior_sigma": PRIOR_SIGMA,
            "kl_weight": KL_WEIGHT,
            "learning_rate": LEARNING_RATE,
            **{key: getattr(args, key) for key in ("epochs", "batch", "draws", "seed")},
            "rows": [],
        }
        torch.manual_seed(args.seed)
        start = build("bbb").state_dict()
        fixed = next(batches(len(data.train[1]), args.batch, torch.Generator().manual_seed(args.seed)))
        titles = "".join(f"{name + ', over lrt':>23}" for name in ESTIMATORS)
        print(f"{'parameters (test accuracy)':32}layer {titles}")
        for trained in (None, *ESTIMATORS):
            state = start
            if trained is not None:
                net = build(trained)
                net.load_state_dict(start)
                train(net, *data.train, args.epochs, args.batch, args.seed)
                state = net.state_dict()
            label = "start" if trained is None else f"trained under {trained}"
            result["rows"].append(measure(label, state, data, fixed, args.draws))
            show(result["rows"][-1])
    write_json(out, result)
    print(f"\nwrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
