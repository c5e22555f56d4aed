"""Data-parallel training: ranks draw independent noise and end with the same parameters."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bbb_fast import fixed_noise, functional, kl_loss
from bbb_fast.layers import BBB, BBB_LRT

pytestmark = pytest.mark.cpu_only("gloo")


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    # Seeded alike on purpose: the layers are the same, the noise must not be.
    torch.manual_seed(0)
    model = nn.Sequential(BBB_LRT.BBBLinear(4, 8), nn.ReLU(), BBB.BBBLinear(8, 2))
    torch.manual_seed(1)
    draws = functional.draw_rng()
    with fixed_noise(3):
        pinned = model(torch.ones(1, 4)).detach()
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(3):
        optimizer.zero_grad()
        (parallel(torch.randn(5, 4)).square().mean() + 1e-3 * kl_loss(model)).backward()
        optimizer.step()
    result, other = (Path(folder) / f"rank{r}.pt" for r in (rank, 1 - rank))
    torch.save({"draws": draws, "pinned": pinned, "model": model.state_dict()}, f"{result}.part")
    os.replace(f"{result}.part", result)
    # Leave together and without gloo's teardown, whose threads now and then abort a finished process.
    deadline = time.monotonic() + 60
    while not other.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os._exit(0)


def test_two_ranks(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_worker, (str(tmp_path),), nprocs=2)
    a, b = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert not torch.equal(a["draws"], b["draws"])
    assert torch.equal(a["pinned"], b["pinned"])
    for name, value in a["model"].items():
        assert torch.equal(value, b["model"][name]), name
