"""Runs that are killed again and again, and thousands of steps: nothing is lost, and nothing is left behind.

In every run a few kills and some hundred steps, with ``--run-slow`` 120 and 10,000.
"""

from __future__ import annotations

import gc
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import command_line
from test_cli import SMALL
from test_training import assert_same_run
from torch import Tensor, nn

from bbb_fast import ELBO, fixed_noise, kl_loss, multi_sample, predictive
from bbb_fast.layers import BBB, BBB_LRT, Flipout

pytestmark = [
    pytest.mark.cpu_only("processes that name their device themselves"),
    pytest.mark.skipif(sys.platform != "linux", reason="forked processes and /proc"),
]


@pytest.mark.parametrize(
    ("layer_type", "kills"),
    [("lrt", 2), *(pytest.param(t, 40, marks=pytest.mark.slow) for t in ("bbb", "lrt", "flipout"))],
)
def test_kills_change_no_bit(
    processes: ForkServerContext, tmp_path: Path, layer_type: str, kills: int
) -> None:
    """SIGKILL at random moments: of the start, of training, of writing. Resumed, it is the unbroken run."""
    pytest.importorskip("sklearn")
    command = [*SMALL, "--layer-type", layer_type, "--epochs", "8", "--out"]

    def start(folder: Path) -> Any:
        resumed = ["--resume"] if (folder / "last.pt").exists() else []
        process = processes.Process(target=command_line, args=([*command, str(folder), *resumed],))
        process.start()
        return process

    whole, began = tmp_path / "whole", time.monotonic()
    start(whole).join()
    took = time.monotonic() - began
    moments, killed, runs = random.Random(kills), 0, 0
    while killed < kills:
        broken, code, longest = tmp_path / f"broken-{runs}", -signal.SIGKILL, 0.7 * took
        while code == -signal.SIGKILL:
            process = start(broken)
            process.join(moments.uniform(0, longest))
            longest *= 1.1  # so that it ends, however much slower the machine has become
            process.kill()
            process.join()
            code = process.exitcode
            killed += code == -signal.SIGKILL
        assert code == 0
        assert_same_run(whole, broken)
        assert set(os.listdir(broken)) == set(os.listdir(whole))
        runs += 1


def trains(model: nn.Module, forward: Callable[[Tensor, int], Tensor]) -> Callable[[int], None]:
    """A step of Adam on the ELBO of an input of 12 KiB, which is new in each."""
    optimizer, elbo = torch.optim.Adam(model.parameters()), ELBO(1000, reduction="mean", from_logits=True)
    target = torch.randint(0, 10, (16,))

    def step(number: int) -> None:
        optimizer.zero_grad()
        elbo(forward(torch.randn(16, 3, 8, 8), number), target, kl_loss(model), 1.0).backward()
        optimizer.step()

    return step


def steps_of_each_kind() -> dict[str, Callable[[int], object]]:
    """Of a model with a layer of each estimator."""
    model = nn.Sequential(
        Flipout.BBBConv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), BBB.BBBLinear(288, 30), BBB_LRT.BBBLinear(30, 10)
    )

    def pinned(x: Tensor, number: int) -> Tensor:
        with fixed_noise(number, 1, model=model):
            return model(x)

    return {
        "train": trains(model, lambda x, _: model(x)),
        "fixed_noise": trains(model, pinned),
        "multi_sample": trains(model, lambda x, number: multi_sample(model, x, 3, seed=number).mean(0)),
        "predictive": lambda number: predictive(model, torch.randn(16, 3, 8, 8), 3, seed=number),
    }


def growth(kind: str, steps: int) -> int:
    """By how many bytes the process grows over so many steps, after a fifth as many."""
    torch.set_num_threads(1)
    step = steps_of_each_kind()[kind]

    def resident_after(numbers: range) -> int:
        for number in numbers:
            step(number)
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    first = steps // 5
    return -resident_after(range(first)) + resident_after(range(first, first + steps))


@pytest.mark.parametrize("steps", [200, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["train", "fixed_noise", "multi_sample", "predictive"])
def test_memory_is_flat(processes: ForkServerContext, kind: str, steps: int) -> None:
    """To a mebibyte: half of the inputs of 200 steps, a hundred bytes a step of 10,000."""
    with ProcessPoolExecutor(1, mp_context=processes) as pool:
        assert pool.submit(growth, kind, steps).result() < 1 << 20
