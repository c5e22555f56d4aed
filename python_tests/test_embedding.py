"""BBBEmbedding and BBBEmbeddingBag: rows of one draw of the table, and only those that are looked up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import rng, unrelated
from torch import Tensor, nn

from bbb_fast import fixed_noise, functional, kl_loss, predict, reference
from bbb_fast.layers import BBB

INDEX = torch.tensor([[1, 2, 3, 1], [3, 10, 1, 0]])


def table(layer: Any, seed: int = 3) -> Tensor:
    """The whole table of the draw that fixed_noise(seed) names."""
    w: Any = functional.sample_weight(layer.W_mu, layer.W_rho, torch.tensor([seed, 0]))
    if layer.padding_idx is not None:
        w = torch.cat(
            (w[: layer.padding_idx], layer.W_mu[layer.padding_idx, None], w[layer.padding_idx + 1 :])
        )
    return w


def layer_of(kind: str = "BBBEmbedding", width: int = 6, **options: Any) -> Any:
    layer = getattr(BBB, kind)(11, width, **options)
    with torch.no_grad():
        layer.W_rho.add_(1.5)
    return layer


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 6, 7, 8, 16, 33])
def test_noise_of_rows(width: int) -> None:
    whole = reference.normal((50, width), rng())
    index = torch.tensor([[0, 49, 7], [7, 13, 1]])
    assert torch.equal(reference.normal_rows(index, width, rng()), whole[index])
    assert reference.normal_rows(index[:0], width, rng()).shape == (0, 3, width)
    far = torch.tensor([3_000_000_000])
    assert reference.normal_rows(far, width, rng()).isfinite().all()


@pytest.mark.parametrize("padding_idx", [None, 3, -1, 0])
@pytest.mark.parametrize("width", [6, 8])
def test_rows_of_one_draw(backend: str, width: int, padding_idx: int | None) -> None:
    """Forward and gradients: those of torch's lookup in a table drawn as a whole."""
    layer = layer_of(width=width, padding_idx=padding_idx)
    with fixed_noise(3):
        y = layer(INDEX)
    expected = F.embedding(INDEX, table(layer), padding_idx=layer.padding_idx)
    torch.testing.assert_close(y, expected)
    g, leaves = torch.randn_like(y), (layer.W_mu, layer.W_rho)
    for a, b in zip(torch.autograd.grad(y, leaves, g), torch.autograd.grad(expected, leaves, g), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        if layer.padding_idx is not None:
            assert not a[layer.padding_idx].any()
    torch.testing.assert_close(y[0, [3]], y[0, [0]])
    torch.testing.assert_close(y[1, [2]], y[0, [0]])


def test_a_row_is_the_same_in_any_batch(backend: str) -> None:
    layer = layer_of()
    model = nn.Sequential(layer, nn.Flatten(), BBB.BBBLinear(24, 2))
    y = predict(model, INDEX.repeat(3, 1), 4, seed=1)
    torch.testing.assert_close(predict(model, INDEX.repeat(3, 1), 4, seed=1, batch_size=1), y)
    assert unrelated(layer(INDEX), layer(INDEX)) and unrelated(layer.eval()(INDEX), layer(INDEX))


def test_means(backend: str) -> None:
    layer, point = layer_of(padding_idx=2), nn.Embedding(11, 6, padding_idx=2)
    point.load_state_dict({"weight": layer.W_mu})
    assert torch.equal(layer(INDEX, sample=False), point(INDEX))
    assert not layer.W_mu[2].any()


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding_idx", [None, 3])
def test_bags(backend: str, mode: str, padding_idx: int | None) -> None:
    layer = layer_of("BBBEmbeddingBag", mode=mode, padding_idx=padding_idx)
    offsets = torch.tensor([0, 3, 3])
    for arguments in ((INDEX, None), (INDEX.flatten(), offsets)):
        with fixed_noise(3):
            y = layer(*arguments)
        expected = F.embedding_bag(
            arguments[0], table(layer), arguments[1], mode=mode, padding_idx=padding_idx
        )
        torch.testing.assert_close(y, expected)
        g, leaves = torch.randn_like(y), (layer.W_mu, layer.W_rho)
        both = torch.autograd.grad(y, leaves, g), torch.autograd.grad(expected, leaves, g)
        for a, b in zip(*both, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        means = F.embedding_bag(arguments[0], layer.W_mu, arguments[1], mode=mode, padding_idx=padding_idx)
        assert torch.equal(layer(*arguments, sample=False), means)
    if mode == "sum":
        weights = torch.rand(INDEX.shape)
        with fixed_noise(3):
            y = layer(INDEX, per_sample_weights=weights)
        expected = F.embedding_bag(
            INDEX, table(layer), mode=mode, per_sample_weights=weights, padding_idx=padding_idx
        )
        torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("padding_idx", [None, 0, 5, 10])
def test_kl_leaves_the_padding_out(backend: str, padding_idx: int | None) -> None:
    priors = {"prior_mu": 0.3, "prior_sigma": 0.5}
    layer = layer_of(padding_idx=padding_idx, priors=priors)
    rows = [k for k in range(11) if k != padding_idx]
    expected = functional.kl_divergence(layer.W_mu[rows], layer.W_rho[rows], 0.3, 0.5)
    for kl in (layer.kl_loss(), kl_loss(nn.Sequential(layer, nn.ReLU()))):
        torch.testing.assert_close(kl, expected)
        for g, part in zip(
            torch.autograd.grad(kl, (layer.W_mu, layer.W_rho)),
            torch.autograd.grad(expected, (layer.W_mu, layer.W_rho), retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(g, part, rtol=1e-5, atol=1e-7)
            assert padding_idx is None or not g[padding_idx].any()


def test_tied_to_the_output(backend: str) -> None:
    """A table that is also the output's weight counts once in the KL."""
    embedding, out = layer_of(), BBB.BBBLinear(6, 11, bias=False)
    out.W_mu, out.W_rho = embedding.W_mu, embedding.W_rho
    model = nn.Sequential(embedding, out)
    torch.testing.assert_close(kl_loss(model), embedding.kl_loss())
    torch.testing.assert_close(kl_loss(nn.Sequential(out, embedding)), embedding.kl_loss())
    assert len(list(model.parameters())) == 2


def test_sparse_gradients(backend: str) -> None:
    layer = layer_of(sparse=True)
    layer(INDEX).sum().backward()
    assert layer.W_mu.grad.is_sparse and layer.W_rho.grad.is_sparse
    torch.optim.SparseAdam([layer.W_mu, layer.W_rho]).step()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(backend: str, dtype: torch.dtype) -> None:
    layer = layer_of(dtype=dtype)
    with fixed_noise(3):
        y = layer(INDEX)
    assert y.dtype == dtype
    torch.testing.assert_close(y, table(layer)[INDEX])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 3), "num_embeddings must be an int >= 1, got 0"),
        ((3, 2.5), "embedding_dim must be an int >= 1, got 2.5"),
        ((3, 2, 3), "padding_idx must be within num_embeddings = 3, got 3"),
        ((3, 2, -4), "padding_idx must be within num_embeddings = 3, got -4"),
    ],
)
def test_wrong_arguments(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"BBBEmbedding: {message}"):
        BBB.BBBEmbedding(*arguments)
    with pytest.raises(ValueError, match="mode must be 'mean', 'sum' or 'max', got 'min'"):
        BBB.BBBEmbeddingBag(3, 2, mode="min")


def test_repr() -> None:
    assert repr(BBB.BBBEmbedding(11, 6, 2)) == "BBBEmbedding(11, 6, padding_idx=2, estimator='bbb')"


def test_frequencies_of_a_bag(backend: str) -> None:
    """A row's gradient is divided by how often it was looked up, as torch.nn.Embedding's is."""
    index = torch.tensor([[1, 1, 1, 2]])
    layer = layer_of("BBBEmbeddingBag", mode="sum", scale_grad_by_freq=True)
    point = nn.Embedding(11, 6, scale_grad_by_freq=True)
    with fixed_noise(3):
        layer(index).sum().backward()
    point(index).sum().backward()
    torch.testing.assert_close(layer.W_mu.grad, point.weight.grad)


def test_one_empirical_sigma_around_the_padding(backend: str) -> None:
    layer = layer_of(padding_idx=4, priors={"prior_sigma": "empirical"})
    rows = [k for k in range(11) if k != 4]
    whole = layer_of(priors={"prior_sigma": "empirical"})
    whole.W_mu, whole.W_rho = (
        nn.Parameter(layer.W_mu[rows].detach()),
        nn.Parameter(layer.W_rho[rows].detach()),
    )
    torch.testing.assert_close(layer.kl_loss(), whole.kl_loss())


@pytest.mark.parametrize("embedding_first", [False, True])
def test_a_padded_table_tied_to_the_output(backend: str, embedding_first: bool) -> None:
    """The output's layer draws all rows: all have a part in the KL, in either order."""
    embedding, out = layer_of(padding_idx=2), BBB.BBBLinear(6, 11, bias=False)
    out.W_mu, out.W_rho = embedding.W_mu, embedding.W_rho
    model = nn.Sequential(embedding, out) if embedding_first else nn.Sequential(out, embedding)
    torch.testing.assert_close(kl_loss(model), out.kl_loss())
