"""Networks for regression: what their uncertainty is made of, units, noise, reproducibility."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from bbb_fast import predictive
from bbb_fast.experiments.options import OptionError
from bbb_fast.experiments.regression import METHODS, Standardized, Training, fit, judge
from bbb_fast.layers import MCDropout

pytestmark = pytest.mark.cpu_only("experiments on small tables run there")

NOISE = 0.2
SMALL = Training(hidden=(20,), noise="constant", steps=1_500, members=4, rates=(0.02, 0.1))
ON_DATA = torch.linspace(-0.9, 0.9, 40, dtype=torch.float64)[:, None]
OFF_DATA = torch.cat([torch.linspace(-3, -2, 20), torch.linspace(2, 3, 20)]).double()[:, None]
NEW_REGION = torch.linspace(0.6, 1.0, 20, dtype=torch.float64)[:, None]

# Those that Must be right about which uncertainty is which.
BAYESIAN = ("bbb", "lrt", "flipout", "mc-dropout", "concrete-dropout", "ensemble")


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
    for count in (100, 1_000):
        epistemic, aleatoric = parts(method, count, ON_DATA)
        epistemic_off, aleatoric_off = parts(method, count, OFF_DATA)
        assert epistemic_off > 2 * epistemic > 0
        assert aleatoric_off == pytest.approx(aleatoric, rel=0.25)


@pytest.mark.parametrize("method", [m for m in BAYESIAN if m != "mc-dropout"])
def test_epistemic_uncertainty_falls_with_more_data_and_aleatoric_does_not(method: str) -> None:
    few, noise_of_few = parts(method, 100, ON_DATA)
    many, noise_of_many = parts(method, 1_000, ON_DATA)
    assert few > 1.3 * many
    for noise in (noise_of_few, noise_of_many):
        assert noise == pytest.approx(NOISE, rel=0.4)


@pytest.mark.parametrize("method", BAYESIAN)
def test_epistemic_uncertainty_falls_where_data_arrive_and_aleatoric_does_not(method: str) -> None:
    """MC dropout included, whose spread at a given rate knows where the data are, but not how many."""
    without, noise_without = parts(method, 500, NEW_REGION, high=0.0)
    with_data, noise_with = parts(method, 1_000, NEW_REGION)
    assert without > 1.5 * with_data
    for noise in (noise_without, noise_with):
        assert noise == pytest.approx(NOISE, rel=0.4)
