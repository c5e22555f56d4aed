"""The command behind ``make fuzz``."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Sequence

from . import runner
from .choices import KINDS, Case
from .outcome import Outcome, Status

SHOWN = 3  # cases of one group
SMALLER = 120.0  # seconds that making cases smaller may take
SILENT = 30.0  # seconds


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fuzz", description="Random calls, native against reference.")
    parser.add_argument("--seed", type=int, default=0, help="which cases (default: 0)")
    parser.add_argument("--calls", type=int, default=2000, help="valid calls (default: 2000)")
    parser.add_argument("--malformed", type=int, default=1000, help="malformed calls (default: 1000)")
    parser.add_argument("--start", type=int, default=0, help="the first case's index (default: 0)")
    parser.add_argument("--only", default="", help="ops to call, by parts of their names, with commas")
    parser.add_argument("--case", help="run one case, SEED:INDEX or SEED:INDEX:malformed")
    parser.add_argument("--plain", default="", help="with --case: choices left at their plainest")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds a call may take (default: 60)")
    return parser


def _cases(options: argparse.Namespace) -> list[Case]:
    if options.case is not None:
        return [Case.parse(options.case, options.plain)]
    wanted = [name for name in options.only.split(",") if name]
    cases = []
    for kind, count in zip(KINDS, (options.calls, options.malformed), strict=True):
        for index in range(options.start, options.start + count):
            case = Case(options.seed, index, kind)
            if not wanted or any(name in runner.OPS[kind](case) for name in wanted):
                cases.append(case)
    return cases


def _describe(case: Case, outcome: Outcome) -> str:
    drawn = ", ".join(f"{name}: {value}" for name, value in outcome.drawn.items())
    lines = [f"  {case.command()}", *([f"    {outcome.detail}"] if outcome.detail else []), f"    {drawn}"]
    return "\n".join(lines)


def report(
    cases: Sequence[Case], faults: dict[str, list[tuple[Case, Outcome]]], timeout: float, seconds: float
) -> None:
    """Prints each group of faults; for so many seconds, makes the first case of each smaller."""
    end = time.monotonic() + seconds
    for group, members in sorted(faults.items(), key=lambda item: -len(item[1])):
        print(f"\n{group}: {len(members)} case{'s' if len(members) > 1 else ''}")
        for k, (case, outcome) in enumerate(members[:SHOWN]):
            again = runner.alone(case, timeout)
            if again.status is not Status.FAULT:
                before = cases[: cases.index(case) + 1]
                needed = runner.culprit(before[-500:], timeout)
                print(f"  not alone: after {', '.join(map(str, needed[:-1])) or 'nothing, this time'}")
            elif k == 0 and time.monotonic() < end:
                case, outcome = runner.smallest(case, again, timeout)
            print(_describe(case, outcome))


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 where no case is a fault, else 1."""
    options = _parser().parse_args(arguments)
    cases = _cases(options)
    start = time.monotonic()
    faults: dict[str, list[tuple[Case, Outcome]]] = {}
    refused: Counter[str] = Counter()
    tightest = (0.0, "")
    told = start
    for count, (case, outcome) in enumerate(runner.run(cases, options.timeout), 1):
        if (now := time.monotonic()) - told > SILENT:
            print(f"[{now - start:5.0f} s] {count} of {len(cases)} calls", flush=True)
            told = now
        if outcome.status is Status.FAULT:
            faults.setdefault(outcome.group(), []).append((case, outcome))
        elif outcome.status is Status.REFUSED:
            refused[f"{outcome.op}: {outcome.what}"] += 1
        else:
            tightest = max(tightest, (outcome.margin, str(case)))
    report(cases, faults, options.timeout, 0.0 if options.case is not None else SMALLER)
    seconds = time.monotonic() - start
    count = sum(map(len, faults.values()))
    print(f"\n{len(cases)} calls in {seconds:.0f} s: {count} faults in {len(faults)} groups")
    if tightest[1]:
        print(f"the largest difference is {tightest[0]:.2f} of what it may be: case {tightest[1]}")
    for message, times in refused.most_common():
        print(f"refused, {times} times: {message}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
