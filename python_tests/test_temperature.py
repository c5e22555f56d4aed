"""Temperature scaling: the fitted temperature against closed forms and another optimizer; wrapped models."""

from __future__ import annotations

import copy
import math
import pickle
from collections import namedtuple
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE
from torch import Tensor, nn

import bbb_fast
from bbb_fast import fixed_noise, metrics, predict
from bbb_fast.layers import BBB_LRT, ModuleWrapper
from bbb_fast.methods import TemperatureScaling


def scaled(model: nn.Module | None = None) -> TemperatureScaling:
    return TemperatureScaling(nn.Identity() if model is None else model).to(DEVICE)


def drawn(true: float, rows: int = 4000, classes: int = 5, draws: int | None = None) -> tuple[Tensor, Tensor]:
    """Logits that are ``true`` times too large, and labels drawn from what they should have said."""
    shape = (rows, classes) if draws is None else (draws, rows, classes)
    right = 1.5 * torch.randn(shape, dtype=torch.float64)
    probs = right.softmax(-1) if draws is None else right.softmax(-1).mean(0)
    return right * true, torch.multinomial(probs, 1).squeeze(-1)


def nll(logits: Tensor, labels: Tensor, temperature: float | Tensor) -> Tensor:
    probs = torch.softmax(logits.double() / temperature, -1)
    probs = probs.mean(0) if logits.ndim == 3 else probs
    return -probs.gather(-1, labels.unsqueeze(-1)).log().mean()


@pytest.mark.parametrize("true", [0.3, 1.0, 2.5, 20.0])
@pytest.mark.parametrize("draws", [None, 4])
def test_recovers_the_temperature(true: float, draws: int | None) -> None:
    logits, labels = drawn(true, draws=draws)
    model = scaled()
    assert model.fit(logits, labels) is model
    assert model.temperature.item() == pytest.approx(true, rel=0.15)


@pytest.mark.parametrize("draws", [None, 3])
def test_is_the_minimum_that_another_optimizer_finds(draws: int | None) -> None:
    logits, labels = drawn(3.0, rows=300, draws=draws)
    labels[:20] = logits[..., :20, :].reshape(-1, 20, 5)[0].argmin(-1)  # some outright errors
    log_temperature = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_temperature], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nll(logits, labels, log_temperature.exp())
        loss.backward()
        return loss

    optimizer.step(closure)
    found = scaled().fit(logits, labels).temperature.item()
    assert found == pytest.approx(log_temperature.exp().item(), rel=1e-4)
    for factor in (0.98, 1.02):
        assert nll(logits, labels, found) < nll(logits, labels, found * factor)


def test_closed_form_of_two_classes() -> None:
    # All margins are 3 and 9 of 10 rows are right: the softmax should say 0.9, so 3 / T = ln 9.
    logits = torch.tensor([[3.0, 0.0]]).expand(10, 2)
    labels = torch.tensor([0] * 9 + [1])
    assert scaled().fit(logits, labels).temperature.item() == pytest.approx(3 / math.log(9), rel=2e-6)


def test_of_several_minima_the_lowest() -> None:
    # The mean of draws that contradict each other, on scales far apart: minima at 0.038 and 17.3.
    margins = torch.tensor([[0.1, -200.0, 0.0, 0.0], [-10.0, 50.0, 0.1, -0.1]], dtype=torch.float64)
    logits = torch.stack([margins, torch.zeros_like(margins)], -1)
    labels = torch.zeros(4, dtype=torch.int64)
    near = [nll(logits, labels, 0.038 * factor) for factor in (0.8, 1.0, 1.25)]
    assert near[1] < min(near[0], near[2])
    found = scaled().fit(logits, labels).temperature.item()
    assert found == pytest.approx(17.3, rel=0.01) and nll(logits, labels, found) < near[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_logits_are_their_float64_values(dtype: torch.dtype) -> None:
    logits, labels = drawn(2.0, rows=500)
    narrow = logits.to(dtype)
    assert scaled().fit(narrow, labels).temperature == scaled().fit(narrow.double(), labels).temperature


def test_perfect_predictions_end_at_the_bound() -> None:
    labels = torch.arange(20) % 3
    with pytest.warns(UserWarning, match="the data do not tell the temperature"):
        model = scaled().fit(F.one_hot(labels, 3) * 0.1, labels)
    assert model.temperature.item() == pytest.approx(0.01, rel=1e-6)
    # Where the NLL rounds to 0 before the bound, the temperature of those that is nearest 1 is taken.
    with pytest.warns(UserWarning, match="the data do not tell the temperature"):
        model = scaled().fit(F.one_hot(labels, 3) * 1e4, labels)
    assert model.temperature.item() == 1.0


def test_labels_against_the_logits_end_at_the_other_bound() -> None:
    labels = torch.arange(20) % 3
    with pytest.warns(UserWarning, match="set to 100") as caught:
        model = scaled().fit(F.one_hot((labels + 1) % 3, 3) * 1.0, labels)
    assert model.temperature.item() == pytest.approx(100.0, rel=1e-6)
    assert caught[0].filename == __file__


def test_logits_that_say_nothing_leave_one() -> None:
    with pytest.warns(UserWarning, match="set to 1$"):
        model = scaled().fit(torch.full((6, 3), 1e4), torch.tensor([0, 1, 2, 0, 0, 0]))
    assert model.temperature.item() == 1.0


def test_huge_logits() -> None:
    logits, labels = drawn(1.0, rows=500)
    one = scaled().fit(logits * 30, labels).temperature
    offset = torch.randn(500, 1, dtype=torch.float64) * 1e6
    moved = scaled().fit(logits * 30 + offset, labels).temperature
    torch.testing.assert_close(moved, one, rtol=1e-4, atol=0)


def test_fits_calibration_and_keeps_the_prediction() -> None:
    logits, labels = drawn(4.0)
    model = scaled().fit(logits, labels)
    before, after = logits.softmax(-1), model(logits).softmax(-1)
    assert metrics.accuracy(before, labels) == metrics.accuracy(after, labels)
    assert metrics.ece(after, labels) < 0.25 * metrics.ece(before, labels)
    assert metrics.nll(after, labels) < metrics.nll(before, labels)


class Bayesian(ModuleWrapper):
    def __init__(self) -> None:
        super().__init__()
        self.first = BBB_LRT.BBBLinear(4, 8)
        self.act = nn.ReLU()
        self.second = BBB_LRT.BBBLinear(8, 3)


def test_around_a_random_model(backend: str) -> None:
    net = Bayesian()
    model = scaled(net)
    x = torch.randn(40, 4)
    inside = predict(net, x, 7, seed=1)
    labels = inside.mean(0).argmax(-1)
    labels[:12] = torch.arange(12) % 3
    model.fit(inside, labels)
    assert model.temperature != 1
    torch.testing.assert_close(predict(model, x, 7, seed=1), inside / model.temperature)
    torch.testing.assert_close(predict(model, x, 7, seed=1, batch_size=9), inside / model.temperature)
    with fixed_noise(3, 2, model=net):
        logits, kl = net(x)
    with fixed_noise(3, 2, model=model):
        output, same = model(x)
    torch.testing.assert_close(output, logits / model.temperature)
    assert same == kl == bbb_fast.kl_loss(model)


def test_outputs_of_other_kinds() -> None:
    class Returns(nn.Module):
        def forward(self, value: Any, *, again: Any = None) -> Any:
            return value if again is None else again

    model = scaled(Returns())
    model.temperature.fill_(4.0)
    Pair = namedtuple("Pair", ["logits", "other"])
    ones = torch.ones(2, 3)
    pair = model(Pair(ones, "x"))
    assert type(pair) is Pair and pair.other == "x" and pair.logits.eq(0.25).all()
    assert model(0, again=ones).eq(0.25).all()
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert model(ones.to(dtype)).dtype == dtype
    for value in ({"logits": ones}, [ones], (), (1, ones), None):
        with pytest.raises(TypeError, match="the model must return a tensor of logits, or a tuple whose"):
            model(value)


def test_state_and_copies() -> None:
    model = scaled(nn.Linear(3, 2))
    assert [name for name, _ in model.named_parameters()] == ["model.weight", "model.bias"]
    model.temperature.fill_(2.5)
    other = scaled(nn.Linear(3, 2))
    other.load_state_dict(model.state_dict())
    assert other.temperature == 2.5
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.temperature == 2.5
    assert "temperature=2.5" in repr(model)
    x = torch.randn(4, 3, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None


def test_fit_leaves_the_rest_alone() -> None:
    logits, labels = drawn(2.0, rows=50)
    logits.requires_grad_()
    before = logits.detach().clone(), labels.clone(), torch.get_rng_state()
    model = scaled().fit(logits, labels)
    assert not model.temperature.requires_grad and logits.grad is None
    assert torch.equal(logits, before[0]) and torch.equal(labels, before[1])
    assert torch.equal(torch.get_rng_state(), before[2])
    # From where it stood before, nothing is kept.
    model.temperature.fill_(77.0)
    assert model.fit(logits, labels).temperature == scaled().fit(logits, labels).temperature


def test_errors() -> None:
    with pytest.raises(TypeError, match="TemperatureScaling: model must be a torch.nn.Module, got function"):
        TemperatureScaling(lambda x: x)  # type: ignore[arg-type]
    model = scaled()
    logits, labels = torch.randn(6, 3), torch.arange(6) % 3
    for bad, message in [
        (logits[0], r"logits must have shape \[N, C\] or \[T, N, C\], got \[3\]"),
        (logits[:0], r"logits is empty"),
        (logits.long(), r"logits must have one of the dtypes"),
        (logits * math.nan, r"logits\[0, 0\] is nan"),
        (logits.masked_fill(torch.eye(6, 3).bool(), math.inf), r"logits\[0, 0\] is inf"),
        (logits[:5], r"labels must have shape \[5\] to match logits \[5, 3\], got \[6\]"),
        (logits[:, :2], r"labels\[2\] is 2; allowed: 0 to 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.fit(bad, labels)
    for bad, message in [
        (labels - 1, r"labels\[0\] is -1; allowed: 0 to 2"),
        (labels.int(), "labels must have dtype torch.int64"),
        (labels.to("meta"), r"labels must be on the device of logits \(.*\), got meta"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.fit(logits, bad)
    with pytest.raises(TypeError, match="logits must be a torch.Tensor of shape"):
        model.fit(nn.Linear(2, 2), labels)  # type: ignore[arg-type]
    assert model.temperature == 1.0
