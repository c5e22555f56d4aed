"""Risk-coverage curves and their areas: by hand, by plain loops, and what they must obey."""

from __future__ import annotations

import math

import pytest
import torch
from test_metrics import DTYPES, F64, LABELS, PROBS, f64, random_labels, random_probs
from torch import Tensor

from bbb_fast import metrics

pytestmark = pytest.mark.cpu_only("has its own test of devices")


def loop(confidence: list[float], wrong: list[bool]) -> tuple[dict[float, tuple[float, float]], float]:
    """Coverage and risk by threshold, and the area, straight from the definition."""
    n = len(confidence)
    points = {}
    for threshold in confidence:
        accepted = [w for c, w in zip(confidence, wrong, strict=True) if c >= threshold]
        points[threshold] = (len(accepted) / n, sum(accepted) / len(accepted))
    return points, sum(points[c][1] for c in confidence) / n


def test_by_hand():
    # By confidence: .9 right, .7 right, .6 wrong, .5 wrong.
    curve = metrics.risk_coverage(PROBS, LABELS)
    assert curve._fields == ("coverage", "risk", "threshold")
    assert curve.coverage.tolist() == [0.25, 0.5, 0.75, 1.0]
    torch.testing.assert_close(curve.risk, f64(0.0, 0.0, 1 / 3, 0.5))
    assert curve.threshold.tolist() == [0.9, 0.7, 0.6, 0.5]
    assert metrics.aurc(PROBS, LABELS) == pytest.approx((1 / 3 + 1 / 2) / 4, rel=1e-15)
    assert metrics.excess_aurc(PROBS, LABELS) == 0.0
    # The surest are the wrong ones: risks 1, 1, 2/3, 1/2.
    backwards = f64(0.0, 3.0, 2.0, 1.0)
    assert metrics.aurc(PROBS, LABELS, backwards) == pytest.approx((1 + 1 + 2 / 3 + 1 / 2) / 4, rel=1e-15)
    excess = metrics.excess_aurc(PROBS, LABELS, backwards)
    assert excess == pytest.approx((2 + 1 / 3) / 4, rel=1e-15)


def test_equal_confidences_are_accepted_together():
    same = torch.zeros(4)
    curve = metrics.risk_coverage(PROBS, LABELS, same)
    assert [part.tolist() for part in curve] == [[1.0], [0.5], [0.0]]
    assert metrics.aurc(PROBS, LABELS, same) == 0.5


@pytest.mark.parametrize("levels", [None, 20, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_the_definition(levels: int | None, dtype: torch.dtype):
    probs = random_probs(150, 4).to(dtype)
    labels = random_labels(probs)
    confidence = None if levels is None else (probs.max(-1).values * levels).round()
    scores = (probs.max(-1).values if confidence is None else confidence).double().tolist()
    points, area = loop(scores, (probs.argmax(-1) != labels).tolist())
    curve = metrics.risk_coverage(probs, labels, confidence)
    assert curve.threshold.tolist() == sorted(points, reverse=True)
    for coverage, risk, threshold in zip(*(part.tolist() for part in curve), strict=True):
        assert (coverage, risk) == pytest.approx(points[threshold], rel=1e-14)
    assert metrics.aurc(probs, labels, confidence) == pytest.approx(area, rel=1e-13)
    # The area is that under the curve drawn in steps, and the last point has all examples.
    steps = torch.diff(curve.coverage, prepend=f64(0.0))
    assert metrics.aurc(probs, labels, confidence) == pytest.approx((steps * curve.risk).sum().item())
    assert curve.coverage[-1] == 1 and curve.risk[-1].item() == pytest.approx(
        1 - metrics.accuracy(probs, labels)
    )


def test_excess_is_from_the_best_confidence():
    probs = random_probs(400, 3)
    labels = random_labels(probs)
    right = probs.argmax(-1) == labels
    n, m = 400, int((~right).sum())
    assert 0 < m < n
    best = sum(j / (n - m + j) for j in range(1, m + 1)) / n
    for confidence in (None, torch.rand(400)):
        area = metrics.aurc(probs, labels, confidence)
        assert metrics.excess_aurc(probs, labels, confidence) == pytest.approx(area - best, abs=1e-14)
    # Any order within the right ones and within the wrong ones is best; the paper's closed form is near.
    assert metrics.excess_aurc(probs, labels, right + torch.rand(400) / 2) == 0.0
    r = m / n
    assert best == pytest.approx(r + (1 - r) * math.log(1 - r), abs=2e-3)


def test_nothing_wrong_and_everything_wrong():
    probs = random_probs(30, 3)
    right, wrong = probs.argmax(-1), (probs.argmax(-1) + 1) % 3
    for labels, risk in ((right, 0.0), (wrong, 1.0)):
        assert metrics.aurc(probs, labels) == risk
        assert metrics.excess_aurc(probs, labels) == 0.0


def test_only_the_order_of_the_confidence_matters():
    probs = random_probs(200, 3)
    labels = random_labels(probs)
    top = probs.max(-1).values
    expected = metrics.aurc(probs, labels)
    assert metrics.aurc(probs, labels, (3 * top).exp() - 100) == expected
    order = torch.randperm(200)
    assert metrics.aurc(probs[order], labels[order]) == pytest.approx(expected, rel=1e-14)


def test_layout_dtypes_and_gradients():
    probs = random_probs(50, 3).requires_grad_()
    labels = random_labels(probs.detach())
    wide = torch.randn(50, 2, dtype=torch.float16).requires_grad_()
    curve = metrics.risk_coverage(probs, labels, wide[:, 0])
    assert all(part.dtype == F64 and not part.requires_grad for part in curve)
    assert type(metrics.aurc(probs, labels)) is float and type(metrics.excess_aurc(probs, labels)) is float
    with torch.device("meta"):
        assert metrics.risk_coverage(probs, labels).risk.device.type == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_agrees_with_the_cpu():
    probs = random_probs(200, 5)
    labels = random_labels(probs)
    for function in (metrics.aurc, metrics.excess_aurc):
        assert function(probs.cuda(), labels.cuda()) == pytest.approx(function(probs, labels), rel=1e-12)
    assert metrics.risk_coverage(probs.cuda(), labels.cuda()).risk.is_cuda


BAD: list[tuple[Tensor, str]] = [
    (torch.ones(3), r"confidence must have shape \[4\] to match probs \[4, 3\], got \[3\]"),
    (torch.ones(4, 1), r"confidence must have shape \[N\], got \[4, 1\]"),
    (torch.ones(4).long(), r"confidence must have one of the dtypes"),
    (f64(1.0, math.nan, 0.0, 0.0), r"confidence\[1\] is nan; every value must be finite"),
    (f64(1.0, 1.0, -math.inf, 0.0), r"confidence\[2\] is -inf; every value must be finite"),
    (torch.ones(4, device="meta"), r"confidence must be on the device of probs \(cpu\), got meta"),
]


@pytest.mark.parametrize("function", [metrics.risk_coverage, metrics.aurc, metrics.excess_aurc])
def test_bad_confidence(function):
    for confidence, message in BAD:
        with pytest.raises(ValueError, match=message):
            function(PROBS, LABELS, confidence)
    with pytest.raises(TypeError, match=r"confidence must be a torch.Tensor of shape \[N\], got list"):
        function(PROBS, LABELS, [1.0, 2.0, 3.0, 4.0])
