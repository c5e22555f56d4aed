"""Times the kernels, layers, models and predictions on a GPU against everything else one could use there.

    python benchmarks/gpu.py [--budget SECONDS] [--out FILE] [--case SUBSTRING] [--device cuda] [--smoke]

Contenders: ours; torch.nn; the textbook formulas in eager mode and under torch.compile (fullgraph, static
shapes, output and KL in one graph; compiling does not count); bayesian-torch where it is installed; and bare:
the matrix products alone that the step cannot do without (LRT forward 2 and step 6, BBB 1 and 3; torch.mm
into preallocated tensors, or F.conv2d and aten.convolution_backward). All contenders of a row run in turn, in
one process; medians with quartiles. ``--device cpu --smoke`` runs every path on tiny sizes: its numbers mean
nothing.

Kernels and layers: time on the device by CUDA events around one call, its kernels queued ahead (launch
overhead does not count), the L2 cache filled with other data before each. forward is the output alone, under
no_grad; a step is forward, KL and backward (input, every parameter) for a given gradient of the output.
Models (forward, loss with KL, backward) and prediction: wall clock of a call, launches included, several in a
row. peak: the most memory a step holds above what is resident before it. bandwidth: bytes that the algorithm
must read and write, over time, over the copy bandwidth (bytes that a tensor copy reads and writes, over its
time). float32 products are tf32: torch.set_float32_matmul_precision('high'), and cuDNN's default;
torch.backends.cudnn.benchmark is on, for every contender.

Rows come in order of importance. Those that the time budget does not reach stand in the result as skipped,
and a contender that fails stands there with its error. The result file is rewritten after every row.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from cases import (
    GPU_AUTOTUNED_CASES,
    GPU_CASES,
    GPU_SMOKE_AUTOTUNED_CASES,
    GPU_SMOKE_CASES,
    KERNELS,
    Case,
    Kernel,
    ModelCase,
    model_cases,
)
from gpu_page import page, targets
from harness import (
    Effort,
    Job,
    SkippedError,
    clock,
    contest,
    describe,
    gpu,
    provenance,
    summary,
    warmed_up,
    write_json,
    write_text,
)
from layers import Stepper
from rivals import CONTENDERS, compiled, compiled_formulas
from torch import Tensor, nn

import bbb_fast
from bbb_fast._backend import use_native
from bbb_fast.layers.base import BayesianLayer

# Seconds that a row without torch.compile takes, about: torch.compile leaves them to the rows to come.
ROW_SECONDS = {"kernels": 0.5, "layers": 2.5, "models": 2.0, "predict": 1.0}
# What compiling a layer takes, by the first word of the contender.
COMPILE_SECONDS = {"compiled": 8.0, "autotuned": 45.0}
LAYER_CONTENDERS: tuple[str, ...] = (
    "lrt", "bbb", "nn", "bare_lrt", "bare_bbb", "eager_lrt", "eager_bbb", "bayesian_torch",
)  # fmt: skip
KL_SCALE = 1 / 50_000
LONGEST_PAUSE = 0.03

T = TypeVar("T")
Rows = dict[str, dict[str, Any]]


def nothing() -> None:
    return None


class Timing(NamedTuple):
    """Seconds that count, and seconds the caller's thread was busy starting the work."""

    seconds: float
    host: float


Timed = Callable[[], Timing]


def timing_row(timings: Sequence[Timing]) -> dict[str, Any]:
    host = median(t.host for t in timings)
    return {**summary([t.seconds for t in timings]), "host_us": host * 1e6}


class Clock:
    """Times one call on a device, the CPU or a GPU, in the two ways that the module describes."""

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
        self._start, self._stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # An idle GPU's clock is slow; a pause counted in its cycles would be too short later.
        until = time.perf_counter() + 0.3
        while time.perf_counter() < until:
            self._flush()
            self.synchronize()
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
        if not self.cuda:
            seconds = clock(run)
            return Timing(seconds, seconds)
        host: list[float] = []
        torch.cuda._sleep(int(min(pause, LONGEST_PAUSE) * self._cycles_per_second))
        self._flush()
        return Timing(self._events(lambda: host.append(clock(run))), host[0])

    def back_to_back(self, run: Callable[[], Any], calls: int) -> Timing:
        """Seconds a call of ``calls`` calls in a row, from an idle device to an idle device."""
        self.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        started = time.perf_counter()
        self.synchronize()
        return Timing((time.perf_counter() - start) / calls, (started - start) / calls)


@dataclass
class Session:
    """What every row needs: the device, the clock, the time that is left, and the sizes."""

    device: torch.device
    clock: Clock
    deadline: float
    smoke: bool
    copy_bandwidth: float = math.nan  # bytes a second, read and written
    reserved: float = 0.0  # seconds, for the rows to come

    @property
    def effort(self) -> Effort:
        """To measure one row."""
        return Effort(3, 0.2, 2, 2) if self.smoke else Effort(40, 1.5, 7, 4)

    def left(self) -> float:
        return self.deadline - time.perf_counter()

    def need(self, seconds: float) -> None:
        """Raises SkippedError unless so many seconds are left beside those of the rows to come."""
        if self.left() < seconds + self.reserved:
            raise SkippedError("the time budget")

    def alone(self, run: Callable[[Any], Any], prepare: Callable[[], Any] = nothing) -> Timed:
        """A call's time on the device; ``prepare`` runs before each, ``run`` gets what it returned.

        The first calls compile, autotune and allocate; the last of them show how long launching takes.
        """
        pause = 0.0

        def once() -> Timing:
            nonlocal pause
            value = prepare()
            timing = self.clock.alone(lambda: run(value), pause)
            pause = 1.5 * timing.host + 1e-4
            return timing

        return warmed_up(once, self.effort.warmup)

    def median(self, run: Callable[[], Any], times: int) -> float:
        """Seconds on the device."""
        once = self.alone(lambda _: run())
        return median(once().seconds for _ in range(3 if self.smoke else times))

    def in_a_row(self, run: Callable[[], Any]) -> Timed:
        """Wall clock of a call; 10 ms of them, so that the synchronisation at the end is a small part."""
        self.clock.back_to_back(run, 3)
        one = self.clock.back_to_back(run, 2).seconds
        calls = 1 if self.smoke else max(1, min(50, math.ceil(0.01 / one)))
        return lambda: self.clock.back_to_back(run, calls)

    def measure(
        self,
        contenders: Mapping[str, Callable[[], Callable[[], T]]],
        row: Callable[[list[T]], dict[str, Any]],
        facts: Mapping[str, dict[str, Any]] | None = None,
    ) -> Rows:
        """Times the contenders in turn; returns their rows: ``facts`` and timings, or the error."""
        times, errors = contest(contenders, self.effort)
        facts = facts or {}
        return {n: errors.get(n) or {**facts.get(n, {}), **row(times[n])} for n in contenders}

    def peak_bytes(self, step: Callable[[], Any], clear: Callable[[], Any]) -> int | None:
        """The most memory a step holds above what was there before it; None without a GPU."""
        if not self.clock.cuda:
            return None
        clear()
        torch.cuda.synchronize(self.device)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        step()
        torch.cuda.synchronize(self.device)
        peak = torch.cuda.max_memory_allocated(self.device) - before
        clear()
        return peak

    def free(self) -> None:
        """Nothing of one row is left for the next one."""
        gc.collect()
        torch.compiler.reset()
        if self.clock.cuda:
            torch.cuda.empty_cache()


# ---------------------------------------------------------------- what the device can do


def measure_copy(session: Session) -> dict[str, Any]:
    """Bytes a second, read and written, of a tensor copy: the yardstick of the parameter kernels."""
    source = torch.randn((1 << 20) if session.smoke else (1 << 28), device=session.device)
    target = torch.empty_like(source)
    seconds = session.median(partial(target.copy_, source), 21)
    session.copy_bandwidth = 2 * source.nbytes / seconds
    return {"tensor_bytes": source.nbytes, "bytes_per_second": session.copy_bandwidth}


def measure_products(session: Session) -> dict[str, Any]:
    """Rates of large products, of random numbers: what the layers' products could reach."""
    size = 128 if session.smoke else 8192
    result: dict[str, Any] = {"size": size}
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        a, b = (torch.randn(size, size, device=session.device, dtype=dtype) for _ in range(2))
        seconds = session.median(partial(torch.mm, a, b.t(), out=torch.empty_like(a)), 11)
        result[f"{name}_flops"] = 2 * size**3 / seconds
    return result


# ---------------------------------------------------------------- parameter kernels


def run_kernel(kernel: Kernel, count: int, compile: bool, session: Session) -> dict[str, Any]:
    """Time, and share of the copy bandwidth, of every contender for one pass over ``count`` elements."""
    t = kernel.tensors(count, session.device)

    def our_op() -> Timed:
        # The raw ops have no gradient; the formulas' leaves want one.
        arguments = kernel.arguments({name: tensor.detach() for name, tensor in t.items()})
        op = getattr(torch.ops.bbb_fast, kernel.op)
        return session.alone(lambda _: op(*arguments))

    def of(formula: Callable[..., Any]) -> Timed:
        inputs, leaves = [t[name] for name in kernel.inputs], [t[name] for name in kernel.leaves]
        if not leaves:
            return session.alone(torch.no_grad()(lambda _: formula(*inputs)))
        for leaf in leaves:
            leaf.requires_grad_()

        def backward(outputs: Tensor | tuple[Tensor, ...]) -> Any:
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            # A scalar is a KL, anything else takes the given gradient.
            gradients = [t["grad"] if y.dim() else t["one"] for y in outputs]
            return torch.autograd.grad(outputs, leaves, gradients)

        return session.alone(backward, prepare=lambda: formula(*inputs))

    def of_compiled(formula: Callable[..., Any]) -> Timed:
        session.need(4.0)
        return of(compiled(formula))

    contenders = {"ours": our_op}
    if kernel.formula is not None:
        contenders["eager"] = partial(of, kernel.formula)
        if compile and kernel.compiled:
            contenders["compiled"] = partial(of_compiled, kernel.formula)
    rows = session.measure(contenders, timing_row)
    for row in rows.values():
        if "median_us" in row:
            rate = kernel.bytes_per_element * count / (row["median_us"] * 1e-6)
            row["of_copy_bandwidth"] = rate / session.copy_bandwidth
    sizes = {"elements": count, "bytes_per_element": kernel.bytes_per_element}
    return {"kernel": kernel.name, **sizes, "contenders": rows}


# ---------------------------------------------------------------- layers


def bare_product(case: Case, device: torch.device) -> tuple[Callable[[], Any], ...]:
    """A product alone, on operands of the type it runs in: forward, then what its backward takes."""
    dtype = torch.float32 if case.precision == "float32" else torch.bfloat16
    n, i, o, k, p = case.batch, case.inputs, case.outputs, case.kernel, case.padding

    def random(*shape: int) -> Tensor:
        return case.place(torch.randn(shape, device=device), device, dtype)

    if k:
        size = case.output_size
        x, W, g = random(n, i, case.size, case.size), random(o, i, k, k), random(n, o, size, size)
        operands = (g, x, W, None, [1, 1], [p, p], [1, 1], False, [0, 0], 1, [True, True, False])
        return (
            lambda: F.conv2d(x, W, padding=p),
            lambda: torch.ops.aten.convolution_backward(*operands),
        )
    x, W, g = random(n, i), random(o, i), random(n, o)
    y, gx, gW = torch.empty_like(g), torch.empty_like(x), torch.empty_like(W)
    return (
        lambda: torch.mm(x, W.t(), out=y),
        lambda: torch.mm(g, W, out=gx),
        lambda: torch.mm(g.t(), x, out=gW),
    )


def run_layer(case: Case, session: Session) -> dict[str, Any]:
    """Forward, step and peak memory of every contender for one layer."""
    torch.manual_seed(0)
    x = case.input(session.device).requires_grad_()
    peaks: dict[str, dict[str, Any]] = {}

    def parts(forward: Callable[[Any], Any], step: Callable[[Any], Any], clear: Callable[[], None]) -> Any:
        timed = {"forward": session.alone(forward), "step": session.alone(step, clear)}
        clear()
        return lambda: {part: once() for part, once in timed.items()}

    def layer(name: str) -> Any:
        kind = name.partition("_")[0]
        if kind in COMPILE_SECONDS:
            session.need(COMPILE_SECONDS[kind])
        if kind == "autotuned":
            made = compiled_formulas("lrt", case, session.device, autotuned=True)
        else:
            made = CONTENDERS[name].build(case, session.device)
        if case.precision == "autocast":
            autocast = torch.autocast(session.device.type, dtype=torch.bfloat16)
            made = made._replace(output=autocast(made.output), output_with_kl=autocast(made.output_with_kl))
        output = torch.no_grad()(made.output)
        stepper = Stepper(made, x, torch.randn_like(output(x)), repeat=1)
        run = parts(lambda _: output(x), lambda _: stepper.step(), stepper.clear)
        peaks[name] = {"peak_bytes": session.peak_bytes(stepper.step, stepper.clear)}
        return run

    def bare(name: str) -> Any:
        products = [bare_product(case, session.device) for _ in range(2 if name == "bare_lrt" else 1)]
        peaks[name] = {"peak_bytes": None}
        return parts(
            lambda _: [forward() for forward, *_ in products],
            lambda _: [call() for calls in products for call in calls],
            nothing,
        )

    names = ("lrt", "bare_lrt", "eager_lrt", "autotuned_lrt") if case.autotuned else LAYER_CONTENDERS
    names += tuple(f"compiled_{estimator}" for estimator in case.compiled)
    rows = session.measure(
        {name: partial(bare if name.startswith("bare") else layer, name) for name in names},
        lambda times: {part: timing_row([t[part] for t in times]) for part in ("forward", "step")},
        peaks,
    )
    outputs = case.batch * case.outputs * (case.output_size**2 if case.kernel else 1)
    return {
        "precision": case.precision,
        "parameter_bytes": sum(p.nbytes for p in case.layer("nn", "meta").parameters()),
        "output_bytes": outputs * x.element_size(),
        "contenders": rows,
    }


# ---------------------------------------------------------------- models and prediction


def model_step(
    net: nn.Module, function: Callable[[Tensor], Any], x: Tensor, target: Tensor
) -> Callable[[], None]:
    """A training step without the optimizer."""

    def step() -> None:
        net.zero_grad()
        result = function(x)
        output, kl = result if isinstance(result, tuple) else (result, 0.0)
        (F.cross_entropy(output, target) + kl * KL_SCALE).backward()

    return step


def graphed(step: Callable[[], None], net: nn.Module, session: Session) -> Callable[[], None]:
    """The step as a CUDA graph: one launch."""
    if not session.clock.cuda:
        raise SkippedError("CUDA graphs need a GPU")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        warmed_up(step, 3)
    torch.cuda.current_stream().wait_stream(side)
    net.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _activation_bytes(net: nn.Module, x: Tensor) -> int:
    """Bytes of all Bayesian layers' outputs."""
    sizes: list[int] = []
    for layer in net.modules():
        if isinstance(layer, BayesianLayer):
            layer.register_forward_hook(lambda _layer, _inputs, output: sizes.append(output.nbytes))
    with torch.no_grad():
        net(x)
    return sum(sizes)


# By variant: the contenders.
MODEL_CONTENDERS = {
    "": ("lrt", "bbb", "nn", "eager_lrt", "eager_bbb"),
    "CUDA graphs": ("lrt", "bbb", "nn"),
    "compiled": ("lrt", "eager_lrt", "compiled_lrt"),
}


def run_model(case: ModelCase, session: Session) -> dict[str, Any]:
    """A model's training step under each estimator, as point model, and with the formulas."""
    torch.manual_seed(0)
    device, graphs = session.device, case.variant == "CUDA graphs"
    x = case.input(device)
    target = torch.randint(10, (case.batch,), device=device)
    peaks: dict[str, dict[str, Any]] = {}
    # A graph reads the parameters where they lie: models live as long as the row.
    nets: dict[str, nn.Module] = {}

    def contender(name: str) -> Timed:
        compile = name.startswith("compiled_")
        if compile:
            session.need(40.0)
        net = nets[name] = case.model(name.replace("compiled_", "eager_"), device)
        function = net if graphs else getattr(net, "output_with_kl", net)
        step = model_step(net, compiled(function) if compile else function, x, target)
        if graphs:
            step = graphed(step, net, session)
        once = session.in_a_row(step)
        # A graph's memory is its own, taken at its capture.
        peaks[name] = {"peak_bytes": None if graphs else session.peak_bytes(step, net.zero_grad)}
        return once

    names = MODEL_CONTENDERS[case.variant]
    return {
        "parameter_bytes": sum(p.nbytes for p in case.model("nn", "meta").parameters()),
        "output_bytes": _activation_bytes(case.model("lrt", device), x),
        "contenders": session.measure({n: partial(contender, n) for n in names}, timing_row, peaks),
    }


def run_predict(case: Case | ModelCase, samples: int, session: Session) -> dict[str, Any]:
    """``bbb_fast.predict`` against loops over eager forwards, with either estimator's formulas.

    Of a BBB linear layer, or of a model with LRT layers.
    """
    torch.manual_seed(0)
    own, build = ("bbb", case.layer) if isinstance(case, Case) else ("lrt", case.model)
    x = case.input(session.device)

    def predict() -> Timed:
        net = build(own, session.device)
        return session.in_a_row(lambda: bbb_fast.predict(net, x, samples=samples))

    def loop(name: str) -> Timed:
        net = build(name, session.device)
        return session.in_a_row(torch.no_grad()(lambda: torch.stack([net(x) for _ in range(samples)])))

    loops = {name: partial(loop, name) for name in ("eager_lrt", "eager_bbb")}
    return {"samples": samples, "contenders": session.measure({"ours": predict, **loops}, timing_row)}


# ---------------------------------------------------------------- the table of rows


def jobs(session: Session) -> list[Job]:
    """Everything, the most important first."""

    def kernels(count: int, compile: bool, table: Sequence[Kernel] = KERNELS) -> list[Job]:
        run = partial(run_kernel, count=count, compile=compile, session=session)
        return [Job("kernels", f"{k.name}, {count:,} elements", partial(run, k)) for k in table]

    def layers(cases: Sequence[Case], note: str = "") -> list[Job]:
        return [Job("layers", case.name + note, partial(run_layer, case, session)) for case in cases]

    def models(cases: Sequence[ModelCase], variant: str = "") -> list[Job]:
        cases = [replace(case, variant=variant) for case in cases]
        return [Job("models", case.name, partial(run_model, case, session)) for case in cases]

    def predictions(batches: Sequence[int], samples: Sequence[int], width: int) -> list[Job]:
        cases: list[tuple[str, Case | ModelCase]] = [
            *((f"BBB3Conv3FC, batch {n}", model_cases(n)[-1]) for n in batches),
            *((f"BBBLinear {width}x{width}, batch {n}", Case("", width, width, n)) for n in batches),
        ]
        return [
            Job("predict", f"predict, {name}, {k} draws", partial(run_predict, case, k, session))
            for (name, case), k in product(cases, samples)
        ]

    if session.smoke:
        return [
            *layers(GPU_SMOKE_CASES),
            *kernels(1 << 14, False),
            *kernels(1 << 12, True, KERNELS[1:2]),
            *models(model_cases(4)),
            *predictions((1, 2), (1, 2), 16),
            *models(model_cases(2)[:1], "CUDA graphs"),
            *models(model_cases(2)[:1], "compiled"),
            *layers(GPU_SMOKE_AUTOTUNED_CASES, ", max-autotune"),
        ]
    steps = model_cases(256)
    return [
        *layers(GPU_CASES[:1]),
        *kernels(1 << 26, True),
        *layers(GPU_CASES[1:4]),
        *models(steps),
        *layers(GPU_CASES[4:8]),
        *predictions((1, 16, 256), (1, 8, 32), 1024),
        *layers(GPU_CASES[8:]),
        *kernels(1 << 20, False),
        # Late: a capture that fails may leave the generator unusable for what comes after.
        *models(steps, "CUDA graphs"),
        *models(steps[-1:], "compiled"),
        *layers(GPU_AUTOTUNED_CASES, ", max-autotune"),
    ]


# ---------------------------------------------------------------- running it


def run_all(
    table: Sequence[Job], rows: list[dict[str, Any]], session: Session, save: Callable[[], None]
) -> None:
    """Measures row by row, and keeps the result file up to date."""
    for k, (job, row) in enumerate(zip(table, rows, strict=True)):
        session.reserved = sum(ROW_SECONDS[later.section] for later in table[k + 1 :])
        begin = time.perf_counter()
        if session.left() < 0:
            row["skipped"] = "the time budget"
            continue
        try:
            measured = job.run()
        except Exception as error:
            measured = {"error": describe(error)}
            error.__traceback__ = None
        row.pop("skipped")
        row |= {**measured, "wall_seconds": round(time.perf_counter() - begin, 2)}
        session.free()
        save()
        now = time.strftime("%H:%M:%S")
        print(f"{now} {job.case}: {row['wall_seconds']} s", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda (default), cuda:N or cpu")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: runs every path, measures nothing")
    parser.add_argument("--budget", type=float, default=420.0, help="seconds for everything (default 420)")
    parser.add_argument("--case", default="", help="only the rows whose name contains this")
    parser.add_argument("--out", type=Path, default="build/gpu.json", help="JSON file; the table goes beside")
    args = parser.parse_args()
    start = time.perf_counter()
    device = torch.device(args.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            parser.error("torch sees no GPU here: try --device cpu --smoke")
        device = torch.device("cuda", device.index or 0)
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    # Formulas in the small dtypes, many shapes: torch.compile has a lot to say that is no result.
    warnings.filterwarnings("ignore", module=r"torch\..*")

    session = Session(device, Clock(device), start + args.budget, args.smoke)
    table = [job for job in jobs(session) if args.case in job.case]
    rows = [{"case": job.case, "skipped": "not reached"} for job in table]
    result: dict[str, Any] = {
        "provenance": provenance() | ({"gpu": gpu(device)} if device.type == "cuda" else {}),
        "smoke": args.smoke,
        "native": use_native(device),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "method": __doc__,
        **{name: [r for j, r in zip(table, rows, strict=True) if j.section == name] for name in ROW_SECONDS},
    }

    def save() -> None:
        result["targets"] = targets(result, args.smoke)
        write_text(args.out.with_suffix(".txt"), page(result))
        write_json(args.out, result)

    result["copy"] = measure_copy(session)
    result["products"] = measure_products(session)
    session.free()
    save()
    run_all(table, rows, session, save)
    result["wall_seconds"] = round(time.perf_counter() - start, 1)
    save()
    print(page(result), end="")
    print(f"\nwrote {args.out} after {result['wall_seconds']} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
