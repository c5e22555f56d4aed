"""Builds, tests, sanitizes and times bbb_fast on the GPU at hand, and says what came of it on one page.

    python3 benchmarks/gpu_report.py [--budget SECONDS] [--out DIR] [--work DIR] [--no-build] [--device cuda]

Runs with any interpreter that has torch, pytest and what a build needs; downloads and installs nothing. Its
stages: the extension, in place; the tests of the ops on the GPU; compute-sanitizer's memcheck and racecheck
over every op; benchmarks/gpu.py. A stage that outruns its limit is stopped and the rest goes on. Writes
DIR/gpu-NAME.json; the stages' output goes to the work folder. Exits with 1 if the build, a test or a
sanitizer failed. ``--device cpu --smoke`` runs the same stages on tiny sizes where there is no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# What runs on a GPU, by the files' names.
TESTS = """
cuda noise dropout sample_weights kl_divergence kl_node bbb lrt special_values layers losses compile
transforms recompute tracing errors kernels_on_cpu inference eval_mode memory models
""".split()
SMOKE_TESTS = ["noise", "losses"]
# A stage may take this share of the budget. The benchmark takes what is left.
LIMIT = 0.4
# Seconds to merge and print.
RESERVE = 8.0
# Processes that share the GPU for the tests, where pytest-xdist is installed.
WORKERS = 12


@dataclass
class Stage:
    """A command with a time limit, its output in a file; ``read`` finds in the output what to keep of it."""

    name: str
    command: list[str]
    limit: float
    work: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    read: Callable[[str], dict[str, Any]] = lambda text: {}

    @property
    def log(self) -> Path:
        return self.work / f"{self.name}.log"

    def start(self) -> subprocess.Popen[bytes]:
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **self.environment}
        # In a group of its own. SIGINT first, on which pytest still says what failed and why. No limit is 0.
        limited = ["timeout", "--signal=INT", "--kill-after=8", f"{max(self.limit, 0.1):.1f}", *self.command]
        with self.log.open("wb") as output:
            return subprocess.Popen(
                limited, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )

    def record(self, code: int, seconds: float) -> dict[str, Any]:
        """What became of it."""
        status = "timed out" if code in (124, 137, -signal.SIGKILL) else "failed" if code else "passed"
        text = self.log.read_text(errors="replace")
        found = {"status": status, "seconds": round(seconds, 1), **self.read(text)}
        if found["status"] == "passed" and found.get("errors", 0) != 0:
            found["status"] = "failed"
        if found["status"] != "passed":
            found["last_lines"] = [line[:200] for line in text.splitlines()[-8:]]
        say(f"{self.name}: {found['status']} after {seconds:.0f} s")
        return found


def run_side_by_side(stages: list[Stage]) -> dict[str, dict[str, Any]]:
    """Runs the stages at once and waits for all of them; returns their records, by name."""
    begun = time.monotonic()
    processes = {stage.name: stage.start() for stage in stages}
    found: dict[str, dict[str, Any]] = {}
    try:
        while len(found) < len(stages):
            time.sleep(0.2)
            for stage in stages:
                code = processes[stage.name].poll()
                if code is not None and stage.name not in found:
                    found[stage.name] = stage.record(code, time.monotonic() - begun)
    finally:
        # Children may outlive the leader of their group, which is timeout.
        for process in processes.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return {stage.name: found[stage.name] for stage in stages}


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


# Printed as JSON: the GPU, and why the kernels would not run there, if so. In a process of its own: no memory
# of the GPU stays here, and no bug there ends this.
PROBE = """
import json, sys, torch
device, found = torch.device(sys.argv[1]), {"name": "cpu"}
if device.type == "cuda":
    of = torch.cuda.get_device_properties(0)
    found = {"name": of.name, "capability": f"{of.major}.{of.minor}"}
try:
    from bbb_fast import _backend
    from bbb_fast.functional import normal
    assert _backend.use_native(device), _backend.why_not_native()
    assert normal((5,), torch.tensor([1, 2], device=device)).isfinite().all()
    try: normal((5,), torch.tensor([1], device=device))
    except ValueError as error: assert "[1]" in str(error), error
    else: raise AssertionError("a wrong rng was taken")
except Exception as error:
    found["not_native"] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""


def probe(device: str) -> dict[str, Any]:
    """Raises SystemExit where torch sees no such device."""
    command = [sys.executable, "-c", PROBE, device]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise SystemExit(f"gpu_report: torch sees no GPU here:\n{done.stderr[-600:]}")
    return json.loads(done.stdout.splitlines()[-1])


def sanitizer() -> str | None:
    """compute-sanitizer, on the PATH or beside nvcc."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    if nvcc := shutil.which("nvcc"):
        homes.append(str(Path(nvcc).resolve().parent.parent))
    places = [f"{home}/{folder}" for home in homes if home for folder in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *places]))


def build_stage(device: str, limit: float, work: Path) -> Stage:
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return Stage("build", command, limit, work, {"FORCE_CUDA": "1"} if device == "cuda" else {})


def test_stage(device: str, smoke: bool, limit: float, work: Path) -> Stage:
    files = [f"python_tests/test_{name}.py" for name in (SMOKE_TESTS if smoke else TESTS)]
    # One line a test: if the run is stopped, what it got to is known.
    command = [sys.executable, "-m", "pytest", *files, "--device", device, "-vv", "-rfEs", "--tb=short"]
    command += ["-m", "not slow", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(min(WORKERS, os.cpu_count() or 1))]
    return Stage("tests", command, limit, work, read=what_tests_said)


def what_tests_said(text: str) -> dict[str, Any]:
    """Counts by outcome, the names of what failed, and the summary line if the run got that far."""
    words = "PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS"
    outcomes = dict(re.findall(rf"^(\S+::.*?) ({words})\b", text, re.MULTILINE))
    # With several processes the outcome comes first; so it does in the summary at the end, where alone a file
    # that could not be collected stands.
    for pattern in (
        rf"\[gw\d+\] \[ *\d+%\] ({words}) (\S+::.*?) *",
        r"(FAILED|ERROR) (python_tests/.*?)(?: - .*)?",
    ):
        outcomes |= {name: outcome for outcome, name in re.findall(f"^{pattern}$", text, re.MULTILINE)}
    kinds = "passed|failed|skipped|error|deselected"
    summary = re.findall(rf"^=* ?(\d+ (?:{kinds})[^=]*?) ?=*$", text, re.MULTILINE)
    return {
        "counts": Counter(outcome.lower() for outcome in outcomes.values()),
        "summary": summary[-1].strip() if summary else None,
        "failures": [name for name, outcome in outcomes.items() if outcome in ("FAILED", "ERROR")],
    }


def sanitizer_stages(tool: str | None, device: str, limit: float, work: Path) -> list[Stage]:
    """memcheck and racecheck; without compute-sanitizer the same program alone, to see that it runs."""
    program = [sys.executable, "python_tests/sanitize.py", "--device", device]
    if tool is None:
        return [Stage("ops", program, limit, work, read=how_many_cases)]
    # Our kernels alone: their mangled names hold the namespace.
    options = ["--kernel-name", "kns=bbb_fast", "--target-processes", "application-only"]
    options += ["--launch-timeout", "60", "--show-backtrace", "device", "--error-exitcode", "9"]
    commands = {
        # torch probes for features with calls that may fail; only what kernels do counts here.
        "memcheck": [tool, "--tool", "memcheck", *options, "--report-api-errors", "no", *program],
        # racecheck is slow, and what it looks for does not depend on how a tensor ends.
        "racecheck": [tool, "--tool", "racecheck", *options, *program, "--sizes", "5", "4097", "20011"],
    }
    # Without torch's cache each tensor is an allocation of its own, whose end memcheck knows.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [
        Stage(name, command, limit, work, environment, what_sanitizers_said)
        for name, command in commands.items()
    ]


def how_many_cases(text: str) -> dict[str, Any]:
    cases = re.findall(r"^sanitize: (\d+) cases", text, re.MULTILINE)
    return {"cases": int(cases[-1])} if cases else {}


def what_sanitizers_said(text: str) -> dict[str, Any]:
    """``errors`` is None where a sanitizer came to no end."""
    found: dict[str, Any] = {"errors": None, **how_many_cases(text)}
    if errors := re.findall(r"ERROR SUMMARY: (\d+) error", text):
        found["errors"] = int(errors[-1])
    hazards = re.findall(r"RACECHECK SUMMARY: (\d+) hazard[^(]*\((\d+) error\S*, (\d+) warning", text)
    if hazards:
        found |= dict(zip(("hazards", "errors", "warnings"), map(int, hazards[-1]), strict=True))
    if "Device not supported" in text:
        found |= {"status": "not available", "reason": "compute-sanitizer: device not supported here"}
    if report := re.findall(r"^========= *((?!COMPUTE-SANITIZER)\S.*)$", text, re.MULTILINE):
        # What was found first, and where.
        found["report"] = [line[:200] for line in report[:12]]
    return found


def summary_lines(stages: dict[str, dict[str, Any]]) -> list[str]:
    lines = ["stages"]
    for name, stage in stages.items():
        failures = stage.get("failures", [])
        counts = ", ".join(f"{n} {what}" for what, n in stage.get("counts", {}).items())
        notes = [stage.get("summary") or counts]
        notes += [
            f"{key} {stage[key]}"
            for key in ("errors", "hazards", "warnings", "cases", "reason")
            if stage.get(key) is not None
        ]
        noted = "; ".join(filter(None, notes))
        lines.append(f"  {name:10} {stage['status']:14} {stage.get('seconds', 0):6.1f} s  {noted}")
        shown = failures[:12] + ([f"... and {len(failures) - 12} more"] if len(failures) > 12 else [])
        if stage["status"] in ("failed", "timed out") and not failures:
            shown = [f"| {line}" for line in stage.get("report", [])[:6] or stage["last_lines"][-4:]]
        lines += [f"    {line[:107]}" for line in shown]
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes and few tests: runs every stage")
    parser.add_argument("--budget", type=float, default=460.0, help="seconds for everything (default 460)")
    parser.add_argument("--no-build", action="store_true", help="test and time the extension that is there")
    parser.add_argument("--out", type=Path, help="of the result (default benchmarks/results; smoke: --work)")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "gpu-report", help="folder of the logs")
    args = parser.parse_args()
    start = time.monotonic()
    # As an exception, so that the stage under way is stopped too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    work = args.work.resolve()
    out = (args.out or (work if args.smoke else ROOT / "benchmarks" / "results")).resolve()
    work.mkdir(parents=True, exist_ok=True)

    def limit(stage: str) -> float:
        left = args.budget - (time.monotonic() - start) - RESERVE
        return min((1.0 if stage == "benchmark" else LIMIT) * args.budget, left)

    say(f"{probe(args.device)['name']}: {args.budget:.0f} s at most; logs in {work}")
    stages: dict[str, dict[str, Any]] = {"build": {"status": "skipped", "reason": "--no-build"}}
    if not args.no_build:
        stages = run_side_by_side([build_stage(args.device, limit("build"), work)])
    facts = probe(args.device)
    if reason := facts.pop("not_native", None):
        # What the reference path takes is not what anyone came here for.
        raise SystemExit(f"gpu_report: the kernels do not run here: {reason}; see {work / 'build.log'}")

    tool = sanitizer() if args.device == "cuda" else None
    if tool is None:
        reason = "compute-sanitizer was not found" if args.device == "cuda" else "no GPU"
        stages |= {name: {"status": "not available", "reason": reason} for name in ("memcheck", "racecheck")}
    tests = test_stage(args.device, args.smoke, limit("tests"), work)
    checks = sanitizer_stages(tool, args.device, limit("sanitizers"), work)
    stages |= run_side_by_side([tests, *checks])

    measured = work / "gpu.json"
    measured.unlink(missing_ok=True)
    command = [sys.executable, "benchmarks/gpu.py", "--device", args.device, "--out", str(measured)]
    command += ["--budget", f"{max(limit('benchmark') - 12, 1):.0f}"] + (["--smoke"] if args.smoke else [])
    stages |= run_side_by_side([Stage("benchmark", command, limit("benchmark"), work)])

    # Written after every row: also there when the benchmark was stopped.
    result = json.loads(measured.read_text()) if measured.exists() else {}
    name = re.sub(r"[^a-z0-9]+", "-", facts["name"].lower()).strip("-")
    path = out / f"gpu-{name}{'-smoke' if args.smoke else ''}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"device": facts, "stages": stages, **result}, indent=1) + "\n")
    if result:
        print(f"\n{measured.with_suffix('.txt').read_text()}")
    print("\n".join(summary_lines(stages)))
    print(f"wrote {path} after {time.monotonic() - start:.0f} s")
    # The benchmark may run out of time: it says itself what it has not measured.
    bad = {"failed", "timed out"}
    return int(
        any(s["status"] in bad - ({"timed out"} if n == "benchmark" else set()) for n, s in stages.items())
    )


if __name__ == "__main__":
    sys.exit(main())
