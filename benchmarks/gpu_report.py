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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TESTS = (
    "test_cuda.py",
    "test_noise.py",
    "test_dropout.py",
    "test_sample_weights.py",
    "test_kl_divergence.py",
    "test_kl_node.py",
    "test_bbb.py",
    "test_lrt.py",
    "test_special_values.py",
    "test_layers.py",
    "test_losses.py",
    "test_compile.py",
    "test_transforms.py",
    "test_recompute.py",
    "test_tracing.py",
    "test_errors.py",
    "test_kernels_on_cpu.py",
    "test_inference.py",
    "test_eval_mode.py",
    "test_memory.py",
    "test_models.py",
)
SMOKE_TESTS = ("test_noise.py", "test_losses.py")
# Shares of the whole budget. What a stage leaves over goes to the benchmark, which takes what there is.
LIMITS = {"build": 0.4, "tests": 0.4, "memcheck": 0.4, "racecheck": 0.4}
# Seconds to merge and print.
RESERVE = 8.0
# Processes that share the GPU for the tests, where pytest-xdist is installed.
WORKERS = 12
# Keys of cases.PRECISIONS: where the targets for bfloat16 products apply.
NARROW = {"autocast": "autocast", "bfloat16": "bf16 throughout"}


# ---------------------------------------------------------------- what a result of gpu.py says


def median(row: dict[str, Any] | None, contender: str, part: str | None = None) -> float | None:
    """A median in microseconds out of a row of the result; None if it was not measured."""
    numbers = (row or {}).get("contenders", {}).get(contender, {})
    if part is not None:
        numbers = numbers.get(part, {})
    return numbers.get("median_us")


def ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None or b == 0 else a / b


def _verdict(met: bool | None) -> str:
    return "not measured" if met is None else ("met" if met else "missed")


def _against_compiled(result: dict[str, Any]) -> list[tuple[float, str]]:
    """(ours over torch.compile's, what) for everything where both were measured."""
    found: list[tuple[float | None, str]] = []
    for row in result["kernels"]:
        found.append((ratio(median(row, "ours"), median(row, "compiled")), row["case"]))
    for row in result["layers"]:
        for estimator in ("lrt", "bbb"):
            for kind in ("forward", "step"):
                mine = median(row, estimator, kind)
                for rival in ("compiled", "autotuned"):
                    theirs = median(row, f"{rival}_{estimator}", kind)
                    found.append((ratio(mine, theirs), f"{row['case']}: {estimator} {kind}"))
    for row in result["models"]:
        found.append((ratio(median(row, "lrt"), median(row, "compiled_lrt")), row["case"]))
    return sorted(((r, name) for r, name in found if r is not None), reverse=True)


def _memory_excess(row: dict[str, Any]) -> int | None:
    """Bytes of an LRT step's peak above what it may take; both peaks are above the resident tensors.

    The target, with the resident parameters counted: torch.nn's peak + the Bayesian parameters (mu and rho) +
    an output for each LRT layer. The Bayesian model holds one set of parameters more to begin with, which
    leaves one set for the step.
    """
    peaks = [row.get("contenders", {}).get(name, {}).get("peak_bytes") for name in ("lrt", "nn")]
    if None in peaks or row.get("parameter_bytes") is None:
        return None
    return peaks[0] - (peaks[1] + row["parameter_bytes"] + row["output_bytes"])


def targets(result: dict[str, Any], smoke: bool) -> list[dict[str, Any]]:
    """Each numeric target: what was wanted, what was measured, and whether it is met."""
    found = []

    def add(target: str, met: bool | None, measured: str) -> None:
        found.append({"target": target, "verdict": _verdict(met), "measured": measured})

    count = max((row["elements"] for row in result["kernels"] if "elements" in row), default=0)
    shares = sorted(
        (row["contenders"]["ours"]["of_copy_bandwidth"], row["kernel"])
        for row in result["kernels"]
        if row.get("elements") == count and "of_copy_bandwidth" in row["contenders"]["ours"]
    )
    low = [f"{name} {100 * share:.0f} %" for share, name in shares if share < 0.8]
    text = f"{len(shares)} kernels"
    if low:
        text = "; ".join(low[:4]) + (f" and {len(low) - 4} more" if len(low) > 4 else "")
    elif shares:
        text += f", the lowest {100 * shares[0][0]:.0f} % ({shares[0][1]})"
    size = f", {count:,} elements" if count else ""
    add(f"every parameter kernel >= 80 % of copy bandwidth{size}", not low if shares else None, text)

    name = "linear 32x32" if smoke else "linear 4096x4096, batch 4096"
    square = [
        row
        for row in result["layers"]
        if row.get("precision") in NARROW and row["case"].startswith(name) and "autotune" not in row["case"]
    ]
    for kind, limit, products in (("forward", 1.15, "two"), ("step", 1.25, "six")):
        known = []
        for row in square:
            over = ratio(median(row, "lrt", kind), median(row, "bare_lrt", kind))
            if over is not None:
                known.append((over, NARROW[row["precision"]]))
        add(
            f"LRT linear 4096^3 bf16, {kind} <= {limit} x its {products} bare products",
            all(over <= limit for over, _ in known) if known else None,
            ", ".join(f"{over:.2f} ({precision})" for over, precision in known),
        )

    rivals = _against_compiled(result)
    slower = [item for item in rivals if item[0] >= 1]
    text = f"{len(rivals)} comparisons"
    if slower:
        text += f", slower in {len(slower)}: " + "; ".join(f"{name} {r:.2f}" for r, name in slower[:3])
    elif rivals:
        text += f", the closest {rivals[0][0]:.2f} ({rivals[0][1]})"
    add("faster than torch.compile of the formulas in every case", not slower if rivals else None, text)

    excess = [
        (over, row["case"])
        for row in (*result["layers"], *result["models"])
        if (over := _memory_excess(row)) is not None
    ]
    excess.sort(reverse=True)
    above = [item for item in excess if item[0] > 0]
    text = f"{len(excess)} cases"
    if above:
        text += f", above in {len(above)}: " + "; ".join(f"{n} by {b / 2**20:.1f} MiB" for b, n in above[:3])
    add(
        "LRT step's peak memory <= torch.nn's + parameters + one output a layer",
        not above if excess else None,
        text,
    )
    return found


# ---------------------------------------------------------------- the printed table


def _cell(value: float | None, form: str, width: int) -> str:
    return f"{'-' if value is None else format(value, form):>{width}}"


def _mib(value: int | None, width: int = 8) -> str:
    return _cell(None if value is None else value / 2**20, ".1f", width)


def _short(name: str) -> str:
    for long, short in (
        ("linear ", "lin "), (", batch ", " b"), ("bf16 autocast", "amp"), ("bf16 throughout", "bf16"),
        ("channels_last", "cl"), ("float32", "f32"), ("max-autotune", "max-at"), (",", ""),
    ):  # fmt: skip
        name = name.replace(long, short)
    return name


def _kernel_lines(result: dict[str, Any]) -> list[str]:
    """One line a kernel: the larger number of elements in full, the smaller one beside it."""
    by_name: dict[str, dict[int, dict[str, Any]]] = {}
    for row in result["kernels"]:
        if "contenders" in row:
            by_name.setdefault(row["kernel"], {})[row["elements"]] = row
    counts = sorted({count for found in by_name.values() for count in found}, reverse=True)[:2]
    large, small = counts[0], counts[-1]
    lines = [
        f"{'parameter kernels':28} {'':6} {f'{large:,} elements':^37} {f'{small:,} elements':>18}",
        f"{'':28} {'B/elem':>6} {'us':>9} {'% copy':>6} {'eager/ours':>10} {'comp/ours':>9} "
        f"{'us':>11} {'% copy':>6}",
    ]

    def share(row: dict[str, Any] | None) -> float | None:
        found = (row or {}).get("contenders", {}).get("ours", {}).get("of_copy_bandwidth")
        return None if found is None else 100 * found

    for name, found in by_name.items():
        row, other = found.get(large), found.get(small) if small != large else None
        mine = median(row, "ours")
        cells = [
            _cell(mine, ".1f", 9),
            _cell(share(row), ".0f", 6),
            _cell(ratio(median(row, "eager"), mine), ".2f", 10),
            _cell(ratio(median(row, "compiled"), mine), ".2f", 9),
            _cell(median(other, "ours"), ".1f", 11),
            _cell(share(other), ".0f", 6),
        ]
        lines.append(f"{name:28} {(row or other or {})['bytes_per_element']:6d} {' '.join(cells)}")
    return lines


def _layer_lines(result: dict[str, Any]) -> list[str]:
    head = ("us", "/bare", "/comp", "us", "/bare", "/comp", "/nn", "/eager", "MiB", "nn MiB")
    widths = (8, 6, 6, 9, 6, 6, 6, 6, 8, 8)
    lines = [
        f"{'layers: ours over others (comp: compiled)':41} {'forward':^22} {'step':^37} {'peak':^17}",
        f"{'':41} " + " ".join(f"{h:>{w}}" for h, w in zip(head, widths, strict=True)),
    ]
    for row in result["layers"]:
        for estimator in ("lrt", "bbb"):
            if estimator not in row.get("contenders", {}):
                continue
            cells = []
            rival = "autotuned" if f"autotuned_{estimator}" in row["contenders"] else "compiled"
            for kind in ("forward", "step"):
                mine = median(row, estimator, kind)
                cells += [mine] + [
                    ratio(mine, median(row, f"{other}_{estimator}", kind)) for other in ("bare", rival)
                ]
            step = median(row, estimator, "step")
            cells += [
                ratio(step, median(row, "nn", "step")),
                ratio(step, median(row, f"eager_{estimator}", "step")),
            ]
            forms = [".1f", ".2f", ".2f"] * 2 + [".2f"] * 2
            text = " ".join(_cell(c, f, w) for c, f, w in zip(cells, forms, widths, strict=False))
            peaks = [row["contenders"].get(name, {}).get("peak_bytes") for name in (estimator, "nn")]
            name = f"{_short(row['case'])} {estimator}"
            lines.append(f"{name:41} {text} " + " ".join(_mib(p) for p in peaks))
    return lines


def _model_lines(result: dict[str, Any]) -> list[str]:
    lines = [
        f"{'models, training step, wall clock':41} {'us':>9} {'/nn':>6} {'/eager':>6} {'/comp':>6} "
        f"{'MiB':>8} {'nn MiB':>8}"
    ]
    for row in result["models"]:
        for estimator in ("lrt", "bbb"):
            mine = median(row, estimator)
            if mine is None:
                continue
            peaks = [row["contenders"].get(name, {}).get("peak_bytes") for name in (estimator, "nn")]
            ratios = [
                ratio(mine, median(row, n)) for n in ("nn", f"eager_{estimator}", f"compiled_{estimator}")
            ]
            lines.append(
                f"{_short(row['case']) + ' ' + estimator:41} {_cell(mine, '.1f', 9)} "
                + " ".join([*(_cell(r, ".2f", 6) for r in ratios), *(_mib(p) for p in peaks)])
            )
    return lines


def _predict_lines(result: dict[str, Any]) -> list[str]:
    lines = ["predict: us (loop over eager LRT / ours, loop over eager BBB / ours), by number of draws"]
    groups: dict[str, list[str]] = {}
    for row in result["predict"]:
        mine = median(row, "ours")
        if mine is None:
            continue
        rivals = ", ".join(_cell(ratio(median(row, n), mine), ".2f", 1) for n in ("eager_lrt", "eager_bbb"))
        groups.setdefault(row["group"], []).append(f"{row['samples']}: {mine:.0f} ({rivals})")
    return lines + [f"  {name:34} " + "   ".join(cells) for name, cells in groups.items()]


def _failures(result: dict[str, Any]) -> list[str]:
    lines, skipped, left_out = [], 0, 0
    for section in ("kernels", "layers", "models", "predict"):
        for row in result[section]:
            skipped += "skipped" in row
            if "error" in row:
                lines.append(f"{_short(row['case'])}: {row['error'][:90]}")
            for name, numbers in row.get("contenders", {}).items():
                parts = [numbers, numbers.get("forward", {}), numbers.get("step", {})]
                error = next((p["error"] for p in parts if "error" in p), None)
                if error is None:
                    continue
                if error.startswith("skipped"):
                    left_out += 1
                else:
                    lines.append(f"{_short(row['case'])}, {name}: {error[:90]}")
    rest = [f"... and {len(lines) - 10} more"] if len(lines) > 10 else []
    counts = f"rows skipped: {skipped}; contenders left out: {left_out}; failures: {len(lines)}"
    return [counts, *(f"  {line}" for line in lines[:10]), *rest]


def render(result: dict[str, Any]) -> str:
    """The result on one page."""
    where = result["provenance"]
    name = where.get("gpu", {}).get("name", where["cpu"])
    copy, products = result.get("copy", {}), result.get("products", {})
    lines = [
        f"{name}, torch {where['torch']}, commit {where['commit']}",
        f"copy {copy.get('bytes_per_second', 0) / 1e12:.2f} TB/s; {products.get('size', 0)}^3 products: bf16 "
        f"{products.get('bfloat16_flops', 0) / 1e12:.0f} TFLOP/s, float32 "
        f"({result['float32_matmul_precision']}) {products.get('float32_flops', 0) / 1e12:.0f} TFLOP/s",
    ]
    if result["smoke"]:
        lines.append("smoke run: the numbers mean nothing")
    if not result["native"]:
        lines.append("no native kernels for this device: the ops run on the reference path")
    parts = {
        "kernels": _kernel_lines,
        "layers": _layer_lines,
        "models": _model_lines,
        "predict": _predict_lines,
    }
    for section, part in parts.items():
        if any("contenders" in row for row in result[section]):
            lines += ["", *part(result)]
    lines += ["", *_failures(result)]
    lines += ["", "targets"]
    for target in result["targets"]:
        lines.append(f"  {target['verdict']:12} {target['target']}")
        if target["measured"]:
            lines.append(f"  {'':12}   {target['measured'][:150]}")
    return "\n".join(line.rstrip() for line in lines) + "\n"


# ---------------------------------------------------------------- stages


@dataclass
class Stage:
    """A command with a time limit, its output in a file."""

    name: str
    command: list[str]
    limit: float
    log: Path
    environment: dict[str, str] = field(default_factory=dict)
    status: str = "not run"  # then: passed, failed, timed out
    seconds: float = 0.0
    process: subprocess.Popen[bytes] | None = None
    begun: float = 0.0

    def start(self) -> None:
        self.begun = time.monotonic()
        if self.limit <= 0:
            self.status = "timed out"
            return
        self.log.parent.mkdir(parents=True, exist_ok=True)
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **self.environment}
        with self.log.open("wb") as output:
            # A group of its own, so that everything it starts can be stopped with it.
            self.process = subprocess.Popen(
                self.command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def poll(self) -> bool:
        """Whether it is over; stops it at its limit."""
        if self.process is None:
            return True
        code = self.process.poll()
        self.seconds = round(time.monotonic() - self.begun, 1)
        if code is None and self.seconds < self.limit:
            return False
        if code is None:
            self.stop()
        self.status = "timed out" if code is None else ("passed" if code == 0 else "failed")
        self.process = None
        return True

    def stop(self) -> None:
        """Ends the process and everything it started."""
        if self.process is None:
            return
        # SIGINT first, on which pytest still says what failed and why; SIGKILL in any case, for children may
        # outlive the leader of their group.
        for sig, patience in ((signal.SIGINT, 5.0), (signal.SIGTERM, 3.0), (signal.SIGKILL, 5.0)):
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(self.process.pid, sig)
                self.process.wait(patience)

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def record(self) -> dict[str, Any]:
        found: dict[str, Any] = {"status": self.status, "seconds": self.seconds}
        if self.status != "passed":
            found["last_lines"] = [line[:200] for line in self.text().splitlines()[-8:]]
        return found


def run_side_by_side(stages: list[Stage]) -> None:
    """Runs the stages at once and waits for all of them."""
    try:
        for stage in stages:
            stage.start()
        while not all([stage.poll() for stage in stages]):
            time.sleep(0.2)
    finally:
        for stage in stages:
            stage.stop()
    for stage in stages:
        say(f"{stage.name}: {stage.status} after {stage.seconds:.0f} s")


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def device_facts(device: str) -> dict[str, Any]:
    """Asked of a process of its own: this one holds no memory of the GPU, and no bug there can end it."""
    if device == "cpu":
        return {"name": "cpu"}
    program = (
        "import json, torch; p = torch.cuda.get_device_properties(0); "
        "print(json.dumps({'name': p.name, 'capability': f'{p.major}.{p.minor}'}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise SystemExit(f"gpu_report: torch sees no GPU here:\n{done.stderr[-600:]}")
    return json.loads(done.stdout.splitlines()[-1])


def sanitizer() -> str | None:
    """compute-sanitizer, on the PATH or beside nvcc."""
    found = shutil.which("compute-sanitizer")
    if found:
        return found
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    nvcc = shutil.which("nvcc")
    if nvcc:
        homes.append(str(Path(nvcc).resolve().parent.parent))
    for home in filter(None, homes):
        for place in ("bin/compute-sanitizer", "compute-sanitizer/compute-sanitizer"):
            if (Path(home) / place).is_file():
                return str(Path(home) / place)
    return None


def why_not_native(device: str) -> str | None:
    """Why the kernels would not run, asked of a process of its own; None if they would."""
    program = (
        "import torch, bbb_fast; from bbb_fast import _backend; from bbb_fast.functional import normal\n"
        f"assert _backend.use_native(torch.device({device!r})), _backend.why_not_native()\n"
        f"rng = torch.tensor([1, 2], device={device!r})\n"
        "assert normal((5,), rng).isfinite().all()\n"
        "try: normal((5,), rng[:1])\n"
        "except ValueError as error: assert '[1]' in str(error), error\n"
        "else: raise AssertionError('a wrong rng was taken')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]


def build_stage(facts: dict[str, Any], limit: float, work: Path) -> Stage:
    environment = {"MAX_JOBS": str(os.cpu_count() or 1)}
    if "capability" in facts:
        environment |= {"FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": facts["capability"]}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return Stage("build", command, limit, work / "build.log", environment)


def test_stage(device: str, smoke: bool, limit: float, work: Path) -> tuple[Stage, list[str]]:
    """The tests, and those of the list that are not there."""
    wanted = SMOKE_TESTS if smoke else TESTS
    files = [f"python_tests/{name}" for name in wanted]
    missing = [name for name in files if not (ROOT / name).exists()]
    # One line a test: if the run is stopped, what it got to is known.
    command = [sys.executable, "-m", "pytest", *(f for f in files if f not in missing), "--device", device]
    command += [
        "-m",
        "not slow",
        "-vv",
        "-rfEs",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        "--continue-on-collection-errors",
    ]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(min(WORKERS, os.cpu_count() or 1))]
    return Stage("tests", command, limit, work / "tests.log"), missing


def test_record(stage: Stage, missing: list[str]) -> dict[str, Any]:
    """Counts by outcome, the names of what failed, and the summary line if the run got that far."""
    text = stage.text()
    words = "PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS"
    outcomes = dict(re.findall(rf"^(\S+::.*?) ({words})\b", text, re.MULTILINE))
    # With several processes the outcome comes first.
    by_worker = re.findall(rf"^\[gw\d+\] \[ *\d+%\] ({words}) (\S+::.*?) *$", text, re.MULTILINE)
    outcomes |= {name: outcome for outcome, name in by_worker}
    # The summary at the end; a file that could not be collected stands here only.
    for outcome, name in re.findall(r"^(FAILED|ERROR) (python_tests/.*?)(?: - .*)?$", text, re.MULTILINE):
        outcomes[name] = outcome
    counts: dict[str, int] = {}
    for outcome in outcomes.values():
        counts[outcome.lower()] = counts.get(outcome.lower(), 0) + 1
    kinds = "passed|failed|skipped|error|deselected"
    summary = re.findall(rf"^=* ?(\d+ (?:{kinds})[^=]*?) ?=*$", text, re.MULTILINE)
    return {
        **stage.record(),
        "counts": counts,
        "summary": summary[-1].strip() if summary else None,
        "failures": [name for name, outcome in outcomes.items() if outcome in ("FAILED", "ERROR")],
        "missing_files": missing,
    }


def sanitizer_stages(tool: str | None, device: str, limits: dict[str, float], work: Path) -> list[Stage]:
    """memcheck and racecheck; without compute-sanitizer the same program alone, to see that it runs."""
    program = [sys.executable, "benchmarks/sanitize.py", "--device", device]
    if tool is None:
        return [Stage("ops", program, limits["memcheck"], work / "ops.log")]
    # Our kernels alone: their mangled names hold the namespace.
    options = ["--kernel-name", "kns=bbb_fast", "--target-processes", "application-only"]
    options += ["--launch-timeout", "60", "--show-backtrace", "device", "--error-exitcode", "9"]
    # torch probes for features with calls that may fail; only what kernels do counts here.
    extra = {"memcheck": ["--report-api-errors", "no"], "racecheck": []}
    # racecheck is slow, and what it looks for does not depend on how a tensor ends.
    sizes = {"memcheck": [], "racecheck": ["--sizes", "5", "4097", "20011"]}
    # Without torch's cache each tensor is an allocation of its own, whose end memcheck knows.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [
        Stage(
            name,
            [tool, "--tool", name, *options, *extra[name], *program, *sizes[name]],
            limits[name],
            work / f"{name}.log",
            environment,
        )
        for name in ("memcheck", "racecheck")
    ]


def sanitizer_record(stage: Stage) -> dict[str, Any]:
    text = stage.text()
    found = stage.record()
    errors = re.findall(r"ERROR SUMMARY: (\d+) error", text)
    hazards = re.findall(r"RACECHECK SUMMARY: (\d+) hazard[^(]*\((\d+) error\S*, (\d+) warning", text)
    if errors:
        found["errors"] = int(errors[-1])
    if hazards:
        found |= dict(zip(("hazards", "errors", "warnings"), map(int, hazards[-1]), strict=True))
    if "Device not supported" in text:
        found |= {"status": "not available", "reason": "compute-sanitizer: device not supported here"}
    elif stage.status == "passed" and found.get("errors") != 0 and stage.name != "ops":
        found["status"] = "failed"
    if report := re.findall(r"^========= *((?!COMPUTE-SANITIZER)\S.*)$", text, re.MULTILINE):
        # What was found first, and where.
        found["report"] = [line[:200] for line in report[:12]]
    if cases := re.findall(r"^sanitize: (\d+) cases", text, re.MULTILINE):
        found["cases"] = int(cases[-1])
    return found


def summary_lines(stages: dict[str, dict[str, Any]]) -> list[str]:
    lines = ["stages"]
    for name, stage in stages.items():
        notes = []
        if stage.get("summary"):
            notes.append(stage["summary"])
        elif stage.get("counts"):
            notes.append(", ".join(f"{n} {what}" for what, n in stage["counts"].items()))
        for key in ("errors", "hazards", "warnings", "cases", "reason"):
            if key in stage:
                notes.append(f"{key} {stage[key]}")
        if stage.get("missing_files"):
            notes.append(f"not there: {', '.join(stage['missing_files'])}")
        lines.append(f"  {name:10} {stage['status']:14} {stage.get('seconds', 0):6.1f} s  {'; '.join(notes)}")
        lines += [f"    {failure[:105]}" for failure in stage.get("failures", [])[:12]]
        if len(stage.get("failures", [])) > 12:
            lines.append(f"    ... and {len(stage['failures']) - 12} more")
        if stage["status"] in ("failed", "timed out") and not stage.get("failures"):
            shown = stage["report"][:6] if "report" in stage else stage.get("last_lines", [])[-4:]
            lines += [f"    | {line[:105]}" for line in shown]
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
        return min(LIMITS.get(stage, 1.0) * args.budget, left)

    facts = device_facts(args.device)
    say(f"{facts['name']}: {args.budget:.0f} s at most; logs in {work}")
    stages: dict[str, dict[str, Any]] = {}
    if args.no_build:
        stages["build"] = {"status": "skipped", "reason": "--no-build"}
    else:
        build = build_stage(facts, limit("build"), work)
        run_side_by_side([build])
        stages["build"] = build.record()
    if reason := why_not_native(args.device):
        # What the reference path takes is not what anyone came here for.
        raise SystemExit(f"gpu_report: the kernels do not run here: {reason}; see {work / 'build.log'}")

    tool = sanitizer() if args.device == "cuda" else None
    tests, missing = test_stage(args.device, args.smoke, limit("tests"), work)
    checks = sanitizer_stages(tool, args.device, {name: limit(name) for name in LIMITS}, work)
    run_side_by_side([tests, *checks])
    stages["tests"] = test_record(tests, missing)
    if tool is None:
        reason = "compute-sanitizer was not found" if args.device == "cuda" else "no GPU"
        stages |= {name: {"status": "not available", "reason": reason} for name in ("memcheck", "racecheck")}
    stages |= {stage.name: sanitizer_record(stage) for stage in checks}

    measured = work / "gpu.json"
    measured.unlink(missing_ok=True)
    command = [sys.executable, "benchmarks/gpu.py", "--device", args.device, "--out", str(measured)]
    command += ["--budget", f"{max(limit('benchmark') - 12, 1):.0f}"] + (["--smoke"] if args.smoke else [])
    benchmark = Stage("benchmark", command, limit("benchmark"), work / "gpu.log")
    run_side_by_side([benchmark])
    stages["benchmark"] = benchmark.record()

    # Written after every row: also there when the benchmark was stopped.
    result = json.loads(measured.read_text()) if measured.exists() else {}
    path = out / f"gpu-{slug(facts['name'])}{'-smoke' if args.smoke else ''}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"device": facts, "stages": stages, **result}, indent=1) + "\n")
    print()
    if result:
        print(render(result))
    print("\n".join(summary_lines(stages)))
    print(f"wrote {path} after {time.monotonic() - start:.0f} s")
    # The benchmark may run out of time: it says itself what it has not measured.
    bad = {name for name, stage in stages.items() if stage["status"] in ("failed", "timed out")}
    return int(bool(bad - ({"benchmark"} if benchmark.status == "timed out" else set())))


if __name__ == "__main__":
    sys.exit(main())
