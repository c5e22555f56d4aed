"""Predicts with T draws: bbb_fast.predict against loops of eager forwards.

    python benchmarks/predict.py [--threads 1 2] [--model LeNet] [--images 10000] [--samples 100] [--quick]

The usual loop runs the model T times on each minibatch and stacks the outputs; here it does not even form
the KL. All contenders hold the same posterior and take a minibatch before the next one begins. Also checks
that the predictive means agree within Monte Carlo error: they must with the loop over weight draws, which
estimates the same thing, and the exit status is 1 if they do not. The loop of LRT forwards gives every place
of a feature map noise of its own, so under convolutions its mean may differ by more: shown, not judged.
Writes PATH.json and PATH.md.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from cases import ModelCase, model_cases
from harness import (
    add_common_arguments,
    clock,
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
from report import predict_console, predict_markdown
from torch import Tensor

import bbb_fast

# Of the standardised differences' root mean square, which is 1 on average. Far from 100,000 independent ones
# stand behind it: all images share their draws.
AGREEMENT = 2.0


class Predictor:
    """One contender: goes through the images and keeps the moments of its probabilities."""

    def __init__(self, draw: Callable[[Tensor], Tensor], batches: Sequence[Tensor]) -> None:
        self.draw = draw
        self.batches = batches
        self.means: list[Tensor] = []
        self.variances: list[Tensor] = []

    @torch.no_grad()
    def next_batch(self) -> float:
        """Seconds that the next minibatch's outputs [samples, batch, classes] take."""
        x = self.batches[len(self.means)]
        outputs: list[Tensor] = []
        seconds = clock(lambda: outputs.append(self.draw(x)))
        probabilities = outputs[0].softmax(-1)
        self.means.append(probabilities.mean(0))
        self.variances.append(probabilities.var(0) / len(probabilities))
        return seconds


def agreement(ours: Predictor, theirs: Predictor) -> dict[str, float]:
    """How far two predictive means are apart, in probability and in standard errors."""
    difference = torch.cat(ours.means) - torch.cat(theirs.means)
    error = (torch.cat(ours.variances) + torch.cat(theirs.variances)).sqrt()
    z = difference / error.clamp_min(1e-12)
    return {
        "mean_abs_difference": difference.abs().mean().item(),
        "max_abs_difference": difference.abs().max().item(),
        "rms_standardised": z.square().mean().sqrt().item(),
    }


def run_predict(case: ModelCase, images: int, samples: int) -> dict[str, Any]:
    torch.manual_seed(0)
    batches = torch.randn(images, case.channels, 32, 32).split(case.batch)
    found = case.alike(("lrt", "eager_lrt", "eager_bbb"))

    def loop(name: str) -> Callable[[Tensor], Tensor]:
        model = found[name].eval()
        return lambda x: torch.stack([model.output(x) for _ in range(samples)])

    draws = {
        "ours": lambda x: bbb_fast.predict(found["lrt"], x, samples=samples, seed=0),
        "eager_lrt": loop("eager_lrt"),
        "eager_bbb": loop("eager_bbb"),
    }
    with torch.no_grad():
        for draw in draws.values():
            draw(batches[0][:8])
    predictors = {name: Predictor(draw, batches) for name, draw in draws.items()}
    times, errors = interleaved_for(
        {name: p.next_batch for name, p in predictors.items()}, math.inf, len(batches)
    )
    if errors:
        raise RuntimeError(f"{case.name}: {errors}")
    rows: dict[str, dict[str, Any]] = {}
    for name, seconds in times.items():
        rows[name] = {"batch": summary(seconds), "total_s": sum(seconds)}
        if name != "ours":
            rows[name]["over_ours"] = ratio(seconds, times["ours"])
            rows[name]["against_ours"] = agreement(predictors["ours"], predictors[name])
    return {
        "model": case.architecture,
        "batch": case.batch,
        "images": images,
        "samples": samples,
        "contenders": rows,
        "agrees": rows["eager_bbb"]["against_ours"]["rms_standardised"] <= AGREEMENT,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_common_arguments(parser, "predict")
    names = [case.architecture for case in model_cases(1)]
    parser.add_argument("--model", nargs="+", choices=names, default=["LeNet"], help="which (default LeNet)")
    parser.add_argument("--images", type=int, default=10_000, help="images (default 10000)")
    parser.add_argument("--batch", type=int, default=1000, help="images of a minibatch (default 1000)")
    parser.add_argument("--samples", type=int, default=100, help="draws of the weights, T (default 100)")
    args = parser.parse_args()
    batch, images, samples = (8, 32, 16) if args.quick else (args.batch, args.images, args.samples)
    result: dict[str, Any] = {
        "provenance": {**provenance(), "threads": args.threads},
        "quick": args.quick,
        "agreement_limit": AGREEMENT,
        "runs": [],
    }
    for count in args.threads:
        run: dict[str, Any] = {"threads": count, "models": []}
        result["runs"].append(run)
        with threads(count):
            for case in model_cases(batch, channels=1):
                if case.architecture in args.model:
                    run["models"].append(run_predict(case, images, samples))
                    print(predict_console(run["models"][-1], count), flush=True)
    out = out_path(args.out, "predict", args.quick)
    write_json(with_suffix(out, ".json"), result)
    write_text(with_suffix(out, ".md"), predict_markdown(result))
    print(f"\nwrote {out}.json and .md")
    return 0 if all(table["agrees"] for run in result["runs"] for table in run["models"]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
