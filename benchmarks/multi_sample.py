"""Several draws in a training step: multi_sample against a loop of forwards.

A training step (forward, mean of squares, backward) of models whose layers draw under each estimator, in
three ways: ``loop``, a backward after each of the forwards, as one draw at a time is trained; ``kept``, one
backward after all forwards; and ``multi_sample``. Medians, interleaved. ``bytes_kept`` is what autograd
holds between forward and backward, without the parameters, each storage counted once. ``passes`` is the
time of the passes over the parameters of a linear layer of 1200 x 1200 alone, in nanoseconds a weight and
draw: drawing the weights, and forming the gradients of mu and rho from those of the weights; ``one`` for a
call a draw, ``sum`` for all draws in one call.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from harness import Effort, Job, summary, time_in_turn
from layers import saved_for_backward
from torch import Tensor, nn

from bbb_fast import multi_sample
from bbb_fast.layers import BBB, BBB_LRT, Flipout
from bbb_fast.models import BBBLeNet

SAMPLES = 16
# For each comparison.
EFFORT = Effort(rounds=200, seconds=6.0, least=5, warmup=1)
QUICK = Effort(rounds=5, warmup=1)
ESTIMATORS = {"bbb": BBB, "lrt": BBB_LRT, "flipout": Flipout}


def mlp(family: Any) -> nn.Module:
    hidden = (family.BBBLinear(784, 400), nn.ReLU(), family.BBBLinear(400, 400), nn.ReLU())
    return nn.Sequential(*hidden, family.BBBLinear(400, 10))


MODELS: dict[str, tuple[Callable[[str], nn.Module], tuple[int, ...]]] = {
    "LeNet, batch 64": (lambda name: BBBLeNet(10, 1, layer_type=name), (64, 1, 32, 32)),
    "784-400-400-10, batch 128": (lambda name: mlp(ESTIMATORS[name]), (128, 784)),
    "linear 1200 x 1200, batch 64": (lambda name: ESTIMATORS[name].BBBLinear(1200, 1200), (64, 1200)),
}


def output(model: nn.Module, x: Tensor) -> Tensor:
    result = model(x)
    return result[0] if isinstance(result, tuple) else result


def steps(model: nn.Module, x: Tensor, samples: int) -> dict[str, Callable[[], None]]:
    def loop() -> None:
        model.zero_grad()
        for _ in range(samples):
            (output(model, x).square().mean() / samples).backward()

    def kept() -> None:
        model.zero_grad()
        torch.stack([output(model, x) for _ in range(samples)]).square().mean().backward()

    def at_once() -> None:
        model.zero_grad()
        multi_sample(model, x, samples).square().mean().backward()

    return {"loop": loop, "kept": kept, "multi_sample": at_once}


def compare(title: str, name: str, samples: int, effort: Effort) -> dict[str, Any]:
    """The three ways under one estimator, and what a model keeps in the last two."""
    make, shape = MODELS[title]
    model, x = make(name), torch.randn(shape)
    found = {key: summary(t) for key, t in time_in_turn(steps(model, x, samples), effort).items()}
    gains = {
        f"times_as_fast_as_{key}": found[key]["median_us"] / found["multi_sample"]["median_us"]
        for key in ("loop", "kept")
    }
    ways = {
        "forwards": lambda: torch.stack([output(model, x) for _ in range(samples)]),
        "multi_sample": lambda: multi_sample(model, x, samples),
    }
    own = list(model.parameters())
    kept = {way: saved_for_backward(run, own) for way, run in ways.items()}
    return {"model": title, "estimator": name, **found, **gains, "bytes_kept": kept}


def passes(samples: int, effort: Effort) -> dict[str, Any]:
    """Nanoseconds a weight and draw: of one draw, and of all in one call."""
    ops = torch.ops.bbb_fast
    mu, rho = torch.randn(1200, 1200), torch.randn(1200, 1200) - 4
    rng = torch.stack([torch.arange(samples), torch.arange(samples)], 1)
    grads = [torch.randn_like(mu) for _ in range(samples)]
    g_mu, g_rho = torch.empty_like(mu), torch.empty_like(mu)

    def draw(rngs: Tensor) -> None:
        ops.sample_weights([mu], [rho], rngs, 0.0, 0.1, False, None)

    def backward(given: list[Tensor], rngs: Tensor) -> None:
        ops.posterior_backward_out(given, [], None, [mu], [rho], rngs, [0.0], [0.1], [g_mu], [g_rho])

    calls: dict[str, tuple[Callable[[], None], int]] = {
        "forward_one": (lambda: draw(rng[0]), 1),
        "backward_one": (lambda: backward(grads[:1], rng[0]), 1),
        "forward": (lambda: draw(rng), samples),
        "backward": (lambda: backward(grads, rng), samples),
    }
    times = time_in_turn({key: run for key, (run, _) in calls.items()}, effort)
    ns = {key: summary(t)["median_us"] * 1e3 / (mu.numel() * calls[key][1]) for key, t in times.items()}
    return {**ns, "one": ns["forward_one"] + ns["backward_one"], "sum": ns["forward"] + ns["backward"]}


def all_jobs(quick: bool) -> list[Job]:
    """A row for each model and estimator, and one for the passes."""
    effort = QUICK if quick else EFFORT
    steps = [
        Job("steps", f"{title}, {name}", partial(compare, title, name, SAMPLES, effort))
        for title in MODELS
        for name in ESTIMATORS
    ]
    return [*steps, Job("passes", "passes", partial(passes, SAMPLES, effort))]


def arrange(result: dict[str, Any]) -> dict[str, Any]:
    """All rows in one list, and the passes by number of threads."""
    runs = result["runs"]
    steps = [{"threads": run["threads"], **row} for run in runs for row in run.get("steps", [])]
    passes = {str(run["threads"]): row for run in runs for row in run.get("passes", [])}
    rest = {key: value for key, value in result.items() if key != "runs"}
    return {**rest, "samples": SAMPLES, "steps": steps, "passes": passes}
