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
import contextlib
import gc
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
    PredictCase,
    model_cases,
    predict_cases,
)
from gpu_report import render, targets
from harness import (
    Clock,
    Timing,
    describe,
    gpu,
    interleaved_for,
    provenance,
    summary,
    write_json,
    write_text,
)
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


class SkippedError(Exception):
    """A contender that was left out, and why."""


@dataclass
class Session:
    """What every row needs: the device, the clock, the time that is left, and the sizes."""

    device: torch.device
    clock: Clock
    deadline: float
    smoke: bool
    copy_bandwidth: float = math.nan
    reserved: float = 0.0  # seconds, for the rows to come

    @property
    def seconds(self) -> float:
        """To measure one row."""
        return 0.2 if self.smoke else 1.5

    @property
    def rounds(self) -> int:
        return 3 if self.smoke else 40

    @property
    def least(self) -> int:
        return 2 if self.smoke else 7

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
        for _ in range(2 if session.smoke else 4):
            self.once(session)


def compiled(function: Callable[..., Any], autotuned: bool = False) -> Callable[..., Any]:
    # Launch overhead is not in the measurement, and CUDA graphs would only add copies of the input.
    mode = "max-autotune-no-cudagraphs" if autotuned else "default"
    return torch.compile(function, mode=mode, fullgraph=True, dynamic=False)


def timing_summary(timings: list[Timing]) -> dict[str, Any]:
    row: dict[str, Any] = summary([t.seconds for t in timings])
    row["host_us"] = summary([t.host for t in timings])["median_us"]
    return row


def set_up(
    factories: dict[str, Callable[[], Any]], session: Session
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Builds and warms up each contender; returns those that run, and a row with the error of each other."""
    built: dict[str, Any] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, make in factories.items():
        try:
            contender = make()
            contender.warm_up(session)
            built[name] = contender
        except SkippedError as reason:
            rows[name] = {"error": f"skipped: {reason}"}
        except Exception as error:
            rows[name] = {"error": describe(error)}
            # Its frames hold the failed contender's tensors.
            error.__traceback__ = None
    return built, rows


def measure(contenders: Mapping[str, Any], rows: dict[str, dict[str, Any]], session: Session) -> None:
    """Times the contenders in turn and adds their medians, or their error, to their rows."""
    runs = {name: (lambda c=contender: c.once(session)) for name, contender in contenders.items()}
    timings, errors = interleaved_for(runs, session.seconds, session.rounds, session.least)
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


def measure_copy(session: Session) -> dict[str, Any]:
    """Bytes a second, read and written, of a tensor copy: the yardstick of the parameter kernels."""
    count = (1 << 20) if session.smoke else (1 << 28)
    source = torch.randn(count, device=session.device)
    target = torch.empty_like(source)
    part = Part(lambda _: target.copy_(source))
    part.warm_up(session)
    seconds = sorted(part.once(session).seconds for _ in range(5 if session.smoke else 21))
    session.copy_bandwidth = 2 * source.nbytes / seconds[len(seconds) // 2]
    return {"tensor_bytes": source.nbytes, "bytes_per_second": session.copy_bandwidth}


def measure_products(session: Session) -> dict[str, Any]:
    """Rates of large products, of random numbers: what the layers' products could reach."""
    size = 128 if session.smoke else 8192
    result: dict[str, Any] = {"size": size}
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        a = torch.randn(size, size, device=session.device, dtype=dtype)
        b = torch.randn(size, size, device=session.device, dtype=dtype)
        c = torch.empty_like(a)
        part = Part(lambda _, a=a, b=b, c=c: torch.mm(a, b.t(), out=c))
        part.warm_up(session)
        seconds = sorted(part.once(session).seconds for _ in range(3 if session.smoke else 11))
        result[f"{name}_flops"] = 2 * size**3 / seconds[len(seconds) // 2]
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

    def ours() -> Part:
        # The raw ops have no gradient; the formulas' leaves want one.
        arguments = kernel.arguments({name: t.detach() for name, t in tensors.items()})
        op = getattr(torch.ops.bbb_fast, kernel.op)
        return Part(lambda _: op(*arguments))

    def of_formula(compile: bool) -> Part:
        if compile:
            session.need(4.0)
        return _formula_part(kernel, tensors, compiled(kernel.formula) if compile else kernel.formula)

    factories: dict[str, Callable[[], Part]] = {"ours": ours}
    if kernel.formula is not None:
        factories["eager"] = lambda: of_formula(False)
        if compile and kernel.compiled:
            factories["compiled"] = lambda: of_formula(True)
    parts, rows = set_up(factories, session)
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


@contextlib.contextmanager
def precision(case: Case, device: torch.device) -> Iterator[None]:
    if case.precision != "autocast":
        yield
        return
    with torch.autocast(device.type, dtype=torch.bfloat16):
        yield


class LayerContender:
    """A layer's forward and its whole step; ``output_with_kl`` returns (y, KL or None)."""

    def __init__(
        self,
        case: Case,
        x: Tensor,
        module: nn.Module,
        output: Callable[[Tensor], Tensor],
        output_with_kl: Callable[[Tensor], tuple[Tensor, Tensor | None]],
    ) -> None:
        self.case, self.x, self.module = case, x, module
        self.output, self.output_with_kl = output, output_with_kl
        self.parts = {"forward": Part(self.forward), "step": Part(self.step, self.clear)}
        self.grad: Tensor | None = None
        self.one = torch.ones((), device=x.device)

    def forward(self, _: Any) -> None:
        with torch.no_grad(), precision(self.case, self.x.device):
            self.output(self.x)

    def clear(self) -> None:
        self.x.grad = None
        self.module.zero_grad(set_to_none=True)

    def step(self, _: Any) -> None:
        with precision(self.case, self.x.device):
            y, kl = self.output_with_kl(self.x)
        if self.grad is None:
            self.grad = torch.randn_like(y)
        if kl is None:
            torch.autograd.backward([y], [self.grad])
        else:
            torch.autograd.backward([y, kl], [self.grad, self.one.to(kl.dtype)])

    def warm_up(self, session: Session) -> None:
        for part in self.parts.values():
            part.warm_up(session)
        self.clear()

    def peak_bytes(self) -> int | None:
        return peak_bytes(self.clear, lambda: self.step(None), self.x.device)


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


class BareProducts:
    """The products alone, on operands of the type they run in: ``count`` forward, three times that in all."""

    def __init__(self, case: Case, count: int, device: torch.device) -> None:
        dtype = torch.float32 if case.precision == "float32" else torch.bfloat16
        i, o = case.inputs, case.outputs

        def random(*shape: int) -> Tensor:
            t = torch.randn(shape, device=device).to(dtype)
            return t.to(memory_format=torch.channels_last) if case.channels_last else t

        self.case = case
        if case.kernel:
            k, p = case.kernel, case.padding
            out = case.output_size
            self.geometry = (None, [1, 1], [p, p], [1, 1], False, [0, 0], 1)
            self.sets = [
                (
                    random(case.batch, i, case.size, case.size),
                    random(o, i, k, k),
                    random(case.batch, o, out, out),
                )
                for _ in range(count)
            ]
        else:
            self.sets = [(random(case.batch, i), random(o, i), random(case.batch, o)) for _ in range(count)]
            # The results: y, the gradient of x and the gradient of W.
            self.results = [
                (torch.empty_like(g), torch.empty_like(x), torch.empty_like(W)) for x, W, g in self.sets
            ]
        self.parts = {"forward": Part(self.forward), "step": Part(self.step)}

    def forward(self, _: Any) -> None:
        if self.case.kernel:
            for x, W, _g in self.sets:
                F.conv2d(x, W, padding=self.case.padding)
            return
        for (x, W, _g), (y, _gx, _gW) in zip(self.sets, self.results, strict=True):
            torch.mm(x, W.t(), out=y)

    def step(self, _: Any) -> None:
        self.forward(None)
        if self.case.kernel:
            for x, W, g in self.sets:
                torch.ops.aten.convolution_backward(g, x, W, *self.geometry, [True, True, False])
            return
        for (x, W, g), (_y, gx, gW) in zip(self.sets, self.results, strict=True):
            torch.mm(g, W, out=gx)
            torch.mm(g.t(), x, out=gW)

    def warm_up(self, session: Session) -> None:
        for part in self.parts.values():
            part.warm_up(session)

    def peak_bytes(self) -> None:
        return None


def _bayesian_torch(case: Case, device: torch.device) -> nn.Module:
    try:
        from bayesian_torch import layers
    except ImportError:
        raise SkippedError("bayesian-torch is not installed") from None
    i, o, k = case.inputs, case.outputs, case.kernel
    with torch.device(device):
        if k:
            layer = layers.Conv2dReparameterization(i, o, k, padding=case.padding)
        else:
            layer = layers.LinearReparameterization(i, o)
    return case.place(layer, device, torch.bfloat16 if case.precision == "bfloat16" else None)


def layer_factories(case: Case, x: Tensor, session: Session) -> dict[str, Callable[[], Any]]:
    device = session.device

    def of_module(name: str) -> LayerContender:
        layer = case.layer(name, device)
        kl = getattr(layer, "kl_loss", nothing)
        return LayerContender(case, x, layer, layer, lambda t: (layer(t), kl()))

    def of_eager(estimator: str) -> LayerContender:
        layer = case.layer(f"eager_{estimator}", device)
        return LayerContender(case, x, layer, layer.output, layer.output_with_kl)

    def of_compiled(estimator: str, autotuned: bool) -> LayerContender:
        session.need(45.0 if autotuned else 8.0)
        layer = case.layer(f"eager_{estimator}", device)
        functions = (compiled(f, autotuned) for f in (layer.output, layer.output_with_kl))
        return LayerContender(case, x, layer, *functions)

    def of_bayesian_torch() -> LayerContender:
        layer = _bayesian_torch(case, device)
        return LayerContender(case, x, layer, lambda t: layer(t, return_kl=False), layer)

    factories: dict[str, Callable[[], Any]] = {
        "lrt": lambda: of_module("lrt"),
        "bbb": lambda: of_module("bbb"),
        "nn": lambda: of_module("nn"),
        "bare_lrt": lambda: BareProducts(case, 2, device),
        "bare_bbb": lambda: BareProducts(case, 1, device),
        "eager_lrt": lambda: of_eager("lrt"),
        "eager_bbb": lambda: of_eager("bbb"),
        "bayesian_torch": of_bayesian_torch,
    }
    if case.autotuned:
        keep = ("lrt", "bare_lrt", "eager_lrt")
        factories = {name: make for name, make in factories.items() if name in keep}
        factories["autotuned_lrt"] = lambda: of_compiled("lrt", True)
    for estimator in case.compiled:
        factories[f"compiled_{estimator}"] = lambda estimator=estimator: of_compiled(estimator, False)
    return factories


def run_layer(case: Case, session: Session) -> dict[str, Any]:
    """Forward, step and peak memory of every contender for one layer."""
    torch.manual_seed(0)
    x = case.input(session.device).requires_grad_()
    contenders, rows = set_up(layer_factories(case, x, session), session)
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

    def plain(name: str) -> Repeated:
        net = case.model(name, device)
        return Repeated(*model_step(net, getattr(net, "output_with_kl", net), x, target))

    def graph(name: str) -> Repeated:
        net = case.model(name, device)
        step, clear = model_step(net, net, x, target)
        # A graph reads the parameters where they lie: clear keeps the model alive beside it.
        return Repeated(graphed(step, clear, session), clear)

    def of_compiled() -> Repeated:
        session.need(40.0)
        net = case.model("eager_lrt", device)
        return Repeated(*model_step(net, compiled(net.output_with_kl), x, target))

    factories: dict[str, Callable[[], Any]]
    if case.variant == "CUDA graphs":
        factories = {name: (lambda name=name: graph(name)) for name in ("lrt", "bbb", "nn")}
    elif case.variant == "compiled":
        factories = {name: (lambda name=name: plain(name)) for name in ("lrt", "eager_lrt")}
        factories["compiled_lrt"] = of_compiled
    else:
        names = ("lrt", "bbb", "nn", "eager_lrt", "eager_bbb")
        factories = {name: (lambda name=name: plain(name)) for name in names}
    contenders, rows = set_up(factories, session)
    for name, contender in contenders.items():
        # A graph's memory is its own, taken at its capture.
        graphs = case.variant == "CUDA graphs"
        rows[name] = {"peak_bytes": None if graphs else contender.peak_bytes(device)}
    measure(contenders, rows, session)
    return {**sizes, "contenders": rows}


def run_predict(case: PredictCase, session: Session) -> dict[str, Any]:
    """``bbb_fast.predict`` against loops over eager forwards, with either estimator's formulas."""
    torch.manual_seed(0)
    x = case.input(session.device)

    def ours() -> Repeated:
        net = case.model("ours", session.device)
        return Repeated(lambda: bbb_fast.predict(net, x, samples=case.samples))

    def loop(name: str) -> Repeated:
        net = case.model(name, session.device)

        def run() -> None:
            with torch.no_grad():
                torch.stack([net.output(x) for _ in range(case.samples)])

        return Repeated(run)

    factories: dict[str, Callable[[], Any]] = {"ours": ours}
    factories |= {name: (lambda name=name: loop(name)) for name in ("eager_lrt", "eager_bbb")}
    contenders, rows = set_up(factories, session)
    measure(contenders, rows, session)
    return {"group": case.group, "samples": case.samples, "contenders": rows}


# ---------------------------------------------------------------- the table of rows


@dataclass
class Row:
    """One line of the result: where it goes, what it is called, and how it is measured."""

    section: str
    name: str
    run: Callable[[Session], dict[str, Any]]
    result: dict[str, Any] = field(default_factory=lambda: {"skipped": "not reached"})


def rows(smoke: bool) -> list[Row]:
    """Everything, the most important first."""

    def kernels(count: int, compile: bool, table: Sequence[Kernel] = KERNELS) -> list[Row]:
        return [
            Row(
                "kernels",
                f"{kernel.name}, {count:,} elements",
                lambda session, kernel=kernel: run_kernel(kernel, count, compile, session),
            )
            for kernel in table
        ]

    def layers(cases: Sequence[Case], note: str = "") -> list[Row]:
        return [
            Row("layers", case.name + note, lambda session, case=case: run_layer(case, session))
            for case in cases
        ]

    def of_models(cases: Sequence[ModelCase]) -> list[Row]:
        return [Row("models", c.name, lambda session, c=c: run_model(c, session)) for c in cases]

    def predictions(cases: Sequence[PredictCase]) -> list[Row]:
        return [Row("predict", c.name, lambda session, c=c: run_predict(c, session)) for c in cases]

    if smoke:
        return [
            *layers(GPU_SMOKE_CASES),
            *kernels(1 << 14, False),
            *kernels(1 << 12, True, KERNELS[1:2]),
            *of_models(model_cases(4)),
            *predictions(predict_cases((1, 2), (1, 2), 16)),
            *of_models([replace(model_cases(2)[0], variant="CUDA graphs")]),
            *of_models([replace(model_cases(2)[0], variant="compiled")]),
            *layers(GPU_SMOKE_AUTOTUNED_CASES, ", max-autotune"),
        ]
    steps = model_cases(256)
    return [
        *layers(GPU_CASES[:1]),
        *kernels(1 << 26, True),
        *layers(GPU_CASES[1:4]),
        *of_models(steps),
        *layers(GPU_CASES[4:8]),
        *predictions(predict_cases((1, 16, 256), (1, 8, 32), 1024)),
        *layers(GPU_CASES[8:]),
        *kernels(1 << 20, False),
        # Late: a capture that fails may leave the generator unusable for what comes after.
        *of_models([replace(case, variant="CUDA graphs") for case in steps]),
        *of_models([replace(steps[-1], variant="compiled")]),
        *layers(GPU_AUTOTUNED_CASES, ", max-autotune"),
    ]


# ---------------------------------------------------------------- running it


def run_rows(table: list[Row], result: dict[str, Any], session: Session, save: Callable[[], None]) -> None:
    """Measures row by row, and keeps the result file up to date."""
    for k, row in enumerate(table):
        session.reserved = sum(ROW_SECONDS[later.section] for later in table[k + 1 :])
        begin = time.perf_counter()
        if session.left() < 0:
            row.result["skipped"] = "the time budget"
            continue
        try:
            measured = row.run(session)
        except Exception as error:
            measured = {"error": describe(error)}
            error.__traceback__ = None
        measured["wall_seconds"] = round(time.perf_counter() - begin, 2)
        row.result.pop("skipped")
        row.result |= measured
        free(session)
        save()
        print(
            f"{time.strftime('%H:%M:%S')} {row.name}: {measured['wall_seconds']} s",
            file=sys.stderr,
            flush=True,
        )


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

    clock = Clock(device)
    session = Session(device, clock, start + args.budget, args.smoke)
    table = [row for row in rows(args.smoke) if args.case in row.name]
    result: dict[str, Any] = {
        "provenance": provenance() | ({"gpu": gpu(device)} if device.type == "cuda" else {}),
        "smoke": args.smoke,
        "native": use_native(device),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "method": METHOD,
        "kernels": [], "layers": [], "models": [], "predict": [],
    }  # fmt: skip
    for row in table:
        row.result = {"case": row.name, **row.result}
        result[row.section].append(row.result)

    def save() -> None:
        result["targets"] = targets(result, args.smoke)
        write_json(args.out, result)
        write_text(args.out.with_suffix(".txt"), render(result))

    result["copy"] = measure_copy(session)
    result["products"] = measure_products(session)
    free(session)
    save()
    run_rows(table, result, session, save)
    result["wall_seconds"] = round(time.perf_counter() - start, 1)
    save()
    print(render(result), end="")
    print(f"\nwrote {args.out} after {result['wall_seconds']} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
