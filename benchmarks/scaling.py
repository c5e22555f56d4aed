"""What a linear layer costs against batch, width, draws and threads, and how near to its bounds it runs.

    python benchmarks/scaling.py [--threads 1 2] [--quick] [--out PATH]

Steps are those of benchmarks/layers.py. Rates come from work that is known: a product of a step is 2 N I O
operations and there are 3 (6 under LRT); the passes beside the products have to move BYTES. Prints a
table; writes PATH.json, PATH.md and PATH.png.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from cases import Case
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
from layers import Effort, run_case
from report import scaling_console, scaling_figure, scaling_markdown
from torch import Tensor

import bbb_fast

CONTENDERS = ("nn", "bbb", "lrt", "eager_bbb", "eager_lrt")
WIDTH, BATCH = 1024, 128
BATCHES = (1, 4, 16, 64, 256, 1024, 4096)
WIDTHS = (16, 64, 256, 1024, 4096)
DRAWS = (1, 4, 16, 64, 256)
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


def run_draws(case: Case, samples: int, rounds: int) -> dict[str, Any]:
    """``samples`` outputs of one layer; torch.nn's is its one function run as often, the floor."""
    torch.manual_seed(0)
    x = case.input()
    layers = {name: case.layer(name).eval() for name in ("nn", "bbb", "eager_bbb", "eager_lrt")}

    def loop(name: str) -> Callable[[], Tensor]:
        return lambda: torch.stack([layers[name](x) for _ in range(samples)])

    runs = {name: loop(name) for name in layers}
    runs["bbb"] = lambda: bbb_fast.predict(layers["bbb"], x, samples=samples)
    with torch.no_grad():
        for run in runs.values():
            run()
        times, errors = interleaved_for(
            {name: lambda run=run: clock(run) for name, run in runs.items()}, EFFORT.seconds, rounds, 3
        )
    if errors:
        raise RuntimeError(f"{samples} draws: {errors}")
    product = 2 * case.batch * case.inputs * case.outputs * samples
    rows = {
        name: {
            "step": summary(seconds),
            "over_base": ratio(seconds, times["nn"]),
            "gflops": PRODUCTS[name] // 3 * product / (summary(seconds)["median_us"] * 1e3),
        }
        for name, seconds in times.items()
    }
    return {
        "case": f"{case.name}, {samples} draws",
        "width": case.inputs,
        "batch": case.batch,
        "draws": samples,
        "base": "nn",
        "contenders": rows,
    }


def measure(counts: Sequence[int], quick: bool) -> dict[str, Any]:
    batches, widths, draws = (BATCHES[:2], WIDTHS[:2], DRAWS[:2]) if quick else (BATCHES, WIDTHS, DRAWS)
    width, batch = (64, 8) if quick else (WIDTH, BATCH)
    effort = QUICK if quick else EFFORT
    result: dict[str, Any] = {
        "provenance": {**provenance(), "threads": list(counts)},
        "quick": quick,
        "bytes_beside_products": BYTES,
        "runs": [],
    }
    for count in counts:
        run: dict[str, Any] = {"threads": count, "batch": [], "width": [], "draws": []}
        result["runs"].append(run)
        with threads(count):
            for sweep, cases in (
                ("batch", [linear(width, n) for n in batches]),
                ("width", [linear(n, batch) for n in widths]),
            ):
                for case in cases:
                    run[sweep].append(with_rates(case, run_case(case, CONTENDERS, effort)))
                    print(scaling_console(run[sweep][-1], count), flush=True)
            for samples in draws:
                run["draws"].append(run_draws(linear(width, batch), samples, effort.rounds))
                print(scaling_console(run["draws"][-1], count), flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_common_arguments(parser, "scaling")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", module="torch")
    result = measure(args.threads, args.quick)
    out = out_path(args.out, "scaling", args.quick)
    write_json(with_suffix(out, ".json"), result)
    write_text(with_suffix(out, ".md"), scaling_markdown(result))
    scaling_figure(result, with_suffix(out, ".png"))
    print(f"\nwrote {out}.json, .md and .png")


if __name__ == "__main__":
    main()
