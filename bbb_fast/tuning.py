"""Measures which routes (:mod:`bbb_fast.routes`) are fastest for a model's layers on this machine."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import _backend, routes
from ._files import atomic_write
from ._layer_functions import explicit_padding
from .layers.base import BayesianLayer
from .layers.shapes import Bilinear, Conv, Linear
from .routes import Routes

__all__ = ["Measured", "Place", "measure", "places", "save", "tune"]

# A measured choice replaces the rule's where it takes less than this share of its time: noise is no reason.
_CLEARLY_FASTER = 0.97
_ROUNDS = 200


@dataclass(frozen=True, eq=False)
class Place:
    """A layer in a model: its name there, the shape of its input, whether that input has a gradient."""

    name: str
    layer: BayesianLayer
    input: tuple[int, ...]
    input_gradient: bool


@dataclass(frozen=True)
class Measured:
    """What one choice took.

    Attributes:
        name: of the layer.
        what: "way", or "variance_dtype".
        key: of :class:`bbb_fast.routes.Routes`.
        seconds: of a forward and a backward, the median, by candidate.
        rule, choice: the candidate that the rules choose, and the one to take.
    """

    name: str
    what: str
    key: tuple[int, ...]
    seconds: Mapping[str, float]
    rule: str
    choice: str


def places(model: nn.Module, x: Tensor) -> list[Place]:
    """The model's Bayesian layers with what each is given when the model is given ``x``; runs it once."""
    found: list[Place] = []
    names = {
        layer: name
        for name, layer in model.named_modules()
        # A bilinear layer has two inputs.
        if isinstance(layer, BayesianLayer) and not isinstance(layer, Bilinear)
    }

    def note(layer: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(layer, BayesianLayer)
        (input,) = args[:1]
        found.append(Place(names[layer], layer, tuple(input.shape), input.requires_grad))

    handles = [layer.register_forward_pre_hook(note) for layer in names]
    try:
        with torch.enable_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return found


def tune(
    places: Iterable[Place],
    *,
    seconds: float = 0.5,
    start: Routes | None = None,
    report: Callable[[Measured], None] = lambda measured: None,
) -> tuple[Routes, list[Measured]]:
    """Times every candidate of every layer, forward and backward, on the threads that torch has now.

    Candidates of one choice take turns until ``seconds`` are over. A choice is made once for layers that
    share it. The routes in use come back as they were. Float32 layers on the CPU only.

    Args: ``start`` what was measured before (default: nothing); ``report`` is told of each choice.
    Returns ``start`` with the new choices, and those. Raises RuntimeError without the native kernels.
    """
    if _backend._C is None:
        raise RuntimeError(f"there is nothing to choose on the reference path: {_backend.why_not_native()}")
    before = routes.current()
    rules = Routes(routes.rules_of_this_cpu())
    ways, narrow = (dict(start.ways), dict(start.narrow)) if start else ({}, {})
    done: list[Measured] = []
    seen: set[tuple[str, tuple[int, ...]]] = set()
    try:
        for place in places:
            for measured in _choices(place, rules, ways, narrow, seen, seconds):
                done.append(measured)
                report(measured)
    finally:
        routes.use(before)
    return Routes(rules.rules, ways, narrow), done


def _choices(
    place: Place,
    rules: Routes,
    ways: dict[routes.Key, str],
    narrow: dict[routes.Key, bool],
    seen: set[tuple[str, routes.Key]],
    seconds: float,
) -> Iterable[Measured]:
    layer, weight = place.layer, tuple(place.layer.W_mu.shape)
    if layer.W_mu.dtype != torch.float32 or layer.W_mu.device.type != "cpu" or 0 in place.input:
        return
    routes.use(rules)
    candidates: list[str] = []
    if isinstance(layer, Conv):
        shape, padding = _padded(layer, place.input)
        geometry = (weight, layer.stride, padding, layer.dilation, layer.groups)
        key = routes.conv_key(shape, *geometry)
        candidates, rule = _backend._C.conv_ways(shape, *geometry)
    elif isinstance(layer, Linear):
        key = routes.linear_key(place.input, weight)
        candidates, rule = _backend._C.linear_ways(place.input, weight)
    if len(candidates) > 1:
        if ("way", key) not in seen:
            seen.add(("way", key))

            def take(way: str) -> None:
                routes.use(Routes(rules.rules, {key: way}))

            measured = _measured(place, "way", key, candidates, rule, take, seconds)
            ways[key] = measured.choice
            yield measured
        routes.use(Routes(rules.rules, {key: ways[key]}))
    key = routes.narrow_key(weight)
    if layer.estimator != "lrt" or not _backend._C.multiplies_bfloat16() or ("narrow", key) in seen:
        return
    seen.add(("narrow", key))
    asked = layer.variance_dtype
    rule = "bfloat16" if routes.narrow_by_rule(weight) else "float32"
    try:

        def set_type(name: str) -> None:
            layer.variance_dtype = getattr(torch, name)

        measured = _measured(place, "variance_dtype", key, ["float32", "bfloat16"], rule, set_type, seconds)
    finally:
        layer.variance_dtype = asked
    narrow[key] = measured.choice == "bfloat16"
    yield measured


def _padded(layer: Conv, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape of the input that the convolution itself gets, batched, and the padding left to it."""
    x = torch.empty(shape, device="meta")
    x = x.unsqueeze(0) if x.dim() == layer.spatial + 1 else x
    x, padding = layer._pad(x)
    name = type(layer).__name__
    x, numbers = explicit_padding(name, x, layer.W_mu, layer.stride, padding, layer.dilation)
    return tuple(x.shape), numbers


def _measured(
    place: Place,
    what: str,
    key: routes.Key,
    candidates: list[str],
    rule: str,
    take: Callable[[str], None],
    seconds: float,
) -> Measured:
    times = measure(place, candidates, take, seconds)
    best = min(times, key=lambda name: times[name])
    choice = best if times[best] < _CLEARLY_FASTER * times[rule] else rule
    return Measured(place.name, what, key, times, rule, choice)


def measure(
    place: Place, candidates: list[str], take: Callable[[str], None], seconds: float
) -> dict[str, float]:
    """Median seconds of the layer's forward and backward under each candidate, which take turns."""
    x = torch.randn(place.input, requires_grad=place.input_gradient)
    layer = place.layer
    parameters = [p for p in layer.parameters() if p.requires_grad]
    wanted = [*parameters, x] if place.input_gradient else parameters
    gradient = torch.randn_like(layer(x))
    times: dict[str, list[float]] = {name: [] for name in candidates}

    def run(name: str) -> None:
        take(name)
        start = time.perf_counter()
        torch.autograd.grad(layer(x), wanted, gradient)
        times[name].append(time.perf_counter() - start)

    for name in [*candidates, *candidates]:
        run(name)
    # What warmed up says who has no chance: no more time is spent on those.
    hopeful = [name for name in candidates if times[name][-1] < 2 * min(t[-1] for t in times.values())]
    for name in hopeful:
        times[name].clear()
    begin = time.perf_counter()
    for k in range(_ROUNDS):
        if k >= 3 and time.perf_counter() - begin > seconds:
            break
        for name in hopeful:
            run(name)
    return {name: statistics.median(values) for name, values in times.items()}


def save(table: Routes, measured: Iterable[Measured], file: str | os.PathLike[str] | None = None) -> Path:
    """Writes the measurements where :func:`bbb_fast.routes.load` finds them; returns the file. OSError."""
    path = routes.cache_file() if file is None else Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "routes": table.to_dict(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
        "measured": [{**vars(m), "key": list(m.key), "seconds": dict(m.seconds)} for m in measured],
    }
    atomic_write(path, (json.dumps(content, indent=1) + "\n").encode())
    return path
