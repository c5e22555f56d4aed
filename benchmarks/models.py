"""Times whole models: ours against their point-estimate twins and the eager formulas.

Training: images are random numbers of MNIST's shape padded to 1 x 32 x 32, since only the time counts. Every
contender takes a minibatch (forward, loss with the KL, backward, Adam step) before the next minibatch begins,
in one process; all start from the twin's weights. 3,840 images, 30 minibatches of 128, keep the whole run to
some minutes; an epoch of MNIST's 60,000 takes 15.6 times as long.

Prediction: the usual loop runs the model T times on each minibatch and stacks the outputs; here it does not
even form the KL. All contenders hold the same posterior and take a minibatch before the next one begins. Also
checks that the predictive means agree within Monte Carlo error: they must with the loop over weight draws,
which estimates the same thing. The loop of LRT forwards gives every place of a feature map noise of its own,
so under convolutions its mean may differ by more: shown, not judged.

Speed-ups and ratios are those of the medians of a minibatch, with the middle 95 % of resampled ones.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from cases import ModelCase, model_cases
from harness import Effort, Job, clock, contest, of_all, ratio, summary, warmed_up
from torch import Tensor, nn

import bbb_fast

CONTENDERS = ("nn", "bbb", "lrt", "lrt_auto", "eager_bbb", "eager_lrt")
# What each of ours is set against.
EAGER = {"bbb": "eager_bbb", "lrt": "eager_lrt", "lrt_auto": "eager_lrt"}
WARMUP = 3
# Of the standardised differences' root mean square, which is 1 on average. Far from 100,000 independent ones
# stand behind it: all images share their draws.
AGREEMENT = 2.0


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
    epoch = Effort(rounds=len(trainers["nn"].batches), seconds=math.inf)
    times = of_all(contest({n: partial(warmed_up, t.step, WARMUP) for n, t in trainers.items()}, epoch))
    rows = {
        name: {
            "step": summary(seconds),
            "epoch_s": sum(seconds),
            "over_nn": ratio(seconds, times["nn"]),
            "last_loss": trainers[name].loss,
            **({"eager_over_ours": ratio(times[EAGER[name]], seconds)} if name in EAGER else {}),
        }
        for name, seconds in times.items()
    }
    return {"model": case.architecture, "batch": case.batch, "images": images, "contenders": rows}


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
        return lambda x: torch.stack([model(x) for _ in range(samples)])

    draws = {
        "ours": lambda x: bbb_fast.predict(found["lrt"], x, samples=samples, seed=0),
        "eager_lrt": loop("eager_lrt"),
        "eager_bbb": loop("eager_bbb"),
    }
    predictors = {name: Predictor(draw, batches) for name, draw in draws.items()}

    def ready(predictor: Predictor) -> Callable[[], float]:
        with torch.no_grad():
            predictor.draw(batches[0][:8])
        return predictor.next_batch

    whole = Effort(rounds=len(batches), seconds=math.inf)
    times = of_all(contest({name: partial(ready, p) for name, p in predictors.items()}, whole))
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


def training_jobs(quick: bool) -> list[Job]:
    """A row for each of the three models."""
    batch, images = (4, 24) if quick else (128, 3840)
    cases = model_cases(batch, channels=1)
    return [Job("models", case.architecture, partial(run_model, case, images)) for case in cases]


def prediction_jobs(quick: bool) -> list[Job]:
    """A row for LeNet."""
    batch, images, samples = (8, 32, 16) if quick else (1000, 10_000, 100)
    case = model_cases(batch, channels=1)[0]
    return [Job("models", case.architecture, partial(run_predict, case, images, samples))]
