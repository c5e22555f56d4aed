"""What every benchmark shares: timing that can be trusted on a shared machine, options, files, provenance."""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

import bbb_fast
from bbb_fast import routes
from bbb_fast._files import atomic_write

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


@dataclass(frozen=True)
class Effort:
    """How long to measure: rounds go on to ``rounds`` or, after ``least``, until ``seconds`` are over.

    ``warmup``: calls of each contender that do not count.
    """

    rounds: int = 100
    seconds: float = 15.0
    least: int = 6
    warmup: int = 2


class SkippedError(Exception):
    """A contender that was left out, and why."""


Errors = dict[str, dict[str, Any]]


def contest(
    contenders: Mapping[str, Callable[[], Callable[[], T]]], effort: Effort
) -> tuple[dict[str, list[T]], Errors]:
    """Builds every contender, then runs each once a round, so that the machine's drift hits all alike.

    What builds a contender also warms it up, and returns what a round calls, which returns its timing. One
    that raises drops out. Returns the timings of the others, and the errors, as rows of a result.
    """
    runs: dict[str, Callable[[], T]] = {}
    times: dict[str, list[T]] = {name: [] for name in contenders}
    errors: Errors = {}

    @contextlib.contextmanager
    def dropping_out(name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            skipped = isinstance(error, SkippedError)
            errors[name] = {"error": f"skipped: {error}" if skipped else describe(error)}
            runs.pop(name, None)
            del times[name]
            # Its frames hold the contender's tensors.
            error.__traceback__ = None

    for name, build in contenders.items():
        with dropping_out(name):
            runs[name] = build()
    begin = time.perf_counter()
    for k in range(effort.rounds):
        if k >= effort.least and time.perf_counter() - begin > effort.seconds:
            break
        for name, run in list(runs.items()):
            with dropping_out(name):
                times[name].append(run())
    return times, errors


def warmed_up(run: Callable[[], T], calls: int) -> Callable[[], T]:
    """The function, after so many calls."""
    for _ in range(calls):
        run()
    return run


def time_in_turn(runs: Mapping[str, Callable[[], Any]], effort: Effort) -> dict[str, list[float]]:
    """Seconds of calls on the CPU. Raises RuntimeError if one fails."""
    return of_all(
        contest(
            {n: partial(warmed_up, partial(clock, run), effort.warmup) for n, run in runs.items()}, effort
        )
    )


def of_all(found: tuple[dict[str, T], Errors]) -> dict[str, T]:
    """The timings of a :func:`contest` that all have to finish. Raises RuntimeError if one did not."""
    times, errors = found
    if errors:
        raise RuntimeError(f"{errors}")
    return times


def describe(error: BaseException) -> str:
    """An error in one line of a result file."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])}"[:300]


def summary(times: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and the outer twentieths, in microseconds."""
    quantiles = torch.tensor([0.5, 0.05, 0.25, 0.75, 0.95], dtype=torch.float64)
    found = (torch.tensor(times, dtype=torch.float64) * 1e6).quantile(quantiles).tolist()
    names = ("median_us", "q05_us", "q25_us", "q75_us", "q95_us")
    return {**dict(zip(names, found, strict=True)), "runs": len(times)}


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
    ratios, (center, base_center) = mine / theirs, pairs.quantile(quantile, dim=-1).tolist()
    low, high = ratios.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"ratio": center / base_center, "low": low, "high": high, "spread": ratios.log().std().item()}


def _command(*words: str) -> str | None:
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpuinfo() -> dict[str, str]:
    """The first processor's fields in /proc/cpuinfo; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    return dict(re.findall(r"^(.+?)\s*: (.*)$", text.split("\n\n")[0], re.MULTILINE))


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
    atomic_write(path, text.encode())


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
    several = None if isinstance(threads, int) else "+"
    shown = threads if isinstance(threads, int) else " ".join(map(str, threads))
    parser.add_argument(
        "--threads", type=int, nargs=several, default=threads, help=f"of torch (default {shown})"
    )
    parser.add_argument("--out", type=Path, help="result file, without a suffix (default in results)")
    return parser


def out_path(out: Path | None, name: str, trial: bool) -> Path:
    """Where a benchmark's files go, without a suffix. A trial never replaces a result."""
    return out or (SCRATCH if trial else RESULTS) / name


def with_suffix(path: Path, suffix: str) -> Path:
    """``path`` with a suffix added: a CPU's name may hold dots."""
    return path.with_name(path.name + suffix)
