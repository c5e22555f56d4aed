"""Timing that can be trusted on a shared machine, and what a result file says about where it comes from."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

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


class Timing(NamedTuple):
    """Seconds that count, and seconds the caller's thread was busy starting the work."""

    seconds: float
    host: float


class Clock:
    """Times one call on a device, the CPU or a GPU.

    :meth:`alone` is the time the device takes. On a GPU: a read of a buffer several times the L2 cache goes
    first, so that every call finds its operands in memory; the call's kernels are queued behind a pause, so
    that the two events around them enclose their run time and not the time Python takes to launch them.
    :meth:`back_to_back` is the time a user waits: wall clock of several calls in a row, launches included.
    """

    LONGEST_PAUSE = 0.03

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        if not self.cuda:
            return
        torch.cuda.set_device(device)
        size = torch.cuda.get_device_properties(device).L2_cache_size or 64 << 20
        # Read, not written: lines that a write leaves in the cache would be written back during the call.
        self._buffer = torch.ones(size, device=device)  # 4 bytes each: 4 times the cache
        self._sink = torch.empty((), device=device)
        self._start = torch.cuda.Event(enable_timing=True)
        self._stop = torch.cuda.Event(enable_timing=True)
        # An idle GPU's clock is slow; a pause counted in its cycles would be too short later.
        until = time.perf_counter() + 0.3
        while time.perf_counter() < until:
            self._flush()
            torch.cuda.synchronize(device)
        cycles = 2_000_000
        seconds = [self._events(lambda: torch.cuda._sleep(cycles)) for _ in range(5)]
        self._cycles_per_second = cycles / min(seconds)

    def _flush(self) -> None:
        torch.sum(self._buffer, 0, out=self._sink)

    def _events(self, run: Callable[[], Any]) -> float:
        self._start.record()
        run()
        self._stop.record()
        self._stop.synchronize()
        return self._start.elapsed_time(self._stop) / 1e3

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def alone(self, run: Callable[[], Any], pause: float) -> Timing:
        """One call, its operands not in the cache; ``pause`` should be longer than launching takes."""
        host = 0.0

        def timed() -> None:
            nonlocal host
            host = clock(run)

        if not self.cuda:
            timed()
            return Timing(host, host)
        torch.cuda._sleep(int(min(pause, self.LONGEST_PAUSE) * self._cycles_per_second))
        self._flush()
        return Timing(self._events(timed), host)

    def back_to_back(self, run: Callable[[], Any], calls: int) -> Timing:
        """Seconds a call of ``calls`` calls in a row, from an idle device to an idle device."""
        self.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        started = time.perf_counter()
        self.synchronize()
        return Timing((time.perf_counter() - start) / calls, (started - start) / calls)


def interleaved_for(
    contenders: Mapping[str, Callable[[], Timing]], seconds: float, rounds: int, least: int = 5
) -> tuple[dict[str, list[Timing]], dict[str, str]]:
    """As :func:`interleaved`, until ``rounds`` rounds or, after ``least``, ``seconds`` are over.

    Contenders come warmed up. One that raises drops out. Returns the timings, and the errors by name.
    """
    times: dict[str, list[Timing]] = {name: [] for name in contenders}
    errors: dict[str, str] = {}
    begin = time.perf_counter()
    for k in range(rounds):
        if k >= least and time.perf_counter() - begin > seconds:
            break
        for name, run in contenders.items():
            if name in errors:
                continue
            try:
                times[name].append(run())
            except Exception as error:
                errors[name] = describe(error)
    return times, errors


def describe(error: BaseException) -> str:
    """An error in one line of a result file."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])}"[:300]


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
    changes = _command("git", "status", "--porcelain", "--untracked-files=no")
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
        "uncommitted_changes": None if changes is None else bool(changes),
        "date": time.strftime("%Y-%m-%d"),
    }


def gpu(device: torch.device) -> dict[str, Any]:
    """What a result measured on a GPU says about it."""
    properties = torch.cuda.get_device_properties(device)
    query = "--query-gpu=driver_version,power.limit,clocks.max.sm,clocks.max.memory"
    smi = _command("nvidia-smi", query, "--format=csv,noheader")
    return {
        "name": torch.cuda.get_device_name(device),
        "capability": list(torch.cuda.get_device_capability(device)),
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver_power_clocks": smi.splitlines()[device.index or 0] if smi else None,
    }


def write_json(path: Path, result: dict[str, Any]) -> None:
    write_text(path, json.dumps(result, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replaces the file at once: a run that is killed leaves the last whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)
