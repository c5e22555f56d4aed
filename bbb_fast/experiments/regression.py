"""Small networks that answer a regression with a mean and a noise, trained by each method, and their scores.

Every model here takes inputs in their own units, float64 ``[N, D]``, and returns the mean and the log
variance of the target in its own units, float64 ``[N, 2]``; it obeys ``fixed_noise``, so that
:func:`bbb_fast.predictive` with ``likelihood="heteroscedastic"`` knows all it needs. The networks inside see
standardized numbers.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import metrics
from ..conversion import convert
from ..inference import predict
from ..layers import ConcreteDropout
from ..losses import get_beta, kl_loss
from ..methods import Ensemble, GaussianNoise, gaussian_nll, mc_dropout
from ..predictive import GaussianPredictive, predictive
from .options import OptionError, check_int

__all__ = ["METHODS", "NOISES", "Standardized", "Training", "check_method", "fit", "judge"]

Noise = Literal["own", "constant", "heteroscedastic"]
NOISES: tuple[Noise, ...] = ("own", "constant", "heteroscedastic")


@dataclass(frozen=True)
class Training:
    """How the networks are made and trained; the same for every set and every split.

    Attributes:
        hidden: units of each hidden layer; ReLU behind each.
        noise: of the targets: "constant", one number for all inputs, "heteroscedastic", a second output of
            the network, or "own": heteroscedastic in ensembles, as their paper has it, constant elsewhere.
        steps: of Adam, for one network.
        batch_size: rows a step; all of them where there are fewer.
        members: of an ensemble.
        rates: of dropout, from which "mc-dropout" chooses on held-out training rows.

    Raises:
        OptionError: a number out of range.
    """

    hidden: tuple[int, ...] = (50,)
    noise: Noise = "own"
    steps: int = 5_000
    batch_size: int = 128
    members: int = 5
    rates: tuple[float, ...] = (0.01, 0.05, 0.1, 0.2)

    def __post_init__(self) -> None:
        if not self.hidden:
            raise OptionError("hidden", "must name at least one layer")
        for units in self.hidden:
            check_int("hidden", units)
        if self.noise not in NOISES:
            raise OptionError("noise", f"must be one of {', '.join(NOISES)}, got {self.noise!r}")
        for option in ("steps", "batch_size", "members"):
            check_int(option, getattr(self, option))
        if not self.rates or not all(0 < rate < 1 for rate in self.rates):
            raise OptionError("rates", f"must be numbers between 0 and 1, got {list(self.rates)}")

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Training:
        """Of what ``asdict`` and JSON have made of one: lists are tuples again."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in plain.items()}
        return cls(**values)


class Standardized(nn.Module):
    """A model of standardized numbers, for numbers in their own units.

    Mean and standard deviation are those of the rows it is made with, which must be training rows alone. A
    column that is constant there says nothing and becomes 0.

    ``forward``: inputs ``[N, D]`` to mean and log variance of the target, float64 ``[N, 2]``.
    """

    input_mean: Tensor
    input_scale: Tensor
    target_mean: Tensor
    target_scale: Tensor

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        super().__init__()
        spread = inputs.std(0, correction=0)
        self.register_buffer("input_mean", inputs.mean(0))
        self.register_buffer("input_scale", torch.where(spread > 0, 1 / spread, 0.0))
        self.register_buffer("target_mean", targets.mean())
        scale = targets.std(correction=0)
        # Rows of one target leave nothing to learn, but no division by 0 either.
        self.register_buffer("target_scale", torch.where(scale > 0, scale, 1.0))
        self.model: nn.Module = nn.Identity()

    def standardize(self, inputs: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """What the inner model sees, float32: inputs ``[N, D]`` and targets ``[N]``."""
        x = ((inputs - self.input_mean) * self.input_scale).float()
        return x, None if targets is None else ((targets - self.target_mean) / self.target_scale).float()

    def forward(self, inputs: Tensor) -> Tensor:
        mean, log_variance = self.model(self.standardize(inputs)[0]).double().unbind(-1)
        return torch.stack(
            [
                mean * self.target_scale + self.target_mean,
                log_variance + 2 * self.target_scale.log(),
            ],
            -1,
        )


def fit(method: str, inputs: Tensor, targets: Tensor, training: Training, seed: int) -> Standardized:
    """A model of one of :data:`METHODS`, trained on these rows.

    Args:
        method: its name.
        inputs: float64 ``[N, D]``.
        targets: float64 ``[N]``.
        training: how.
        seed: of weights, order of rows and noise: the same seed gives the same model. The caller's random
            state stays as it was.

    Raises:
        OptionError: an unknown method.
    """
    check_method(method)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fitted = Standardized(inputs, targets)
        x, y = fitted.standardize(inputs, targets)
        assert y is not None
        own = METHODS[method]
        noise = own.noise if training.noise == "own" else training.noise
        fitted.model = own.train(_Problem(x, y, training, noise == "constant"))
    return fitted.eval()


@dataclass(frozen=True, eq=False)
class _Problem:
    """Standardized training rows, and how to train on them."""

    x: Tensor
    y: Tensor
    training: Training
    constant: bool

    def network(self, rate: float = 0.0) -> nn.Sequential:
        """``[N, D]`` to mean and log variance, ``[N, 2]``; with dropout, if any, but not of x."""
        sizes = [self.x.shape[1], *self.training.hidden, 1 if self.constant else 2]
        layers: list[nn.Module] = []
        for k, (inputs, outputs) in enumerate(pairwise(sizes)):
            layers += [nn.ReLU()] if k else []
            layers += [nn.Dropout(rate)] if k and rate else []
            layers.append(nn.Linear(inputs, outputs))
        return nn.Sequential(*layers, *([nn.Flatten(0), GaussianNoise()] if self.constant else []))

    def part(self, rows: Tensor) -> _Problem:
        return _Problem(self.x[rows], self.y[rows], self.training, self.constant)

    def held_out(self) -> tuple[_Problem, _Problem]:
        """Four fifths to train on, and a fifth to choose on."""
        order = torch.randperm(len(self.x))
        count = max(1, len(order) // 5)
        return self.part(order[count:]), self.part(order[:count])


def _rows(count: int, size: int) -> Iterator[tuple[bool, slice]]:
    """Batches without end; whether a new order of the rows is due, and which of them."""
    size = min(size, count)
    while True:
        for start in range(0, count - size + 1, size):
            yield start == 0, slice(start, start + size)


def _steps(
    model: nn.Module,
    problem: _Problem,
    rate: float,
    steps: int,
    *,
    decay: bool = True,
    bayesian: bool = False,
    weight_decay: float = 0.0,
) -> Iterator[int]:
    """Trains in place by Adam, a step each time the next number is asked for; ends in eval mode.

    Args: ``decay``, by half a cosine of the learning rate to 0; ``bayesian``, on the evidence lower bound.
    """
    x, y, count = problem.x, problem.y, len(problem.x)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, weight_decay=weight_decay, fused=True)
    model.train()
    batches = _rows(count, problem.training.batch_size)
    for step in range(1, steps + 1):
        anew, rows = next(batches)
        if anew:
            order = torch.randperm(count)
            shuffled_x, shuffled_y = x[order], y[order]
        if decay:
            optimizer.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))
        loss = gaussian_nll(model(shuffled_x[rows]), shuffled_y[rows])
        if bayesian:
            # The prior comes in slowly: at full weight it switches off hidden units that have yet to learn.
            loss = loss + get_beta(0, 1, "Soenderby", step, steps) * kl_loss(model) / count
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == steps:
            model.eval()
        yield step


def _train(model: nn.Module, *args: Any, **options: Any) -> nn.Module:
    """All steps of :func:`_steps`."""
    for _ in _steps(model, *args, **options):
        pass
    return model


_PRIORS = {"prior_sigma": 1.0, "posterior_rho_initial": (-5.0, 0.1)}
_VARIATIONAL_RATE = 1e-2


def _variational(estimator: str) -> Callable[[_Problem], nn.Module]:
    """Training of a Gaussian posterior over all weights by the evidence lower bound."""

    def train(problem: _Problem) -> nn.Module:
        model = convert(problem.network(), estimator, priors=_PRIORS, exclude=GaussianNoise)
        return _train(model, problem, _VARIATIONAL_RATE, problem.training.steps, bayesian=True)

    return train


def _concrete_dropout(problem: _Problem) -> nn.Module:
    """Dropout whose rates are learned, by the bound of its paper."""
    model = problem.network()
    for k, layer in enumerate(model):
        if k and isinstance(layer, nn.Linear):
            model[k] = ConcreteDropout(layer)
    return _train(model, problem, _VARIATIONAL_RATE, problem.training.steps, bayesian=True)


# Gal and Ghahramani's weight decay is lengthscale^2 (1 - p) / (2 N tau); theirs is this lengthscale. Then it
# is around 1e-7 and does nothing, whatever tau: so tau is chosen after training, not before.
_LENGTHSCALE = 1e-2
_DROPOUT_RATE = 3e-3
_DRAWS_TO_CHOOSE = 100
# Standard deviations of the noise to choose from, in units of the targets'.
_NOISE_STDS = tuple(10 ** (k / 20 - 2) for k in range(43))


def _dropout_network(problem: _Problem, rate: float) -> nn.Module:
    model = problem.network(rate)
    decay = _LENGTHSCALE**2 * (1 - rate) / len(problem.x)
    _train(model, problem, _DROPOUT_RATE, problem.training.steps, weight_decay=decay)
    return mc_dropout(model)


def _mc_dropout(problem: _Problem) -> nn.Module:
    """Dropout of the rate, and with a noise, that is best on held-out rows; then trained on all."""
    rest, held_out = problem.held_out()
    best = (-math.inf, 0.0, 0.0)
    for rate in problem.training.rates:
        outputs = predict(_dropout_network(rest, rate), held_out.x, _DRAWS_TO_CHOOSE, seed=0)
        for std in _NOISE_STDS if problem.constant else (0.0,):
            if problem.constant:
                outputs[..., 1] = 2 * math.log(std)
            each = -gaussian_nll(outputs, held_out.y.expand(len(outputs), -1), reduction="none")
            best = max(best, (float(each.logsumexp(0).mean()), rate, std))
    _, rate, std = best
    model = _dropout_network(problem, rate)
    if problem.constant:
        assert isinstance(model, nn.Sequential)
        model[-1] = GaussianNoise(std)
    return model


_POINT_RATE = 1e-2
# When to look at held-out rows, and how many times the best number of steps to go without a better one.
_LOOKS = tuple(round(50 * 2 ** (k / 2)) for k in range(24))
_PATIENCE = 4


def _point_networks(problem: _Problem, members: int) -> nn.Module:
    """Networks without posterior, each stopped by a fifth of the rows, drawn anew, that it does not see."""
    return Ensemble([_stopped_network(*problem.held_out()) for _ in range(members)])


def _stopped_network(problem: _Problem, held_out: _Problem) -> nn.Module:
    """A network as it was at the step where the likelihood of the held-out rows was best."""
    model = problem.network()
    best, best_loss, weights = 0, math.inf, copy.deepcopy(model.state_dict())
    for step in _steps(model, problem, _POINT_RATE, problem.training.steps, decay=False):
        if step not in _LOOKS and step != problem.training.steps:
            continue
        with torch.no_grad():
            loss = float(gaussian_nll(model(held_out.x), held_out.y))
        if loss < best_loss:
            best, best_loss, weights = step, loss, copy.deepcopy(model.state_dict())
        elif step >= _PATIENCE * best:
            break
    model.load_state_dict(weights)
    return model.eval()


@dataclass(frozen=True)
class _Method:
    """How a method trains, and the noise that its paper has."""

    train: Callable[[_Problem], nn.Module]
    noise: Noise = "constant"


METHODS: dict[str, _Method] = {
    "deterministic": _Method(lambda problem: _point_networks(problem, 1)),
    "ensemble": _Method(
        lambda problem: _point_networks(problem, problem.training.members), "heteroscedastic"
    ),
    "mc-dropout": _Method(_mc_dropout),
    "concrete-dropout": _Method(_concrete_dropout),
    "bbb": _Method(_variational("bbb")),
    "lrt": _Method(_variational("lrt")),
    "flipout": _Method(_variational("flipout")),
}


def check_method(method: str) -> None:
    """Raises OptionError for what is none of :data:`METHODS`."""
    if method not in METHODS:
        raise OptionError("methods", f"must be among {', '.join(METHODS)}, got {method!r}")


def judge(
    model: nn.Module, inputs: Tensor, targets: Tensor, samples: int, seed: int
) -> tuple[GaussianPredictive, dict[str, Any]]:
    """What a model says of rows, and scores of it, all in the target's own units.

    Args: ``inputs`` float64 ``[N, D]``, ``targets`` float64 ``[N]``, draws and their seed.
    Returns the prediction and, by name: ``rmse``; ``log_likelihood``, the mean of ln 1/T sum_t p(y | draw t);
    ``crps``, ``coverage`` of the central 95 % interval, its mean ``width`` and ``calibration_error``, of the
    Gaussian with the mixture's mean and variance.
    """
    said = predictive(model, inputs, samples, likelihood="heteroscedastic", targets=targets, seed=seed)
    assert said.log_likelihood is not None
    return said, {
        "rmse": metrics.rmse(said.mean, targets),
        "log_likelihood": float(said.log_likelihood.mean()),
        "crps": metrics.crps_gaussian(said.mean, said.variance, targets),
        "coverage": metrics.picp(said.mean, said.variance, targets),
        "width": metrics.interval_width(said.variance),
        "calibration_error": metrics.regression_calibration(said.mean, said.variance, targets).error,
    }
