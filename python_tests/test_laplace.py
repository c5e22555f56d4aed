"""Last-layer Laplace: the draws against their covariance; the fit against laplace-torch, if it is there."""

from __future__ import annotations

import copy
import io
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bbb_fast import fixed_noise, posterior_means, predict
from bbb_fast.layers import BBB_LRT_Linear
from bbb_fast.methods import LaplaceLinear, last_layer_laplace

OUT, IN = 3, 4


def orthogonal(n: int) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n)).Q


def layer(bias: bool = True) -> LaplaceLinear:
    torch.manual_seed(0)
    own = (orthogonal(OUT), torch.rand(OUT) + 0.1) if bias else ()
    scale = torch.rand(OUT, IN) + 0.1
    return LaplaceLinear(nn.Linear(IN, OUT, bias=bias), (orthogonal(OUT), orthogonal(IN)), scale, *own)


def covariance_of(model: LaplaceLinear) -> Tensor:
    """Of the flattened weight and the bias, formed from the Kronecker product of the eigenvectors."""
    vectors = torch.kron(model.out_vectors, model.in_vectors)
    weight = vectors @ torch.diag(model.weight_scale.flatten() ** 2) @ vectors.T
    if model.bias_vectors is None or model.bias_scale is None:
        return weight
    bias = model.bias_vectors @ torch.diag(model.bias_scale**2) @ model.bias_vectors.T
    return torch.block_diag(weight, bias)


def weights(model: LaplaceLinear) -> Tensor:
    """The flattened weight and the bias of one draw, read off the outputs."""
    out = model(torch.cat([torch.zeros(1, IN), torch.eye(IN)]))
    weight = (out[1:] - out[:1]).T.flatten()
    return weight if model.bias is None else torch.cat([weight, out[0]])


@pytest.mark.parametrize("bias", [True, False])
def test_draws_have_the_covariance(bias: bool, backend: str) -> None:
    model = layer(bias)
    drawn = []
    for k in range(4000):
        with fixed_noise(3, sample=k):
            drawn.append(weights(model))
    found, expected = torch.cov(torch.stack(drawn).T), covariance_of(model)
    # A covariance of n draws is off by sqrt((s_ij^2 + s_ii s_jj) / n).
    diagonal = expected.diagonal()
    error = ((expected**2 + torch.outer(diagonal, diagonal)) / len(drawn)).sqrt()
    assert ((found - expected).abs() / error).max() < 5
    with posterior_means():
        means = weights(model)
    assert ((torch.stack(drawn).mean(0) - means).abs() / (diagonal / len(drawn)).sqrt()).max() < 5


def test_one_draw_is_one_function(backend: str) -> None:
    model, x = layer().train(), torch.randn(7, IN)
    with fixed_noise(1):
        whole = model(x)
        parts = torch.cat([model(x[:3]), model(x[3:])])
        torch.testing.assert_close(whole, parts)
        assert not torch.equal(model(x), model(x, sample=False))
    assert not torch.equal(model(x), model(x))
    plain = torch.nn.functional.linear(x, model.weight, model.bias)
    assert torch.equal(model(x, sample=False), plain)
    with posterior_means():
        assert torch.equal(model(x), plain)
    torch.testing.assert_close(predict(model, x, samples=3, seed=1)[0], whole)


def test_is_kept_by_state_dict_and_copies() -> None:
    model, other = layer(), layer()
    for buffer in other.buffers():
        buffer.zero_()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    assert not list(model.parameters())
    x = torch.randn(2, IN)
    for twin in (other, copy.deepcopy(model)):
        with fixed_noise(1):
            expected = model(x)
        with fixed_noise(1):
            assert torch.equal(twin(x), expected)
    double = copy.deepcopy(model).double()
    with fixed_noise(1):
        assert double(x.double()).dtype == torch.float64
    assert "in_features=4, out_features=3, bias=True" in repr(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": nn.ReLU()}, "must be a torch.nn.Linear, got ReLU"),
        ({"weight_vectors": (torch.eye(IN), torch.eye(IN))}, r"U must be \[3, 3\], got \[4, 4\]"),
        ({"weight_vectors": (torch.eye(OUT), torch.eye(OUT))}, r"V must be \[4, 4\], got \[3, 3\]"),
        ({"weight_scale": torch.ones(IN, OUT)}, r"weight_scale must be \[3, 4\], got \[4, 3\]"),
        ({"weight_scale": -torch.ones(OUT, IN)}, "weight_scale must be finite and >= 0"),
        ({"bias_scale": torch.full((OUT,), torch.nan)}, "bias_scale must be finite and >= 0"),
        ({"bias_scale": None}, "needs bias_vectors and bias_scale"),
        ({"layer": nn.Linear(IN, OUT, bias=False)}, "has no bias"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "layer": nn.Linear(IN, OUT), "weight_vectors": (torch.eye(OUT), torch.eye(IN)),
        "weight_scale": torch.ones(OUT, IN), "bias_vectors": torch.eye(OUT), "bias_scale": torch.ones(OUT),
    }  # fmt: skip
    LaplaceLinear(**arguments)
    with pytest.raises((TypeError, ValueError), match=message):
        LaplaceLinear(**{**arguments, **change})


def test_says_which_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "laplace", None)
    with pytest.raises(ImportError, match="pip install laplace-torch"):
        last_layer_laplace(nn.Linear(2, 2), [])


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, DataLoader[Any]]:
    pytest.importorskip("laplace")
    torch.manual_seed(0)
    x = torch.randn(300, 5)
    y = (x[:, 0] + x[:, 1] * x[:, 2] > 0).long() + (x[:, 3] > 1).long()
    model = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, DataLoader(TensorDataset(x, y), batch_size=64)


class TestFit:
    def test_has_the_posterior_of_laplace_torch(self, trained: tuple[nn.Module, DataLoader[Any]]) -> None:
        from laplace import Laplace

        model, data = trained
        before = copy.deepcopy(model.state_dict())
        ours: Any = last_layer_laplace(model, data)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert all(parameter.requires_grad for parameter in model.parameters())
        theirs = Laplace(
            model, "classification", subset_of_weights="last_layer", hessian_structure="kron"
        )  # fmt: skip
        theirs.fit(data)
        theirs.optimize_prior_precision(method="marglik")
        expected = theirs.posterior_precision.to_matrix(exponent=-1)
        torch.testing.assert_close(covariance_of(ours[2]), expected, rtol=1e-3, atol=1e-4)
        x = 3 * torch.randn(40, 5)
        probs = predict(ours, x, samples=4000).softmax(-1).mean(0)
        torch.testing.assert_close(
            probs, theirs(x, pred_type="nn", link_approx="mc", n_samples=4000), rtol=0, atol=0.03
        )
        with posterior_means():
            torch.testing.assert_close(ours(x), model(x))

    def test_wrong_models(self, trained: tuple[nn.Module, DataLoader[Any]]) -> None:
        model, data = trained
        cases: tuple[tuple[Any, dict[str, Any], str], ...] = (
            ("net", {}, "must be a torch.nn.Module, got str"),
            (nn.ReLU(), {}, "has no torch.nn.Linear"),
            (nn.Sequential(BBB_LRT_Linear(5, 3)), {}, "must not answer at random already"),
            (model, {"layer": "1"}, "must be one of 0, 2, got '1'"),
        )
        for wrong, options, message in cases:
            with pytest.raises((TypeError, ValueError), match=message):
                last_layer_laplace(wrong, data, **options)
