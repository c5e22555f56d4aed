"""Timing that can be trusted on a shared machine, and what a result file says about where it comes from."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import bbb_fast

RESULTS = Path(__file__).parent / "results"


def interleaved(
    contenders: Mapping[str, Callable[[], float]], rounds: int, warmup: int = 3
) -> dict[str, list[float]]:
    """Runs every contender once a round, in turn, so that the machine's drift hits all alike.

    A contender returns the seconds that count (it may leave its own preparation out).
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for k in range(warmup + rounds):
        for name, run in contenders.items():
            seconds = run()
            if k >= warmup:
                times[name].append(seconds)
    return times


def clock(function: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def summary(times: list[float]) -> dict[str, float]:
    """Median and quartiles, in microseconds."""
    t = torch.tensor(times, dtype=torch.float64) * 1e6
    q = torch.quantile(t, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    return {"median_us": q[1], "q25_us": q[0], "q75_us": q[2], "runs": len(times)}


def _command(*words: str) -> str | None:
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def provenance() -> dict[str, Any]:
    """Machine, versions and commit: stands in every result file."""
    info = bbb_fast.build_info()
    return {
        "cpu": _cpu(),
        "cpu_features": torch.backends.cpu.get_cpu_capability(),
        "instruction_set": info.get("extension", {}).get("instruction_set"),
        "backend": info["backend"],
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "bbb_fast": bbb_fast.__version__,
        "commit": _command("git", "rev-parse", "--short", "HEAD"),
        "uncommitted_changes": bool(_command("git", "status", "--porcelain", "--untracked-files=no")),
        "date": time.strftime("%Y-%m-%d"),
    }


def write_json(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
