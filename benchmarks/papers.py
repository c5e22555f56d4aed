"""Two experiments of papers, on MNIST.

    python benchmarks/papers.py gradient_variance|sparse [--data-dir DIR] [--epochs N] [--out PATH]

DIR holds MNIST's files; without it the images are scikit-learn's digits, which show that it runs.

gradient_variance: how much the gradient of a minibatch varies with the noise, under each estimator. After
table 1 of Kingma, Salimans and Welling, "Variational dropout and the local reparameterization trick", NeurIPS
2015: a net 784-1000-1000-1000-10 with ReLU, and the variance of the gradient of W_mu of its first and of its
last layer, averaged over the elements, before and after training. Other than in the paper, the posterior is
any Gaussian, the minibatch is fixed, so that the noise alone varies, and after training under one estimator
every estimator is measured at the parameters that were found. The gradient is that of the loss of an example,
mean NLL + KL / N; the KL's part has no noise and is left out.

sparse: how many weights are noise, and what is lost without them. Molchanov, Ashukha and Vetrov, "Variational
dropout sparsifies deep neural networks", ICML 2017, section 5.1: a net 784-300-100-10 with ReLU under local
reparameterization and a log-uniform prior; Adam, its learning rate falling from 1e-3 to 0, batch 100; weights
with ln alpha > 3 are set to 0, and the test error is that of the remaining means. The weight of the KL rises
to 1 within the first epochs.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from harness import arguments, out_path, provenance, threads, with_suffix, write_json
from torch import Tensor, nn

from bbb_fast import kl_loss, posterior_means, predict, prune, sparsity
from bbb_fast.experiments.data import batches, channel_stats, load, normalize
from bbb_fast.layers import BBB, BBB_LRT, Flipout
from bbb_fast.priors import LogUniform

Split = tuple[Tensor, Tensor]
LEARNING_RATE = 1e-3
ESTIMATORS = {"bbb": BBB, "flipout": Flipout, "lrt": BBB_LRT}
LAYERS = ("first", "last")
VARIANCE: dict[str, Any] = {
    "widths": (784, 1000, 1000, 1000, 10),
    # 0.36 to 0.40 of the initial mu's: as much noise as of Gaussian dropout with a rate of 0.11 to 0.14.
    "initial_sigma": 0.018,
    "prior_sigma": 0.1,
    # At 1 the KL of 2.8 million weights outweighs the NLL of a few epochs.
    "kl_weight": 0.01,
    "learning_rate": LEARNING_RATE,
    "batch": 1000,
    "draws": 40,
    "seed": 0,
}
# Variances are taken over this many draws and then averaged, whose spread tells how sure they are.
GROUP = 5
SPARSE: dict[str, Any] = {
    "widths": (784, 300, 100, 10),
    "batch": 100,
    "learning_rate": LEARNING_RATE,
    "warm_up": 10,
}
# The paper starts from ln sigma^2 = -10.
SPARSE_SIGMA = math.exp(-5)
SEEDS = (0, 1, 2)


def load_data(name: str, data_dir: Path | None) -> tuple[Split, Split]:
    """Normalized images of 28 x 28 pixels, flat, and labels: to train and to test."""
    sets = [load(name, split, data_dir) for split in ("train", "test")]
    images = [s.images[:, :, 2:-2, 2:-2] for s in sets]
    stats = channel_stats(images[0])
    train, test = ((normalize(i, *stats).flatten(1), s.labels) for i, s in zip(images, sets, strict=True))
    return train, test


def build(family: Any, widths: Sequence[int], sigma: float, **priors: Any) -> nn.Sequential:
    """Linear layers of an estimator with ReLU between them; ``sigma``: the posterior's, to begin with."""
    modules: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        start = {
            "posterior_mu_initial": (0.0, math.sqrt(2 / inputs)),
            "posterior_rho_initial": (math.log(math.expm1(sigma)), 0.0),
        }
        modules += [family.BBBLinear(inputs, outputs, priors={**start, **priors}), nn.ReLU()]
    return nn.Sequential(*modules[:-1])


def train(
    net: nn.Module, data: Split, epochs: int, batch: int, seed: int,
    rates: Callable[[int], tuple[float, float]], after: Callable[[int], None] = lambda epoch: None,
) -> None:  # fmt: skip
    """By Adam. ``rates``: of an epoch, the learning rate and the weight of the KL."""
    x, y = data
    optimizer = torch.optim.Adam(net.parameters(), lr=LEARNING_RATE)
    shuffle = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        optimizer.param_groups[0]["lr"], weight = rates(epoch)
        for index in batches(len(y), batch, shuffle):
            loss = F.cross_entropy(net(x[index]), y[index]) + weight / len(y) * kl_loss(net)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        after(epoch + 1)


# ---------------------------------------------------------------- the variance of gradients


def variance_net(estimator: str) -> nn.Sequential:
    family, prior = ESTIMATORS[estimator], VARIANCE["prior_sigma"]
    return build(family, VARIANCE["widths"], VARIANCE["initial_sigma"], prior_sigma=prior)


def gradient_variance(net: nn.Sequential, x: Tensor, y: Tensor, draws: int) -> dict[str, dict[str, float]]:
    """Of the first and the last layer's W_mu, the mean over its elements, and its standard error."""
    weights = [net.get_parameter(f"{k}.W_mu") for k in (0, len(net) - 1)]
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


def variance_rows(data: Split, test: Split, epochs: int) -> list[dict[str, Any]]:
    """Every estimator for the same minibatch, at the start and where training under each of them leads."""
    seed, rows = VARIANCE["seed"], []
    rates = (LEARNING_RATE, VARIANCE["kl_weight"])
    torch.manual_seed(seed)
    start = variance_net("bbb").state_dict()
    x, y = data
    fixed = next(batches(len(y), VARIANCE["batch"], torch.Generator().manual_seed(seed)))
    for trained in (None, *ESTIMATORS):
        state = start
        if trained is not None:
            net = variance_net(trained)
            net.load_state_dict(start)
            # Of the noise: the parameters found do not depend on what was measured before.
            torch.manual_seed(seed)
            train(net, data, epochs, VARIANCE["batch"], seed, lambda _: rates)
            state = net.state_dict()
        variance = {}
        for name in ESTIMATORS:
            net = variance_net(name)
            net.load_state_dict(state)
            variance[name] = gradient_variance(net, x[fixed], y[fixed], VARIANCE["draws"])
        probs = predict(net, test[0], samples=10, seed=0, batch_size=1000).softmax(-1).mean(0)
        accuracy = (probs.argmax(-1) == test[1]).float().mean().item()
        label = "start" if trained is None else f"trained under {trained}"
        rows.append({"parameters": label, "accuracy": accuracy, "variance": variance})
        for layer in LAYERS:
            of_layer = {name: v[layer]["variance"] for name, v in variance.items()}
            over = ", ".join(f"{n} {v / of_layer['lrt']:.2f}" for n, v in of_layer.items())
            print(f"{label} ({accuracy:.1%}), {layer} layer, variance over lrt's: {over}", flush=True)
    return rows


# ---------------------------------------------------------------- sparse networks


@torch.no_grad()
def error(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Of the means."""
    with posterior_means():
        return (net(x).argmax(-1) != y).double().mean().item()


def sparse_run(seed: int, epochs: int, data: Split, test: Split) -> dict[str, Any]:
    """One training, and what is left of it."""
    torch.manual_seed(seed)
    net = build(BBB_LRT, SPARSE["widths"], SPARSE_SIGMA, prior=LogUniform())
    begin, curve = time.perf_counter(), []

    def note(epoch: int) -> None:
        if epoch % max(epochs // 10, 1) == 0:
            curve.append({"epoch": epoch, "error": error(net, *test), "pruned": sparsity(net).fraction})
            print(f"  seed {seed}, {curve[-1]}, {time.perf_counter() - begin:.0f} s", flush=True)

    def rates(epoch: int) -> tuple[float, float]:
        return LEARNING_RATE * (1 - epoch / epochs), min(1.0, (epoch + 1) / SPARSE["warm_up"])

    train(net, data, epochs, SPARSE["batch"], seed, rates, note)
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
    parser = arguments(__doc__)
    parser.add_argument("name", choices=("gradient_variance", "sparse"))
    parser.add_argument("--data-dir", type=Path, help="folder with MNIST's files (default: digits instead)")
    parser.add_argument("--epochs", type=int, help="of training (default 3 and 200)")
    args = parser.parse_args()
    dataset = "digits" if args.data_dir is None else "mnist"
    # Digits never replace a result.
    out = with_suffix(out_path(args.out, args.name, dataset == "digits"), ".json")
    data, test = load_data(dataset, args.data_dir)
    settings, usual = (VARIANCE, 3) if args.name == "gradient_variance" else (SPARSE, 200)
    epochs = args.epochs or usual
    result = {"provenance": provenance(), "dataset": dataset, **settings, "epochs": epochs}
    with threads(args.threads):
        if args.name == "gradient_variance":
            write_json(out, result | {"rows": variance_rows(data, test, epochs)})
        else:
            runs: list[dict[str, Any]] = []
            for seed in SEEDS:
                runs.append(sparse_run(seed, epochs, data, test))
                write_json(out, result | {"runs": runs})
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
