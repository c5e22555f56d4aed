"""``predictive``: equal to the explicit loop, the same bits however the data come, for whatever answers at
random."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import bbb_fast
from bbb_fast import CategoricalPredictive, Ensemble, convert, fixed_noise, mc_dropout, metrics, predictive
from bbb_fast._noise import RandomModule
from bbb_fast.layers import ConcreteDropout, MCDropout1d

ROWS, FEATURES, CLASSES = 300, 6, 4  # more than two blocks, the last one short


def point() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 16), nn.ReLU(), nn.Linear(16, CLASSES))


def wide(estimator: str) -> nn.Module:
    model = convert(point(), estimator)
    for name, parameter in model.named_parameters():
        if name.endswith("W_rho"):
            nn.init.constant_(parameter, -1.5)
    return model


METHODS: dict[str, Callable[[], nn.Module]] = {
    "bbb": lambda: wide("bbb"),
    "lrt": lambda: wide("lrt"),
    "flipout": lambda: wide("flipout"),
    "last layer": lambda: convert(point(), include="2"),
    "MC dropout": lambda: mc_dropout(point(), 0.3),
    "MC dropout of "
    "channels": lambda: nn.Sequential(nn.Linear(FEATURES, 16), MCDropout1d(0.3), nn.Linear(16, CLASSES)),
    "concrete dropout": lambda: nn.Sequential(
        ConcreteDropout(nn.Linear(FEATURES, 16)), nn.ReLU(), ConcreteDropout(nn.Linear(16, CLASSES))
    ),
    "ensemble": lambda: Ensemble([point() for _ in range(12)]),
    "ensemble of Bayesian nets": lambda: Ensemble([wide("lrt") for _ in range(2)]),
    "ensemble of dropout nets": lambda: Ensemble([mc_dropout(point(), 0.3), wide("bbb")]),
    "Bayesian net with dropout": lambda: nn.Sequential(
        convert(nn.Linear(FEATURES, 16)), nn.ReLU(), MCDropout1d(0.2), convert(nn.Linear(16, CLASSES))
    ),
}  # fmt: skip


@pytest.fixture(params=METHODS)
def model(request: pytest.FixtureRequest, backend: str) -> nn.Module:
    torch.manual_seed(0)
    return METHODS[request.param]()


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(ROWS, FEATURES, generator=generator)
    return x, torch.randint(0, CLASSES, (ROWS,), generator=generator)


def loop(model: nn.Module, x: Tensor, samples: int, seed: int) -> Tensor:
    """The explicit loop: [T, N, ...]."""
    outputs = []
    model.eval()
    with torch.no_grad():
        for k in range(samples):
            with fixed_noise(seed, k, model=model):
                outputs.append(model(x))
    return torch.stack(outputs).double()


FIELDS = (
    *("probs", "entropy", "expected_entropy", "mutual_information", "epistemic", "aleatoric"),
    *("epistemic_normalized", "aleatoric_normalized", "log_likelihood"),
)


def assert_same_bits(a: Any, b: Any) -> None:
    for name in vars(a):
        one, other = getattr(a, name), getattr(b, name)
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other, name


@pytest.mark.parametrize("samples", [1, 5, 40])  # fewer and more than are held at a time
def test_equals_the_explicit_loop(model: nn.Module, samples: int) -> None:
    x, y = data()
    found = predictive(model, x, samples, seed=3, targets=y)
    outputs = loop(model, x, samples, 3)
    probs = outputs.softmax(-1)
    soft, normal = metrics.decompose(probs), metrics.uncertainty(outputs, "normalized")
    likelihood = probs[:, torch.arange(ROWS), y].mean(0).log()
    wanted = dict(zip(FIELDS, (
        probs.mean(0), metrics.predictive_entropy(probs), metrics.expected_entropy(probs),
        metrics.mutual_information(probs), soft.epistemic, soft.aleatoric, normal.epistemic, normal.aleatoric,
        likelihood,
    ), strict=True))  # fmt: skip
    assert isinstance(found, CategoricalPredictive) and len(found) == ROWS
    for name, value in wanted.items():
        own = getattr(found, name)
        assert own.dtype == torch.float64 and not own.requires_grad
        torch.testing.assert_close(own, value, rtol=1e-5, atol=1e-6, msg=partial("{}: {}".format, name))
    assert torch.equal(found.prediction, found.probs.argmax(-1))


def test_the_same_bits_however_the_data_come(model: nn.Module) -> None:
    x, y = data()
    whole = predictive(model, x, 6, seed=3, targets=y)
    pairs = TensorDataset(x, y)
    for size in (1, 7, 100, 128, 1000):
        assert_same_bits(predictive(model, x, 6, seed=3, targets=y, batch_size=size), whole)
    for size in (13, 256):
        assert_same_bits(predictive(model, DataLoader(pairs, batch_size=size), 6, seed=3), whole)
    assert_same_bits(predictive(model, pairs, 6, seed=3), whole)
    stream = zip(x.split(77), y.split(77), strict=True)
    assert_same_bits(predictive(model, stream, 6, seed=3), whole)
    alone = predictive(model, list(x.split(41)), 6, seed=3)
    assert torch.equal(alone.probs, whole.probs) and alone.targets is None and alone.log_likelihood is None


def test_draws_are_independent(model: nn.Module) -> None:
    """T draws that were one would have no epistemic part, and draws k and j of all layers would correlate."""
    x, _ = data()
    found = predictive(model, x, 12, seed=3)
    assert bool((found.epistemic > 1e-8).all()) and bool((found.mutual_information > 1e-9).all())
    outputs = loop(model, x, 12, 3)
    assert len({tuple(output.flatten().tolist()) for output in outputs}) == 12
    # Of independent draws, any two differ about as much.
    distances = torch.cdist(outputs.flatten(1), outputs.flatten(1))[tuple(torch.triu_indices(12, 12, 1))]
    assert distances.min() > 0.1 * distances.median()


def test_another_seed_draws_otherwise_and_one_seed_alike(model: nn.Module) -> None:
    x, _ = data()
    torch.manual_seed(5)
    first = predictive(model, x, 3)
    torch.manual_seed(5)
    assert_same_bits(predictive(model, x, 3), first)
    assert_same_bits(predictive(model, x, 3, seed=first.seed), first)
    # Of point estimates a seed draws nothing.
    if sum(isinstance(m, RandomModule) for m in model.modules()) > isinstance(model, Ensemble):
        assert not torch.equal(predictive(model, x, 3, seed=first.seed + 1).probs, first.probs)


def test_a_model_that_is_not_random(backend: str) -> None:
    found = predictive(point(), data()[0], 7)
    assert bool((found.epistemic == 0).all()) and bool((found.mutual_information == 0).all())
    assert bool((found.epistemic_normalized == 0).all()) and bool((found.aleatoric > 0).all())


def test_the_model_is_left_as_it_was(backend: str) -> None:
    last = convert(nn.Linear(8, CLASSES))
    model = nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Dropout(), last)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    first = predictive(model.train(), data()[0], 3, seed=1)
    assert model.training and all(m.training for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(first.probs, predictive(model.eval(), data()[0], 3, seed=1).probs)


class _Head(nn.Module):
    """Returns what a test says."""

    def __init__(self, result: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self._result = result

    def forward(self, x: Tensor) -> Any:
        return self._result(x)


def regression(outputs: int) -> nn.Module:
    torch.manual_seed(1)
    return convert(nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, outputs)), "bbb")


@pytest.mark.parametrize("noise", [0.3, torch.tensor([0.2, 0.5])])
def test_gaussian(backend: str, noise: float | Tensor) -> None:
    model, x = regression(2), data()[0]
    y = torch.randn(ROWS, 2, dtype=torch.float64)
    found = predictive(model, x, 20, likelihood="gaussian", noise_std=noise, seed=2, targets=y)
    outputs = loop(model, x, 20, 2)
    std = torch.as_tensor(noise, dtype=torch.float64).expand(2)
    normal = torch.distributions.Normal
    wanted = normal(outputs, std).log_prob(y).sum(-1).logsumexp(0) - np.log(20)
    close: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(found.mean, outputs.mean(0), **close)
    torch.testing.assert_close(found.epistemic, outputs.var(0, correction=0), **close)
    torch.testing.assert_close(found.aleatoric, (std**2).expand(ROWS, 2).clone(), **close)
    torch.testing.assert_close(found.variance, found.epistemic + found.aleatoric)
    torch.testing.assert_close(found.log_likelihood, wanted, **close)
    one = normal(found.mean, found.variance.sqrt())
    torch.testing.assert_close(found.log_density(y), one.log_prob(y).sum(-1))
    q = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    torch.testing.assert_close(found.quantile(q), one.icdf(q.reshape(3, 1, 1)))
    torch.testing.assert_close(found.quantile(0.5), found.mean)
    assert_same_bits(
        predictive(
            model, DataLoader(TensorDataset(x, y), 50), 20, likelihood="gaussian", noise_std=noise, seed=2
        ),
        found,
    )


@pytest.mark.parametrize("targets", [1, 3])
def test_heteroscedastic(backend: str, targets: int) -> None:
    inner = regression(2 * targets)
    model = inner if targets == 1 else nn.Sequential(inner, nn.Unflatten(-1, (targets, 2)))
    x = data()[0]
    y = torch.randn((ROWS,) if targets == 1 else (ROWS, targets), dtype=torch.float64)
    found = predictive(model, x, 20, likelihood="heteroscedastic", seed=2, targets=y)
    outputs = loop(model, x, 20, 2)
    mean, variance = outputs[..., 0], outputs[..., 1].exp()
    close: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(found.mean, mean.mean(0), **close)
    torch.testing.assert_close(found.epistemic, mean.var(0, correction=0), **close)
    torch.testing.assert_close(found.aleatoric, variance.mean(0), **close)
    each = torch.distributions.Normal(mean, variance.sqrt()).log_prob(y).reshape(20, ROWS, -1).sum(-1)
    torch.testing.assert_close(found.log_likelihood, each.logsumexp(0) - np.log(20), **close)


def test_one_target_a_row_in_either_shape(backend: str) -> None:
    model, x = regression(1), data()[0]
    y = torch.randn(ROWS)
    options: dict[str, Any] = {"likelihood": "gaussian", "noise_std": 0.3, "seed": 2}
    flat = predictive(model, x, 5, targets=y, **options)
    column = predictive(model, x, 5, targets=y[:, None], **options)
    assert flat.mean.shape == (ROWS, 1)
    assert torch.equal(flat.log_likelihood, column.log_likelihood)
    assert torch.equal(flat.log_density(y), flat.log_density(y[:, None].numpy()))


def test_inputs_of_other_kinds(backend: str) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = convert(nn.Linear(FEATURES, CLASSES))

        def forward(self, x: dict[str, Tensor]) -> tuple[Tensor, str]:
            return self.layer(x["a"]) + x["b"].sum(-1, keepdim=True), "more"

    model, (x, _) = Two(), data()
    inputs = {"a": x, "b": torch.ones(ROWS, 2)}
    found = predictive(model, inputs, 3, seed=0)
    parts = [{k: v[rows] for k, v in inputs.items()} for rows in (slice(90), slice(90, None))]
    assert_same_bits(predictive(model, parts, 3, seed=0), found)
    assert_same_bits(predictive(model, {k: v.numpy() for k, v in inputs.items()}, 3, seed=0), found)
    by_call = predictive(model, x, 3, seed=0, call=lambda m, t: m({"a": t, "b": torch.ones(len(t), 2)}))
    assert torch.equal(by_call.probs, found.probs)
    # Float64 NumPy arrays go to the model's type, as with predict.
    narrow = predictive(model.layer, x.double().numpy(), 3, seed=0)
    assert_same_bits(narrow, predictive(model.layer, x, 3, seed=0))


def test_batches_whose_rows_differ_in_shape(backend: str) -> None:
    """Padded sequences: each batch has a length of its own."""

    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = convert(nn.Linear(FEATURES, CLASSES))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.sum(1))

    batches = [torch.randn(n, length, FEATURES) for n, length in ((5, 2), (7, 2), (4, 3))]
    found = predictive(Sums(), batches, 3, seed=0)
    assert found.probs.shape == (16, CLASSES)


def test_an_iterable_data_set(backend: str) -> None:
    x, y = data()

    class Stream(IterableDataset):
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            return iter([(x[:200], y[:200]), (x[200:], y[200:])])

    model = METHODS["lrt"]()
    assert_same_bits(predictive(model, Stream(), 3, seed=0), predictive(model, x, 3, seed=0, targets=y))


MEMORY = """
import resource, sys, torch
from torch import nn
import bbb_fast
from bbb_fast import Ensemble, convert, mc_dropout, predictive
torch.set_num_threads(1)
net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 200))
kinds = {"lrt": convert(net), "dropout": mc_dropout(net, 0.2)}
kinds["ensemble"] = Ensemble([net, convert(net, "bbb")])
model, x = kinds[sys.argv[1]], torch.randn(256, 8)
predictive(model, x, 2)
predictive(model, x, int(sys.argv[2]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def _peak(kind: str, samples: int) -> int:
    command = [sys.executable, "-W", "ignore", "-c", MEMORY, kind, str(samples)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in KiB on Linux")
@pytest.mark.parametrize(
    "kind", ["lrt", *(pytest.param(k, marks=pytest.mark.slow) for k in ("dropout", "ensemble"))]
)
def test_memory_does_not_grow_with_the_draws(kind: str) -> None:
    """The outputs of 1,000 draws would take 200 MB in float32."""
    few, more, many = (_peak(kind, samples) for samples in (10, 100, 1000))
    assert max(more, many) - few < 12_000, (few, more, many)


X = torch.zeros(3, FEATURES)
ZEROS = torch.zeros(3, dtype=torch.long)
GAUSSIAN = {"likelihood": "gaussian"}


def constant(result: Any) -> nn.Module:
    return _Head(lambda x: result)


# What predictive is called with, after or in place of a model and X.
WRONG: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "no module": ((3, X), {}, "must be a torch.nn.Module, got int"),
    "no samples": ((point(), X, 0), {}, "samples must be an int >= 1, got 0"),
    "batch size": ((point(), X), {"batch_size": 0}, "batch_size must be an int >= 1, got 0"),
    "likelihood": ((point(), X), {"likelihood": "poisson"}, "'heteroscedastic', got 'poisson'"),
    "likelihood's type": ((point(), X), {"likelihood": []}, "likelihood must be one of"),
    "noise elsewhere": ((point(), X), {"noise_std": 1.0}, "noise_std is for likelihood 'gaussian'"),
    "negative noise": ((point(), X), {"noise_std": -1.0, **GAUSSIAN}, "must be finite and >= 0, got -1.0"),
    "noise's type": ((point(), X), {"noise_std": "a", **GAUSSIAN}, "noise_std must be a number"),
    "noise's shape": (
        (point(), X),
        {"noise_std": torch.ones(3), **GAUSSIAN},
        r"shape of a row's output, \[4\], got \[3\]",
    ),
    "data": ((point(), 5), {}, "an iterable of batches, got int"),
    "no rows": ((point(), X[:0]), {}, "the data have no rows"),
    "no batches": ((point(), []), {}, "the data have no rows"),
    "targets' rows": ((point(), X), {"targets": ZEROS[:2]}, r"targets must have 3 rows, got \[2\]"),
    "batch's targets": ((point(), [(X, ZEROS[:2])]), {}, r"3 rows and targets \[2\]"),
    "targets twice": ((point(), [X]), {"targets": ZEROS}, "targets come in them"),
    "floating classes": ((point(), X), {"targets": torch.zeros(3)}, "must be integers, got torch.float32"),
    "class": ((point(), X), {"targets": torch.tensor([0, 1, 4])}, r"classes 0 \.\.\. 3"),
    "targets' shape": ((point(), X), {"targets": ZEROS[:, None]}, r"shape \[3\], got \[3, 1\]"),
    "some targets": ((point(), [(X, ZEROS), X]), {}, "some batches have targets"),
    "three things": ((point(), [(X, X, X)]), {}, "got 3 things"),
    "no tensor": ((constant("text"), X), {}, "must return a tensor"),
    "integers": ((constant(torch.zeros(3, 4).long()), X), {}, "floating numbers"),
    "other rows": ((constant(torch.zeros(2, 4)), X), {}, r"output \[2, 4\] for 3 rows"),
    "one number": ((constant(torch.zeros(3)), X), {}, r"one number a class, \[N, C\], got \[3\]"),
    "not finite": ((constant(torch.full((3, 4), torch.nan)), X), {}, "not finite"),
    "two numbers": ((point(), X), {"likelihood": "heteroscedastic"}, r"last dimension of 2, got \[3, 4\]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case: str) -> None:
    arguments, options, message = WRONG[case]
    with pytest.raises((TypeError, ValueError), match=message):
        predictive(*arguments, **options)


def test_wrong_questions() -> None:
    found = predictive(regression(1), data()[0], 3, likelihood="gaussian", seed=0)
    with pytest.raises(ValueError, match="variance is 0"):  # one draw and no noise
        predictive(nn.Linear(FEATURES, 1), data()[0], 1, likelihood="gaussian").log_density(torch.zeros(ROWS))
    with pytest.raises(ValueError, match=r"shape \[300, 1\], got \[300, 2\]"):
        found.log_density(torch.zeros(ROWS, 2))
    wrong: tuple[Any, ...] = (0.0, 1.5, [[0.5]])
    for q in wrong:
        with pytest.raises(ValueError, match=r"q must be in \(0, 1\)"):
            found.quantile(q)


def test_extreme_outputs(backend: str) -> None:
    """A class that is ruled out has probability 0 and costs nothing; one that is certain has no entropy."""
    logits = torch.tensor([[-float("inf"), 0.0, 1e4], [1e30, 0.0, -1e30]])
    found = predictive(_Head(lambda x: logits), torch.zeros(2, 1), 3, targets=torch.tensor([0, 0]))
    assert found.probs.tolist() == [[0, 0, 1], [1, 0, 0]] and found.entropy.tolist() == [0, 0]
    assert found.log_likelihood is not None and found.log_likelihood.tolist() == [-float("inf"), 0]


def test_progress(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    predictive(point(), data()[0], 2, progress=True)
    assert f"{ROWS}/{ROWS}" in capsys.readouterr().err


def test_it_is_public() -> None:
    assert bbb_fast.predictive is predictive and issubclass(CategoricalPredictive, bbb_fast.Predictive)
    assert "probs=[300, 4]" in repr(predictive(point(), data()[0], 2))
