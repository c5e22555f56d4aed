"""Trains each of the three models for an epoch: ours against their point-estimate twins and eager formulas.

    python benchmarks/models.py [--threads 1 2] [--model LeNet ...] [--images 3840] [--quick] [--out PATH]

Images are random numbers of MNIST's shape padded to 1 x 32 x 32, since only the time counts. Every contender
takes a minibatch (forward, loss with the KL, backward, Adam step) before the next minibatch begins, in one
process; all start from the twin's weights. The default of 3,840 images, 30 minibatches of 128, keeps the
whole run to some minutes; an epoch of MNIST's 60,000 takes 15.6 times as long. Writes PATH.json and PATH.md.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from cases import ModelCase, model_cases
from harness import (
    add_common_arguments,
    interleaved_for,
    out_path,
    provenance,
    ratio,
    summary,
    threads,
    with_suffix,
    write_json,
    write_text,
)
from report import models_console, models_markdown
from torch import Tensor, nn

CONTENDERS = ("nn", "bbb", "lrt", "lrt_auto", "eager_bbb", "eager_lrt")
# What each of ours is set against.
EAGER = {"bbb": "eager_bbb", "lrt": "eager_lrt", "lrt_auto": "eager_lrt"}
WARMUP = 3


class Trainer:
    """One contender, its optimizer, and its way through the minibatches."""

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, batch: int) -> None:
        self.output: Callable[[Tensor], Any] = getattr(model, "output_with_kl", model)
        self.optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        self.batches = list(zip(images.split(batch), labels.split(batch), strict=True))
        self.count = len(images)
        self.next = 0
        self.loss = math.nan

    def step(self) -> float:
        """Seconds that the next minibatch takes."""
        x, target = self.batches[self.next % len(self.batches)]
        self.next += 1
        start = time.perf_counter()
        result = self.output(x)
        output, kl = result if isinstance(result, tuple) else (result, 0.0)
        loss = F.cross_entropy(output, target) + kl / self.count
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        stop = time.perf_counter()
        self.loss = loss.item()
        return stop - start


def run_model(case: ModelCase, images: int) -> dict[str, Any]:
    """Each contender's minibatches of one epoch, after a few that do not count."""
    torch.manual_seed(0)
    x, labels = torch.randn(images, case.channels, 32, 32), torch.randint(10, (images,))
    trainers = {name: Trainer(model, x, labels, case.batch) for name, model in case.alike(CONTENDERS).items()}
    for trainer in trainers.values():
        for _ in range(WARMUP):
            trainer.step()
    rounds = len(trainers["nn"].batches)
    times, errors = interleaved_for({name: t.step for name, t in trainers.items()}, math.inf, rounds)
    if errors:
        raise RuntimeError(f"{case.name}: {errors}")
    rows: dict[str, dict[str, Any]] = {}
    for name, seconds in times.items():
        rows[name] = {
            "step": summary(seconds),
            "epoch_s": sum(seconds),
            "over_nn": ratio(seconds, times["nn"]),
            "last_loss": trainers[name].loss,
        }
        if name in EAGER:
            rows[name]["eager_over_ours"] = ratio(times[EAGER[name]], seconds)
    return {"model": case.architecture, "batch": case.batch, "images": images, "contenders": rows}


def measure(counts: Sequence[int], cases: Sequence[ModelCase], images: int, quick: bool) -> dict[str, Any]:
    result: dict[str, Any] = {
        "provenance": {**provenance(), "threads": list(counts)},
        "quick": quick,
        "runs": [],
    }
    for count in counts:
        run: dict[str, Any] = {"threads": count, "models": []}
        result["runs"].append(run)
        with threads(count):
            for case in cases:
                run["models"].append(run_model(case, images))
                print(models_console(run["models"][-1], count), flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_common_arguments(parser, "models")
    names = [case.architecture for case in model_cases(1)]
    parser.add_argument("--model", nargs="+", choices=names, default=names, help="which models")
    parser.add_argument("--images", type=int, default=3840, help="images of an epoch (default 3840)")
    parser.add_argument("--batch", type=int, default=128, help="images of a minibatch (default 128)")
    args = parser.parse_args()
    batch, images = (4, 24) if args.quick else (args.batch, args.images)
    cases = [case for case in model_cases(batch, channels=1) if case.architecture in args.model]
    result = measure(args.threads, cases, images, args.quick)
    out = out_path(args.out, "models", args.quick)
    write_json(with_suffix(out, ".json"), result)
    write_text(with_suffix(out, ".md"), models_markdown(result))
    print(f"\nwrote {out}.json and .md")


if __name__ == "__main__":
    main()
