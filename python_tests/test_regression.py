"""Networks for regression: what their uncertainty is made of, units, noise, reproducibility."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from bbb_fast import predict, predictive
from bbb_fast.experiments import regression
from bbb_fast.experiments.options import OptionError
from bbb_fast.experiments.regression import METHODS, NOISES, Standardized, Training, fit, judge
from bbb_fast.layers import MCDropout
from bbb_fast.methods import gaussian_nll

pytestmark = pytest.mark.cpu_only("experiments on small tables run there")

NOISE = 0.2
SMALL = Training(hidden=(20,), noise="constant", steps=1_200, members=4, rates=(0.05,))
ON_DATA = torch.linspace(-0.9, 0.9, 40, dtype=torch.float64)[:, None]
OFF_DATA = torch.cat([torch.linspace(-3, -2, 20), torch.linspace(2, 3, 20)]).double()[:, None]
NEW_REGION = torch.linspace(0.6, 1.0, 20, dtype=torch.float64)[:, None]

# All but the one that has no epistemic part; and how few rows are few, for those whose epistemic part falls
# with more of them. With fewer, posteriors over weights call the noise larger than it is; with more, networks
# that are trained on random parts of the rows agree.
BAYESIAN = ("bbb", "lrt", "flipout", "mc-dropout", "concrete-dropout", "ensemble")
FEW = {"bbb": 200, "lrt": 200, "flipout": 200, "concrete-dropout": 50, "ensemble": 50}
MANY = 1_000


def data(count: int, low: float = -1.0, high: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    x = low + (high - low) * torch.rand(count, 1, generator=generator, dtype=torch.float64)
    noise = torch.randn(count, generator=generator, dtype=torch.float64)
    return x, torch.sin(3 * x[:, 0]) + NOISE * noise


@cache
def model(method: str, count: int, high: float = 1.0) -> Standardized:
    return fit(method, *data(count, high=high), SMALL, seed=0)


def parts(method: str, count: int, where: Tensor, high: float = 1.0) -> tuple[float, float]:
    """Epistemic and aleatoric standard deviation, over the inputs."""
    said = predictive(model(method, count, high), where, 100, likelihood="heteroscedastic", seed=1)
    return float(said.epistemic.mean().sqrt()), float(said.aleatoric.mean().sqrt())


@pytest.mark.parametrize("method", BAYESIAN)
def test_epistemic_uncertainty_rises_off_the_data_and_aleatoric_does_not(method: str) -> None:
    epistemic, aleatoric = parts(method, MANY, ON_DATA)
    epistemic_off, aleatoric_off = parts(method, MANY, OFF_DATA)
    assert epistemic_off > 2 * epistemic > 0
    assert aleatoric_off == pytest.approx(aleatoric, rel=0.25)


@pytest.mark.parametrize(("method", "count"), FEW.items())
def test_epistemic_uncertainty_falls_with_more_data_and_aleatoric_does_not(method: str, count: int) -> None:
    few, noise_of_few = parts(method, count, ON_DATA)
    many, noise_of_many = parts(method, MANY, ON_DATA)
    assert few > 1.3 * many
    for noise in (noise_of_few, noise_of_many):
        assert noise == pytest.approx(NOISE, rel=0.5)


@pytest.mark.parametrize("method", BAYESIAN)
def test_epistemic_uncertainty_falls_where_data_arrive_and_aleatoric_does_not(method: str) -> None:
    """MC dropout included, whose spread at a given rate knows where the data are, but not how many."""
    without, noise_without = parts(method, 500, NEW_REGION, high=0.0)
    with_data, noise_with = parts(method, MANY, NEW_REGION)
    assert without > 1.5 * with_data
    for noise in (noise_without, noise_with):
        assert noise == pytest.approx(NOISE, rel=0.5)


TINY = Training(hidden=(8,), steps=60, members=2, rates=(0.1, 0.3))


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_answers_with_mean_and_noise(method: str, noise: Any) -> None:
    x, y = data(50)
    made = fit(method, x, y, replace(TINY, noise=noise), seed=0)
    said, scores = judge(made, x, y, 20, seed=0)
    assert said.mean.shape == y.shape
    assert all(math.isfinite(value) for value in scores.values())
    differ = said.aleatoric.std() > 1e-6 * said.aleatoric.mean()
    own = "heteroscedastic" if method == "ensemble" else "constant"
    # Members of an ensemble differ in their constants, but not from input to input.
    assert bool(differ) == ((own if noise == "own" else noise) == "heteroscedastic")
    assert bool((said.epistemic > 0).all()) == (method != "deterministic")


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_bits(method: str) -> None:
    x, y = data(50)
    before = torch.get_rng_state()
    one, again, other = (judge(fit(method, x, y, TINY, seed), x, y, 10, 0)[0].mean for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one, again)
    assert not torch.isclose(one, other).all()


@pytest.mark.parametrize("method", ["ensemble", "lrt", "mc-dropout"])
def test_scores_are_in_the_targets_own_units(method: str) -> None:
    x, y = data(50)
    _, scores = judge(fit(method, x, y, TINY, 0), x, y, 10, 0)
    # Powers of two, so that the standardized numbers are the same bits.
    wide = 1024 * y
    _, of_wide = judge(fit(method, 4 * x, wide, TINY, 0), 4 * x, wide, 10, 0)
    for key in ("rmse", "crps", "width"):
        assert of_wide[key] == pytest.approx(1024 * scores[key], rel=1e-5)
    assert of_wide["log_likelihood"] == pytest.approx(scores["log_likelihood"] - math.log(1024), abs=1e-4)
    for key in ("coverage", "calibration_error"):
        assert of_wide[key] == pytest.approx(scores[key])


def test_log_likelihood_is_that_of_the_mixture_of_draws() -> None:
    x, y = data(40)
    made = fit("lrt", x, y, TINY, 0)
    said, scores = judge(made, x, y, 7, seed=3)
    mean, log_variance = predict(made, x, 7, seed=3).unbind(-1)
    each = torch.distributions.Normal(mean, torch.exp(0.5 * log_variance)).log_prob(y)
    expected = each.logsumexp(0) - math.log(7)
    assert scores["log_likelihood"] == pytest.approx(float(expected.mean()))
    assert scores["rmse"] == pytest.approx(float((mean.mean(0) - y).square().mean().sqrt()))
    inside = ((y - said.mean).abs() <= 1.959964 * said.variance.sqrt()).double().mean()
    assert scores["coverage"] == pytest.approx(float(inside))


def test_standardization_is_that_of_the_training_rows() -> None:
    x, y = data(50)
    x = torch.cat([5 + 3 * x, torch.full_like(x, 7.0)], 1)
    made = Standardized(x, y)
    inside, target = made.standardize(x, y)
    assert target is not None
    for column in (inside[:, 0], target):
        assert float(column.mean()) == pytest.approx(0, abs=1e-6)
        assert float(column.std(correction=0)) == pytest.approx(1, abs=1e-6)
    # A column that was constant in training says nothing, whatever it is later.
    x[:, 1] = torch.linspace(-100, 100, len(x))
    assert not made.standardize(x)[0][:, 1].any()


def test_mc_dropout_takes_the_rate_and_the_noise_that_held_out_rows_like_best() -> None:
    x, y = data(400)
    made = fit("mc-dropout", x, y, replace(SMALL, steps=500, rates=(0.02, 0.9)), 0)
    assert [m.p for m in made.modules() if isinstance(m, MCDropout)] == [0.02]
    said = predictive(made, x, 50, likelihood="heteroscedastic", seed=0)
    assert float(said.variance.mean().sqrt()) == pytest.approx(NOISE, rel=0.3)


def test_networks_of_an_ensemble_stop_where_held_out_rows_like_them_best() -> None:
    """Of pure noise they learn next to nothing, where they would know it by heart."""
    x, y = torch.randn(40, 6, dtype=torch.float64), torch.randn(40, dtype=torch.float64)
    training = Training(hidden=(50,), steps=400, members=2)
    assert judge(fit("ensemble", x, y, training, 0), x, y, 2, 0)[1]["rmse"] > 0.5
    rest, held_out = regression._Problem(x.float(), y.float(), training, constant=False).held_out()
    torch.manual_seed(1)
    stopped = regression._stopped_network(rest, held_out)
    torch.manual_seed(1)
    network = rest.network()
    losses = {
        step: gaussian_nll(network(held_out.x), held_out.y).item()
        for step in regression._steps(network, rest, regression._POINT_RATE, 400, decay=False)
        if step in regression._LOOKS
    }
    assert losses[400] > min(losses.values())
    assert gaussian_nll(stopped(held_out.x), held_out.y).item() == min(losses.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": ()}, "hidden must name at least one layer"),
        ({"hidden": (0,)}, "hidden must be an int >= 1, got 0"),
        ({"noise": "loud"}, "noise must be one of own, constant, heteroscedastic, got 'loud'"),
        ({"steps": 0}, "steps must be an int >= 1, got 0"),
        ({"members": 2.5}, "members must be an int >= 1, got 2.5"),
        ({"rates": (0.1, 1.0)}, r"rates must be numbers between 0 and 1, got \[0.1, 1.0\]"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Training(**options)


def test_unknown_method() -> None:
    with pytest.raises(OptionError, match="methods must be among deterministic, ensemble.*got 'magic'"):
        fit("magic", *data(20), TINY, 0)
