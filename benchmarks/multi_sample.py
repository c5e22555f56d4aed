"""Several draws in a training step: multi_sample against a loop of forwards.

    python benchmarks/multi_sample.py [--samples 16] [--threads 1 2] [--quick] [--out PATH]

A training step (forward, mean of squares, backward) of models whose layers draw under each estimator, in
three ways: ``loop``, a backward after each of the forwards, as one draw at a time is trained; ``kept``, one
backward after all forwards; and ``multi_sample``. Medians, interleaved. ``bytes_kept`` is what autograd
holds between forward and backward, without the parameters, each storage counted once. ``passes`` is the
time of the passes over the parameters of a linear layer of 1200 x 1200 alone, in nanoseconds a weight and
draw: drawing the weights, and forming the gradients of mu and rho from those of the weights; ``one`` for a
call a draw, ``sum`` for all draws in one call.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from harness import (
    add_common_arguments,
    clock,
    interleaved_for,
    out_path,
    provenance,
    summary,
    threads,
    with_suffix,
    write_json,
)
from torch import Tensor, nn

from bbb_fast import multi_sample
from bbb_fast.layers import BBB, BBB_LRT, Flipout
from bbb_fast.models import BBBLeNet

# For each comparison.
SECONDS = 6.0
ESTIMATORS = {"bbb": BBB, "lrt": BBB_LRT, "flipout": Flipout}


def mlp(family: Any) -> nn.Module:
    return nn.Sequential(
        family.BBBLinear(784, 400),
        nn.ReLU(),
        family.BBBLinear(400, 400),
        nn.ReLU(),
        family.BBBLinear(400, 10),
    )


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


def bytes_kept(forward: Callable[[], Tensor], model: nn.Module) -> int:
    """What a forward keeps for backward, without the parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs = forward()  # alive while the rest is counted, so that no address is used twice
    del outputs
    return sum(kept.values())


def compare(
    make: Callable[[str], nn.Module], shape: tuple[int, ...], name: str, samples: int, seconds: float
) -> dict[str, Any]:
    model, x = make(name), torch.randn(shape)
    contenders = steps(model, x, samples)
    for run in contenders.values():
        run()
    timed = {key: (lambda run=run: clock(run)) for key, run in contenders.items()}
    times, errors = interleaved_for(timed, seconds, 200)
    if errors:
        raise RuntimeError(f"{name}: {errors}")
    medians = {key: summary(t)["median_us"] for key, t in times.items()}
    return {
        **{key: summary(t) for key, t in times.items()},
        "times_as_fast_as_loop": medians["loop"] / medians["multi_sample"],
        "times_as_fast_as_kept": medians["kept"] / medians["multi_sample"],
        "bytes_kept": {
            "forwards": bytes_kept(lambda: torch.stack([output(model, x) for _ in range(samples)]), model),
            "multi_sample": bytes_kept(lambda: multi_sample(model, x, samples), model),
        },
    }


def passes(samples: int, seconds: float) -> dict[str, Any]:
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
    for run, _ in calls.values():
        run()
    times, _ = interleaved_for(
        {key: (lambda run=run: clock(run)) for key, (run, _) in calls.items()}, seconds, 200
    )
    ns = {key: summary(t)["median_us"] * 1e3 / (mu.numel() * calls[key][1]) for key, t in times.items()}
    return {**ns, "one": ns["forward_one"] + ns["backward_one"], "sum": ns["forward"] + ns["backward"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=16, help="draws (default 16)")
    add_common_arguments(parser, "multi_sample")
    args = parser.parse_args()
    seconds = 0.0 if args.quick else SECONDS
    out = with_suffix(out_path(args.out, "multi_sample", args.quick), ".json")
    result: dict[str, Any] = {"provenance": provenance(), "samples": args.samples, "steps": [], "passes": {}}
    for count in args.threads:
        with threads(count):
            for title, (make, shape) in MODELS.items():
                for name in ESTIMATORS:
                    row = compare(make, shape, name, args.samples, seconds)
                    result["steps"].append({"model": title, "estimator": name, "threads": count, **row})
                    kept, forwards = (row["bytes_kept"][k] / 1e6 for k in ("multi_sample", "forwards"))
                    faster = f"{row['times_as_fast_as_loop']:.2f} times as fast as the loop"
                    memory = f"keeps {kept:.1f} MB, forwards {forwards:.1f}"
                    print(f"{title}, {name}, {count} threads: {faster}; {memory}", flush=True)
            result["passes"][str(count)] = passes(args.samples, seconds)
            print(f"passes, {count} threads: {result['passes'][str(count)]}", flush=True)
    write_json(out, result)
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
