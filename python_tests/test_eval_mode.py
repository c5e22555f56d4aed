"""Eval mode for one call: right whatever refers to the modules, and not written to the model itself."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bbb_fast import predict
from bbb_fast._eval_mode import in_eval_mode
from bbb_fast.layers import BBB


class Referring(nn.Module):
    """A model that gets at its dropout in one way or another."""

    get: Callable[[], Any]
    kept: Any

    def __init__(self, way: str) -> None:
        super().__init__()
        drop: Any = nn.Dropout(0.5)
        self.drop = drop
        self.way = way
        if way == "closure":
            self.get = lambda: drop
        elif way == "bound method":
            self.get = self._own
        elif way == "partial":
            self.get = functools.partial(Referring._own, self)
        elif way == "containers":
            self.kept = (1, {"a": [drop]})
            self.get = self._kept
        elif way == "key":
            self.kept = {drop: 1}
            self.get = self._key
        elif way == "object":
            self.kept = type("Holder", (), {})()
            self.kept.drop = drop
            self.get = self._of_object
        elif way == "weak reference":
            self.get = weakref.ref(drop)
        elif way == "parent":
            object.__setattr__(drop, "parent", self)
            self.get = self._by_parent
        elif way == "hook":
            self.tail = nn.Identity()
            self.tail.register_forward_hook(self._after)
            self.get = self._tail

    def _own(self) -> nn.Module:
        return self.drop

    def _kept(self) -> nn.Module:
        return self.kept[1]["a"][0]

    def _key(self) -> nn.Module:
        return next(iter(self.kept))

    def _of_object(self) -> nn.Module:
        return self.kept.drop

    def _by_parent(self) -> nn.Module:
        parent: Any = self.drop.parent
        return parent.drop

    def _tail(self) -> nn.Module:
        return self.tail

    def _after(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return self.drop(output)

    def forward(self, x: Tensor) -> Tensor:
        return self.get()(x)


WAYS = [
    "closure",
    "bound method",
    "partial",
    "containers",
    "key",
    "object",
    "weak reference",
    "parent",
    "hook",
]
COPIED = {"bound method", "partial", "containers", "key", "weak reference", "parent", "hook"}


@pytest.mark.parametrize("way", WAYS)
def test_references_between_modules(way: str) -> None:
    model, x = Referring(way), torch.ones(4, 50)
    with in_eval_mode(model) as running:
        assert torch.equal(running(x), x)
        assert (running is not model) == (way in COPIED)
        assert model.training == model.drop.training == (way in COPIED)
    assert model.training and model.drop.training
    assert not torch.equal(model(x), x)


def registered() -> dict[str, Callable[[], Any]]:
    norms = torch.nn.utils.parametrizations
    compile: Callable[..., Any] = torch.compile
    return {
        "batch norm": lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout()),
        "tied": lambda: nn.Sequential(*[nn.Sequential(nn.Linear(3, 3), nn.Dropout())] * 2),
        "dict": lambda: nn.Sequential(nn.ModuleDict({"a": nn.Linear(3, 3)})["a"], nn.RReLU()),
        "weight norm": lambda: norms.weight_norm(nn.Linear(3, 3)),
        "spectral norm": lambda: norms.spectral_norm(nn.Linear(3, 3)),
        "old spectral norm": lambda: torch.nn.utils.spectral_norm(nn.Linear(3, 3)),
        "recurrent": lambda: nn.Sequential(nn.RNN(3, 3, 2, dropout=0.5)),
        "compiled": lambda: compile(nn.Sequential(nn.Linear(3, 3), nn.Dropout()), backend="eager"),
        "compiled inside": lambda: nn.Sequential(compile(nn.Dropout(), backend="eager"), nn.Dropout()),
        "compiled in place": lambda: compiled_in_place(),
        "scripted": lambda: torch.jit.script(nn.Sequential(nn.Linear(3, 3), nn.Dropout())),
        "scripted inside": lambda: nn.Sequential(torch.jit.script(nn.Dropout()), nn.Dropout()),
        "symbolic": lambda: torch.fx.symbolic_trace(nn.Sequential(nn.Linear(3, 3), nn.Dropout())),
        "lazy": lambda: nn.Sequential(nn.LazyLinear(3), nn.Dropout()),
    }


def compiled_in_place() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout())
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize("kind", registered())
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_kinds_of_models(kind: str) -> None:
    """As in eval mode; and the state and the modes are as they were."""
    torch._dynamo.reset()
    model, x = registered()[kind](), torch.randn(5, 3)

    def output(of: nn.Module) -> Tensor:
        y = of(x)
        return y[0] if isinstance(y, tuple) else y

    if kind == "lazy":
        model(x)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    assert any(modes)
    with torch.no_grad(), in_eval_mode(model) as running:
        actual = output(running)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    model.eval()
    with torch.no_grad():
        assert torch.equal(actual, output(model))


def test_the_copy_shares_tensors_and_keeps_attributes_to_itself() -> None:
    class Recording(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.calls = 1
            return super().forward(x)

    model = nn.Sequential(Recording(3, 2))
    with in_eval_mode(model) as running:
        assert all(a is b for a, b in zip(running.parameters(), model.parameters(), strict=True))
        running(torch.randn(4, 3))
        assert running.get_submodule("0").calls == 1
    assert not hasattr(model[0], "calls")


@pytest.mark.parametrize("compiled", [False, True])
def test_threads(compiled: bool) -> None:
    """Predictions at the same time; and, where the modules can be copied, training meanwhile."""
    torch._dynamo.reset()
    layers = nn.Sequential(BBB.BBBLinear(6, 6), nn.Dropout(0.5), BBB.BBBLinear(6, 3))
    model: Any = torch.compile(layers, backend="eager") if compiled else layers
    x, wrong = torch.randn(8, 6), []
    expected = predict(model, x, 4, seed=3)
    start = threading.Barrier(3 if compiled else 4)

    def work() -> None:
        start.wait()
        for _ in range(20):
            if not torch.equal(predict(model, x, 4, seed=3), expected):
                wrong.append("prediction")

    def train() -> None:
        start.wait()
        for _ in range(40):
            model.train()
            model(x)
            if not all(module.training for module in layers.modules()):
                wrong.append("mode")

    threads = [threading.Thread(target=work) for _ in range(3)]
    if not compiled:
        threads.append(threading.Thread(target=train))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert all(module.training for module in layers.modules())


def test_modes_after_overlapping_calls() -> None:
    """Of a model that runs itself: they come back after the last, also for a model within another."""
    inner = Referring("closure")
    outer = nn.Sequential(inner, nn.Dropout())
    outer[1].eval()
    first, second = in_eval_mode(outer), in_eval_mode(inner)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert outer.training and not inner.training and not inner.drop.training
    second.__exit__(None, None, None)
    assert inner.training and inner.drop.training and not outer[1].training
