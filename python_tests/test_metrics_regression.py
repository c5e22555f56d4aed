"""Scores of regression: closed forms by hand, by quadrature and by other libraries; every error."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from test_metrics import DTYPES, F64, f64
from torch import Tensor

from bbb_fast import metrics

pytestmark = pytest.mark.cpu_only("has its own test of devices")


def predictions(*shape: int, seed: int = 0, too_sure: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and y, the errors of y being ``too_sure`` times the standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    mean, noise = torch.randn(2, *shape, generator=generator, dtype=F64)
    variance = torch.rand(*shape, generator=generator, dtype=F64) * 3 + 0.1
    return mean, variance, mean + too_sure * noise * variance.sqrt()


def spread(x: Tensor) -> list[float]:
    return x.flatten().tolist()


MEAN, VARIANCE, Y = f64(1.0, 2.0, -1.0), f64(1.0, 4.0, 0.25), f64(1.0, 0.0, -2.0)  # z = 0, -1, -2


def test_by_hand():
    assert metrics.rmse(MEAN, Y) == pytest.approx(math.sqrt(5 / 3), rel=1e-15)
    half = 0.5 * math.log(2 * math.pi)
    density = f64(-half, -half - 0.5 - math.log(2), -half - 2 + math.log(2))
    torch.testing.assert_close(metrics.gaussian_log_density(MEAN, VARIANCE, Y), density)
    # At the mean of N(0, 1) the score is (sqrt(2) - 1) / sqrt(pi).
    one = metrics.crps_gaussian(f64(3.0), f64(1.0), f64(3.0))
    assert one == pytest.approx((math.sqrt(2) - 1) / math.sqrt(math.pi), rel=1e-14)
    # 1.96 standard deviations hold 95 %, 0.674 of them 50 %.
    assert metrics.picp(MEAN, VARIANCE, Y) == pytest.approx(2 / 3, rel=1e-15)
    assert metrics.picp(MEAN, VARIANCE, Y, level=0.5) == pytest.approx(1 / 3, rel=1e-15)
    assert metrics.picp(MEAN, VARIANCE, Y, level=0.96) == 1.0
    width = metrics.interval_width(VARIANCE)
    assert width == pytest.approx(2 * 1.959963984540054 * 3.5 / 3, rel=1e-14)
    # Below the quartiles are z = -1 and -2 of the three, below the upper one all.
    curve = metrics.regression_calibration(MEAN, VARIANCE, Y, levels=3)
    assert curve._fields == ("expected", "observed", "error")
    assert curve.expected.tolist() == [0.25, 0.5, 0.75]
    torch.testing.assert_close(curve.observed, f64(2 / 3, 1.0, 1.0))
    assert curve.error == pytest.approx(((5 / 12) ** 2 + 0.25 + 1 / 16) / 3, rel=1e-14)


def test_crps_of_samples_by_hand():
    # |1 - 2|, |4 - 2| have the mean 3/2; the pairs' mean distance is 3/2, half of it 3/4.
    assert metrics.crps_samples(f64([4.0], [1.0]), f64(2.0)) == 0.75
    assert metrics.crps_samples(f64([5.0, 7.0]), f64(2.0, 8.0)) == 2.0  # one sample: the absolute error
    assert metrics.crps_samples(torch.full((7, 2), 0.1), torch.full((2,), 0.1)) == 0.0
    assert metrics.crps_samples(torch.full((7, 1), 1e8, dtype=F64), f64(0.0)) == pytest.approx(1e8, rel=1e-15)


@pytest.mark.parametrize("shape", [(400,), (80, 5)])
def test_log_density_against_scipy(shape: tuple[int, ...]):
    norm = pytest.importorskip("scipy.stats").norm
    mean, variance, y = predictions(*shape)
    expected = torch.from_numpy(norm.logpdf(y.numpy(), mean.numpy(), variance.sqrt().numpy()))
    expected = expected if len(shape) == 1 else expected.sum(-1)
    torch.testing.assert_close(
        metrics.gaussian_log_density(mean, variance, y), expected, rtol=1e-12, atol=1e-12
    )


def test_crps_is_the_integral_it_is_defined_by():
    integrate = pytest.importorskip("scipy.integrate")
    norm = pytest.importorskip("scipy.stats").norm
    for mean, variance, y in zip(*map(spread, predictions(6, too_sure=3.0)), strict=True):
        law, end = norm(mean, math.sqrt(variance)), 40 * math.sqrt(variance) + abs(y - mean)
        below = integrate.quad(lambda x, law=law: law.cdf(x) ** 2, mean - end, y)[0]
        above = integrate.quad(lambda x, law=law: law.sf(x) ** 2, y, mean + end)[0]
        value = metrics.crps_gaussian(f64(mean), f64(variance), f64(y))
        assert value == pytest.approx(below + above, rel=1e-7)


def test_crps_far_out_is_the_distance_less_a_constant():
    assert metrics.crps_gaussian(f64(0.0), f64(4.0), f64(1e6)) == pytest.approx(
        1e6 - 2 / math.sqrt(math.pi), rel=1e-15
    )
    assert metrics.crps_gaussian(f64(5.0), f64(1e-30), f64(2.0)) == pytest.approx(3.0, rel=1e-14)


@pytest.mark.parametrize("draws", [2, 3, 50])
def test_crps_of_samples_against_torchmetrics(draws: int):
    tm = pytest.importorskip("torchmetrics.functional.regression")
    samples = torch.randn(draws, 40, dtype=F64) * 2
    y = torch.randn(40, dtype=F64)
    expected = tm.continuous_ranked_probability_score(samples.T, y).item()
    assert metrics.crps_samples(samples, y) == pytest.approx(expected, rel=1e-12)
    assert metrics.crps_samples(samples.unflatten(1, (8, 5)), y.unflatten(0, (8, 5))) == pytest.approx(
        expected
    )


def test_crps_of_many_samples_is_that_of_their_law():
    mean, variance, y = predictions(30)
    samples = mean + variance.sqrt() * torch.randn(20_000, 30, dtype=F64)
    expected = metrics.crps_gaussian(mean, variance, y)
    assert metrics.crps_samples(samples, y) == pytest.approx(expected, rel=0.01)


def test_rmse_against_scikit_learn_and_torchmetrics():
    sk = pytest.importorskip("sklearn.metrics")
    tm = pytest.importorskip("torchmetrics.functional.regression")
    mean, _, y = predictions(300)
    assert metrics.rmse(mean, y) == pytest.approx(sk.root_mean_squared_error(y.numpy(), mean.numpy()))
    mean, _, y = predictions(60, 5)
    assert metrics.rmse(mean, y) == pytest.approx(tm.mean_squared_error(mean, y, squared=False).item())


@pytest.mark.parametrize("level", [0.05, 0.5, 0.9, 0.95, 0.999])
def test_intervals_against_scipy(level: float):
    norm = pytest.importorskip("scipy.stats").norm
    mean, variance, y = predictions(500, 2)
    low, high = (torch.from_numpy(end) for end in norm.interval(level, mean.numpy(), variance.sqrt().numpy()))
    inside = ((y >= low) & (y <= high)).double().mean().item()
    assert metrics.picp(mean, variance, y, level) == pytest.approx(inside, rel=1e-14)
    assert metrics.interval_width(variance, level) == pytest.approx((high - low).mean().item(), rel=1e-12)


def test_levels_next_to_one():
    mean, variance, y = predictions(50)
    level = 1 - 2.0**-53
    assert metrics.interval_width(variance, level) < 20 * variance.sqrt().mean()
    assert metrics.picp(mean, variance, y, level) == 1.0


@pytest.mark.parametrize("shape", [(300,), (60, 5)])
@pytest.mark.parametrize("levels", [1, 9, 19])
def test_calibration_against_scipy(shape: tuple[int, ...], levels: int):
    norm = pytest.importorskip("scipy.stats").norm
    mean, variance, y = predictions(*shape)
    reached = norm.cdf(y.numpy(), mean.numpy(), variance.sqrt().numpy())
    curve = metrics.regression_calibration(mean, variance, y, levels)
    assert len(curve.expected) == levels
    for expected, observed in zip(curve.expected.tolist(), curve.observed.tolist(), strict=True):
        assert observed == pytest.approx((reached <= expected).mean(), rel=1e-14)
    gaps = curve.observed - curve.expected
    assert curve.error == pytest.approx((gaps**2).mean().item(), rel=1e-14) and type(curve.error) is float


def test_calibration_tells_who_is_too_sure():
    good = metrics.regression_calibration(*predictions(4000))
    sure = metrics.regression_calibration(*predictions(4000, too_sure=3.0))
    unsure = metrics.regression_calibration(*predictions(4000, too_sure=0.3))
    assert good.error < 2e-4 and sure.error > 50 * good.error and unsure.error > 50 * good.error
    low, high = sure.expected < 0.5, sure.expected > 0.5
    assert (sure.observed > sure.expected)[low].all() and (sure.observed < sure.expected)[high].all()
    assert (unsure.observed < unsure.expected)[low].all() and (unsure.observed > unsure.expected)[high].all()
    assert metrics.picp(*predictions(4000)) == pytest.approx(0.95, abs=0.015)


def test_the_true_law_scores_best():
    """The scores are proper: neither a wider nor a narrower nor a shifted law does better."""
    mean, variance, y = predictions(5000)
    density = metrics.gaussian_log_density(mean, variance, y).mean()
    crps = metrics.crps_gaussian(mean, variance, y)
    for other in ((mean, variance * 1.5), (mean, variance / 1.5), (mean + 0.3, variance)):
        assert metrics.gaussian_log_density(*other, y).mean() < density
        assert metrics.crps_gaussian(*other, y) > crps


@pytest.mark.parametrize("shape", [(70,), (70, 3)])
def test_report_is_the_functions(shape: tuple[int, ...]):
    given = predictions(*shape)
    mean, variance, y = given
    report = metrics.regression_report(*given)
    assert report == {
        "rmse": metrics.rmse(mean, y),
        "log_density": metrics.gaussian_log_density(*given).mean().item(),
        "crps": metrics.crps_gaussian(*given),
        "picp": metrics.picp(*given),
        "interval_width": metrics.interval_width(variance),
        "calibration": metrics.regression_calibration(*given).error,
    }
    assert all(type(value) is float for value in report.values())


def test_scores_scale_with_the_unit():
    mean, variance, y = predictions(100, 2)
    one = metrics.regression_report(mean, variance, y)
    ten = metrics.regression_report(10 * mean, 100 * variance, 10 * y)
    for name in ("rmse", "crps", "interval_width"):
        assert ten[name] == pytest.approx(10 * one[name])
    assert ten["log_density"] == pytest.approx(one["log_density"] - 2 * math.log(10))
    assert ten["picp"] == one["picp"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_narrow_dtypes_are_their_float64_values(dtype: torch.dtype):
    given = [t.to(dtype) for t in predictions(100)]
    assert metrics.regression_report(*given) == metrics.regression_report(*(t.double() for t in given))
    samples = torch.randn(9, 100).to(dtype)
    assert metrics.crps_samples(samples, given[2]) == metrics.crps_samples(
        samples.double(), given[2].double()
    )


@pytest.mark.filterwarnings("error")
def test_layout_gradients_and_default_device():
    def strided(x: Tensor) -> Tensor:
        return torch.stack([x, x], -1)[..., 0].requires_grad_()

    given = predictions(40, 3)
    samples = torch.randn(5, 40, 3, dtype=F64)
    expected = metrics.regression_report(*given), metrics.crps_samples(samples, given[2])
    with torch.device("meta"):
        y = strided(given[2])
        got = metrics.regression_report(*map(strided, given)), metrics.crps_samples(strided(samples), y)
        assert not metrics.gaussian_log_density(*map(strided, given)).requires_grad
        assert metrics.regression_calibration(*given).expected.device.type == "cpu"
    assert got[0] == pytest.approx(expected[0]) and got[1] == pytest.approx(expected[1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_agrees_with_the_cpu():
    given = predictions(200, 3)
    on_gpu: list[Any] = [t.cuda() for t in given]
    assert metrics.regression_report(*on_gpu) == pytest.approx(metrics.regression_report(*given), rel=1e-10)
    assert metrics.gaussian_log_density(*on_gpu).is_cuda
    assert metrics.regression_calibration(*on_gpu).observed.is_cuda
    samples = torch.randn(7, 200, 3)
    assert metrics.crps_samples(samples.cuda(), on_gpu[2]) == pytest.approx(
        metrics.crps_samples(samples, given[2])
    )


# --- Errors ---------------------------------------------------------------------------------------

WITH_VARIANCE: list[Callable[..., object]] = [
    metrics.gaussian_log_density,
    metrics.crps_gaussian,
    metrics.picp,
    metrics.regression_calibration,
    metrics.regression_report,
]
BAD_VALUES = [
    (torch.ones(3).long(), r"{0} must have one of the dtypes .*, got torch.int64"),
    (torch.ones(3, 1, 1), r"{0} must have shape \[N\] or \[N, D\], got \[3, 1, 1\]"),
    (torch.tensor(1.0), r"{0} must have shape \[N\] or \[N, D\], got \[\]"),
    (f64(1.0, math.nan, 1.0), r"{0}\[1\] is nan; every value must be finite"),
    (f64(1.0, 1.0, math.inf), r"{0}\[2\] is inf; every value must be finite"),
]
NOT_LIKE_MEAN = [
    (torch.ones(3, 1), r"{0} must have shape \[3\] like mean, got \[3, 1\]"),
    (torch.ones(2), r"{0} must have shape \[3\] like mean, got \[2\]"),
    (torch.ones(3, device="meta"), r"{0} must be on the device of mean \(cpu\), got meta"),
]


def rmse_with_variance(mean: Tensor, variance: Tensor, y: Tensor) -> float:
    return metrics.rmse(mean, y)


@pytest.mark.parametrize("function", [*WITH_VARIANCE, rmse_with_variance])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_bad_values(function: Callable[..., object], at: int):
    name = ("mean", "variance", "y")[at]
    if function is rmse_with_variance and name == "variance":
        return

    def run(value: object) -> None:
        given: list[object] = [MEAN, VARIANCE, Y]
        given[at] = value
        function(*given)

    for value, message in BAD_VALUES + (NOT_LIKE_MEAN if at else []):
        with pytest.raises(ValueError, match=message.replace("{0}", name)):
            run(value)
    with pytest.raises(ValueError, match=rf"{name} is empty \(shape \[0\]\)"):
        run(torch.ones(0))
    with pytest.raises(TypeError, match=rf"{name} must be a torch.Tensor of shape \[N\] or .*, got list"):
        run([1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    "function",
    [partial(f, MEAN) for f in WITH_VARIANCE] + [lambda variance, y: metrics.interval_width(variance)],
)
def test_bad_variance(function: Callable[..., object]):
    for value, shown in ((0.0, "0"), (-0.25, "-0.25")):
        with pytest.raises(ValueError, match=rf"variance\[1\] is {shown}; a variance must be positive"):
            function(f64(1.0, value, 1.0), Y)


def test_bad_samples():
    y = torch.ones(3)
    for samples, message in [
        (torch.ones(3), r"samples must have shape \[T, N\] or \[T, N, D\], got \[3\]"),
        (torch.ones(2, 4), r"y must have shape \[4\] to match samples \[2, 4\], got \[3\]"),
        (torch.ones(2, 3, 1), r"y must have shape \[3, 1\] to match samples \[2, 3, 1\], got \[3\]"),
        (torch.ones(0, 3), r"samples is empty"),
        (f64([1.0, math.nan, 1.0]), r"samples\[0, 1\] is nan"),
    ]:
        with pytest.raises(ValueError, match=message):
            metrics.crps_samples(samples, y)
    with pytest.raises(ValueError, match=r"y\[0\] is inf"):
        metrics.crps_samples(torch.ones(2, 3), f64(math.inf, 0.0, 0.0))
    with pytest.raises(ValueError, match=r"y must be on the device of samples \(cpu\), got meta"):
        metrics.crps_samples(torch.ones(2, 3), y.to("meta"))
    with pytest.raises(TypeError, match=r"samples must be a torch.Tensor .*\[T, N\] or .*, got list"):
        metrics.crps_samples([[1.0]], y)  # type: ignore[arg-type]  # on purpose


@pytest.mark.parametrize("level", [0, 1, 0.0, 1.0, -0.5, 95, math.nan, "0.95", None, True])
def test_bad_level(level: object):
    for function in (partial(metrics.picp, MEAN, VARIANCE, Y), partial(metrics.interval_width, VARIANCE)):
        with pytest.raises(ValueError, match="level must be a number above 0 and below 1, got"):
            function(level)


@pytest.mark.parametrize("levels", [0, -1, 2.0, "9", None, True])
def test_bad_levels(levels: object):
    with pytest.raises(ValueError, match="levels must be an integer of at least 1, got"):
        metrics.regression_calibration(MEAN, VARIANCE, Y, levels)  # type: ignore[arg-type]
