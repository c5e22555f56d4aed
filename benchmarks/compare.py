"""Whether one result of benchmarks/layers.py is slower than another, beyond noise.

What is compared is each contender's time over that of its base (torch.nn's layer; for sampling, the eager
formulas), measured in the same rounds, because raw times drift with the machine; of the lower quartiles,
because what else a machine does only makes times longer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

# Two processes differ by more than their rounds show (where memory lies, what else runs).
FLOOR = 0.10
# Standard deviations. A comparison asks some two hundred questions, but asks again what looks slower.
DEVIATIONS = 3.0
# What has to agree for a comparison to mean anything, in ``provenance``.
SAME = ("machine", "cpu", "instruction_set", "backend", "torch")


class Key(NamedTuple):
    threads: int
    case: str
    contender: str

    def __str__(self) -> str:
        return f"{self.case}, {self.contender}, {self.threads} thread(s)"


class Change(NamedTuple):
    """``tolerance``: how much slower, as a share, would still be noise."""

    key: Key
    old: float
    new: float
    tolerance: float

    def __str__(self) -> str:
        return (
            f"{self.key}: {self.old:.3f} -> {self.new:.3f} times its base, "
            f"{self.new / self.old - 1:+.0%} (noise: up to {self.tolerance:.0%})"
        )


def _rows(result: Mapping[str, Any]) -> Iterator[tuple[Key, Mapping[str, Any]]]:
    """Every contender of a result but the bases."""
    for run in result["runs"]:
        for table in (*run.get("sampling", ()), *run.get("layers", ())):
            for name, row in table["contenders"].items():
                if name != table["base"]:
                    yield Key(run["threads"], table["case"], name), row


def ratios(result: Mapping[str, Any]) -> dict[Key, Mapping[str, float]]:
    """Every ratio of a result; contenders that failed have none."""
    return {key: row["lower_over_base"] for key, row in _rows(result) if "lower_over_base" in row}


def incompatible(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Why the two results must not be compared: one line for each reason."""
    reasons = [
        f"{name}: {old['provenance'].get(name)!r} and {new['provenance'].get(name)!r}"
        for name in SAME
        if old["provenance"].get(name) != new["provenance"].get(name)
    ]
    counts = [sorted(run["threads"] for run in result["runs"]) for result in (old, new)]
    if not set(counts[0]) & set(counts[1]):
        reasons.append(f"no number of threads in common: {counts[0]} and {counts[1]}")
    elif not ratios(old).keys() & ratios(new).keys():
        reasons.append("no case and contender in common")
    return reasons


def tolerance(old: Mapping[str, float], new: Mapping[str, float]) -> float:
    """The share by which ``new`` may be above ``old`` and still be noise."""
    noise = DEVIATIONS * math.hypot(old["spread"], new["spread"])
    return max(FLOOR, math.expm1(noise))


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Every ratio that both results have."""
    before = ratios(old)
    return [
        Change(key, before[key]["ratio"], now["ratio"], tolerance(before[key], now))
        for key, now in ratios(new).items()
        if key in before
    ]


def regressions(found: list[Change]) -> list[Change]:
    """Those that are slower beyond noise, the worst first."""
    slower = [c for c in found if c.new > c.old * (1 + c.tolerance)]
    return sorted(slower, key=lambda c: c.old / c.new)


def blind(found: list[Change], share: float = 0.2) -> list[Change]:
    """Those so noisy that a slow-down by ``share`` would not have been seen."""
    return [c for c in found if c.tolerance > share]


def missing(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Key]:
    """What ``old`` measured and ``new`` tried and could not: its contenders that failed."""
    failed = {key for key, row in _rows(new) if "error" in row}
    return [key for key in ratios(old) if key in failed]
