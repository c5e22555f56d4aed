"""Times each layer against torch.nn's, the textbook formulas, torch.compile and other libraries.

    python benchmarks/layers.py [--threads 1 2] [--case TEXT] [--contenders NAME ...] [--quick] [--out PATH]
    python benchmarks/layers.py --compare OLD.json [NEW.json]

Every contender of a case runs once a round, in one process. Prints a table and writes PATH.json, PATH.md and
PATH.png. With --compare, measures what OLD.json holds again (or reads NEW.json) and exits with 1 if anything
became slower beyond noise, with 2 if the two cannot be compared; writes files only where --out says.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import operator
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import compare
import eager
import torch
from cases import CASES, Case
from harness import (
    add_common_arguments,
    clock,
    describe,
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
from memory import peak_bytes, saved_for_backward
from report import layers_console, layers_figure, layers_markdown
from rivals import CONTENDERS, Layer, compiled, versions
from torch import Tensor

from bbb_fast import _backend, functional

METHOD = {
    "forward": "the layer's output, and the KL as its library forms it (torch.nn has none)",
    "backward": "all parameters' and the input's gradients, for a given one of the output and 1 for the KL",
    "step": "forward and backward, after an untimed one of the same layer",
    "over_base": "the step's median over torch.nn's (sampling: over the eager formulas') in the same rounds; "
    "low and high: the middle 95 % of the ratios of resampled rounds",
    "lower_over_base": "the same of the lower quartiles, for --compare: other work only makes times longer",
    "saved_bytes": "bytes autograd keeps from forward to backward, KL included, each storage once, without "
    "the parameters and the layer's input",
    "peak_bytes": "the most that a step's own tensors take at one time, gradients included, from "
    "torch.profiler's record; scratch space past torch's allocator is not in it",
}
ISAS = ("avx512", "avx2", "base")
COUNTS = (10_000, 1_000_000)


class Times(NamedTuple):
    """Seconds of one step."""

    forward: float
    backward: float
    step: float


Wrap = Callable[[str, Callable[[], Times]], Callable[[], Times]]


@dataclass(frozen=True)
class Effort:
    """How long to measure: rounds go on to ``rounds`` or, after ``least``, until ``seconds`` are over."""

    rounds: int = 100
    seconds: float = 15.0
    least: int = 6
    warmup: int = 2


QUICK = Effort(rounds=3, seconds=1.0, least=2, warmup=1)


class Stepper:
    """Runs one contender's training steps on one input."""

    def __init__(self, layer: Layer, x: Tensor, g: Tensor, repeat: int) -> None:
        self.layer = layer
        self.x = x
        self.g = g
        self.repeat = repeat
        self.leaves = [x, *layer.module.parameters()]
        # The KL's gradient, once its type and shape are known.
        self.one: Tensor | None = None

    def clear(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None

    def forward(self) -> tuple[Tensor, Tensor | None]:
        return self.layer.output_with_kl(self.x)

    def backward(self, y: Tensor, kl: Tensor | None) -> None:
        if kl is None:
            torch.autograd.backward((y,), (self.g,))
            return
        if self.one is None:
            self.one = torch.ones_like(kl, requires_grad=False)
        torch.autograd.backward((y, kl), (self.g, self.one))

    def step(self) -> None:
        self.backward(*self.forward())

    def timed(self) -> Times:
        """One step, or the medians of ``repeat`` in a row: what interrupts a few of them does not count.

        As in training, a step of the same layer comes before it, and leaves it memory and caches as it does.
        """
        forward, backward = [], []
        self.clear()
        self.step()
        for _ in range(self.repeat):
            self.clear()
            start = time.perf_counter()
            result = self.forward()
            middle = time.perf_counter()
            self.backward(*result)
            stop = time.perf_counter()
            forward.append(middle - start)
            backward.append(stop - middle)
            del result
        steps = map(operator.add, forward, backward)
        return Times(median(forward), median(backward), median(steps))

    def memory(self) -> dict[str, int]:
        self.clear()
        saved = saved_for_backward(self.forward, self.leaves)
        peak = peak_bytes(self.step)
        self.clear()
        return {"saved_bytes": saved, "peak_bytes": peak}


def _over_base(times: Sequence[float], base: Sequence[float]) -> dict[str, dict[str, float]]:
    return {"over_base": ratio(times, base), "lower_over_base": ratio(times, base, quantile=0.25)}


def unchanged(_: str, run: Callable[[], Times]) -> Callable[[], Times]:
    return run


def run_case(case: Case, contenders: Sequence[str], effort: Effort, wrap: Wrap = unchanged) -> dict[str, Any]:
    """Forward, backward, step and memory of every contender, and the ratio to torch.nn's step.

    ``wrap`` may put something around a contender's timed step, by name: how tests slow one down.
    """
    torch.manual_seed(0)
    torch.compiler.reset()
    # The input wants a gradient too, as it does anywhere but in a first layer.
    x = case.input().requires_grad_()
    plain = case.layer("nn")
    with torch.no_grad():
        g = torch.randn_like(plain(x))
    rows: dict[str, dict[str, Any]] = {}
    steppers: dict[str, Stepper] = {}
    for name in dict.fromkeys(("nn", *contenders)):
        if CONTENDERS[name].for_overhead and case.overhead_us is None:
            continue
        try:
            stepper = Stepper(CONTENDERS[name].build(case), x, g, case.repeat)
            for _ in range(effort.warmup):
                stepper.timed()
            rows[name] = stepper.memory()
            steppers[name] = stepper
        except Exception as error:
            rows[name] = {"error": describe(error)}
    runs = {name: wrap(name, stepper.timed) for name, stepper in steppers.items()}
    times, errors = interleaved_for(runs, effort.seconds, effort.rounds, effort.least)
    for name, error in errors.items():
        rows[name] = {"error": error}
    for name, steps in times.items():
        if name in errors:
            continue
        for part in Times._fields:
            rows[name][part] = summary([getattr(t, part) for t in steps])
        rows[name] |= _over_base([t.step for t in steps], [t.step for t in times["nn"]])
    return {
        "case": case.name,
        "base": "nn",
        "weight_bytes": plain.weight.nbytes,
        "output_bytes": g.nbytes,
        "contenders": rows,
    }


@contextlib.contextmanager
def _instruction_set(name: str) -> Iterator[None]:
    before = _backend._C.build_info()["instruction_set"]
    _backend._C.set_isa(name)
    try:
        yield
    finally:
        _backend._C.set_isa(before)


def _ours_by_instruction_set(draw: Callable[[], Any]) -> dict[str, Callable[[], Any]]:
    """Our draw on each instruction set that this CPU has; on the reference path where there is no other."""
    if _backend.backend() != "native":
        return {"ours_reference": draw}

    def on(isa: str) -> Callable[[], Any]:
        def run() -> None:
            with _instruction_set(isa):
                draw()

        return run

    found = {}
    for isa in ISAS:
        with contextlib.suppress(ValueError), _instruction_set(isa):
            found[f"ours_{isa}"] = on(isa)
    return found


def run_sampling(count: int, effort: Effort) -> dict[str, Any]:
    """One weight draw with its KL: forward alone, no gradient."""
    torch.compiler.reset()
    mu, rho = torch.randn(count) * 0.1, torch.randn(count) * 0.1 - 3
    rng = functional.draw_rng()
    compiled_draw = compiled(eager.sample_and_kl)
    draws = {
        "eager": lambda: eager.sample_and_kl(mu, rho),
        **_ours_by_instruction_set(lambda: functional.sample_weight(mu, rho, rng, with_kl=True)),
        "compiled": lambda: compiled_draw(mu, rho),
    }
    rows: dict[str, dict[str, Any]] = {}
    runs: dict[str, Callable[[], float]] = {}
    for name, draw in draws.items():
        try:
            for _ in range(effort.warmup + 1):
                draw()
            runs[name] = lambda draw=draw: clock(draw)
            rows[name] = {}
        except Exception as error:
            rows[name] = {"error": describe(error)}
    times, errors = interleaved_for(runs, effort.seconds / 5, 3 * effort.rounds, effort.least)
    for name, seconds in times.items():
        if name in errors:
            rows[name] = {"error": errors[name]}
        else:
            rows[name] = {"step": summary(seconds), **_over_base(seconds, times["eager"])}
    return {
        "case": f"sampling + KL of {count:,} weights",
        "count": count,
        "base": "eager",
        "contenders": rows,
    }


def measure(
    counts: Sequence[int],
    cases: Sequence[Case],
    sampling: Sequence[int],
    contenders: Sequence[str],
    effort: Effort,
) -> dict[str, Any]:
    """The whole table, for each number of threads; prints each part as it comes."""
    result: dict[str, Any] = {
        "provenance": {**provenance(), "threads": list(counts), "libraries": versions()},
        "quick": effort is QUICK,
        "method": METHOD,
        "contenders": {name: CONTENDERS[name].note for name in contenders},
        "runs": [],
    }
    for count in counts:
        run: dict[str, Any] = {"threads": count, "sampling": [], "layers": []}
        result["runs"].append(run)
        with threads(count):
            for weights in sampling:
                run["sampling"].append(run_sampling(weights, effort))
                print(layers_console(run["sampling"][-1], count), flush=True)
            for case in cases:
                run["layers"].append(run_case(case, contenders, effort))
                print(layers_console(run["layers"][-1], count), flush=True)
    return result


def measure_again(
    old: Mapping[str, Any], effort: Effort, select: Callable[[compare.Key], bool] = lambda key: True
) -> dict[str, Any]:
    """Those cases and contenders of a result that ``select`` takes (and their bases), measured now."""
    wanted = [key for key, _ in compare.ratios(old) if select(key)]
    counts = list(dict.fromkeys(key.threads for key in wanted))
    names = {key.case for key in wanted}
    known = [*CASES, *(case.smaller() for case in CASES)]
    return measure(
        counts,
        [case for case in known if case.name in names],
        [n for n in COUNTS if f"sampling + KL of {n:,} weights" in names],
        [name for name in CONTENDERS if any(key.contender == name for key in wanted)],
        effort,
    )


def judge(old: Mapping[str, Any], new: Mapping[str, Any], effort: Effort, again: bool) -> int:
    """Prints what became slower; with ``again``, only what is slower in a second measurement too."""
    if reasons := compare.incompatible(old, new):
        print("these results cannot be compared:", *reasons, sep="\n  ")
        return 2
    found = compare.changes(old, new)
    slower = compare.regressions(found)
    if slower and again:
        suspects = {change.key for change in slower}
        print(f"\n{len(suspects)} suspected, measuring them again")
        second = measure_again(old, effort, suspects.__contains__)
        slower = [c for c in compare.regressions(compare.changes(old, second)) if c.key in suspects]
    failed = compare.missing(old, new)
    print(f"\n{len(found)} ratios compared")
    for change in compare.blind(found):
        print(f"too noisy to see a slow-down by 20 %: {change}")
    for key in failed:
        print(f"failed now, ran before: {key}")
    for change in slower:
        print(f"slower: {change}")
    if not slower and not failed:
        print("nothing became slower beyond noise")
    return 1 if slower or failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_common_arguments(parser, "layers")
    parser.add_argument("--case", default="", help='only the cases with this in their names ("sampling" too)')
    parser.add_argument(
        "--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="NAME",
        help=f"which (torch.nn always runs): {', '.join(CONTENDERS)}",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=Effort.rounds, help="rounds a case at most")
    parser.add_argument("--seconds", type=float, default=Effort.seconds, help="seconds a case, about")
    parser.add_argument("--compare", type=Path, nargs="+", metavar="JSON", help="OLD.json [NEW.json]")
    args = parser.parse_args()
    if args.compare and len(args.compare) > 2:
        parser.error("--compare takes one or two files")
    # The formulas on many shapes: torch.compile has a lot to say that is no result.
    warnings.filterwarnings("ignore", module="torch")
    effort = QUICK if args.quick else Effort(rounds=args.rounds, seconds=args.seconds)
    if args.compare:
        old, *rest = (json.loads(path.read_text()) for path in args.compare)
        new = rest[0] if rest else measure_again(old, effort)
        if args.out:
            write_json(with_suffix(args.out, ".json"), new)
        return judge(old, new, effort, again=not rest)
    cases = [case for case in CASES if args.case in case.name]
    if args.quick:
        cases = [case.smaller() for case in cases if case in (CASES[1], CASES[3], CASES[-1])]
    result = measure(
        args.threads,
        cases,
        [n for n in COUNTS if args.case in f"sampling + KL of {n:,} weights"],
        args.contenders,
        effort,
    )
    out = out_path(args.out, "layers", args.quick)
    write_json(with_suffix(out, ".json"), result)
    write_text(with_suffix(out, ".md"), layers_markdown(result))
    layers_figure(result, with_suffix(out, ".png"))
    print(f"\nwrote {out}.json, .md and .png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
