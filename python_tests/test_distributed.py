"""Data-parallel training, with whole and with sharded parameters: independent noise, one result."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from bbb_fast import ELBO, convert, fixed_noise, functional, kl_loss
from bbb_fast._noise import posterior_means
from bbb_fast.layers import BBB, BBB_LRT, ModuleWrapper
from bbb_fast.layers.base import BayesianLayer, BayesianModule

pytestmark = pytest.mark.cpu_only("gloo")


class Model(ModuleWrapper):
    """Shards of its parameters over two ranks are of different sizes, and some are empty."""

    def __init__(self) -> None:
        super().__init__()
        self.first = BBB_LRT.BBBLinear(4, 7)
        self.act = nn.ReLU()
        self.second = BBB.BBBLinear(7, 3, bias=False)
        self.last = BBB_LRT.BBBLinear(3, 1)


class Converted(nn.Module):
    """Of the layers that ``Model`` has not, with what is run in weight space."""

    def __init__(self) -> None:
        super().__init__()
        self.signs = convert(
            nn.Sequential(nn.Linear(4, 6), nn.ConvTranspose1d(1, 2, 3, padding=1)), "flipout"
        )
        self.words = convert(nn.Embedding(5, 4))
        self.recurrent = convert(nn.GRU(6, 5, batch_first=True))
        # Without a bias: its gradient at the keys is nothing but rounding, of which Adam takes the sign.
        self.attention = convert(nn.MultiheadAttention(5, 1, bias=False, batch_first=True))
        self.last = convert(nn.Sequential(nn.LayerNorm(9), nn.Linear(9, 1)), others="weights")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        linear, transposed = self.signs.children()
        y, _ = self.recurrent(transposed(linear(x).unsqueeze(1)))
        y = self.attention(y, y, y, need_weights=False)[0].mean(1)
        words = self.words((x[:, :2] > 0).long().sum(1))
        return self.last(torch.cat((y, words), 1)), kl_loss(self)


MODELS: dict[str, Callable[[], nn.Module]] = {"layers": Model, "converted": Converted}


def _model(name: str = "layers") -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]()


def _whole(t: Tensor) -> Tensor:
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()


def _by_layers(model: nn.Module, **options: Any) -> Any:
    for module in model.modules():
        if isinstance(module, BayesianModule):
            fully_shard(module, **options)
    return fully_shard(model, **options)


def _mesh(*shape: int) -> Any:
    return init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])


# How two ranks may share a model out.
SHARINGS: dict[str, Callable[..., Any]] = {
    "layers": _by_layers,
    "root": fully_shard,
    "layers, kept": lambda m: _by_layers(m, reshard_after_forward=False),
    "replicated and sharded": lambda m: _by_layers(m, mesh=_mesh(1, 2)),
    "replicated, one rank a shard": lambda m: _by_layers(m, mesh=_mesh(2, 1)),
    "ddp": DistributedDataParallel,
    "fsdp1": lambda m: FullyShardedDataParallel(m, use_orig_params=True, device_id=torch.device("cpu")),
    "fsdp1, flat": lambda m: FullyShardedDataParallel(m, device_id=torch.device("cpu")),
}


def _train(model: nn.Module, x: Tensor, kl_inside: bool, pinned: bool) -> list[float]:
    """Three steps on ``x``; the KL of the whole model before each and after the last."""
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    bound, target = ELBO(100, from_logits=True), torch.zeros(len(x), dtype=torch.int64)
    kls = []
    for _ in range(3):
        optimizer.zero_grad()
        with fixed_noise(5) if pinned else posterior_means():
            y, kl = model(x)
        if not kl_inside:
            kl = kl_loss(model)
        kls.append(kl.item())
        bound(torch.cat((y, 1 - y), 1), target, kl, 0.1).backward()
        optimizer.step()
    return kls


def _sharded_training(rank: int, name: str, sharing: str, kl_inside: bool, pinned: bool) -> dict[str, Any]:
    torch.manual_seed(7)
    x = torch.randn(12, 4)
    plain, model = _model(name), SHARINGS[sharing](_model(name))
    expected = _train(plain, x, kl_inside, pinned)
    kls = _train(model, x[6 * rank : 6 * rank + 6], kl_inside, pinned)
    result: dict[str, Any] = {"kl": (kls, expected)}
    gather: Any = nullcontext()
    if sharing.startswith("fsdp1"):
        gather = FullyShardedDataParallel.summon_full_params(model)
    with gather:
        inner: Any = model.module if hasattr(model, "module") else model
        result["parameters"] = [
            (_whole(p), _whole(q)) for p, q in zip(inner.parameters(), plain.parameters(), strict=True)
        ]
    return result


def _sharded_uses(rank: int) -> dict[str, Any]:
    """The other uses of a sharded model."""
    plain, model = _model(), _by_layers(_model())
    layers = [m for m in model.modules() if isinstance(m, BayesianLayer)]
    of_plain = [m for m in plain.modules() if isinstance(m, BayesianLayer)]
    pairs = [(layer.kl_loss(), alone.kl_loss()) for layer, alone in zip(layers, of_plain, strict=True)]
    # A factor, and the gradient in shards.
    (3 * kl_loss(model)).backward()
    (3 * kl_loss(plain)).backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert isinstance(p.grad, DTensor) and isinstance(p, DTensor) and q.grad is not None
        assert p.grad.placements == p.placements
        pairs.append((p.grad.full_tensor(), q.grad))
    with torch.no_grad():
        pairs.append((kl_loss(model), kl_loss(plain)))
    x = torch.ones(2, 4)
    with torch.no_grad():
        result: dict[str, Any] = {"drawn": model(x)[0]}
        with fixed_noise(3):
            result["pinned"] = model(x)[0]
        with fixed_noise(3):
            pairs.append((result["pinned"], plain(x)[0]))
    for layer in layers:
        layer.reset_parameters()
        assert all(isinstance(t, DTensor) for pair in layer.posterior() for t in pair)
    result["reset"] = kl_loss(model)
    result["pairs"] = [(a.detach(), b.detach()) for a, b in pairs]
    return result


def _placements(rank: int) -> dict[str, Any]:
    """Parameters placed by hand, as tensor parallelism does: the KL, and one line for what does not work."""
    mesh, mu, rho = init_device_mesh("cpu", (2,)), torch.randn(5, 3), torch.randn(5, 3)
    dist.broadcast(mu, 0), dist.broadcast(rho, 0)
    pairs = []
    for of_mu, of_rho in [(Shard(0),) * 2, (Shard(1),) * 2, (Replicate(),) * 2, (Shard(0), Replicate())]:
        leaves = [distribute_tensor(mu, mesh, [of_mu]), distribute_tensor(rho, mesh, [of_rho]), mu, rho]
        m, r, m_plain, r_plain = (t.detach().requires_grad_() for t in leaves)
        # A plain tensor beside it counts once.
        kl = functional.kl_divergence([m, m_plain], [r, r_plain], 0.1, [0.4, 0.3])
        a, b = mu.clone().requires_grad_(), rho.clone().requires_grad_()
        parts = [functional.kl_divergence(a, b, 0.1, s) for s in (0.4, 0.3)]
        pairs.append((kl.detach(), (parts[0] + parts[1]).detach()))
        grads = torch.autograd.grad(kl, [m, r, m_plain, r_plain])
        expected = [g for part in parts for g in torch.autograd.grad(part, [a, b])]
        pairs += [(_whole(g), e) for g, e in zip(grads, expected, strict=True)]
    partial = DTensor.from_local(mu / 2, mesh, [Partial()])
    kl = functional.kl_divergence(partial, distribute_tensor(rho, mesh, [Shard(0)]))
    pairs.append((kl, functional.kl_divergence(mu, rho)))
    layer = BBB.BBBLinear(3, 5)
    errors = []

    def fsdp(module: nn.Module, **options: Any) -> Any:
        return FullyShardedDataParallel(module, device_id=torch.device("cpu"), **options)

    flat, pieces = fsdp(BBB.BBBLinear(3, 5)), fsdp(BBB.BBBLinear(3, 5), use_orig_params=True)
    flat_cell, pieces_of_cell = fsdp(BBB.BBBGRUCell(3, 5)), fsdp(BBB.BBBGRUCell(3, 5), use_orig_params=True)
    shard = distribute_tensor(mu, mesh, [Shard(0)])
    for call in (
        lambda: functional.kl_divergence(shard, rho),
        lambda: functional.bbb_linear(torch.ones(2, 3), shard, shard, None, None, torch.tensor([1, 2])),
        lambda: functional.sample_weight(shard, shard, torch.tensor([1, 2])),
        lambda: layer(distribute_tensor(torch.ones(2, 3), mesh, [Replicate()])),
        lambda: kl_loss(flat),
        lambda: kl_loss(pieces),
        lambda: pieces.module.kl_loss(),
        lambda: kl_loss(flat_cell),
        lambda: kl_loss(pieces_of_cell),
    ):
        try:
            errors.append(repr(call()))
        except (TypeError, NotImplementedError, RuntimeError) as error:
            errors.append(f"{type(error).__name__}: {error}")
    return {"pairs": pairs, "errors": errors}


def _ddp(rank: int) -> dict[str, Any]:
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
    return {"draws": draws, "pinned": pinned, "model": model.state_dict()}


def _training_cases() -> list[tuple[str, str, bool, bool]]:
    inside, outside = True, False
    cases = [
        (name, sharing, where, False)
        for name in MODELS
        for sharing in SHARINGS
        for where in (inside, outside)
    ]
    # Of the older FSDP the KL is to be had within the forward only.
    cases = [case for case in cases if not (case[1].startswith("fsdp1") and case[2] is outside)]
    for name in MODELS:
        cases += [(name, "layers", outside, True), (name, "root", inside, True), (name, "ddp", inside, True)]
    return cases


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results: dict[str, Any] = {
        "ddp": _ddp(rank),
        "training": {case: _sharded_training(rank, *case) for case in _training_cases()},
        "uses": _sharded_uses(rank),
        "placements": _placements(rank),
    }
    result, other = (Path(folder) / f"rank{r}.pt" for r in (rank, 1 - rank))
    torch.save(results, f"{result}.part")
    os.replace(f"{result}.part", result)
    # Leave together and without gloo's teardown, whose threads now and then abort a finished process.
    deadline = time.monotonic() + 60
    while not other.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os._exit(0)


@pytest.fixture(scope="module")
def ranks(processes: ForkServerContext, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks found."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.start_processes(_worker, (str(folder),), 2, start_method="forkserver")
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_data_parallel(ranks: list[dict[str, Any]]) -> None:
    a, b = (r["ddp"] for r in ranks)
    assert not torch.equal(a["draws"], b["draws"])
    assert torch.equal(a["pinned"], b["pinned"])
    for name, value in a["model"].items():
        assert torch.equal(value, b["model"][name]), name


@pytest.mark.parametrize(("name", "sharing", "kl_inside", "pinned"), _training_cases())
def test_sharded_training(
    ranks: list[dict[str, Any]], name: str, sharing: str, kl_inside: bool, pinned: bool
) -> None:
    """Three steps on two ranks' halves of a batch are three steps of one process on the whole of it."""
    for rank in ranks:
        result = rank["training"][name, sharing, kl_inside, pinned]
        kls, expected = result["kl"]
        assert kls == pytest.approx(expected, rel=1e-6)
        for sharded, plain in result["parameters"]:
            torch.testing.assert_close(sharded, plain, rtol=1e-5, atol=1e-6)


def test_uses_of_shards(ranks: list[dict[str, Any]]) -> None:
    a, b = (r["uses"] for r in ranks)
    for sharded, plain in [*a["pairs"], *b["pairs"]]:
        torch.testing.assert_close(sharded, plain, rtol=1e-6, atol=1e-7)
    assert not torch.isclose(a["drawn"], b["drawn"]).any()
    assert torch.equal(a["pinned"], b["pinned"])
    assert torch.equal(a["reset"], b["reset"])


def test_placements(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        for sharded, plain in rank["placements"]["pairs"]:
            torch.testing.assert_close(sharded, plain, rtol=1e-6, atol=1e-7)
        kl, linear, weight, input_, *pieces = rank["placements"]["errors"]
        assert kl == "TypeError: kl_divergence: mu and rho must both be DTensors, or neither"
        for error, name in [(linear, "bbb_linear: W_mu"), (weight, "sample_weights: mu"), (input_, "input")]:
            assert error.startswith("NotImplementedError: ") and f"{name} is a DTensor" in error
        assert len(pieces) == 5
        for error in pieces:
            assert re.match(
                "RuntimeError: BBB(Linear|GRUCell): FullyShardedDataParallel has the param", error
            )


def test_importing_stays_light() -> None:
    """DTensor is another second of imports, for those who shard."""
    code = "import sys, torch; b = set(sys.modules); import bbb_fast; print(*sorted(set(sys.modules) - b))"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "bbb_fast.functional" in run.stdout
    assert "torch.distributed" not in run.stdout
