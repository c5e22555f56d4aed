"""Several Python threads call ops and layers at once, each with a number of OpenMP threads of its own that it
changes on the way: every result has the bits that one thread gets alone.

In every run a few calls of each thread, with ``--run-slow`` 10,000 (of predictions, which take longer, 1000).
``make sanitize`` runs the few under ThreadSanitizer.
"""

from __future__ import annotations

import random
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import partial
from itertools import product
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import DTYPES, flat, kernels
from test_layer_table import CASES, Case
from torch import Tensor, nn

from bbb_fast import fixed_noise, kl_loss, multi_sample, predict
from bbb_fast.layers import BBB, BBB_LRT, Flipout

pytestmark = pytest.mark.cpu_only("threads that share the CPU's kernels")

# What a thread runs.
Call = Callable[[], list[Tensor]]

OMP_THREADS = (1, 2, 3)


def races(short: int, long: int = 10_000) -> pytest.MarkDecorator:
    """How many threads run how many calls each."""
    by_hand = [pytest.param(threads, long, marks=pytest.mark.slow) for threads in (2, 3, 4)]
    return pytest.mark.parametrize(("threads_at_once", "calls"), [(3, short), *by_hand])


@pytest.fixture(autouse=True)
def short_turns(threads: None) -> Iterator[None]:
    """Python changes threads as often as it can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def alone(call: Call) -> list[list[Tensor]]:
    """The results, which for products of the library may depend on the number of OpenMP threads."""
    results: list[list[Tensor]] = []
    for count in OMP_THREADS:
        torch.set_num_threads(count)
        result = call()
        if not any(all(map(torch.equal, result, other)) for other in results):
            results.append(result)
    return results


def at_once(count: int, work: Callable[[int], None]) -> None:
    """``work(0)`` to ``work(count - 1)``, begun together; raises what one of them raises."""
    start = threading.Barrier(count, timeout=60)

    def begin(thread: int) -> None:
        start.wait()
        work(thread)

    with ThreadPoolExecutor(count) as pool:
        for future in [pool.submit(begin, thread) for thread in range(count)]:
            future.result()


def race(calls_of: Callable[[], dict[str, Call]], threads: int, calls: int) -> None:
    """Each thread runs so many of its own ``calls_of()``: half in an order common to all, half in its own."""
    expected = {name: alone(call) for name, call in calls_of().items()}
    for name, results in expected.items():
        assert all(t.isfinite().all() for result in results for t in result), name

    def work(thread: int) -> None:
        common, choice, own = random.Random(0), random.Random(1 + thread), calls_of()
        for _ in range(calls):
            torch.set_num_threads(choice.choice(OMP_THREADS))
            name = choice.choice((common.choice(list(own)), choice.choice(list(own))))
            result = own[name]()
            assert any(all(map(torch.equal, result, other)) for other in expected[name]), name

    at_once(threads, work)


@races(60)
def test_kernels(native: None, threads_at_once: int, calls: int) -> None:
    """In each type, on enough elements for several OpenMP threads."""
    made: dict[str, Call] = {}
    for dtype in DTYPES:
        other = torch.bfloat16 if dtype == torch.float32 else dtype
        made |= {f"{name}, {dtype}": kernel for name, kernel in kernels(40_003, dtype, other).items()}
    race(lambda: made, threads_at_once, calls)


# Those of the table are small. Of these, several OpenMP threads share the weights, and the last two go around
# the library (csrc/products.cpp).
LARGE = {
    "BBBLinear": ((160, 130), (9, 160)),
    "BBBConv2d": ((32, 33, 3, 1, 1), (16, 32, 2, 2)),
    "BBBConv1d": ((3, 6, 5, 1, 2), (4, 3, 70)),
}


def large(name: str, family: ModuleType) -> Case:
    arguments, shape = LARGE[name]
    return Case(lambda: getattr(family, name)(*arguments), lambda: (torch.randn(shape),))


CASES_HERE = {" ".join(key): case for key, case in CASES.items()}
for _name, _family in product(LARGE, (BBB, BBB_LRT, Flipout)):
    CASES_HERE[f"large {_name} {_family.__name__}"] = large(_name, _family)


Made = dict[str, tuple[int, nn.Module, tuple[Tensor, ...]]]


def made() -> Made:
    """A seed for each layer, and inputs that want a gradient where they can."""
    result: Made = {}
    for seed, (name, case) in enumerate(CASES_HERE.items()):
        inputs = tuple(x.requires_grad_(x.is_floating_point()) for x in case.inputs())
        result[name] = seed, case.make(), inputs
    return result


def forward_and_backward(seed: int, layer: nn.Module, inputs: tuple[Tensor, ...], in_one: bool) -> Call:
    """Outputs, KL, and the gradients of both: in one backward, or in one each."""

    def call() -> list[Tensor]:
        with fixed_noise(seed, 1, model=layer, draw="activations"):
            outputs = flat(layer(*inputs))
        kl = kl_loss(layer)
        loss = torch.stack([t.square().sum() for t in outputs]).sum()
        leaves = [t for t in (*layer.parameters(), *inputs) if t.requires_grad]
        gradients: list[Tensor | None] = []
        for each in [loss + kl] if in_one else [loss, kl]:
            if each.requires_grad:
                gradients += torch.autograd.grad(each, leaves, allow_unused=True)
        return [t.detach() for t in (*outputs, kl, *gradients) if t is not None]

    return call


@races(60)
def test_layers_of_their_own(threads_at_once: int, calls: int) -> None:
    """Which share nothing but the library's state, and form the KL's gradient with the output's."""
    common = made()
    race(
        lambda: {k: forward_and_backward(s, deepcopy(m), x, True) for k, (s, m, x) in common.items()},
        threads_at_once,
        calls,
    )


@races(60)
def test_the_same_layers(threads_at_once: int, calls: int) -> None:
    """Parameters, and what a forward leaves for the KL, are one for all threads.

    Whether a KL finds the graph of this thread's forward is chance, and the sum of both gradients is then
    rounded otherwise: hence one backward each.
    """
    common = made()
    race(
        lambda: {k: forward_and_backward(*each, False) for k, each in common.items()}, threads_at_once, calls
    )


@races(50, 1000)
def test_predictions_of_one_model(threads_at_once: int, calls: int) -> None:
    """Each prediction pins the noise in its own thread."""
    model = nn.Sequential(Flipout.BBBLinear(5, 7), nn.ReLU(), BBB.BBBLinear(7, 6), BBB_LRT.BBBLinear(6, 3))
    x = torch.randn(4, 5)

    def predicted(seed: int) -> list[Tensor]:
        with torch.no_grad():
            return [predict(model, x, 3, seed=seed), multi_sample(model, x, 3, seed=seed)]

    race(lambda: {f"seed {s}": partial(predicted, s) for s in range(4)}, threads_at_once, calls)


@races(60)
@pytest.mark.parametrize("family", [BBB, BBB_LRT, Flipout])
def test_free_draws(family: Any, threads_at_once: int, calls: int) -> None:
    """In whatever order threads draw from PyTorch's generator: the noise is that of one thread, each once."""
    layer, x = family.BBBLinear(5, 3), torch.randn(4, 5)
    drawn: list[bytes] = []

    def draw(_: int) -> None:
        for _ in range(calls):
            drawn.append(layer(x).detach().numpy().tobytes())

    torch.manual_seed(3)
    for _ in range(threads_at_once):
        draw(0)
    expected, drawn = Counter(drawn), []
    assert set(expected.values()) == {1}
    torch.manual_seed(3)
    at_once(threads_at_once, draw)
    assert Counter(drawn) == expected
