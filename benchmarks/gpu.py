"""Times the kernels, layers, models and predictions on a GPU against everything else one could use there.

    python benchmarks/gpu.py [--budget SECONDS] [--out FILE] [--case SUBSTRING] [--device cuda] [--smoke]

Contenders: ours; torch.nn; the textbook formulas in eager mode and under torch.compile; bayesian-torch where
it is installed; and the bare matrix products that the step cannot do without. All contenders of a row run
in turn, in one process. ``--device cpu --smoke`` runs every path on tiny sizes: its numbers mean nothing.

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
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

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
    Clock,
    Job,
    SkippedError,
    Timing,
    describe,
    gpu,
    interleaved_for,
    provenance,
    set_up,
    summary,
    write_json,
    write_text,
)
from layers import Effort, Stepper
from rivals import Layer, bayesian_torch, compiled, compiled_formulas, formulas, ours, output_alone
from torch import Tensor, nn

import bbb_fast
from bbb_fast._backend import use_native
from bbb_fast.layers.base import BayesianLayer

METHOD = {
    "kernels, layers": "time on the device: CUDA events around one call, its kernels queued ahead (launch "
    "overhead does not count), the L2 cache filled with other data before each; medians with quartiles",
    "forward": "the output alone, under no_grad",
    "step": "forward, KL and backward (input, every parameter); the gradient of the output is given",
    "models": "wall clock of a step, launches included, several in a row: forward, loss with KL, backward",
    "predict": "wall clock of a call, launches included, several in a row",
    "compiled": "torch.compile(fullgraph=True, dynamic=False) of the textbook formulas, output and KL in one "
    "graph; compile time does not count. autotuned: mode max-autotune-no-cudagraphs",
    "bare": "the matrix products alone, LRT forward 2 and step 6, BBB 1 and 3: torch.mm into preallocated "
    "tensors, or F.conv2d and aten.convolution_backward",
    "peak": "the most memory a step holds above what is resident before it",
    "float32": "torch.set_float32_matmul_precision('high') and cuDNN's default: tf32 products",
    "cuDNN": "torch.backends.cudnn.benchmark is on, for every contender",
    "bandwidth": "bytes that the algorithm must read and write, over time, over the copy bandwidth (bytes "
    "that a tensor copy reads and writes, over its time)",
}
# Seconds that a row without torch.compile takes, about: torch.compile leaves them to the rows to come.
ROW_SECONDS = {"kernels": 0.5, "layers": 2.5, "models": 2.0, "predict": 1.0}


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


def nothing() -> None:
    return None


@dataclass
class Part:
    """One timed call: ``prepare`` runs before each, outside the interval; ``run`` gets what it returned."""

    run: Callable[[Any], Any]
    prepare: Callable[[], Any] = nothing
    pause: float = 0.0

    def once(self, session: Session) -> Timing:
        value = self.prepare()
        timing = session.clock.alone(lambda: self.run(value), self.pause)
        # Longer than launching takes, judging by the last time.
        self.pause = 1.5 * timing.host + 1e-4
        return timing

    def warm_up(self, session: Session) -> None:
        """The first call compiles, autotunes and allocates; the last ones show how long launching takes."""
        for _ in range(session.effort.warmup):
            self.once(session)


def timing_summary(timings: list[Timing]) -> dict[str, Any]:
    row: dict[str, Any] = summary([t.seconds for t in timings])
    row["host_us"] = summary([t.host for t in timings])["median_us"]
    return row


def set_up_all(
    factories: Mapping[str, Callable[[], Any]], session: Session
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Builds and warms up each contender; returns those that run, and a row with the error of each other."""

    def warmed_up(make: Callable[[], Any]) -> Any:
        contender = make()
        contender.warm_up(session)
        return contender

    return set_up({name: partial(warmed_up, make) for name, make in factories.items()})


def measure(contenders: Mapping[str, Any], rows: dict[str, dict[str, Any]], session: Session) -> None:
    """Times the contenders in turn and adds their medians, or their error, to their rows."""
    runs = {name: (lambda c=contender: c.once(session)) for name, contender in contenders.items()}
    effort = session.effort
    timings, errors = interleaved_for(runs, effort.seconds, effort.rounds, effort.least)
    for name, measured in timings.items():
        row = {"error": errors[name]} if name in errors else timing_summary(measured)
        rows[name] = rows.get(name, {}) | row


def free(session: Session) -> None:
    """Nothing of one row is left for the next one."""
    gc.collect()
    torch.compiler.reset()
    if session.clock.cuda:
        torch.cuda.empty_cache()


# ---------------------------------------------------------------- what the device can do


def median_seconds(run: Callable[[], Any], times: int, session: Session) -> float:
    part = Part(lambda _: run())
    part.warm_up(session)
    seconds = sorted(part.once(session).seconds for _ in range(times))
    return seconds[len(seconds) // 2]


def measure_copy(session: Session) -> dict[str, Any]:
    """Bytes a second, read and written, of a tensor copy: the yardstick of the parameter kernels."""
    source = torch.randn((1 << 20) if session.smoke else (1 << 28), device=session.device)
    target = torch.empty_like(source)
    seconds = median_seconds(lambda: target.copy_(source), 5 if session.smoke else 21, session)
    session.copy_bandwidth = 2 * source.nbytes / seconds
    return {"tensor_bytes": source.nbytes, "bytes_per_second": session.copy_bandwidth}


def measure_products(session: Session) -> dict[str, Any]:
    """Rates of large products, of random numbers: what the layers' products could reach."""
    size = 128 if session.smoke else 8192
    result: dict[str, Any] = {"size": size}
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        a, b = (torch.randn(size, size, device=session.device, dtype=dtype) for _ in range(2))
        run = partial(torch.mm, a, b.t(), out=torch.empty_like(a))
        seconds = median_seconds(run, 3 if session.smoke else 11, session)
        result[f"{name}_flops"] = 2 * size**3 / seconds
    return result


# ---------------------------------------------------------------- parameter kernels


def _formula_part(kernel: Kernel, t: dict[str, Tensor], function: Callable[..., Any]) -> Part:
    inputs = [t[name] for name in kernel.inputs]
    if not kernel.leaves:

        def forward(_: Any) -> Any:
            with torch.no_grad():
                return function(*inputs)

        return Part(forward)
    leaves = [t[name].requires_grad_() for name in kernel.leaves]

    def backward(outputs: Tensor | tuple[Tensor, ...]) -> Any:
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        # A scalar is a KL, anything else takes the given gradient.
        return torch.autograd.grad(outputs, leaves, [t["grad"] if y.dim() else t["one"] for y in outputs])

    return Part(backward, prepare=lambda: function(*inputs))


def run_kernel(kernel: Kernel, count: int, compile: bool, session: Session) -> dict[str, Any]:
    """Time, and share of the copy bandwidth, of every contender for one pass over ``count`` elements."""
    tensors = kernel.tensors(count, session.device)

    def our_op() -> Part:
        # The raw ops have no gradient; the formulas' leaves want one.
        arguments = kernel.arguments({name: t.detach() for name, t in tensors.items()})
        op = getattr(torch.ops.bbb_fast, kernel.op)
        return Part(lambda _: op(*arguments))

    def of_formula(compile: bool) -> Part:
        if compile:
            session.need(4.0)
        return _formula_part(kernel, tensors, compiled(kernel.formula) if compile else kernel.formula)

    factories = {"ours": our_op}
    if kernel.formula is not None:
        factories["eager"] = partial(of_formula, False)
        if compile and kernel.compiled:
            factories["compiled"] = partial(of_formula, True)
    parts, rows = set_up_all(factories, session)
    measure(parts, rows, session)
    for row in rows.values():
        if "median_us" in row:
            rate = kernel.bytes_per_element * count / (row["median_us"] * 1e-6)
            row["of_copy_bandwidth"] = rate / session.copy_bandwidth
    return {
        "kernel": kernel.name,
        "elements": count,
        "bytes_per_element": kernel.bytes_per_element,
        "contenders": rows,
    }


# ---------------------------------------------------------------- layers


class LayerContender(Stepper):
    """A layer's forward and its whole step, in the case's precision."""

    def __init__(self, case: Case, x: Tensor, layer: Layer) -> None:
        super().__init__(layer, x, None, repeat=1)
        self.autocast = case.precision == "autocast"
        self.parts = {
            "forward": Part(lambda _: self.output()),
            "step": Part(lambda _: self.step(), self.clear),
        }

    def _precision(self) -> Any:
        if not self.autocast:
            return nullcontext()
        return torch.autocast(self.x.device.type, dtype=torch.bfloat16)

    def output(self) -> None:
        with torch.no_grad(), self._precision():
            self.layer.output(self.x)

    def forward(self) -> tuple[Tensor, Tensor | None]:
        with self._precision():
            return super().forward()

    def backward(self, y: Tensor, kl: Tensor | None) -> None:
        if self.g is None:  # its type is the output's
            self.g = torch.randn_like(y)
        super().backward(y, kl)

    def warm_up(self, session: Session) -> None:
        for part in self.parts.values():
            part.warm_up(session)
        self.clear()

    def peak_bytes(self) -> int | None:
        return peak_bytes(self.clear, self.step, self.x.device)


def peak_bytes(clear: Callable[[], None], step: Callable[[], None], device: torch.device) -> int | None:
    """The most memory a step holds above what was there before it; None without a GPU."""
    if device.type != "cuda":
        return None
    clear()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    clear()
    return peak


def bare_product(case: Case, device: torch.device) -> tuple[Callable[[], Any], ...]:
    """A product alone, on operands of the type it runs in: forward, then what its backward takes."""
    dtype = torch.float32 if case.precision == "float32" else torch.bfloat16
    n, i, o, k, p = case.batch, case.inputs, case.outputs, case.kernel, case.padding

    def random(*shape: int) -> Tensor:
        t = torch.randn(shape, device=device).to(dtype)
        return t.to(memory_format=torch.channels_last) if case.channels_last else t

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


class BareProducts:
    """``count`` products forward, three times that in all."""

    def __init__(self, case: Case, count: int, device: torch.device) -> None:
        products = [bare_product(case, device) for _ in range(count)]
        forward = [product[0] for product in products]
        step = forward + [call for product in products for call in product[1:]]
        self.parts = {
            name: Part(lambda _, calls=calls: [call() for call in calls])
            for name, calls in (("forward", forward), ("step", step))
        }

    def warm_up(self, session: Session) -> None:
        for part in self.parts.values():
            part.warm_up(session)

    def peak_bytes(self) -> None:
        return None


def layer_factories(case: Case, x: Tensor, session: Session) -> dict[str, Callable[[], Any]]:
    def of(build: Callable[..., Layer], *args: Any) -> Callable[[], LayerContender]:
        return lambda: LayerContender(case, x, build(*args, case, session.device))

    def of_compiled(estimator: str, autotuned: bool = False) -> LayerContender:
        session.need(45.0 if autotuned else 8.0)
        return LayerContender(case, x, compiled_formulas(estimator, case, session.device, autotuned))

    factories: dict[str, Callable[[], Any]] = {
        "lrt": of(ours, "lrt"),
        "bbb": of(ours, "bbb"),
        "nn": of(output_alone, "nn"),
        "bare_lrt": lambda: BareProducts(case, 2, session.device),
        "bare_bbb": lambda: BareProducts(case, 1, session.device),
        "eager_lrt": of(formulas, "lrt"),
        "eager_bbb": of(formulas, "bbb"),
        "bayesian_torch": of(bayesian_torch, "Reparameterization"),
    }
    if case.autotuned:
        factories = {name: factories[name] for name in ("lrt", "bare_lrt", "eager_lrt")}
        factories["autotuned_lrt"] = partial(of_compiled, "lrt", autotuned=True)
    return factories | {f"compiled_{name}": partial(of_compiled, name) for name in case.compiled}


def run_layer(case: Case, session: Session) -> dict[str, Any]:
    """Forward, step and peak memory of every contender for one layer."""
    torch.manual_seed(0)
    x = case.input(session.device).requires_grad_()
    contenders, rows = set_up_all(layer_factories(case, x, session), session)
    for name, contender in contenders.items():
        rows[name] = {"peak_bytes": contender.peak_bytes()}
    timings: dict[str, dict[str, Any]] = {}
    parts = {f"{name} {kind}": part for name, c in contenders.items() for kind, part in c.parts.items()}
    measure(parts, timings, session)
    for label, numbers in timings.items():
        name, kind = label.split()
        rows[name][kind] = numbers
    outputs = case.batch * case.outputs
    if case.kernel:
        outputs *= case.output_size**2
    return {
        "precision": case.precision,
        "parameter_bytes": sum(p.nbytes for p in case.layer("nn", "meta").parameters()),
        "output_bytes": outputs * x.element_size(),
        "contenders": rows,
    }


# ---------------------------------------------------------------- models and prediction


class Repeated:
    """A call timed by the wall clock, several in a row."""

    def __init__(self, run: Callable[[], Any], clear: Callable[[], None] = nothing) -> None:
        self.run, self.clear = run, clear
        self.calls = 1

    def warm_up(self, session: Session) -> None:
        session.clock.back_to_back(self.run, 3)
        one = session.clock.back_to_back(self.run, 2).seconds
        # 10 ms, so that the synchronisation at the end is a small part.
        self.calls = 1 if session.smoke else max(1, min(50, math.ceil(0.01 / one)))

    def once(self, session: Session) -> Timing:
        return session.clock.back_to_back(self.run, self.calls)

    def peak_bytes(self, device: torch.device) -> int | None:
        return peak_bytes(self.clear, self.run, device)


KL_SCALE = 1 / 50_000


def model_step(
    net: nn.Module, function: Callable[[Tensor], Any], x: Tensor, target: Tensor
) -> tuple[Callable[[], None], Callable[[], None]]:
    """A training step without the optimizer, and what frees its gradients."""

    def clear() -> None:
        net.zero_grad(set_to_none=True)

    def step() -> None:
        clear()
        result = function(x)
        output, kl = result if isinstance(result, tuple) else (result, None)
        loss = F.cross_entropy(output, target)
        if kl is not None:
            loss = loss + kl * KL_SCALE
        loss.backward()

    return step, clear


def graphed(step: Callable[[], None], clear: Callable[[], None], session: Session) -> Callable[[], None]:
    """The step as a CUDA graph: one launch."""
    if not session.clock.cuda:
        raise SkippedError("CUDA graphs need a GPU")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _activation_bytes(net: nn.Module, x: Tensor) -> int:
    """Bytes of all Bayesian layers' outputs."""
    total = 0

    def count(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        nonlocal total
        total += output.nbytes

    hooks = [m.register_forward_hook(count) for m in net.modules() if isinstance(m, BayesianLayer)]
    with torch.no_grad():
        net(x)
    for hook in hooks:
        hook.remove()
    return total


def run_model(case: ModelCase, session: Session) -> dict[str, Any]:
    """A model's training step under each estimator, as point model, and with the formulas."""
    torch.manual_seed(0)
    device = session.device
    x = case.input(device)
    target = torch.randint(10, (case.batch,), device=device)
    sizes = {
        "parameter_bytes": sum(p.nbytes for p in case.model("nn", "meta").parameters()),
        "output_bytes": _activation_bytes(case.model("lrt", device), x),
    }

    def plain(name: str, compile: bool = False) -> Repeated:
        if compile:
            session.need(40.0)
        net = case.model(name, device)
        function = getattr(net, "output_with_kl", net)
        return Repeated(*model_step(net, compiled(function) if compile else function, x, target))

    def graph(name: str) -> Repeated:
        net = case.model(name, device)
        step, clear = model_step(net, net, x, target)
        # A graph reads the parameters where they lie: clear keeps the model alive beside it.
        return Repeated(graphed(step, clear, session), clear)

    graphs = case.variant == "CUDA graphs"
    if graphs:
        names: tuple[str, ...] = ("lrt", "bbb", "nn")
    elif case.variant == "compiled":
        names = ("lrt", "eager_lrt")
    else:
        names = ("lrt", "bbb", "nn", "eager_lrt", "eager_bbb")
    factories = {name: partial(graph if graphs else plain, name) for name in names}
    if case.variant == "compiled":
        factories["compiled_lrt"] = partial(plain, "eager_lrt", compile=True)
    contenders, rows = set_up_all(factories, session)
    for name, contender in contenders.items():
        # A graph's memory is its own, taken at its capture.
        rows[name] = {"peak_bytes": None if graphs else contender.peak_bytes(device)}
    measure(contenders, rows, session)
    return {**sizes, "contenders": rows}


def run_predict(size: int, batch: int, samples: int, session: Session) -> dict[str, Any]:
    """``bbb_fast.predict`` against loops over eager forwards, with either estimator's formulas.

    Of 3Conv3FC (LRT layers), or of a BBB linear layer of ``size``.
    """
    torch.manual_seed(0)
    case = Case("", size, size, batch) if size else model_cases(batch)[-1]
    build = case.layer if isinstance(case, Case) else case.model
    x = case.input(session.device)

    def predict() -> Repeated:
        net = build("bbb" if size else "lrt", session.device)
        return Repeated(lambda: bbb_fast.predict(net, x, samples=samples))

    def loop(name: str) -> Repeated:
        net = build(name, session.device)

        def run() -> None:
            with torch.no_grad():
                torch.stack([net(x) for _ in range(samples)])

        return Repeated(run)

    loops = {name: partial(loop, name) for name in ("eager_lrt", "eager_bbb")}
    contenders, rows = set_up_all({"ours": predict, **loops}, session)
    measure(contenders, rows, session)
    return {"group": predicted(size, batch), "samples": samples, "contenders": rows}


def predicted(size: int, batch: int) -> str:
    return f"{f'BBBLinear {size}x{size}' if size else 'BBB3Conv3FC'}, batch {batch}"


# ---------------------------------------------------------------- the table of rows


def jobs(session: Session) -> list[Job]:
    """Everything, the most important first."""

    def kernels(count: int, compile: bool, table: Sequence[Kernel] = KERNELS) -> list[Job]:
        name = f"{count:,} elements"
        return [
            Job("kernels", f"{k.name}, {name}", partial(run_kernel, k, count, compile, session))
            for k in table
        ]

    def layers(cases: Sequence[Case], note: str = "") -> list[Job]:
        return [Job("layers", case.name + note, partial(run_layer, case, session)) for case in cases]

    def models(cases: Sequence[ModelCase], variant: str = "") -> list[Job]:
        cases = [replace(case, variant=variant) for case in cases]
        return [Job("models", case.name, partial(run_model, case, session)) for case in cases]

    def predictions(batches: Sequence[int], samples: Sequence[int], linear: int) -> list[Job]:
        return [
            Job(
                "predict",
                f"predict, {predicted(size, n)}, {k} draws",
                partial(run_predict, size, n, k, session),
            )
            for size, n, k in product((0, linear), batches, samples)
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
        free(session)
        save()
        now = time.strftime("%H:%M:%S")
        print(f"{now} {job.case}: {row['wall_seconds']} s", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda (default), cuda:N or cpu")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: runs every path, measures nothing")
    parser.add_argument("--budget", type=float, default=420.0, help="seconds for everything (default 420)")
    parser.add_argument("--case", default="", help="only the rows whose name contains this")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("build/gpu.json"),
        help="JSON file (default build/gpu.json); the table beside",
    )
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
    sections: dict[str, list[Any]] = {"kernels": [], "layers": [], "models": [], "predict": []}
    for job, row in zip(table, rows, strict=True):
        sections[job.section].append(row)
    result: dict[str, Any] = {
        "provenance": provenance() | ({"gpu": gpu(device)} if device.type == "cuda" else {}),
        "smoke": args.smoke,
        "native": use_native(device),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "method": METHOD,
        **sections,
    }

    def save() -> None:
        result["targets"] = targets(result, args.smoke)
        write_text(args.out.with_suffix(".txt"), page(result))
        write_json(args.out, result)

    result["copy"] = measure_copy(session)
    result["products"] = measure_products(session)
    free(session)
    save()
    run_all(table, rows, session, save)
    result["wall_seconds"] = round(time.perf_counter() - start, 1)
    save()
    print(page(result), end="")
    print(f"\nwrote {args.out} after {result['wall_seconds']} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
