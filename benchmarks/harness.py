"""What every benchmark shares: timing that can be trusted on a shared machine, options, files, provenance."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

import bbb_fast
from bbb_fast import routes

RESULTS = Path(__file__).parent / "results"
# Where runs go that measure nothing worth keeping: not under version control.
SCRATCH = Path(__file__).parent.parent / "runs" / "bench"

T = TypeVar("T")


def clock(function: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


class Job(NamedTuple):
    """One row of a result: where it goes, what it is called, and how it is measured."""

    section: str
    case: str
    run: Callable[[], dict[str, Any]]


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
    contenders: Mapping[str, Callable[[], T]], seconds: float, rounds: int, least: int = 5
) -> tuple[dict[str, list[T]], dict[str, str]]:
    """Runs every contender once a round, in turn, so that the machine's drift hits all alike.

    Goes on until ``rounds`` rounds or, after ``least``, ``seconds`` are over. Contenders come warmed up and
    return their timing; one that raises drops out. Returns the timings, and the errors by name.
    """
    times: dict[str, list[T]] = {name: [] for name in contenders}
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


def time_in_turn(
    runs: Mapping[str, Callable[[], Any]], seconds: float, rounds: int, least: int = 5
) -> dict[str, list[float]]:
    """:func:`interleaved_for` of calls on the CPU, after one of each. Raises RuntimeError if one fails."""

    def timed(run: Callable[[], Any]) -> Callable[[], float]:
        run()
        return lambda: clock(run)

    times, errors = interleaved_for({n: timed(run) for n, run in runs.items()}, seconds, rounds, least)
    if errors:
        raise RuntimeError(f"{errors}")
    return times


class SkippedError(Exception):
    """A contender that was left out, and why."""


def set_up(factories: Mapping[str, Callable[[], T]]) -> tuple[dict[str, T], dict[str, dict[str, Any]]]:
    """Builds each contender; returns those that can be built, and a row with the error of each other."""
    built: dict[str, T] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, make in factories.items():
        try:
            built[name] = make()
        except SkippedError as reason:
            rows[name] = {"error": f"skipped: {reason}"}
        except Exception as error:
            rows[name] = {"error": describe(error)}
            # Its frames hold the failed contender's tensors.
            error.__traceback__ = None
    return built, rows


def describe(error: BaseException) -> str:
    """An error in one line of a result file."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])}"[:300]


def summary(times: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and the outer twentieths, in microseconds."""
    t = torch.tensor(times, dtype=torch.float64) * 1e6
    q = torch.quantile(t, torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)).tolist()
    return {
        "median_us": q[2],
        "q05_us": q[0],
        "q25_us": q[1],
        "q75_us": q[3],
        "q95_us": q[4],
        "runs": len(times),
    }


def ratio(
    times: Sequence[float], base: Sequence[float], quantile: float = 0.5, resamples: int = 200
) -> dict[str, float]:
    """The quantile of ``times`` over that of ``base``, of the same rounds, and how sure it is.

    ``low`` and ``high`` hold the middle 95 % of the ratios of resampled rounds (a bootstrap that keeps the
    two times of a round together); ``spread`` is the standard deviation of their logarithms.
    """
    pairs = torch.tensor([times, base], dtype=torch.float64)
    rounds = pairs.shape[1]
    draws = torch.randint(rounds, (resamples, rounds), generator=torch.Generator().manual_seed(0))
    mine, theirs = pairs[:, draws].quantile(quantile, dim=-1)
    ratios = mine / theirs
    center = pairs.quantile(quantile, dim=-1)
    low, high = ratios.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {
        "ratio": (center[0] / center[1]).item(),
        "low": low,
        "high": high,
        "spread": ratios.log().std().item(),
    }


def _command(*words: str) -> str | None:
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpuinfo() -> dict[str, str]:
    """The first processor's fields in /proc/cpuinfo; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0]
    except OSError:
        return {}
    fields = (line.partition(":") for line in text.splitlines())
    return {name.strip(): value.strip() for name, _, value in fields}


def _cpu() -> str:
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


# What tells CPUs apart for these benchmarks, the best first, by the name of the flag in /proc/cpuinfo.
_FEATURES = {"amx_bf16": "amx", "avx512_bf16": "avx512bf16", "avx512f": "avx512", "avx2": "avx2"}


# Generations that the model's name need not tell apart, by AMD's number of the family. A Zen 4, of family 25,
# goes by its name and instructions alone.
_FAMILIES = {"26": "zen5"}


def machine_slug(model: str, flags: Iterable[str], family: str = "") -> str:
    """A short name for result files: the CPU's model in plain words and its best vector instructions.

    "Intel(R) Xeon(R) Processor @ 2.80GHz" with AVX-512 gives "intel-xeon-2.80ghz-avx512".
    """
    words = re.sub(r"\((r|tm|c)\)", " ", model.lower())
    words = re.sub(r"\b(\d+-core|processor|cpu|core)\b", " ", words)
    flags = set(flags)
    best = next((short for flag, short in _FEATURES.items() if flag in flags), "")
    generation = _FAMILIES.get(family, "") if "amd" in words else ""
    named = re.findall(r"[a-z0-9]+(?:\.[a-z0-9]+)*", words)
    return "-".join([*named, *(part for part in (generation, best) if part)])


def this_machine() -> str:
    """:func:`machine_slug` of the CPU at hand."""
    fields = _cpuinfo()
    return machine_slug(_cpu(), fields.get("flags", "").split(), fields.get("cpu family", ""))


def bf16_instructions() -> bool:
    """Whether this CPU multiplies bfloat16 numbers itself. If not, a product in bfloat16 gains nothing."""
    cpu = torch.cpu
    return cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported()


def provenance() -> dict[str, Any]:
    """Machine, versions and commit: stands in every result file."""
    info = bbb_fast.build_info()
    # What other benchmarks have written in the meantime does not count.
    changes = _command("git", "status", "--porcelain", "--untracked-files=no", ":/", ":!/benchmarks/results")
    return {
        "cpu": _cpu(),
        "machine": this_machine(),
        "cpu_features": torch.backends.cpu.get_cpu_capability(),
        "bf16_instructions": bf16_instructions(),
        "instruction_set": info.get("extension", {}).get("instruction_set"),
        "backend": info["backend"],
        "rules": routes.current().rules,
        "measured_routes": len(routes.current().ways) + len(routes.current().narrow),
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


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """torch runs on that many threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def arguments(doc: str, threads: Sequence[int] | int = 1) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has: --threads (several where several are the default)
    and --out; ``doc`` is the module's docstring."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    several = {} if isinstance(threads, int) else {"nargs": "+"}
    shown = threads if isinstance(threads, int) else " ".join(map(str, threads))
    parser.add_argument("--threads", type=int, default=threads, help=f"of torch (default {shown})", **several)
    parser.add_argument("--out", type=Path, help="result file, without a suffix (default in results)")
    return parser


def out_path(out: Path | None, name: str, trial: bool) -> Path:
    """Where a benchmark's files go, without a suffix. A trial never replaces a result."""
    return out or (SCRATCH if trial else RESULTS) / name


def with_suffix(path: Path, suffix: str) -> Path:
    """``path`` with a suffix added: a CPU's name may hold dots."""
    return path.with_name(path.name + suffix)
