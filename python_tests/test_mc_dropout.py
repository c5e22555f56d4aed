"""mc_dropout: a model's own dropout stays on, or one is put in; nothing is left out in silence."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bbb_fast import (
    convert,
    fixed_noise,
    kl_loss,
    mc_dropout,
    multi_sample,
    posterior_means,
    predict,
    to_deterministic,
)
from bbb_fast._noise import RandomModule
from bbb_fast.layers import ConcreteDropout, MCDropout, MCDropout1d, MCDropout2d, MCDropout3d
from bbb_fast.methods import model_precision


class Own(nn.Module):
    """The lecture's kind of network: dropout behind each convolution and the dense layer."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Dropout2d(0.3), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Dropout(0.2)
        )
        self.dense = nn.Linear(6 * 4 * 4, 12)
        self.drop = nn.Dropout(0.5, inplace=True)
        self.last = nn.Linear(12, 3)
        self.in_a_list = [self.drop]

    def forward(self, x: Tensor) -> Tensor:
        y = self.dense(self.convolutions(x).flatten(1)).relu()
        return self.last(self.in_a_list[0](y))


def plain() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(6 * 4 * 4, 12), nn.ReLU(), nn.Linear(12, 3)),
    )


def images() -> Tensor:
    return torch.randn(7, 1, 8, 8)


def masks(model: nn.Module) -> dict[str, MCDropout]:
    return {name: m for name, m in model.named_modules() if isinstance(m, MCDropout)}


MODELS: dict[str, Callable[[], tuple[nn.Module, nn.Module]]] = {
    "turned on": lambda: (m := Own(), mc_dropout(m)),
    "another rate": lambda: (m := Own(), mc_dropout(m, 0.4)),
    "inserted": lambda: (m := plain(), mc_dropout(m, 0.4)),
}
every_model = pytest.mark.parametrize("name", list(MODELS))


def test_its_own() -> None:
    model = Own()
    found = masks(mc_dropout(model))
    assert {name: (type(m), m.p) for name, m in found.items()} == {
        "convolutions.2": (MCDropout2d, 0.3),
        "convolutions.5": (MCDropout, 0.2),
        "drop": (MCDropout, 0.5),
    }
    assert {m.p for m in masks(mc_dropout(model, 0.4)).values()} == {0.4}
    assert {m.p for m in masks(mc_dropout(mc_dropout(model), 0.4)).values()} == {0.4}
    kinds = nn.Sequential(nn.Dropout1d(), nn.Dropout2d(), nn.Dropout3d(), nn.Dropout())
    assert [type(m) for m in mc_dropout(kinds).children()] == [
        MCDropout1d,
        MCDropout2d,
        MCDropout3d,
        MCDropout,
    ]
    assert type(mc_dropout(nn.Dropout(0.1))) is MCDropout
    # Rates of 0 stay beside others; alone they need p.
    assert [m.p for m in mc_dropout(nn.Sequential(nn.Dropout(0.0), nn.Dropout(0.1))).children()] == [0.0, 0.1]


def test_inserted() -> None:
    model = plain()
    found = masks(mc_dropout(model, 0.25))
    assert {name: (type(m), m.p) for name, m in found.items()} == {
        "2.input_dropout": (MCDropout2d, 0.25),
        "5.input_dropout": (MCDropout, 0.25),
        "7.input_dropout": (MCDropout, 0.25),
    }
    # Where the input of a layer is 1, what the layer sees are masks.
    seen: list[Tensor] = []
    made: Any = mc_dropout(nn.Sequential(nn.Linear(2, 50), nn.Linear(50, 50)), 0.25)
    made[1].register_forward_hook(lambda module, args, output: seen.append(args[0]))
    with torch.no_grad():
        made[0].weight.zero_()
        made[0].bias.fill_(1.0)
    made(torch.zeros(40, 2))
    assert seen[0].unique().tolist() == [0.0, pytest.approx(1 / 0.75)]
    assert abs(float((seen[0] == 0).double().mean()) - 0.25) < 0.05


@every_model
def test_the_original_is_untouched(name: str) -> None:
    model, made = MODELS[name]()
    assert not any(isinstance(m, RandomModule) for m in model.modules())
    assert not any(m._forward_pre_hooks for m in model.modules())
    before, after = model.state_dict(), made.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[k], after[k]) and before[k] is not after[k] for k in before)
    fresh = type(model)() if isinstance(model, Own) else plain()
    made.load_state_dict(fresh.state_dict())
    fresh.load_state_dict(made.state_dict())
    x = images()
    with posterior_means():
        assert torch.equal(made(x), fresh.eval()(x))
    assert made.training and not mc_dropout(fresh, 0.4).training
    assert all(not m.training for m in masks(mc_dropout(fresh, 0.4)).values())


@every_model
def test_draws(backend: str, name: str) -> None:
    _, made = MODELS[name]()
    x = images()
    made.eval()
    assert not torch.equal(made(x), made(x))
    y = predict(made, x, 6, seed=3)
    torch.testing.assert_close(predict(made, x, 6, seed=3, batch_size=2), y)
    assert all(not torch.allclose(y[a], y[b]) for a in range(6) for b in range(a))
    several = multi_sample(made, x, 2, seed=3)
    for k in range(2):
        with fixed_noise(3, k, model=made, draw="activations"):
            torch.testing.assert_close(several[k], made(x))
    assert float(kl_loss(made)) == 0


def test_draws_average_to_more_than_one_function() -> None:
    """The draws' mean and variance are those of dropout: of one linear layer, exactly."""
    model = nn.Sequential(nn.Linear(3, 20), nn.Linear(20, 1)).double()
    made, x = mc_dropout(model, 0.3), torch.randn(1, 3, dtype=torch.float64)
    y = predict(made, x, 4_000, seed=0).flatten()
    with torch.no_grad():
        expected = float(model(x))
        variance = float((model[0](x) * model[1].weight).square().sum()) * 0.3 / 0.7
    assert float(y.mean()) == pytest.approx(expected, abs=5 * math.sqrt(variance / 4_000))
    assert float(y.var()) == pytest.approx(variance, rel=0.15)


@every_model
def test_copies(name: str) -> None:
    _, made = MODELS[name]()
    x = images()
    others = copy.deepcopy(made), pickle.loads(pickle.dumps(made))
    with fixed_noise(1):
        y = made(x)
    # They have masks of their own, and do not lead to the first one's.
    for mask in masks(made).values():
        mask.p = 1.0
    for other in others:
        with fixed_noise(1):
            assert torch.equal(other(x), y)


@pytest.mark.parametrize("name", ["turned on", "inserted"])
def test_compiled(name: str) -> None:
    torch._dynamo.reset()
    _, made = MODELS[name]()
    x = images()
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    with fixed_noise(5, 1, model=made):
        torch.testing.assert_close(compiled(x), made(x))
    assert not torch.equal(compiled(x), compiled(x))
    torch._dynamo.reset()


def test_one_module_at_two_places() -> None:
    """Each place gets masks of its own; a list of the model still leads to the first."""
    drop = nn.Dropout(0.5)
    made: Any = mc_dropout(nn.Sequential(nn.Identity(), drop, nn.Identity(), drop))
    assert made[1] is not made[3]
    with fixed_noise(1, model=made):
        x = torch.ones(1, 400)
        assert 0.4 < float(((made[1](x) == 0) == (made[3](x) == 0)).double().mean()) < 0.6
    own: Any = mc_dropout(Own())
    assert own.in_a_list[0] is own.drop


class Alone(nn.Dropout):
    pass


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (nn.MultiheadAttention(4, 2, dropout=0.1), r"\(model\) \(MultiheadAttention, dropout=0.1\)"),
        (nn.Sequential(nn.LSTM(3, 4, 2, dropout=0.2)), r"0 \(LSTM, dropout=0.2\)"),
        (nn.Sequential(nn.Dropout(), nn.GRU(3, 4, 2, dropout=0.2)), r"1 \(GRU, dropout=0.2\)"),
        (nn.Sequential(nn.AlphaDropout()), r"0 \(AlphaDropout\)"),
        (nn.Sequential(nn.FeatureAlphaDropout()), r"0 \(FeatureAlphaDropout\)"),
        (nn.Sequential(Alone()), r"0 \(Alone\)"),
        (nn.TransformerEncoderLayer(4, 2), r"self_attn \(MultiheadAttention, dropout=0.1\)"),
    ],
)
def test_what_cannot_be_reached(model: nn.Module, named: str) -> None:
    for p in (None, 0.5):
        with pytest.raises(ValueError, match=rf"mc_dropout: .* cannot be turned on in eval mode: {named}"):
            mc_dropout(model, p)


@pytest.mark.filterwarnings("ignore:dropout option adds dropout after all but last")
def test_a_rate_that_does_nothing() -> None:
    made: Any = mc_dropout(nn.Sequential(nn.Dropout(), nn.LSTM(3, 4, 1, dropout=0.2)))
    assert isinstance(made[0], MCDropout)


def test_transformers() -> None:
    """torch's fused forward of eval mode, which has no dropout, does not run."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True).eval()
    layer.self_attn.dropout = 0.0
    x = torch.randn(3, 4, 8)
    without = copy.deepcopy(layer)
    for name in ("dropout", "dropout1", "dropout2"):
        setattr(without, name, nn.Identity())
    for made in (mc_dropout(layer), mc_dropout(without, 0.2)):
        with torch.no_grad():
            assert not torch.equal(made(x), made(x))
            with posterior_means():
                torch.testing.assert_close(made(x), layer(x))
            y = predict(made, x, 3, seed=1)
        assert not torch.equal(y[0], y[1])
    assert set(masks(mc_dropout(without, 0.2))) == {"linear2.input_dropout"}


@every_model
def test_to_deterministic(name: str) -> None:
    """torch.nn's dropout again, off in eval mode."""
    model, made = MODELS[name]()
    back = to_deterministic(made)
    assert not any(isinstance(m, RandomModule) for m in back.modules())
    assert [m.p for m in back.modules() if isinstance(m, nn.modules.dropout._DropoutNd)] == [
        m.p for m in masks(made).values()
    ]
    x = images()
    assert torch.equal(back.eval()(x), model.eval()(x))
    assert not torch.equal(back.train()(x), back(x))
    with pytest.raises(TypeError, match=r"to_deterministic: MCDropout(2d)? draws which of its inputs"):
        to_deterministic(made, seed=1)
    layer = nn.Linear(3, 2)
    assert torch.equal(to_deterministic(ConcreteDropout(layer)).get_parameter("weight"), layer.weight)


def test_beside_bayesian_layers() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    made: Any = convert(mc_dropout(model), "lrt", include="2")
    assert isinstance(made[1], MCDropout) and kl_loss(made).item() > 0
    x = torch.randn(5, 3)
    y = predict(made, x, 4, seed=1)
    torch.testing.assert_close(predict(made, x, 4, seed=1, batch_size=1), y)
    several = multi_sample(made, x, 3, seed=1)
    for k in range(3):
        with fixed_noise(1, k, model=made, draw="activations"):
            torch.testing.assert_close(several[k], made(x))


@pytest.mark.parametrize(
    ("model", "p", "error", "message"),
    [
        ("LeNet", 0.5, TypeError, "model must be a torch.nn.Module, got str"),
        (nn.DataParallel(nn.Dropout()), 0.5, TypeError, "the model inside DataParallel"),
        (plain(), None, ValueError, "own dropout modules are none: say p"),
        (nn.Sequential(nn.Dropout(0.0)), None, ValueError, r"modules drop nothing \(p = 0\): say p"),
        (nn.Linear(2, 3), 0.5, ValueError, "convolutions 1: none behind the first"),
        (plain(), "0.5", TypeError, "p must be a number, got str"),
        (plain(), 1.5, ValueError, r"p must be in \[0, 1\], got 1.5"),
    ],
)
def test_bad_arguments(model: Any, p: float | None, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"mc_dropout: .*{message}"):
        mc_dropout(model, p)


def test_model_precision() -> None:
    """Gal and Ghahramani 2016, eq. 7."""
    assert model_precision(0.1, 0.2, 100, 1e-3) == pytest.approx(0.01 * 0.8 / (2 * 100 * 1e-3))
    for bad, message in (
        ((0.0, 0.1, 10, 1.0), "length_scale must be finite and > 0, got 0.0"),
        ((1.0, 1.0, 10, 1.0), r"p must be in \[0, 1\), got 1.0"),
        ((1.0, 0.1, 0, 1.0), "train_size must be >= 1, got 0"),
        ((1.0, 0.1, 10, math.nan), "weight_decay must be finite and > 0, got nan"),
    ):
        with pytest.raises(ValueError, match=f"model_precision: {message}"):
            model_precision(*bad)
