"""What docs/migrate.md shows runs as it stands.

Its blocks marked "python run" run in their order, those of a section in one namespace; "diff" and "text"
blocks do not. The first section's diff, applied to its script, makes the Bayesian script.
"""

from __future__ import annotations

import gc
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import COMPILER, repository_root
from torch import Tensor

from bbb_fast import _backend, layers, posterior_means
from bbb_fast.models import BBBLeNet

pytestmark = pytest.mark.cpu_only("the page's scripts choose their device themselves")

PAGE = repository_root() / "docs" / "migrate.md"
NAMES = ["torch.nn", "bayesian-torch", "blitz", "torchbnn", "PyTorch-BayesianCNN"]


def _sections() -> dict[str, str]:
    parts = re.split(r"^## From (.*)\n", PAGE.read_text(), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _blocks(section: str, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", _sections()[section], flags=re.M | re.S)


def _run(code: str, names: dict[str, Any]) -> None:
    exec(compile(code, str(PAGE), "exec"), names)


def _hunks(diff: str) -> Iterator[tuple[str, str]]:
    """The lines of each before and after."""
    for hunk in diff.split("@@\n"):
        lines = hunk.splitlines(keepends=True)
        assert all(line[0] in " +-" for line in lines), hunk
        before, after = ("".join(line[1:] for line in lines if line[0] in kinds) for kinds in (" -", " +"))
        yield before, after


def _scripts() -> tuple[str, str]:
    """torch.nn's, and the Bayesian one."""
    plain = _blocks("torch.nn", "python run")[0]
    bayesian = plain
    for before, after in _hunks(_blocks("torch.nn", "diff")[0]):
        assert bayesian.count(before) == 1, before
        bayesian = bayesian.replace(before, after)
    return plain, bayesian


def test_every_section_is_run() -> None:
    assert list(_sections()) == NAMES
    assert all(_blocks(name, "python run") for name in NAMES)
    marked = sum(len(_blocks(name, "python run")) for name in NAMES)
    assert marked == len(re.findall(r"^ *```py", PAGE.read_text(), flags=re.M))


def test_the_scripts_differ_by_an_import_and_two_lines() -> None:
    changes = [line for line in _blocks("torch.nn", "diff")[0].splitlines() if line[0] in "+-"]
    added = [line[1:].strip() for line in changes if line[0] == "+"]
    removed = [line[1:].strip() for line in changes if line[0] == "-"]
    assert added[0] == "import bbb_fast"
    assert added[1] == "model = bbb_fast.convert(model)"
    assert removed == ["loss = F.cross_entropy(run(x), y)"]
    assert added[2:] == [removed[0] + " + 0.1 * bbb_fast.kl_loss(model) / train_size"]
    plain, bayesian = (script.splitlines() for script in _scripts())
    assert len(bayesian) == len(plain) + 2
    assert "bbb_fast" not in "".join(plain)


@pytest.fixture(scope="module")
def on_the_cpu() -> Iterator[pytest.MonkeyPatch]:
    """As on a machine without a GPU, not under torchrun, and in the end where it began."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        for name in ("RANK", "LOCAL_RANK"):
            patch.delenv(name, raising=False)
        yield patch


@pytest.fixture(scope="module")
def trained(
    on_the_cpu: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Any]]:
    """The names of the Bayesian script after three epochs, and the folder of its checkpoint."""
    folder = tmp_path_factory.mktemp("migrate")
    before = Path.cwd()
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "__main__"}
    compiled = _backend.native_available() and COMPILER is not None
    with torch.compiler.set_stance("default" if compiled else "force_eager"):
        os.chdir(folder)
        try:
            _run(_scripts()[1], names)
        finally:
            os.chdir(before)
        yield {**names, "checkpoint": str(folder / "checkpoint.pt")}


def test_plain_script(
    on_the_cpu: pytest.MonkeyPatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    with torch.compiler.set_stance("force_eager"):
        _run(_scripts()[0], names)
        names["x_test"] = names["make_data"](200).tensors[0]
        before, after = next(_hunks(_blocks("torch.nn", "diff")[1]))
        _run(before, names)
    assert names["probs"].shape == (200, 10)
    assert after in _blocks("torch.nn", "python run")[1]
    assert torch.load("checkpoint.pt", weights_only=True)["epochs"] == 3


def test_bayesian_script(trained: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    names = dict(trained)
    for block in _blocks("torch.nn", "python run")[1:]:
        _run(block, names)
    accuracy = (names["probs"].argmax(-1) == names["y_test"]).float().mean()
    assert accuracy > 0.8
    shown = capsys.readouterr().out
    assert all(kind in shown for kind in ("BBBConv2d", "BBBLinear", "BatchNorm2d"))


def test_checkpoint_continues(trained: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    data, checkpoint, train = trained["data"], trained["checkpoint"], trained["train"]
    saved = torch.load(checkpoint, weights_only=True)
    assert saved["epochs"] == 3
    assert {"0.W_mu", "0.W_rho", "5.bias_mu", "7.bias_rho", "1.running_mean"} <= set(saved["model"])
    loaded = train(data, checkpoint, epochs=3)  # no epoch is left
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, saved["model"][name]), name
        assert torch.equal(value, trained["model"].state_dict()[name]), name
    assert capsys.readouterr().out == ""
    further = train(data, checkpoint, epochs=4)
    assert re.findall(r"epoch (\d+)", capsys.readouterr().out) == ["4"]
    assert all(not torch.equal(value, loaded.state_dict()[n]) for n, value in further.named_parameters())
    again = torch.load(checkpoint, weights_only=True)
    assert again["epochs"] == 4
    steps = [[float(state["step"]) for state in s["optimizer"]["state"].values()] for s in (saved, again)]
    assert set(steps[0]) == {60.0} and set(steps[1]) == {80.0}


@pytest.mark.skipif(not dist.is_available(), reason="this torch is built without torch.distributed")
def test_under_ddp(trained: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, checkpoint, train = trained["data"], str(tmp_path / "ddp.pt"), trained["train"]
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = train(data, checkpoint, epochs=2)
    finally:
        # What holds the group goes first: see test_readme.py.
        gc.collect()
        dist.destroy_process_group()
    assert {name for name, _ in model.named_parameters()} == set(dict(trained["model"].named_parameters()))
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    saved = torch.load(checkpoint, weights_only=True)["model"]
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    # Names are the same with and without DDP.
    capsys.readouterr()
    train(data, checkpoint, epochs=3)
    assert re.findall(r"epoch (\d+)", capsys.readouterr().out) == ["3"]


# PyTorch-BayesianCNN's LeNet for one channel and ten classes: the shapes of weight and bias.
LENET = {
    "conv1": (6, 1, 5, 5),
    "conv2": (16, 6, 5, 5),
    "fc1": (120, 400),
    "fc2": (84, 120),
    "fc3": (10, 84),
}


def _lenet_state() -> dict[str, Tensor]:
    state = {}
    for layer, shape in LENET.items():
        for name, size in (("W", shape), ("bias", shape[:1])):
            state[f"{layer}.{name}_mu"] = 0.1 * torch.randn(size)
            state[f"{layer}.{name}_rho"] = -5 + 0.1 * torch.randn(size)
    return state


# The checkpoints that the other sections load: a network 20-30-3, its layers and what its entries are called.
CHECKPOINTS = {
    "bayesian-torch": ("bayesian_torch.pt", ("0", "2"), ("mu_{}", "rho_{}")),
    "blitz": ("blitz.pt", ("first", "last"), ("{}_mu", "{}_rho", "{}_sampler.mu", "{}_sampler.rho")),
    "torchbnn": ("torchbnn.pt", ("0", "2"), ("{}_mu", "{}_log_sigma")),
}


def _checkpoint(layers: tuple[str, str], names: tuple[str, ...]) -> dict[str, Tensor]:
    """Means of numbers, and every sigma 0.1."""
    state = {}
    for layer, (inputs, outputs) in zip(layers, ((20, 30), (30, 3)), strict=True):
        for part, shape in (("weight", (outputs, inputs)), ("bias", (outputs,))):
            mean = 0.1 * torch.randn(shape)
            for name in names:
                rho = math.log(0.1) if "log_sigma" in name else math.log(math.expm1(0.1))
                value = mean if "mu" in name else torch.full(shape, rho)
                state[f"{layer}.{name.format(part)}"] = value
    return state


@pytest.mark.parametrize("section", NAMES[1:])
def test_other_libraries(section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    state = {}
    if section in CHECKPOINTS:
        file, layers, entries = CHECKPOINTS[section]
        state = _checkpoint(layers, entries)
        torch.save(state, file)
    torch.save(_lenet_state(), "model_lenet_lrt_softplus.pt")
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in _blocks(section, "python run"):
        _run(block, names)
    names["loss"].backward()
    model = names["model"] if "model" in names else names["net"]
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    if "probs" in names:
        torch.testing.assert_close(names["probs"].sum(-1), torch.ones(len(names["probs"])))
    if "averaged_kl" in names:
        torch.testing.assert_close(names["averaged_kl"](model, 0.2, 0.5), _averaged_kl(model, 0.2, 0.5))
    if state:
        layer = model.get_submodule(layers[0])
        assert torch.equal(layer.W_mu, state[f"{layers[0]}.{entries[0].format('weight')}"])
        torch.testing.assert_close(F.softplus(layer.W_rho), torch.full((30, 20), 0.1))


def _averaged_kl(model: torch.nn.Module, prior_mu: float, prior_sigma: float) -> Tensor:
    prior = torch.distributions.Normal(prior_mu, prior_sigma)
    total = torch.zeros(())
    for name, mu in model.named_parameters():
        if name.endswith("_mu"):
            rho = model.get_parameter(name.removesuffix("_mu") + "_rho")
            posterior = torch.distributions.Normal(mu, F.softplus(rho))
            total = total + torch.distributions.kl_divergence(posterior, prior).mean()
    return total


def test_names_in_the_tables() -> None:
    """Of layers that the tables name there is each."""
    named = set(re.findall(r"`layers\.(?:(\w+)\.)?(\w+)", PAGE.read_text()))
    assert {("BBB", "BBBLinear"), ("Flipout", "BBBLinear"), ("", "WeightSpace")} <= named
    for family, name in named - {("", "Flipout")}:
        assert issubclass(getattr(getattr(layers, family) if family else layers, name), torch.nn.Module)
    for kind in ("Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"):
        assert all(hasattr(family, f"BBB{kind}") for family in (layers.BBB, layers.Flipout))
    assert hasattr(layers.BBB, "BBBGRU")


@pytest.mark.parametrize("layer_type", ["lrt", "bbb"])
def test_state_dict_of_pytorch_bayesiancnn(layer_type: str) -> None:
    state = _lenet_state()
    net = BBBLeNet(10, 1, None, layer_type=layer_type)
    assert str(net.load_state_dict(state)) == "<All keys matched successfully>"
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    h = x = torch.randn(3, 1, 32, 32)
    for layer in ("conv1", "conv2"):
        h = F.conv2d(h, state[f"{layer}.W_mu"], state[f"{layer}.bias_mu"])
        h = F.max_pool2d(F.softplus(h), 2)
    h = h.flatten(1)
    for layer in ("fc1", "fc2", "fc3"):
        h = F.linear(h, state[f"{layer}.W_mu"], state[f"{layer}.bias_mu"])
        h = h if layer == "fc3" else F.softplus(h)
    with posterior_means():
        torch.testing.assert_close(net(x)[0], h)
    torch.testing.assert_close(net(x, sample=False)[0], h)
