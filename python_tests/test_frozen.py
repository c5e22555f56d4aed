"""frozen_ensemble, and the export of the means, of one pinned draw and of an ensemble of draws."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from bbb_fast import convert, fixed_noise, frozen_ensemble, posterior_means, predict, to_deterministic
from bbb_fast._noise import RandomModule
from bbb_fast.layers import BBB_LRT
from bbb_fast.models import BBBLeNet

pytestmark = pytest.mark.cpu_only("a model is exported where it is, and loaded on the CPU")

SEED, SAMPLES = 7, 3


class Convolutions(nn.Module):
    """With batch norms, a skip connection and a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 4, 3, padding="same", padding_mode="reflect"), nn.BatchNorm2d(4)
        self.down, self.up = nn.Conv2d(4, 8, 3, 2, 1, groups=2), nn.ConvTranspose2d(8, 4, 2, 2)
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.first(x)))
        return self.last((h + self.up(torch.relu(self.down(h)))).mean((2, 3)))


class Words(nn.Module):
    """Embedding, recurrent layer and attention."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.words = nn.Embedding(17, 8, padding_idx=0)
        self.recurrent = kind(8, 4, batch_first=True, bidirectional=True)
        self.attention, self.norm = nn.MultiheadAttention(8, 2, batch_first=True), nn.LayerNorm(8)
        self.last = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.recurrent(self.words(x))[0]
        return self.last(self.norm(h + self.attention(h, h, h, need_weights=False)[0]).mean(1))


class Cells(nn.Module):
    """Cells over the sum of a bag of words."""

    def __init__(self) -> None:
        super().__init__()
        self.bags = nn.EmbeddingBag(17, 4, mode="sum")
        self.lstm, self.gru, self.rnn = nn.LSTMCell(4, 4), nn.GRUCell(4, 4), nn.RNNCell(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h, c = self.lstm(self.bags(x))
        return self.rnn(h, self.gru(c))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)


def numbers(n: int) -> Tensor:
    return torch.randint(0, 17, (n, 6))


# How each is made, and an input of so many rows.
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "lenet": (lambda: BBBLeNet(10, 1), lambda n: torch.randn(n, 1, 32, 32)),
    "convolutions": (lambda: convert(Convolutions()), lambda n: torch.randn(n, 2, 6, 6)),
    "norms too": (lambda: convert(Convolutions(), others="weights"), lambda n: torch.randn(n, 2, 6, 6)),
    "lstm": (lambda: convert(Words(nn.LSTM)), numbers),
    "rnn": (lambda: convert(Words(nn.RNN)), numbers),
    "cells": (lambda: convert(Cells(), "bbb"), numbers),
    "gru": (lambda: convert(Words(nn.GRU)), numbers),
    "transformer": (lambda: convert(Encoder(), "flipout"), lambda n: torch.randn(n, 4, 8)),
    "weight norm": (
        lambda: convert(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), nn.Tanh())),
        lambda n: torch.randn(n, 4),
    ),
}
Made = tuple[nn.Module, Callable[[int], Tensor]]


@pytest.fixture(params=MODELS)
def made(request: pytest.FixtureRequest) -> Made:
    """A model in training mode, with the statistics of a batch, and its inputs."""
    make, inputs = MODELS[request.param]
    model = make()
    with torch.no_grad():
        model(inputs(5))
    return model, inputs


def forms(model: nn.Module) -> dict[str, nn.Module]:
    """What may be exported of a Bayesian model."""
    model = copy.deepcopy(model).eval()
    return {
        "means": to_deterministic(model),
        "draw": to_deterministic(model, seed=SEED, sample=1),
        "ensemble": frozen_ensemble(model, SAMPLES, seed=SEED),
    }


def expected(model: nn.Module, x: Tensor) -> dict[str, list[Tensor]]:
    """What they answer."""
    draws = predict(model, x, SAMPLES, seed=SEED)
    with posterior_means():
        means = predict(model, x, 1)[0]
    return {"means": [means], "draw": [draws[1]], "ensemble": [draws.mean(0), draws.var(0, correction=0)]}


def any_batch(form: str) -> Any:
    """The first dimension of the only input is free. (An ensemble takes any arguments.)"""
    rows = {0: torch.export.Dim.DYNAMIC}
    return ((rows,),) if form == "ensemble" else (rows,)


def answers(result: Any, count: int) -> list[Tensor]:
    """The first outputs: a ModuleWrapper's model also returns a KL."""
    return [torch.as_tensor(t) for t in (result if isinstance(result, (tuple, list)) else (result,))][:count]


def close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- the ensemble


def test_answers_as_predict_does(backend: str, made: Made) -> None:
    model, inputs = made
    x, before = inputs(5), copy.deepcopy(model.state_dict())
    ensemble = frozen_ensemble(model, SAMPLES, seed=SEED)
    draws = predict(model, x, SAMPLES, seed=SEED)
    mean, variance = ensemble(x)
    close(mean, draws.mean(0))
    close(variance, draws.var(0, correction=0))
    assert (variance > 0).any()
    for k, member in enumerate(ensemble.members):
        close(answers(member(x), 1)[0], draws[k])
    probs = draws.softmax(-1)
    close(
        frozen_ensemble(model, SAMPLES, seed=SEED, class_dim=-1)(x),
        (probs.mean(0), probs.var(0, correction=0)),
    )
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(p.requires_grad for p in ensemble.parameters())
    assert not any(isinstance(m, RandomModule) or m.training for m in ensemble.modules())


def test_what_no_posterior_is_over_is_there_once() -> None:
    model: Any = convert(Convolutions(), include="last")
    ensemble = frozen_ensemble(model, SAMPLES, seed=SEED)
    members: list[Any] = list(ensemble.members)
    first, *others = members
    for other in others:
        for name in ("first.weight", "norm.weight", "up.bias"):
            assert other.get_parameter(name) is first.get_parameter(name)
        assert other.norm.running_mean is first.norm.running_mean
        assert not torch.equal(other.last.weight, first.last.weight)
    assert first.first.weight is not model.first.weight
    with torch.no_grad():
        model.first.weight.zero_()
    assert first.first.weight.any()
    drawn = sum(p.numel() for p in model.last.parameters()) // 2
    rest = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("last"))
    assert sum(p.numel() for p in ensemble.parameters()) == SAMPLES * drawn + rest


def test_copies_and_checkpoints() -> None:
    model, x = convert(Convolutions()), torch.randn(4, 2, 6, 6)
    ensemble, other = (frozen_ensemble(model, SAMPLES, seed=seed) for seed in (1, 2))
    expected = ensemble(x)
    close(copy.deepcopy(ensemble)(x), expected)
    close(ensemble.double()(x.double())[1].float(), expected[1])
    assert not torch.equal(other(x)[0], expected[0])
    other.load_state_dict(ensemble.float().state_dict())
    close(other(x), expected)


def test_ties_hooks_and_other_calls() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(17, 8), nn.Linear(8, 17, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
            return {"logits": scale * self.head(torch.tanh(self.embed(x)))}

    point = Tied()
    calls: list[int] = []
    point.embed.register_forward_hook(lambda *_: calls.append(1))
    model, x = convert(point), numbers(4)

    def call(member: nn.Module, x: Tensor, **options: float) -> Tensor:
        return member(x, **options)["logits"]

    ensemble = frozen_ensemble(model, 2, seed=SEED, call=call)
    tied = [(m.get_parameter("head.weight"), m.get_parameter("embed.weight")) for m in ensemble.members]
    assert all(head is embed for head, embed in tied)
    draws = predict(model, x, 2, seed=SEED, call=lambda m, x: m(x, scale=3.0)["logits"])
    calls.clear()
    close(ensemble(x, scale=3.0), (draws.mean(0), draws.var(0, correction=0)))
    assert calls == [1, 1]
    with pytest.raises(TypeError, match="frozen_ensemble: the model must return a tensor.*dict of logits"):
        frozen_ensemble(model, 2)(x)


def test_seeds() -> None:
    model, x = BBB_LRT.BBBLinear(4, 3), torch.randn(5, 4)
    torch.manual_seed(3)
    a, b = (frozen_ensemble(model, 2)(x)[0] for _ in range(2))
    assert not torch.equal(a, b)
    torch.manual_seed(3)
    assert torch.equal(frozen_ensemble(model, 2)(x)[0], a)
    mean, variance = frozen_ensemble(model, 1, seed=SEED)(x)
    with fixed_noise(SEED, model=model):
        close(mean, model(x))
    assert not variance.any()


class Masked(RandomModule):
    def forward(self, x: Tensor) -> Tensor:
        return x


def test_wrong_arguments() -> None:
    layer = BBB_LRT.BBBLinear(2, 2)
    for arguments, options, error, message in (
        (("model",), {}, TypeError, "model must be a torch.nn.Module, got str"),
        ((layer, 0), {}, ValueError, "samples must be an int >= 1, got 0"),
        ((layer, 1.5), {}, ValueError, "samples must be an int >= 1, got 1.5"),
        ((layer,), {"class_dim": 1.5}, TypeError, "class_dim must be an int or None, got 1.5"),
        ((layer,), {"seed": "a"}, TypeError, "seed must be an int, got str"),
        ((nn.Sequential(layer, Masked()),), {}, TypeError, "Masked draws at each forward"),
    ):
        with pytest.raises(error, match=message):
            frozen_ensemble(*arguments, **options)
    assert repr(frozen_ensemble(layer, 1, class_dim=-1)).startswith("FrozenEnsemble(\n  class_dim=-1")


# ---------------------------------------------------------------- torch.export


@pytest.mark.filterwarnings("ignore:The tensor attributes .*_flat_weights")
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_export(made: Made, strict: bool) -> None:
    """Plain ops, for every batch size, with the numbers of the library."""
    torch._dynamo.reset()
    model, inputs = made
    x, other = inputs(5), inputs(8)
    for form, module in forms(model).items():
        program = torch.export.export(module, (x,), dynamic_shapes=any_batch(form), strict=strict)
        targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        assert targets and not any("bbb_fast" in target or "rand" in target for target in targets)
        for batch in (x, other):
            wanted = expected(model, batch)[form]
            close(answers(program.module()(batch), len(wanted)), wanted)


def test_a_saved_program_runs_without_the_package(tmp_path: Path) -> None:
    model, x = BBBLeNet(10, 1), torch.randn(4, 1, 32, 32)
    for form, module in forms(model).items():
        program = torch.export.export(module, (x,), dynamic_shapes=any_batch(form))
        torch.export.save(program, tmp_path / f"{form}.pt2")
    torch.save({"x": x, **expected(model, x)}, tmp_path / "expected.pt")
    script = (
        "import sys, torch; sys.modules['bbb_fast'] = None\n"
        "answers = torch.load('expected.pt'); x = answers.pop('x')\n"
        "for form, wanted in answers.items():\n"
        "    found = torch.export.load(form + '.pt2').module()(x)[: len(wanted)]\n"
        "    torch.testing.assert_close(list(found), wanted, rtol=1e-5, atol=1e-5)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 2, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(self.lstm(packed)[0], batch_first=True)[0]


@pytest.mark.filterwarnings("ignore:The tensor attributes .*_flat_weights")
def test_packed_sequences_are_not_exported() -> None:
    """By torch.nn's own models neither: docs/export.md says so."""
    x = torch.randn(3, 4, 3), torch.tensor([4, 2, 3])
    for model in (Packed().eval(), to_deterministic(convert(Packed())).eval()):
        with pytest.raises(Exception, match=r"zeros\(\)|skipped|data-dependent|Could not"):
            torch.export.export(model, x)


# ---------------------------------------------------------------- ONNX


@pytest.fixture(scope="module")
def onnxruntime() -> Any:
    pytest.importorskip("onnxscript")
    return pytest.importorskip("onnxruntime")


@pytest.mark.filterwarnings("ignore")
def test_onnx(made: Made, onnxruntime: Any) -> None:
    """ONNX Runtime gives the numbers of the library, for every batch size."""
    model, inputs = made
    x, other = inputs(5), inputs(8)
    for form, module in forms(model).items():
        program = torch.onnx.export(module, (x,), dynamo=True, dynamic_shapes=any_batch(form), verbose=False)
        file: Any = io.BytesIO()
        assert program is not None
        program.save(file)
        session = onnxruntime.InferenceSession(file.getvalue())
        (name,) = (entry.name for entry in session.get_inputs())
        for batch in (x, other):
            wanted = expected(model, batch)[form]
            found = answers(session.run(None, {name: batch.numpy()}), len(wanted))
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
