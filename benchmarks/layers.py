"""Times each layer against torch.nn's and against the textbook formulas; prints a table, writes JSON.

    python benchmarks/layers.py [--threads 1] [--rounds 30] [--case linear] [--out results/layers.json]

Every contender of a case runs once a round, in one process. "forward" is the layer's forward; "backward"
the gradient of sum(y * g) + KL from there; "step" both, with the KL. Ratios are ratios of medians.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import eager
import torch
from cases import CASES, Case
from harness import RESULTS, clock, interleaved, provenance, summary, write_json
from torch import Tensor, nn

from bbb_fast import functional


def _step(layer: nn.Module, x: Tensor, g: Tensor, times: dict[str, list[float]], warm: list[int]) -> float:
    for p in layer.parameters():
        p.grad = None
    start = time.perf_counter()
    y = layer(x)
    middle = time.perf_counter()
    loss = (y * g).sum()
    if hasattr(layer, "kl_loss"):
        loss = loss + layer.kl_loss()
    before = time.perf_counter()
    loss.backward()
    stop = time.perf_counter()
    if warm[0] <= 0:
        times["forward"].append(middle - start)
        times["backward"].append(stop - before)
    warm[0] -= 1
    return stop - start


def run_case(case: Case, rounds: int) -> dict[str, Any]:
    """Medians of every contender's forward, backward and step, and the ratios to torch.nn's step."""
    torch.manual_seed(0)
    # The input wants a gradient too, as it does anywhere but in a first layer.
    x = case.input().requires_grad_()
    layers = case.layers()
    with torch.no_grad():
        g = torch.randn_like(layers["nn"](x))
    parts = {name: {"forward": [], "backward": []} for name in layers}
    warmup = 3

    def contender(name: str) -> Callable[[], float]:
        warm = [warmup]

        def run() -> float:
            x.grad = None
            return _step(layers[name], x, g, parts[name], warm)

        return run

    steps = interleaved({name: contender(name) for name in layers}, rounds, warmup)
    rows = {
        name: {
            "forward": summary(parts[name]["forward"]),
            "backward": summary(parts[name]["backward"]),
            "step": summary(steps[name]),
        }
        for name in layers
    }
    base = rows["nn"]["step"]["median_us"]
    for row in rows.values():
        row["step_over_nn"] = row["step"]["median_us"] / base
    return {"case": case.name, "contenders": rows}


def run_sampling(count: int, rounds: int) -> dict[str, Any]:
    """One weight draw with its KL: forward alone, no gradient."""
    mu, rho = torch.randn(count) * 0.1, torch.randn(count) * 0.1 - 3
    rng = functional.draw_rng()
    times = interleaved(
        {
            "ours": lambda: clock(lambda: functional.sample_weight(mu, rho, rng, with_kl=True)),
            "eager": lambda: clock(lambda: eager.sample_and_kl(mu, rho)),
        },
        rounds,
    )
    rows = {name: summary(t) for name, t in times.items()}
    return {
        "case": f"sampling + KL of {count:,} weights",
        "contenders": rows,
        "eager_over_ours": rows["eager"]["median_us"] / rows["ours"]["median_us"],
    }


def print_case(result: dict[str, Any]) -> None:
    print(f"\n{result['case']}")
    print(f"  {'':10} {'forward':>10} {'backward':>10} {'step':>10} {'step / nn':>10}")
    for name, row in result["contenders"].items():
        numbers = [row[part]["median_us"] / 1e3 for part in ("forward", "backward", "step")]
        print(f"  {name:10} " + " ".join(f"{n:7.2f} ms" for n in numbers) + f" {row['step_over_nn']:10.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    parser.add_argument("--rounds", type=int, default=30, help="measured rounds a case (default 30)")
    parser.add_argument("--case", default="", help="only the cases whose name contains this")
    parser.add_argument("--out", type=Path, help="JSON file (default results/layers-THREADSthreads.json)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    where = provenance()
    print(
        f"{where['cpu']}, {where['instruction_set']} kernels, torch {where['torch']}, {args.threads} threads"
    )
    result: dict[str, Any] = {"provenance": where, "sampling": [], "layers": []}
    if args.case in "sampling":
        for count in (10_000, 1_000_000):
            row = run_sampling(count, max(args.rounds, 30))
            result["sampling"].append(row)
            ours, theirs = (row["contenders"][n]["median_us"] / 1e3 for n in ("ours", "eager"))
            print(f"{row['case']}: {ours:.3f} ms, eager {theirs:.3f} ms, {row['eager_over_ours']:.1f} times")
    for case in CASES:
        if args.case in case.name:
            result["layers"].append(run_case(case, args.rounds))
            print_case(result["layers"][-1])
    out = args.out or RESULTS / f"layers-{args.threads}threads.json"
    write_json(out, result)
    print(f"\nwrote {out}")


if __name__ == "__main__":
    main()
