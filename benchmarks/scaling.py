"""What a linear layer costs against batch, width, draws and threads, and how near to its bounds it runs.

Steps are those of layers.py; draws: outputs of `predict`, against loops of eager forwards and against
torch.nn's one function run as often. Rates come from work that is known. GFLOP/s: operations of the products
(three in a step, six under LRT; one and two in a draw), 2 N I O each, over the whole time. Of plain rate:
that over torch.nn's. GB/s beside the products: the bytes that the other passes have to move, over the time
beyond torch.nn's (twice torch.nn's under LRT), where that is at least 5 % of the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from cases import Case
from harness import Effort, Job, ratio, summary, time_in_turn
from layers import run_case
from torch import Tensor

import bbb_fast

CONTENDERS = ("nn", "bbb", "lrt", "eager_bbb", "eager_lrt")
WIDTH, BATCH = 1024, 128
BATCHES: tuple[int, ...] = (1, 4, 16, 64, 256, 1024, 4096)
WIDTHS: tuple[int, ...] = (16, 64, 256, 1024, 4096)
DRAWS: tuple[int, ...] = (1, 4, 16, 64, 256)
# Products of a step; torch.nn's are three: output, gradient of the input, gradient of the weight.
PRODUCTS = {"nn": 3, "bbb": 3, "eager_bbb": 3, "lrt": 6, "eager_lrt": 6}
# Bytes that the passes beside the products have to move in float32, a weight, an input and an output element.
# BBB: mu, rho in and w out; backward mu, rho, the gradient in and two gradients out; noise and KL ride along.
# LRT: rho in and sigma^2 out, mu and rho for the KL, then rho and the gradient in and one out; x in and x^2
# out, then two gradients and x combined; m, v in and y out, the same again in backward.
BYTES = {"bbb": (32, 0, 0), "lrt": (28, 20, 24)}
EFFORT = Effort(rounds=30, seconds=3.0, least=5, warmup=2)
QUICK = Effort(rounds=2, seconds=0.1, least=2, warmup=1)


def linear(width: int, batch: int) -> Case:
    # Calls in a row until one timing takes a millisecond or so.
    repeat = max(1, min(20, 2**24 // (batch * width * width)))
    return Case(f"linear {width}x{width}, batch {batch}", width, width, batch, repeat=repeat)


def with_rates(case: Case, table: dict[str, Any]) -> dict[str, Any]:
    """Adds to each row GFLOP/s of its products, their share of torch.nn's rate, and GB/s beside them."""
    product = 2 * case.batch * case.inputs * case.outputs
    elements = (case.inputs * case.outputs, case.batch * case.inputs, case.batch * case.outputs)
    plain = table["contenders"]["nn"]["step"]["median_us"]
    for name, row in table["contenders"].items():
        if "error" in row:
            continue
        us = row["step"]["median_us"]
        row["gflops"] = PRODUCTS[name] * product / us / 1e3
        row["of_plain_rate"] = PRODUCTS[name] * plain / PRODUCTS["nn"] / us
        estimator = name.removeprefix("eager_")
        if estimator in BYTES:
            moved = sum(b * n for b, n in zip(BYTES[estimator], elements, strict=True))
            beside = us - PRODUCTS[name] / PRODUCTS["nn"] * plain
            row["us_beside_products"] = beside
            # A difference of two times near each other says nothing.
            row["gb_per_s_beside_products"] = moved / beside / 1e3 if beside > 0.05 * us else None
    return {**table, "width": case.inputs, "batch": case.batch}


def run_step(case: Case, effort: Effort) -> dict[str, Any]:
    return with_rates(case, run_case(case, CONTENDERS, effort))


def run_draws(case: Case, samples: int, effort: Effort) -> dict[str, Any]:
    """``samples`` outputs of one layer; torch.nn's is its one function run as often, the floor."""
    torch.manual_seed(0)
    x = case.input()
    layers = {name: case.layer(name).eval() for name in ("nn", "bbb", "eager_bbb", "eager_lrt")}

    def loop(name: str) -> Callable[[], Tensor]:
        return lambda: torch.stack([layers[name](x) for _ in range(samples)])

    runs = {name: loop(name) for name in layers}
    runs["bbb"] = lambda: bbb_fast.predict(layers["bbb"], x, samples=samples)
    with torch.no_grad():
        times = time_in_turn(runs, replace(effort, seconds=EFFORT.seconds, least=3, warmup=1))
    product = 2 * case.batch * case.inputs * case.outputs * samples
    rows = {
        name: {
            "step": summary(seconds),
            "over_base": ratio(seconds, times["nn"]),
            "gflops": PRODUCTS[name] // 3 * product / (summary(seconds)["median_us"] * 1e3),
        }
        for name, seconds in times.items()
    }
    sizes = {"width": case.inputs, "batch": case.batch, "draws": samples}
    return {"case": f"{case.name}, {samples} draws", **sizes, "base": "nn", "contenders": rows}


def all_jobs(quick: bool) -> list[Job]:
    """A row for each batch, each width, and each number of draws."""
    some = slice(2 if quick else None)
    width, batch = (64, 8) if quick else (WIDTH, BATCH)
    effort = QUICK if quick else EFFORT
    sweeps = {
        "batch": [linear(width, n) for n in BATCHES[some]],
        "width": [linear(n, batch) for n in WIDTHS[some]],
    }
    case = linear(width, batch)
    return [
        *(Job(sweep, c.name, partial(run_step, c, effort)) for sweep, cases in sweeps.items() for c in cases),
        *(Job("draws", f"{case.name}, {n} draws", partial(run_draws, case, n, effort)) for n in DRAWS[some]),
    ]
