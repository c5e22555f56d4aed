"""Adaptive, class-wise and maximum calibration error: by hand, by plain loops, by other libraries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_metrics import BAD_PROBS, DTYPES, F64, LABELS, PROBS, f64, random_labels, random_probs
from torch import Tensor

from bbb_fast import metrics

pytestmark = pytest.mark.cpu_only("has its own test of devices")


def loop_error(confidence: list[float], right: list[bool], edges: list[float]) -> tuple[float, float]:
    """The mean and the largest gap of bins (lo, hi], the first one closed."""
    mean, largest, n = 0.0, 0.0, len(confidence)
    seen = 0
    for k in range(len(edges) - 1):
        low = -1.0 if k == 0 else edges[k]
        inside = [i for i in range(n) if low < confidence[i] <= edges[k + 1]]
        seen += len(inside)
        if inside:
            gap = abs(sum(right[i] - confidence[i] for i in inside)) / len(inside)
            mean += len(inside) / n * gap
            largest = max(largest, gap)
    assert seen == n
    return mean, largest


def test_adaptive_by_hand():
    # Confidences .5 (wrong), .6 (wrong), .7 (right), .9 (right): two of them in each of two bins.
    diagram = metrics.reliability(PROBS, LABELS, bins=2, adaptive=True)
    torch.testing.assert_close(diagram.edges, f64(0.0, 0.6, 1.0))
    torch.testing.assert_close(diagram.confidence, f64(0.55, 0.8))
    torch.testing.assert_close(diagram.accuracy, f64(0.0, 1.0))
    assert diagram.count.tolist() == [2, 2]
    assert metrics.adaptive_ece(PROBS, LABELS, bins=2) == pytest.approx((1.1 + 0.4) / 4, rel=1e-14)
    assert metrics.mce(PROBS, LABELS, bins=2, adaptive=True) == pytest.approx(0.55, rel=1e-14)
    # Equal width: .5 alone in (0, .5], which is the worse bin.
    assert metrics.mce(PROBS, LABELS, bins=2) == pytest.approx(0.5, rel=1e-14)


@pytest.mark.parametrize("n", [1, 2, 5, 99, 100, 101])
@pytest.mark.parametrize("bins", [1, 2, 7, 15, 120])
def test_adaptive_bins_differ_by_one_example_at_most(n: int, bins: int):
    probs = random_probs(n, 4, seed=n)
    count = metrics.reliability(probs, random_labels(probs), bins, adaptive=True).count
    assert count.sum() == n and len(count) == bins
    assert count.max() - count.min() <= 1


def test_adaptive_does_not_depend_on_the_order_of_tied_rows():
    probs = random_probs(300, 3).mul(8).round().add(1)
    probs /= probs.sum(-1, keepdim=True)
    labels = random_labels(probs)
    expected = metrics.adaptive_ece(probs, labels, 10)
    for seed in range(5):
        order = torch.randperm(300, generator=torch.Generator().manual_seed(seed))
        assert metrics.adaptive_ece(probs[order], labels[order], 10) == pytest.approx(expected, rel=1e-13)
    diagram = metrics.reliability(probs, labels, 10, adaptive=True)
    top = probs.max(-1).values
    for k in range(10):
        inside = (top > diagram.edges[k]) & (top <= diagram.edges[k + 1])
        assert inside.sum() == diagram.count[k]


@pytest.mark.parametrize("bins", [1, 7, 15, 100])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_errors_against_a_plain_loop(bins: int, adaptive: bool, dtype: torch.dtype):
    probs = random_probs(200, 4, seed=bins).to(dtype)
    probs[0] = torch.tensor([0.0, 1.0, 0.0, 0.0])  # the ends of the range
    labels = random_labels(probs)
    rows, truth = probs.double().tolist(), labels.tolist()
    diagram = metrics.reliability(probs, labels, bins, adaptive=adaptive)
    top = [max(row) for row in rows]
    right = [row.index(max(row)) == label for row, label in zip(rows, truth, strict=True)]
    mean, largest = loop_error(top, right, diagram.edges.tolist())
    function = metrics.adaptive_ece if adaptive else metrics.ece
    assert function(probs, labels, bins) == pytest.approx(mean, rel=1e-12)
    assert metrics.mce(probs, labels, bins, adaptive=adaptive) == pytest.approx(largest, rel=1e-12)
    total = 0.0
    for c in range(4):
        edges = metrics.reliability(probs, labels, bins, adaptive=adaptive, of_class=c).edges.tolist()
        total += loop_error([row[c] for row in rows], [label == c for label in truth], edges)[0]
    error = metrics.classwise_ece(probs, labels, bins, adaptive=adaptive)
    assert error == pytest.approx(total / 4, rel=1e-12)


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_against_torchmetrics(bins: int):
    tm = pytest.importorskip("torchmetrics.functional.classification")  # sums in float32
    probs = random_probs(1000, 5)
    labels = random_labels(probs)
    for norm, function in (("l1", metrics.ece), ("max", metrics.mce)):
        expected = tm.multiclass_calibration_error(probs, labels, 5, n_bins=bins, norm=norm).item()
        assert function(probs, labels, bins) == pytest.approx(expected, rel=2e-5)
    one_vs_rest = [
        tm.binary_calibration_error(probs[:, c].contiguous(), (labels == c).long(), n_bins=bins).item()
        for c in range(5)
    ]
    assert metrics.classwise_ece(probs, labels, bins) == pytest.approx(sum(one_vs_rest) / 5, rel=2e-5)


@pytest.mark.parametrize("adaptive", [False, True])
def test_curve_of_a_class_against_scikit_learn(adaptive: bool):
    curve = pytest.importorskip("sklearn.calibration").calibration_curve
    probs = random_probs(997, 3)
    labels = random_labels(probs)
    diagram = metrics.reliability(probs, labels, 10, adaptive=adaptive, of_class=1)
    kind = "quantile" if adaptive else "uniform"
    frequency, mean = curve((labels == 1).numpy(), probs[:, 1].numpy(), n_bins=10, strategy=kind)
    filled = diagram.count > 0
    torch.testing.assert_close(diagram.accuracy[filled], torch.from_numpy(frequency))
    torch.testing.assert_close(diagram.confidence[filled], torch.from_numpy(mean))


def test_calibrated_predictions_have_no_error():
    # Every class's probability comes true: 3 of 4 are class 0, 1 of 4 class 1.
    probs = f64([0.75, 0.25]).expand(4, 2)
    labels = torch.tensor([0, 0, 1, 0])
    assert metrics.adaptive_ece(probs, labels) == 0.0
    assert metrics.classwise_ece(probs, labels) == 0.0 == metrics.classwise_ece(probs, labels, adaptive=True)
    assert metrics.mce(probs, labels) == 0.0


@pytest.mark.parametrize("adaptive", [False, True])
def test_calibrated_ece_is_that_of_labels_drawn_from_the_probabilities(adaptive: bool):
    probs = random_probs(400, 5, seed=3)
    function = metrics.adaptive_ece if adaptive else metrics.ece
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.multinomial(probs, 1, generator=generator).squeeze(1) for _ in range(500))
    expected = torch.tensor([function(probs, labels) for labels in drawn], dtype=F64)
    sample = metrics.calibrated_ece(probs, adaptive=adaptive, repeats=500, seed=1)
    assert sample.shape == (500,) and sample.dtype == F64
    error = (expected.var() + sample.var()).div(500).sqrt()
    assert (sample.mean() - expected.mean()).abs() < 4 * error
    assert sample.std().item() == pytest.approx(expected.std().item(), rel=0.15)


def test_calibrated_ece_tells_the_miscalibrated():
    probs = random_probs(2000, 4)
    sharpened = probs**3 / (probs**3).sum(-1, keepdim=True)
    generator = torch.Generator().manual_seed(1)
    of_probs, of_sharpened = (torch.multinomial(p, 1, generator=generator)[:, 0] for p in (probs, sharpened))
    chance = metrics.calibrated_ece(sharpened, repeats=200)
    assert metrics.ece(sharpened, of_probs) > chance.max()
    assert metrics.ece(sharpened, of_sharpened) < chance.max()


def test_calibrated_ece_hangs_on_its_seed_alone():
    probs = random_probs(50, 3)
    expected = metrics.calibrated_ece(probs, repeats=5, seed=7)
    state = torch.get_rng_state()
    with torch.device("meta"):
        assert metrics.calibrated_ece(probs.T.contiguous().T, repeats=5, seed=7).equal(expected)
    assert torch.get_rng_state().equal(state)
    assert not metrics.calibrated_ece(probs, repeats=5, seed=8).equal(expected)
    # One probability of 1: nothing can be wrong.
    assert metrics.calibrated_ece(f64([1.0, 0.0]).expand(3, 2), repeats=2).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("repeats", 0),
        ("repeats", 1.5),
        ("seed", -1),
        ("seed", 2**63),
        ("seed", None),
        ("bins", 0),
        ("adaptive", 1),
    ],
)
def test_calibrated_ece_refuses(option: str, value: object):
    with pytest.raises(ValueError, match=f"{option} must be"):
        metrics.calibrated_ece(PROBS, **{option: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(("probs", "message"), BAD_PROBS)
def test_calibrated_ece_of_bad_probabilities(probs: Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        metrics.calibrated_ece(probs, repeats=1)


def test_classwise_sees_what_the_top_label_hides():
    # The top class is right as often as it says, but the rest goes to the wrong one of the others.
    probs = f64([0.5, 0.5, 0.0]).expand(4, 3) * f64(1.0, 0.9, 1.0) + f64(0.0, 0.0, 0.05)
    labels = torch.tensor([0, 0, 2, 2])
    assert metrics.ece(probs, labels) == pytest.approx(0.0, abs=1e-15)
    assert metrics.classwise_ece(probs, labels) == pytest.approx((0.45 + 0.45) / 3, rel=1e-12)


def test_memory_layout_and_default_device_do_not_matter():
    probs, labels = random_probs(60, 4), torch.arange(60) % 4
    expected = [f(probs, labels, adaptive=True) for f in (metrics.classwise_ece, metrics.mce)]
    with torch.device("meta"):
        turned = [
            f(probs.T.contiguous().T, labels, adaptive=True) for f in (metrics.classwise_ece, metrics.mce)
        ]
        assert turned == expected
        assert metrics.reliability(probs, labels, adaptive=True, of_class=0).edges.device.type == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_agrees_with_the_cpu():
    probs = random_probs(200, 5)
    labels = random_labels(probs)
    for function in (metrics.adaptive_ece, metrics.classwise_ece, metrics.mce):
        assert function(probs.cuda(), labels.cuda()) == pytest.approx(function(probs, labels), rel=1e-12)
    assert metrics.reliability(probs.cuda(), labels.cuda(), adaptive=True).edges.is_cuda


@pytest.mark.parametrize("adaptive", [None, 1, "mass", torch.tensor(True)])
def test_bad_adaptive(adaptive: Any):
    for function in (metrics.classwise_ece, metrics.mce, metrics.reliability):
        with pytest.raises(ValueError, match="adaptive must be True or False, got"):
            function(PROBS, LABELS, adaptive=adaptive)


@pytest.mark.parametrize("of_class", [-1, 3, 1.0, "1", True])
def test_bad_class(of_class: object):
    with pytest.raises(ValueError, match="of_class must be None or a class from 0 to 2, got"):
        metrics.reliability(PROBS, LABELS, of_class=of_class)  # type: ignore[arg-type]


def test_results_are_floats_without_gradient():
    probs: Tensor = random_probs(20, 3).requires_grad_()
    labels = random_labels(probs.detach())
    for function in (metrics.adaptive_ece, metrics.classwise_ece, metrics.mce):
        assert type(function(probs, labels)) is float
    assert metrics.reliability(probs, labels, adaptive=True).edges.dtype == F64
