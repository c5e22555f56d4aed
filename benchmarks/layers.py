"""Times each layer against torch.nn's, the textbook formulas, torch.compile and other libraries.

Every contender of a case runs once a round, in one process, and so do the instruction sets of a weight draw.
Float32. Ratios are those of medians, to the whole step (forward, backward, KL) of torch.nn's layer, and to
the eager formulas' draw. The formulas and libraries are described in rivals.py. A variance in bfloat16 gains
nothing on a CPU without such instructions: numbers are converted back and forth there.
"""

from __future__ import annotations

import contextlib
import operator
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import eager
import torch
from cases import CASES, Case
from harness import Effort, Errors, Job, clock, contest, ratio, summary, warmed_up
from rivals import CONTENDERS, Layer, compiled
from torch import Tensor

from bbb_fast import _backend, functional

METHOD = {
    "forward": "the layer's output, and the KL as its library forms it (torch.nn has none)",
    "backward": "all parameters' and the input's gradients, for a given one of the output and 1 for the KL",
    "step": "forward and backward, after an untimed one of the same layer",
    "over_base": "the step's median over torch.nn's (sampling: over the eager formulas') in the same rounds; "
    "low and high: the middle 95 % of the ratios of resampled rounds",
    "lower_over_base": "the same of the lower quartiles, for --compare: other work only makes times longer",
    "saved_bytes": "bytes autograd keeps from forward to backward, KL included, each storage once, without "
    "the parameters and the layer's input",
    "peak_bytes": "the most that a step's own tensors take at one time, gradients included, from "
    "torch.profiler's record; scratch space past torch's allocator is not in it",
}
ISAS = ("avx512", "avx2", "base")
COUNTS = (10_000, 1_000_000)


class Times(NamedTuple):
    """Seconds of one step."""

    forward: float
    backward: float
    step: float


Wrap = Callable[[str, Callable[[], Times]], Callable[[], Times]]


QUICK = Effort(rounds=3, seconds=1.0, least=2, warmup=1)


class Stepper:
    """Runs one contender's training steps on one input."""

    def __init__(self, layer: Layer, x: Tensor, g: Tensor, repeat: int) -> None:
        self.layer = layer
        self.x = x
        self.g = g
        self.repeat = repeat
        self.leaves = [x, *layer.module.parameters()]
        # The KL's gradient, once its type and shape are known.
        self.one: Tensor | None = None

    def clear(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None

    def forward(self) -> tuple[Tensor, Tensor | None]:
        return self.layer.output_with_kl(self.x)

    def backward(self, y: Tensor, kl: Tensor | None) -> None:
        if kl is None:
            torch.autograd.backward((y,), (self.g,))
            return
        if self.one is None:
            self.one = torch.ones_like(kl, requires_grad=False)
        torch.autograd.backward((y, kl), (self.g, self.one))

    def step(self) -> None:
        self.backward(*self.forward())

    def timed(self) -> Times:
        """One step, or the medians of ``repeat`` in a row: what interrupts a few of them does not count.

        As in training, a step of the same layer comes before it, and leaves it memory and caches as it does.
        """
        forward, backward = [], []
        self.clear()
        self.step()
        for _ in range(self.repeat):
            self.clear()
            start = time.perf_counter()
            result = self.forward()
            middle = time.perf_counter()
            self.backward(*result)
            stop = time.perf_counter()
            forward.append(middle - start)
            backward.append(stop - middle)
            del result
        steps = map(operator.add, forward, backward)
        return Times(median(forward), median(backward), median(steps))

    def memory(self) -> dict[str, int]:
        self.clear()
        saved = saved_for_backward(self.forward, self.leaves)
        peak = peak_bytes(self.step)
        self.clear()
        return {"saved_bytes": saved, "peak_bytes": peak}


def saved_for_backward(forward: Callable[[], Any], kept_anyway: Iterable[Tensor]) -> int:
    """Bytes that autograd holds between ``forward`` and its backward, each storage counted once.

    Storages of ``kept_anyway`` (the parameters and the layer's input, which are there in any case) do not
    count. Tensors that C++ autograd functions save are counted like any others.
    """
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = forward()
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    for t in kept_anyway:
        sizes.pop(t.untyped_storage().data_ptr(), None)
    del result
    return sum(sizes.values())


def peak_bytes(step: Callable[[], Any]) -> int:
    """The most bytes of tensors that ``step`` itself allocated and had at one time.

    From the allocations and releases that torch.profiler records; releases of older tensors do not count.
    Scratch space that oneDNN and MKL take past torch's allocator is not in it.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as run:
        step()
    sizes: dict[int, int] = {}
    now = peak = 0
    for event in sorted(_allocations(run), key=lambda e: e.start_time_ns):
        address, size = event.extra_fields.ptr, event.extra_fields.alloc_size
        if size > 0:
            sizes[address] = size
            now += size
        else:
            now -= sizes.pop(address, 0)
        peak = max(peak, now)
    return peak


def _allocations(run: torch.profiler.profile) -> Iterator[Any]:
    assert run.profiler is not None and run.profiler.kineto_results is not None
    pending = list(run.profiler.kineto_results.experimental_event_tree())
    while pending:
        event = pending.pop()
        pending += event.children
        if event.tag == torch._C._profiler._EventType.Allocation:
            yield event


def _unchanged(_: str, run: Callable[[], Times]) -> Callable[[], Times]:
    return run


def run_case(
    case: Case, contenders: Sequence[str], effort: Effort, wrap: Wrap = _unchanged
) -> dict[str, Any]:
    """Forward, backward, step and memory of every contender, and the ratio to torch.nn's step.

    ``wrap`` may put something around a contender's timed step, by name: how tests slow one down.
    """
    torch.manual_seed(0)
    torch.compiler.reset()
    # The input wants a gradient too, as it does anywhere but in a first layer.
    x = case.input().requires_grad_()
    plain = case.layer("nn")
    with torch.no_grad():
        g = torch.randn_like(plain(x))
    memory: dict[str, dict[str, int]] = {}

    def ready(name: str) -> Callable[[], Times]:
        stepper = Stepper(CONTENDERS[name].build(case), x, g, case.repeat)
        warmed_up(stepper.timed, effort.warmup)
        memory[name] = stepper.memory()
        return wrap(name, stepper.timed)

    names = [n for n in dict.fromkeys(("nn", *contenders)) if case.overhead or not CONTENDERS[n].for_overhead]
    times, errors = contest({name: partial(ready, name) for name in names}, effort)
    parts = {
        name: {part: summary([getattr(t, part) for t in found]) for part in Times._fields}
        for name, found in times.items()
    }
    steps = {name: [t.step for t in found] for name, found in times.items()}
    over = _over_base(steps, "nn", errors)
    rows = {name: errors.get(name) or {**memory[name], **parts[name], **over[name]} for name in names}
    sizes = {"weight_bytes": plain.weight.nbytes, "output_bytes": g.nbytes}
    return {"case": case.name, "base": "nn", **sizes, "contenders": rows}


def _over_base(times: Mapping[str, list[float]], base: str, errors: Errors) -> dict[str, dict[str, Any]]:
    """Raises RuntimeError where the base could not be measured."""
    if base in errors:
        raise RuntimeError(f"{base}: {errors[base]}")
    return {
        name: {
            "over_base": ratio(seconds, times[base]),
            "lower_over_base": ratio(seconds, times[base], quantile=0.25),
        }
        for name, seconds in times.items()
    }


@contextlib.contextmanager
def _instruction_set(name: str) -> Iterator[None]:
    before = _backend._C.build_info()["instruction_set"]
    _backend._C.set_isa(name)
    try:
        yield
    finally:
        _backend._C.set_isa(before)


def _ours_by_instruction_set(draw: Callable[[], Any]) -> dict[str, Callable[[], Any]]:
    """Our draw on each instruction set that this CPU has; on the reference path where there is no other."""
    if _backend.backend() != "native":
        return {"ours_reference": draw}

    def on(isa: str) -> Callable[[], Any]:
        def run() -> None:
            with _instruction_set(isa):
                draw()

        return run

    found = {}
    for isa in ISAS:
        with contextlib.suppress(ValueError), _instruction_set(isa):
            found[f"ours_{isa}"] = on(isa)
    return found


def sampling_name(count: int) -> str:
    return f"sampling + KL of {count:,} weights"


def run_sampling(count: int, effort: Effort) -> dict[str, Any]:
    """One weight draw with its KL: forward alone, no gradient."""
    torch.compiler.reset()
    mu, rho = torch.randn(count) * 0.1, torch.randn(count) * 0.1 - 3
    rng = functional.draw_rng()
    compiled_draw = compiled(eager.sample_and_kl)
    draws = {
        "eager": lambda: eager.sample_and_kl(mu, rho),
        **_ours_by_instruction_set(lambda: functional.sample_weight(mu, rho, rng, with_kl=True)),
        "compiled": lambda: compiled_draw(mu, rho),
    }
    # A draw takes less than a step.
    more = replace(effort, rounds=3 * effort.rounds, seconds=effort.seconds / 5)
    ready = {n: partial(warmed_up, partial(clock, draw), effort.warmup + 1) for n, draw in draws.items()}
    times, errors = contest(ready, more)
    over = _over_base(times, "eager", errors)
    rows = {n: errors.get(n) or {"step": summary(times[n]), **over[n]} for n in draws}
    return {"case": sampling_name(count), "count": count, "base": "eager", "contenders": rows}


def jobs(
    effort: Effort, cases: Sequence[Case], counts: Sequence[int], contenders: Sequence[str]
) -> list[Job]:
    """A row for each number of weights that are sampled, then one for each layer."""
    return [
        *(Job("sampling", sampling_name(n), partial(run_sampling, n, effort)) for n in counts),
        *(Job("layers", case.name, partial(run_case, case, contenders, effort)) for case in cases),
    ]


def all_jobs(quick: bool) -> list[Job]:
    cases = [case.smaller() for case in (CASES[1], CASES[3], CASES[-1])] if quick else CASES
    return jobs(QUICK if quick else Effort(), cases, COUNTS, list(CONTENDERS))
