"""Metrics: values by hand, by plain loops and by scikit-learn; properties; every error."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bbb_fast import metrics

pytestmark = pytest.mark.cpu_only("has its own test of devices")

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
F64 = torch.float64


def f64(*rows: object) -> Tensor:
    return torch.tensor(rows, dtype=F64)


def random_probs(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(scale * torch.randn(*shape, generator=generator, dtype=F64), -1)


def random_labels(probs: Tensor, seed: int = 1) -> Tensor:
    """Labels that follow the rows of probs about half of the time, so that no score is trivial."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(probs.shape[-1], (len(probs),), generator=generator)
    keep = torch.rand(len(probs), generator=generator) < 0.5
    return torch.where(keep, probs.argmax(-1), noise)


def random_scores(seed: int, levels: int | None = None) -> tuple[Tensor, Tensor]:
    """In and out scores that overlap; levels=None has no ties, few levels have many."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(311, generator=generator, dtype=F64)
    b = torch.randn(173, generator=generator, dtype=F64) + 0.8
    if levels is None:
        return a, b
    return (a * levels / 4).round(), (b * levels / 4).round()


# --- Proper scores and calibration ----------------------------------------------------------------

PROBS = f64([0.7, 0.2, 0.1], [0.1, 0.3, 0.6], [0.5, 0.25, 0.25], [0.05, 0.9, 0.05])
LABELS = torch.tensor([0, 1, 2, 1])  # right, wrong, wrong, right


def test_proper_scores_by_hand():
    assert metrics.accuracy(PROBS, LABELS) == 0.5
    expected = -(math.log(0.7) + math.log(0.3) + math.log(0.25) + math.log(0.9)) / 4
    assert metrics.nll(PROBS, LABELS) == pytest.approx(expected, rel=1e-15)
    squares = (0.09 + 0.04 + 0.01) + (0.01 + 0.49 + 0.36) + (0.25 + 0.0625 + 0.5625) + 0.015
    assert metrics.brier(PROBS, LABELS) == pytest.approx(squares / 4, rel=1e-14)


def test_scores_of_certain_predictions():
    right = torch.eye(3)
    labels = torch.arange(3)
    report = metrics.classification_report(right, labels)
    assert report == {"accuracy": 1.0, "nll": 0.0, "brier": 0.0, "ece": 0.0}
    assert math.copysign(1.0, report["nll"]) == 1.0
    assert all(type(value) is float for value in report.values())
    wrong = metrics.classification_report(right, (labels + 1) % 3)
    assert wrong["nll"] == pytest.approx(149 * math.log(2), rel=1e-15)
    assert (wrong["accuracy"], wrong["brier"], wrong["ece"]) == (0.0, 2.0, 1.0)


def test_nll_keeps_every_positive_float32():
    tiny = torch.tensor([[2.0**-149, 1.0]])
    assert metrics.nll(tiny, torch.tensor([0])) == pytest.approx(149 * math.log(2), rel=1e-15)
    smaller = tiny.double() * f64(2.0**-100, 1.0)
    assert metrics.nll(smaller, torch.tensor([0])) == metrics.nll(tiny, torch.tensor([0]))
    larger = tiny * torch.tensor([4.0, 1.0])
    assert metrics.nll(larger, torch.tensor([0])) == pytest.approx(147 * math.log(2), rel=1e-15)


def test_accuracy_takes_the_lowest_class_of_a_tie():
    tie = torch.tensor([[0.5, 0.5], [0.5, 0.5]])
    assert metrics.accuracy(tie, torch.tensor([0, 0])) == 1.0
    assert metrics.accuracy(tie, torch.tensor([1, 1])) == 0.0


def test_reliability_and_ece_by_hand():
    # Confidences .7 (right), .6 (wrong), .5 (wrong), .9 (right) in the bins (0, .5] and (.5, 1].
    diagram = metrics.reliability(PROBS, LABELS, bins=2)
    assert isinstance(diagram, metrics.Reliability)
    assert diagram._fields == ("edges", "confidence", "accuracy", "count")
    torch.testing.assert_close(diagram.edges, f64(0.0, 0.5, 1.0))
    torch.testing.assert_close(diagram.confidence, f64(0.5, 2.2 / 3))
    torch.testing.assert_close(diagram.accuracy, f64(0.0, 2 / 3))
    assert diagram.count.tolist() == [1, 3] and diagram.count.dtype == torch.int64
    assert metrics.ece(PROBS, LABELS, bins=2) == pytest.approx((0.5 + 0.2) / 4, rel=1e-14)
    # One bin: the gap between the mean confidence and the accuracy.
    assert metrics.ece(PROBS, LABELS, bins=1) == pytest.approx(2.7 / 4 - 0.5, rel=1e-14)


def test_empty_bins_are_zero():
    diagram = metrics.reliability(PROBS, LABELS, bins=10)
    empty = diagram.count == 0
    assert empty.sum() == 6 and diagram.count.sum() == 4
    assert diagram.confidence[empty].abs().sum() == 0 == diagram.accuracy[empty].abs().sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_confidence_on_an_edge_is_in_the_bin_below(dtype: torch.dtype):
    top = torch.tensor([0.6, 0.7, 0.8, 0.9, 1.0], dtype=dtype)
    probs = torch.stack([top, 1 - top], -1)
    diagram = metrics.reliability(probs, torch.zeros(5, dtype=torch.int64), bins=10)
    assert diagram.count.tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1, 1]


def test_more_bins_than_a_narrow_dtype_tells_apart():
    probs = random_probs(50, 4).to(torch.bfloat16)
    diagram = metrics.reliability(probs, random_labels(probs), bins=5000)
    assert diagram.count.sum() == 50 and len(diagram.edges) == 5001


@pytest.mark.parametrize("bins", [1, 7, 15, 100])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ece_against_a_plain_loop(bins: int, dtype: torch.dtype):
    probs = random_probs(400, 5, seed=bins).to(dtype)
    labels = random_labels(probs)
    diagram = metrics.reliability(probs, labels, bins)
    edges = diagram.edges.tolist()
    members: list[list[int]] = [[] for _ in range(bins)]
    rows, truth = probs.double().tolist(), labels.tolist()
    for n, row in enumerate(rows):
        for k in range(bins):
            if edges[k] < max(row) <= edges[k + 1]:
                members[k].append(n)
    expected = 0.0
    for k, inside in enumerate(members):
        assert diagram.count[k] == len(inside)
        if not inside:
            continue
        confidence = sum(max(rows[n]) for n in inside) / len(inside)
        right = sum(rows[n].index(max(rows[n])) == truth[n] for n in inside) / len(inside)
        assert diagram.confidence[k].item() == pytest.approx(confidence, rel=1e-12)
        assert diagram.accuracy[k].item() == pytest.approx(right, rel=1e-12)
        expected += len(inside) / len(rows) * abs(right - confidence)
    assert sum(map(len, members)) == 400
    assert metrics.ece(probs, labels, bins) == pytest.approx(expected, rel=1e-12)


def test_calibrated_predictions_have_no_calibration_error():
    # Confidence 3/4, and right 3 times out of 4.
    probs = f64([0.75, 0.25]).expand(4, 2)
    assert metrics.ece(probs, torch.tensor([0, 0, 1, 0])) == 0.0


def test_report_is_the_functions():
    probs = random_probs(100, 4)
    labels = random_labels(probs)
    assert metrics.classification_report(probs, labels) == {
        "accuracy": metrics.accuracy(probs, labels),
        "nll": metrics.nll(probs, labels),
        "brier": metrics.brier(probs, labels),
        "ece": metrics.ece(probs, labels),
    }


def test_proper_scores_against_scikit_learn():
    sk = pytest.importorskip("sklearn.metrics")
    probs = random_probs(500, 6)
    labels = random_labels(probs)
    p, y = probs.numpy(), labels.numpy()
    assert metrics.nll(probs, labels) == pytest.approx(sk.log_loss(y, p, labels=range(6)))
    assert metrics.accuracy(probs, labels) == pytest.approx(sk.accuracy_score(y, p.argmax(1)))
    # Two classes: scikit-learn's score of one class is half of the sum over both.
    two = random_probs(500, 2)
    y2 = random_labels(two)
    expected = 2 * sk.brier_score_loss(y2.numpy(), two[:, 1].numpy())
    assert metrics.brier(two, y2) == pytest.approx(expected)
    # Several classes, class by class.
    one_vs_rest = sum(sk.brier_score_loss(y == c, p[:, c]) for c in range(6))
    assert metrics.brier(probs, labels) == pytest.approx(one_vs_rest)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_of_narrow_dtypes_are_those_of_their_float64_values(dtype: torch.dtype):
    probs = random_probs(300, 4).to(dtype)
    labels = random_labels(probs)
    report = metrics.classification_report(probs, labels)
    p = probs.double()
    true = p[torch.arange(300), labels]
    assert report["nll"] == pytest.approx(-true.log().mean().item(), rel=1e-13)
    one_hot = torch.nn.functional.one_hot(labels, 4)
    assert report["brier"] == pytest.approx((p - one_hot).square().sum(-1).mean().item())
    # The top probability itself may be tied in a narrow type.
    assert report["accuracy"] == (probs.argmax(-1) == labels).double().mean().item()


def test_bfloat16_rows_that_rounding_moved_are_accepted():
    probs = random_probs(2000, 10).to(torch.bfloat16)
    assert (probs.sum(-1, dtype=F64) - 1).abs().max() > 1e-3
    metrics.classification_report(probs, random_labels(probs))


# --- Uncertainty decomposition --------------------------------------------------------------------

# Two draws. Example 0: certain of opposite classes, all epistemic. Example 1: both undecided, all
# aleatoric. Example 2: in between.
DRAWS = f64([[1.0, 0.0], [0.5, 0.5], [0.9, 0.1]], [[0.0, 1.0], [0.5, 0.5], [0.5, 0.5]])
LN2 = math.log(2.0)


def entropy(*row: float) -> float:
    return -sum(p * math.log(p) for p in row if p > 0)


def test_entropies_by_hand():
    total = metrics.predictive_entropy(DRAWS)
    aleatoric = metrics.expected_entropy(DRAWS)
    torch.testing.assert_close(total, f64(LN2, LN2, entropy(0.7, 0.3)))
    torch.testing.assert_close(aleatoric, f64(0.0, LN2, (entropy(0.9, 0.1) + LN2) / 2))
    torch.testing.assert_close(metrics.mutual_information(DRAWS), total - aleatoric)
    assert total.dtype == F64 and total.shape == (3,)


def test_entropies_are_their_formulas():
    p = random_probs(13, 40, 6)
    mean = p.mean(0)
    total = -(mean * mean.log()).sum(-1)
    aleatoric = -(p * p.log()).sum(-1).mean(0)
    torch.testing.assert_close(metrics.predictive_entropy(p), total, rtol=1e-13, atol=0)
    torch.testing.assert_close(metrics.expected_entropy(p), aleatoric, rtol=1e-13, atol=0)
    information = metrics.mutual_information(p)
    torch.testing.assert_close(information, total - aleatoric, rtol=0, atol=1e-13)


def test_rounding_does_not_make_mutual_information_negative():
    # Draws that differ in the last digits only: the true value is below the rounding error.
    one = random_probs(1, 500, 10)
    p = torch.cat([one, one * (1 + 1e-15), one * (1 - 1e-15)])
    assert (metrics.predictive_entropy(p) - metrics.expected_entropy(p)).min() < 0
    information = metrics.mutual_information(p)
    assert information.min() == 0 and information.max() < 1e-14


def test_decompose_by_hand():
    parts = metrics.decompose(DRAWS)
    assert parts._fields == (
        "epistemic",
        "aleatoric",
        "epistemic_per_class",
        "aleatoric_per_class",
    )
    # Example 2: p̄ = (0.7, 0.3), deviations ±0.2, mean of p (1 - p) = (0.09 + 0.25) / 2.
    torch.testing.assert_close(parts.epistemic, f64(0.5, 0.0, 0.08))
    torch.testing.assert_close(parts.aleatoric, f64(0.0, 0.5, 0.34))
    epistemic = f64([0.25, 0.25], [0.0, 0.0], [0.04, 0.04])
    torch.testing.assert_close(parts.epistemic_per_class, epistemic)
    aleatoric = f64([0.0, 0.0], [0.25, 0.25], [0.17, 0.17])
    torch.testing.assert_close(parts.aleatoric_per_class, aleatoric)


def test_decompose_is_the_diagonal_of_the_matrices():
    p = random_probs(7, 20, 5)
    deviation = p - p.mean(0)
    epistemic = torch.einsum("tnc,tnd->ncd", deviation, deviation) / 7
    aleatoric = torch.diag_embed(p.mean(0)) - torch.einsum("tnc,tnd->ncd", p, p) / 7
    parts = metrics.decompose(p)
    torch.testing.assert_close(parts.epistemic_per_class, epistemic.diagonal(dim1=1, dim2=2))
    torch.testing.assert_close(parts.aleatoric_per_class, aleatoric.diagonal(dim1=1, dim2=2))
    trace = torch.einsum("ncc->n", epistemic)
    torch.testing.assert_close(parts.epistemic, trace)
    torch.testing.assert_close(parts.aleatoric, torch.einsum("ncc->n", aleatoric))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("draws", [1, 2, 3, 10])
def test_parts_add_up_to_the_total(dtype: torch.dtype, draws: int):
    p = random_probs(draws, 50, 6, seed=draws).to(dtype)
    mean = p.double().mean(0)
    parts = metrics.decompose(p)
    total = parts.epistemic_per_class + parts.aleatoric_per_class
    torch.testing.assert_close(total, mean - mean.square(), rtol=0, atol=1e-15)
    assert all(field.dtype == F64 and (field >= 0).all() for field in parts)
    information = metrics.mutual_information(p)
    assert (information >= 0).all()
    entropies = metrics.expected_entropy(p) + information
    torch.testing.assert_close(entropies, metrics.predictive_entropy(p), rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("draws", [1, 3, 7, 49])
def test_equal_draws_have_no_epistemic_uncertainty(dtype: torch.dtype, draws: int):
    # Exactly 0, although sum / T of equal numbers is not exactly that number.
    one = random_probs(1, 40, 9).to(dtype)
    for p in (one.expand(draws, 40, 9), one.repeat(draws, 1, 1), one.mT.repeat(draws, 1, 1).mT):
        assert metrics.mutual_information(p).eq(0).all()
        parts = metrics.decompose(p)
        assert parts.epistemic.eq(0).all() and parts.epistemic_per_class.eq(0).all()
        torch.testing.assert_close(metrics.expected_entropy(p), metrics.predictive_entropy(p))


def test_bounds_are_reached():
    uniform = torch.full((3, 1, 4), 0.25)
    assert metrics.predictive_entropy(uniform).item() == pytest.approx(math.log(4), rel=1e-15)
    certain = torch.eye(4).unsqueeze(1)  # each draw certain of another class
    assert metrics.mutual_information(certain).item() == pytest.approx(math.log(4), rel=1e-15)
    assert metrics.decompose(certain).epistemic.item() == pytest.approx(0.75, rel=1e-15)
    assert metrics.decompose(torch.ones(2, 3, 1)).aleatoric.eq(0).all()


def test_a_value_just_above_one_does_not_make_a_variance_negative():
    p = torch.tensor([[[1.0005, 0.0]], [[1.0, 0.0]]])
    assert all((field >= 0).all() for field in metrics.decompose(p))
    assert (metrics.predictive_entropy(p) >= 0).all()
    assert metrics.nll(p[0], torch.tensor([0])) == 0.0
    assert metrics.reliability(p[0], torch.tensor([0])).count[-1] == 1


def test_to_probs_by_hand():
    outputs = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])
    torch.testing.assert_close(metrics.to_probs(outputs), f64([0.25, 0.75], [0.5, 0.5]), rtol=1e-7, atol=0)
    # softplus(0) = ln 2 and softplus(ln 3) = ln 4 = 2 ln 2.
    torch.testing.assert_close(
        metrics.to_probs(outputs, "normalized"), f64([1 / 3, 2 / 3], [0.5, 0.5]), rtol=1e-7, atol=0
    )


@pytest.mark.parametrize("method", ["softmax", "normalized"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_to_probs_sums_to_one_however_large_the_outputs(method: str, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(3)
    outputs = torch.randn(4, 5, 6, generator=generator, dtype=F64)
    largest = torch.finfo(dtype).max
    for scale in (1.0, 100.0, 1e4, largest / 8):
        probs = metrics.to_probs((outputs * scale).to(dtype), method)
        assert probs.dtype == F64 and probs.shape == (4, 5, 6) and (probs >= 0).all()
        torch.testing.assert_close(probs.sum(-1), torch.ones(4, 5, dtype=F64))
    low = torch.tensor([-largest, -largest], dtype=dtype)
    assert metrics.to_probs(low, method).tolist() == [0.5, 0.5]


def test_normalized_is_softplus_over_its_sum():
    outputs = 8 * torch.randn(200, 7, generator=torch.Generator().manual_seed(5), dtype=F64)
    softplus = torch.log1p(outputs.exp())
    expected = softplus / softplus.sum(-1, keepdim=True)
    probs = metrics.to_probs(outputs, "normalized")
    torch.testing.assert_close(probs, expected, rtol=1e-13, atol=0)
    # Across the switch at -40: the ratio of the two softplus values is e^-1 up to e^-39.
    near = metrics.to_probs(f64(-39.5, -40.5), "normalized")
    assert (near[1] / near[0]).item() == pytest.approx(math.exp(-1), rel=1e-13)


@pytest.mark.parametrize("method", ["softmax", "normalized"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_uncertainty_is_decompose_of_to_probs(method: str, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(4)
    outputs = (3 * torch.randn(6, 30, 10, generator=generator)).to(dtype)
    direct = metrics.uncertainty(outputs, method)
    for a, b in zip(direct, metrics.decompose(metrics.to_probs(outputs, method)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("method", ["softmax", "normalized"])
def test_uncertainty_matches_the_formulas_of_pytorch_bayesiancnn(method: str):
    outputs = 2 * torch.randn(9, 10, generator=torch.Generator().manual_seed(6), dtype=F64)
    if method == "softmax":
        p = torch.softmax(outputs, 1)
    else:
        softplus = torch.nn.functional.softplus(outputs)
        p = softplus / softplus.sum(1, keepdim=True)
    deviation = p - p.mean(0)
    epistemic = torch.diag(deviation.T @ deviation / 9)
    aleatoric = torch.diag(torch.diag(p.mean(0)) - p.T @ p / 9)
    parts = metrics.uncertainty(outputs.unsqueeze(1), method)
    torch.testing.assert_close(parts.epistemic_per_class[0], epistemic)
    torch.testing.assert_close(parts.aleatoric_per_class[0], aleatoric)


# --- Out-of-distribution scores -------------------------------------------------------------------


def test_ood_scores_by_hand():
    scores_in = f64(1.0, 2.0, 3.0, 4.0)
    scores_out = f64(3.0, 5.0)
    # 3 beats two of the four and ties with one, 5 beats all four.
    assert metrics.auroc(scores_in, scores_out) == 6.5 / 8
    # Precision is 1/1 at the threshold 5, and 2/4 at 3 (where 3, 4 of the in set come along).
    assert metrics.aupr(scores_in, scores_out) == 0.75
    assert metrics.fpr_at_tpr(scores_in, scores_out) == 0.5
    assert metrics.fpr_at_tpr(scores_in, scores_out, tpr=0.5) == 0.0
    assert metrics.fpr_at_tpr(scores_in, scores_out, tpr=0.51) == 0.5
    report = metrics.ood_report(scores_in, scores_out)
    assert report == {"auroc": 6.5 / 8, "aupr": 0.75, "fpr95": 0.5}
    assert all(type(value) is float for value in report.values())


def test_separated_reversed_and_constant_scores():
    low, high = f64(0.0, 1.0), f64(2.0, 3.0, 4.0)
    assert metrics.ood_report(low, high) == {"auroc": 1.0, "aupr": 1.0, "fpr95": 0.0}
    reverse = metrics.ood_report(high, low)
    assert (reverse["auroc"], reverse["fpr95"]) == (0.0, 1.0)
    same = metrics.ood_report(torch.zeros(6), torch.zeros(2))
    assert same == {"auroc": 0.5, "aupr": 0.25, "fpr95": 1.0}


def test_true_positive_rate_that_floating_point_overshoots():
    # 0.07 * 100 > 7 in floating point; catching 7 of the 100 is nevertheless enough.
    scores_out = torch.arange(100.0)
    scores_in = torch.tensor([92.5, 93.5])
    assert metrics.fpr_at_tpr(scores_in, scores_out, tpr=0.07) == 0.5
    for n in range(1, 60):
        for k in range(1, n + 1):
            out = torch.arange(float(n))
            below = torch.tensor([n - k - 0.5])  # caught only by a threshold that catches k + 1
            assert metrics.fpr_at_tpr(below, out, tpr=k / n) == 0.0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("levels", [None, 40, 6, 2])
def test_ood_scores_against_scikit_learn(seed: int, levels: int | None):
    sk = pytest.importorskip("sklearn.metrics")
    scores_in, scores_out = random_scores(seed, levels)
    truth = torch.cat([torch.zeros(len(scores_in)), torch.ones(len(scores_out))]).numpy()
    scores = torch.cat([scores_in, scores_out]).numpy()
    assert metrics.auroc(scores_in, scores_out) == pytest.approx(sk.roc_auc_score(truth, scores))
    expected = sk.average_precision_score(truth, scores)
    assert metrics.aupr(scores_in, scores_out) == pytest.approx(expected)
    fpr, tpr, _ = sk.roc_curve(truth, scores, drop_intermediate=False)
    for level in (0.05, 0.5, 0.8, 0.95, 1.0):
        best = fpr[tpr >= level].min()
        assert metrics.fpr_at_tpr(scores_in, scores_out, level) == pytest.approx(best, abs=1e-15)


@pytest.mark.parametrize("levels", [None, 40, 6, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_auroc_properties(levels: int | None, dtype: torch.dtype):
    a, b = (scores.to(dtype) for scores in random_scores(11, levels))
    value = metrics.auroc(a, b)
    assert metrics.auroc(b, a) == pytest.approx(1 - value, abs=1e-15)
    assert metrics.auroc(-b, -a) == value
    assert metrics.auroc(a.double().exp(), b.double().exp()) == value  # depends on the order only
    wins = (b[:, None] > a).double() + 0.5 * (b[:, None] == a).double()
    assert value == pytest.approx(wins.mean().item(), rel=1e-13)


def test_scores_of_two_dtypes_compare_by_value():
    # Rounded to float16, the two would be tied.
    a = torch.tensor([1.0], dtype=torch.float16)
    b = torch.tensor([1.0 + 2.0**-20])
    assert metrics.auroc(a, b) == 1.0


# --- All of them ----------------------------------------------------------------------------------


def test_no_gradient_no_change_to_the_input_and_same_bits_again():
    p = random_probs(3, 8, 4).requires_grad_()
    before = p.detach().clone()
    labels = random_labels(before[0])
    results = [metrics.mutual_information(p), *metrics.decompose(p), metrics.to_probs(p)]
    assert not any(result.requires_grad for result in results)
    report = metrics.classification_report(p[0], labels)
    assert report == metrics.classification_report(p[0], labels)
    assert metrics.mutual_information(p).equal(results[0])
    assert p.detach().equal(before)


@pytest.mark.filterwarnings("error")
def test_memory_layout_does_not_matter():
    def strided(x: Tensor) -> Tensor:
        return torch.stack([x, x], -1)[..., 0]

    p = random_probs(3, 40, 4)
    labels = random_labels(p[0])
    expected = metrics.classification_report(p[0], labels)
    assert metrics.classification_report(strided(p[0]), strided(labels)) == expected
    draws_inside = p.transpose(0, 1).contiguous().transpose(0, 1)
    for layout in (strided(p), p.mT.contiguous().mT, draws_inside):
        for a, b in zip(metrics.decompose(layout), metrics.decompose(p), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-16)
        information = metrics.mutual_information(p)
        torch.testing.assert_close(metrics.mutual_information(layout), information)
    a, b = random_scores(0, 6)
    assert metrics.ood_report(strided(a), strided(b)) == metrics.ood_report(a, b)


def test_numpy_scalars_are_numbers():
    numpy = pytest.importorskip("numpy")
    a, b = random_scores(0, 6)
    assert metrics.ece(PROBS, LABELS, numpy.int64(2)) == metrics.ece(PROBS, LABELS, 2)
    assert metrics.fpr_at_tpr(a, b, numpy.float32(0.5)) == metrics.fpr_at_tpr(a, b, 0.5)


def test_one_example_one_draw_one_class():
    one = torch.ones(1, 1)
    label = torch.zeros(1, dtype=torch.int64)
    report = metrics.classification_report(one, label)
    assert report == {"accuracy": 1.0, "nll": 0.0, "brier": 0.0, "ece": 0.0}
    assert metrics.predictive_entropy(one[None]).tolist() == [0.0]
    assert metrics.ood_report(torch.ones(1), torch.ones(1))["auroc"] == 0.5


def test_default_device_and_dtype_do_not_matter():
    old = torch.get_default_dtype()
    expected = metrics.classification_report(PROBS, LABELS)
    try:
        torch.set_default_dtype(torch.float16)
        with torch.device("meta"):
            assert metrics.classification_report(PROBS, LABELS) == expected
            assert metrics.decompose(DRAWS).epistemic.device.type == "cpu"
            assert metrics.reliability(PROBS, LABELS).edges.device.type == "cpu"
            assert metrics.to_probs(DRAWS, "normalized").device.type == "cpu"
    finally:
        torch.set_default_dtype(old)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_agrees_with_the_cpu():
    probs = random_probs(3, 200, 5)
    labels = random_labels(probs[0])
    on_gpu = metrics.classification_report(probs[0].cuda(), labels.cuda())
    assert on_gpu == pytest.approx(metrics.classification_report(probs[0], labels), rel=1e-12)
    for a, b in zip(metrics.decompose(probs.cuda()), metrics.decompose(probs), strict=True):
        assert a.is_cuda
        torch.testing.assert_close(a.cpu(), b, rtol=1e-12, atol=1e-15)
    assert metrics.reliability(probs[0].cuda(), labels.cuda()).count.is_cuda
    a, b = random_scores(0, 6)
    assert metrics.ood_report(a.cuda(), b.cuda()) == pytest.approx(metrics.ood_report(a, b))
    with pytest.raises(ValueError, match="device of probs"):
        metrics.nll(probs[0].cuda(), labels)
    with pytest.raises(ValueError, match="device of scores_in"):
        metrics.auroc(a.cuda(), b)


# --- Errors ---------------------------------------------------------------------------------------

WITH_LABELS = [
    metrics.accuracy,
    metrics.nll,
    metrics.brier,
    metrics.ece,
    metrics.adaptive_ece,
    metrics.classwise_ece,
    metrics.mce,
    metrics.reliability,
    metrics.classification_report,
    metrics.risk_coverage,
    metrics.aurc,
    metrics.excess_aurc,
]
BINNED = [metrics.ece, metrics.adaptive_ece, metrics.classwise_ece, metrics.mce, metrics.reliability]
WITH_DRAWS = [
    metrics.predictive_entropy,
    metrics.expected_entropy,
    metrics.mutual_information,
    metrics.decompose,
]
WITH_SCORES = [metrics.auroc, metrics.aupr, metrics.fpr_at_tpr, metrics.ood_report]


def changed(probs: Tensor, at: tuple[int, ...], value: float) -> Tensor:
    probs = probs.clone()
    probs[at] = value
    return probs


BAD_PROBS = [
    (PROBS[0], r"probs must have shape \[N, C\], got \[3\]"),
    (PROBS[None], r"probs must have shape \[N, C\], got \[1, 4, 3\]"),
    (torch.tensor(1.0), r"probs must have shape \[N, C\], got \[\]"),
    (PROBS.long(), r"probs must have one of the dtypes .*float32.*, got torch.int64"),
    (PROBS.to(torch.complex64), r"dtypes .*, got torch.complex64"),
    (PROBS[:0], r"probs is empty \(shape \[0, 3\]\)"),
    (PROBS[:, :0], r"probs is empty \(shape \[4, 0\]\)"),
    (changed(PROBS, (1, 2), math.nan), r"probs\[1, 2\] is nan; every value must be finite"),
    (changed(PROBS, (3, 0), math.inf), r"probs\[3, 0\] is inf; every value must be finite"),
    (changed(PROBS, (2, 1), -0.25), r"probs\[2, 1\] is -0.25; a probability must not be negative"),
    (
        changed(changed(PROBS, (0, 0), 0.69), (2, 0), 0.6),
        r"probs\[2\] sums to 1.1 \(the worst row\); every row must sum to 1 within 0.001",
    ),
    (PROBS.bfloat16() * 1.02, r"every row must sum to 1 within 0.00781"),
]
BAD_LABELS: list[tuple[Tensor, str]] = [
    (LABELS[:3], r"labels must have shape \[4\] to match probs \[4, 3\], got \[3\]"),
    (LABELS[:, None], r"labels must have shape \[4\].*got \[4, 1\]"),
    (LABELS.int(), r"labels must have dtype torch.int64, got torch.int32"),
    (LABELS.float(), r"labels must have dtype torch.int64, got torch.float32"),
    (torch.tensor([0, 1, 3, 1]), r"labels\[2\] is 3; allowed: 0 to 2"),
    (torch.tensor([0, -1, 2, 1]), r"labels\[1\] is -1; allowed: 0 to 2"),
    (LABELS.to("meta"), r"labels must be on the device of probs \(cpu\), got meta"),
]
BAD_DRAWS = [
    (DRAWS[0], r"sample_probs must have shape \[T, N, C\], got \[3, 2\]"),
    (DRAWS.long(), r"sample_probs must have one of the dtypes"),
    (DRAWS[:0], r"sample_probs is empty \(shape \[0, 3, 2\]\)"),
    (changed(DRAWS, (1, 0, 1), math.nan), r"sample_probs\[1, 0, 1\] is nan"),
    (changed(DRAWS, (0, 2, 0), -0.5), r"sample_probs\[0, 2, 0\] is -0.5"),
    (changed(DRAWS, (1, 2, 0), 0.4), r"sample_probs\[1, 2\] sums to 0.9 \(the worst row\)"),
]
BAD_SCORES = [
    (torch.ones(2, 2), r"must have shape \[N_{0}\], got \[2, 2\]"),
    (torch.ones(2, dtype=torch.int64), r"scores_{0} must have one of the dtypes"),
    (torch.ones(0), r"scores_{0} is empty \(shape \[0\]\)"),
    (torch.tensor([1.0, math.nan]), r"scores_{0}\[1\] is nan; every value must be finite"),
    (torch.tensor([-math.inf, 1.0]), r"scores_{0}\[0\] is -inf; every value must be finite"),
]


@pytest.mark.parametrize("function", WITH_LABELS)
def test_bad_probs_and_labels(function: Callable[..., object]):
    for probs, message in BAD_PROBS:
        with pytest.raises(ValueError, match=message):
            function(probs, LABELS)
    for labels, message in BAD_LABELS:
        with pytest.raises(ValueError, match=message):
            function(PROBS, labels)
    with pytest.raises(TypeError, match=r"probs must be a torch.Tensor .*\[N, C\], got list"):
        function(PROBS.tolist(), LABELS)
    with pytest.raises(TypeError, match=r"labels must be a torch.Tensor .*\[N\], got list"):
        function(PROBS, LABELS.tolist())


@pytest.mark.parametrize("function", WITH_DRAWS)
def test_bad_sample_probs(function: Callable[..., object]):
    for draws, message in BAD_DRAWS:
        with pytest.raises(ValueError, match=message):
            function(draws)
    with pytest.raises(TypeError, match=r"sample_probs must be a torch.Tensor.*got ndarray"):
        function(DRAWS.numpy())


@pytest.mark.parametrize("function", WITH_SCORES)
def test_bad_scores(function: Callable[..., object]):
    good = torch.ones(3)
    for scores, message in BAD_SCORES:
        with pytest.raises(ValueError, match=message.replace("{0}", "in")):
            function(scores, good)
        with pytest.raises(ValueError, match=message.replace("{0}", "out")):
            function(good, scores)
    with pytest.raises(ValueError, match=r"scores_out must be on the device of scores_in \(cpu\)"):
        function(good, good.to("meta"))
    with pytest.raises(TypeError, match=r"scores_in must be a torch.Tensor .*got float"):
        function(1.0, good)
    with pytest.raises(TypeError, match=r"scores_out must be a torch.Tensor .*got NoneType"):
        function(good, None)


@pytest.mark.parametrize("bins", [0, -3, 2.5, "15", None, True])
def test_bad_bins(bins: object):
    for function in BINNED:
        with pytest.raises(ValueError, match=r"bins must be an integer of at least 1, got"):
            function(PROBS, LABELS, bins)  # type: ignore[operator]


@pytest.mark.parametrize("tpr", [0.0, -0.1, 1.01, 95, math.nan, "0.95", None])
def test_bad_tpr(tpr: object):
    with pytest.raises(ValueError, match=r"tpr must be a number in \(0, 1\], got"):
        metrics.fpr_at_tpr(torch.ones(2), torch.ones(2), tpr)  # type: ignore[arg-type]


@pytest.mark.parametrize("function", [metrics.to_probs, metrics.uncertainty])
def test_bad_outputs(function: Callable[..., object]):
    for method in ("sigmoid", "", None, 3):
        with pytest.raises(ValueError, match=r"method must be one of 'softmax', 'normalized', got"):
            function(DRAWS, method)
    with pytest.raises(TypeError, match="outputs must be a torch.Tensor"):
        function(DRAWS.tolist())
    for value, message in [
        (changed(DRAWS, (0, 1, 1), math.inf), r"outputs\[0, 1, 1\] is inf"),
        (changed(DRAWS, (1, 1, 0), math.nan), r"outputs\[1, 1, 0\] is nan"),
        (DRAWS[:, :0], r"outputs is empty \(shape \[2, 0, 2\]\)"),
        (DRAWS.long(), r"outputs must have one of the dtypes"),
        (torch.tensor(1.0), r"outputs must have shape \[.*C\], got \[\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            function(value)
    with pytest.raises(ValueError, match=r"outputs must have shape \[T, N, C\], got \[3, 2\]"):
        metrics.uncertainty(DRAWS[0])
