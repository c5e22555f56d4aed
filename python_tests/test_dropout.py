"""Dropout's mask and the uniform noise, and the layers that drop: MC dropout and concrete dropout."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, DTYPES, rng
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bbb_fast import (
    ELBO,
    convert,
    fixed_noise,
    kl_loss,
    multi_sample,
    posterior_means,
    predict,
    reference,
    summary,
)
from bbb_fast.functional import dropout, uniform
from bbb_fast.layers import BBB, BBB_LRT, ConcreteDropout, MCDropout, MCDropout1d, MCDropout2d, MCDropout3d
from bbb_fast.reference import philox4x32


def words(count: int, r: Tensor) -> Tensor:
    """Element i takes output i % 4 of block i // 4: written without the package's own numbering."""
    seed, stream = r.tolist()
    low = (1 << 32) - 1
    counter = [
        torch.arange(count // 4 + 1),
        *(torch.tensor(n) for n in (0, stream & low, stream >> 32 & low)),
    ]
    outputs = philox4x32(counter, [torch.tensor(seed & low), torch.tensor(seed >> 32 & low)])
    return torch.stack([outputs[i % 4][i // 4] for i in range(count)] or [torch.tensor(0)])[:count]


def in_formats(x: Tensor) -> list[Tensor]:
    """The same numbers in several memory formats."""
    found = [x, x.transpose(0, -1).contiguous().transpose(0, -1), torch.stack((x, -x), -1)[..., 0]]
    if x.dim() in (4, 5):
        found.append(x.contiguous(memory_format={4: torch.channels_last, 5: torch.channels_last_3d}[x.dim()]))
    return found


# Of rng(), computed once and kept.
GOLDEN_UNIFORM = ["0x1.f284eap-1", "0x1.6f4236p-1", "0x1.164f42p-1", "0x1.7b2b5ap-1", "0x1.7173dcp-2"]
GOLDEN_MASK = "111100000101100011000011"


def independent(a: Tensor, b: Tensor) -> bool:
    """Whether two outputs of ones, half of them dropped, agree in half of their elements: by 5 deviations."""
    return abs(float(((a == 0) == (b == 0)).double().mean()) - 0.5) < 2.5 / math.sqrt(a.numel())


SHAPES = [(6,), (5, 7), (3, 4, 5), (2, 3, 4, 5), (2, 3, 2, 3, 4), (0, 3), (3, 0, 2), (1, 1)]


# ---------------------------------------------------------------- the functions


def test_golden_values(backend: str) -> None:
    """Pinned for every later release."""
    u = uniform(5, rng())
    assert u.tolist() == [float.fromhex(h) for h in GOLDEN_UNIFORM]
    kept = dropout(torch.ones(24), rng(), 0.5) != 0
    assert "".join("01"[int(k)] for k in kept) == GOLDEN_MASK


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.93, 1.0])
def test_every_element_takes_its_word(backend: str, dtype: torch.dtype, p: float) -> None:
    x = torch.randn(37).to(dtype)
    kept = words(37, rng()) >= round(p * 2**32)
    factor = 1 / (1 - p) if p < 1 else 0.0
    wide = x.to(torch.promote_types(dtype, torch.float32))
    assert torch.equal(dropout(x, rng(), p), (wide * (kept.to(wide.dtype) * factor)).to(dtype))
    if p in (0.0, 1.0):
        assert bool(kept.all()) == (p == 0.0) and bool((~kept).all()) == (p == 1.0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("one_mask", [False, True])
@pytest.mark.parametrize("channels", [False, True])
def test_which_elements_share_a_word(
    backend: str, shape: tuple[int, ...], channels: bool, one_mask: bool
) -> None:
    if channels and len(shape) < 2:
        return
    drawn = shape[:2] if channels else shape
    if one_mask and len(drawn) > 1:
        drawn = (1, *drawn[1:])
    mask = (words(math.prod(drawn), rng()) >= round(0.4 * 2**32)).reshape(drawn)
    if channels:
        mask = mask.reshape(*drawn, *(1 for _ in shape[2:]))
    for x in in_formats(torch.randn(shape)):
        x.requires_grad_()
        y = dropout(x, rng(), 0.4, channels=channels, one_mask=one_mask)
        torch.testing.assert_close(y, x * mask / 0.6)
        if x.numel() > 1 and torch.empty_like(x).stride() == x.stride():
            assert y.stride() == x.stride()
        g = torch.randn(shape)
        for grad in in_formats(g):
            (found,) = torch.autograd.grad(y, x, grad, retain_graph=True)
            torch.testing.assert_close(found, g * mask / 0.6)


def test_one_mask_is_the_first_rows(backend: str) -> None:
    """Of a batch of one row, and of any part of the batch."""
    x = torch.randn(5, 3, 4)
    for channels in (False, True):
        y = dropout(x, rng(), channels=channels, one_mask=True)
        assert torch.equal(dropout(x[:1], rng(), channels=channels), y[:1])
        parts = [dropout(part, rng(), channels=channels, one_mask=True) for part in x.split(2)]
        assert torch.equal(torch.cat(parts), y)
        assert not torch.equal(dropout(x, rng(), channels=channels), y)


def test_masks_of_smaller_rates_hold_those_of_larger(backend: str) -> None:
    x = torch.ones(10_000)
    before = torch.ones(10_000, dtype=torch.bool)
    for p in (0.1, 0.5, 0.9):
        kept = dropout(x, rng(), p) != 0
        assert not bool((kept & ~before).any())
        # Five standard deviations.
        assert abs(float(kept.double().mean()) - (1 - p)) < 5 * math.sqrt(p * (1 - p) / 10_000)
        before = kept


def test_rngs_are_unrelated(backend: str) -> None:
    x = torch.ones(10_000)
    masks = [dropout(x, rng(seed, stream)) for seed, stream in ((1, 0), (2, 0), (1, 1), (1 << 40, 0))]
    assert all(independent(a, b) for k, a in enumerate(masks) for b in masks[:k])


def test_nothing_is_hidden(backend: str) -> None:
    """What is not finite stays seen, where it is dropped too."""
    x = torch.tensor([math.nan, math.inf, -math.inf] * 8)
    y = dropout(x, rng())
    kept = words(24, rng()) >= 1 << 31
    assert torch.equal(y.isnan(), x.isnan() | ~kept)


def test_derivatives(backend: str) -> None:
    for options in ({}, {"channels": True}, {"one_mask": True}):
        x = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
        run = lambda x, o=options: dropout(x, rng(), 0.3, **o) * x  # noqa: E731
        assert torch.autograd.gradcheck(run, x) and torch.autograd.gradgradcheck(run, x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_uniform(backend: str, dtype: torch.dtype) -> None:
    bits = {torch.float16: 10, torch.bfloat16: 7}.get(dtype, 23)
    u = uniform((5, 9), rng(), dtype=dtype)
    exact = ((words(45, rng()) >> (32 - bits)).double() + 0.5) / 2**bits
    assert u.dtype == dtype and torch.equal(u.double(), exact.reshape(5, 9))
    assert torch.equal((1 - u).double(), 1 - u.double())
    u = uniform(40_000, rng(), dtype=dtype)
    assert float(u.min()) > 0 and float(u.max()) < 1
    histogram = torch.histc(u.float().cpu(), 16, 0, 1)
    # Pearson's statistic of 15 degrees of freedom: below 50 but once in 10^5.
    assert float(((histogram - 2500) ** 2 / 2500).sum()) < 50
    assert uniform((), rng(), dtype=dtype).shape == () and uniform((3, 0), rng()).shape == (3, 0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: dropout(torch.ones(3), rng(), 1.5), ValueError, r"dropout: p must be in \[0, 1\], got 1.5"),
        (lambda: dropout(torch.ones(3), rng(), -0.1), ValueError, r"p must be in \[0, 1\], got -0.1"),
        (lambda: dropout(torch.ones(3), rng(), math.nan), ValueError, r"p must be in \[0, 1\], got nan"),
        (
            lambda: dropout(torch.ones(3), rng(), channels=True),
            ValueError,
            r"dropout: with channels, input must have dimensions \[N, C, ...\], got \[3\]",
        ),
        (lambda: dropout(torch.ones(3).long(), rng()), TypeError, "dropout: input must be float32, .*int64"),
        (lambda: dropout(torch.ones(3), rng().float()), TypeError, "dropout: rng must be int64"),
        (lambda: dropout(torch.ones(3), rng()[:1]), ValueError, r"rng must have shape \[2\]"),
        (lambda: uniform(-1, rng()), ValueError, r"uniform: size must be >= 0, got \[-1\]"),
        (lambda: uniform(3, rng(), dtype=torch.int32), TypeError, "uniform: dtype must be float32"),
    ],
)
def test_bad_arguments(backend: str, call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# ---------------------------------------------------------------- the native ops

ops = torch.ops.bbb_fast
WAYS = [{}, {"channels": True}, {"one_mask": True}, {"channels": True, "one_mask": True}]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 63, 64, 65, 127, 129, 4095, 4097, 12_301])
def test_the_kernels_bits(isa: str, count: int, dtype: torch.dtype) -> None:
    """Those of the reference, on every instruction set, wherever a tile or a chunk ends."""
    x = torch.randn(count).to(dtype)
    for r in (rng(), rng(-1, -1), rng(1 << 62, (1 << 63) - 1)):
        assert torch.equal(uniform(count, r, dtype=dtype), reference.uniform(count, r, dtype=dtype))
        for p in (0.0, 2.0**-40, 0.1, 0.5, 0.9, 1 - 2.0**-40, 1.0):
            assert torch.equal(dropout(x, r, p), reference.dropout(x, r, p))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [s for s in SHAPES if len(s) > 1] + [(7, 65, 3, 11), (70, 30, 9, 11)])
def test_the_bits_of_shared_words(isa: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for way in WAYS:
        for x in in_formats(torch.randn(shape).to(dtype)):
            y = dropout(x, rng(), 0.3, **way)
            expected = reference.dropout(x, rng(), 0.3, **way)
            assert torch.equal(y, expected) and y.dtype == dtype
            if math.prod(shape) > 1:
                assert y.stride() == expected.stride()


def test_opcheck(native: None) -> None:
    # Not dense, and in channels_last.
    for x, way in zip(in_formats(torch.randn(2, 3, 4, 5))[2:], WAYS, strict=False):
        torch.library.opcheck(ops.dropout, (x.requires_grad_(), rng(), 0.3), way)
    torch.library.opcheck(ops.drop_elements, (torch.randn(3, 5), rng(), 0.3))
    torch.library.opcheck(ops.uniform, ([3, 5], rng(), torch.float32))
    with pytest.raises(ValueError, match="drop_elements: input must be contiguous, got strides"):
        ops.drop_elements(torch.randn(3, 5).t(), rng(), 0.3)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(way) or "elements")
def test_no_mask_is_kept(native: None, way: dict[str, bool]) -> None:
    """For backward: the rng alone."""
    kept: Any = []
    x = torch.randn(4, 5, 6, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = dropout(x, rng(), **way)
    assert [t.tolist() for t in kept] == [rng().tolist()]
    y.sum().backward()


# ---------------------------------------------------------------- the layers

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MCDropout": (MCDropout, (6, 5)),
    "MCDropout, images": (MCDropout, (6, 3, 4, 5)),
    "MCDropout1d": (MCDropout1d, (6, 9, 3)),
    "MCDropout2d": (MCDropout2d, (6, 9, 2, 3)),
    "MCDropout3d": (MCDropout3d, (6, 9, 2, 3, 2)),
    "MCDropout2d, features": (MCDropout2d, (6, 9)),
    "ConcreteDropout, linear": (lambda: ConcreteDropout(nn.Linear(5, 4), 0.5), (6, 5)),
    "ConcreteDropout, tokens": (lambda: ConcreteDropout(nn.Linear(5, 4), 0.5), (6, 3, 5)),
    "ConcreteDropout, conv": (lambda: ConcreteDropout(nn.Conv2d(5, 4, 2), 0.5), (6, 5, 4, 3)),
    "ConcreteDropout, transposed": (lambda: ConcreteDropout(nn.ConvTranspose1d(5, 4, 2), 0.5), (6, 5, 4)),
}
every_layer = pytest.mark.parametrize("name", list(LAYERS))


def made(name: str) -> tuple[nn.Module, Tensor]:
    make, shape = LAYERS[name]
    return make().to(DEVICE), torch.randn(shape)


@every_layer
def test_free_draws(backend: str, name: str) -> None:
    """A fresh mask for each forward and row, in train and in eval mode; the seed governs."""
    layer, x = made(name)
    x = x[:1].expand(x.shape).contiguous()
    for mode in (True, False):
        layer.train(mode)
        torch.manual_seed(3)
        a, b = layer(x), layer(x)
        torch.manual_seed(3)
        assert torch.equal(layer(x), a) and not torch.equal(a, b)
        assert not torch.equal(a, a[:1].expand(a.shape))


@every_layer
def test_a_pinned_draw_is_one_function(backend: str, name: str) -> None:
    layer, x = made(name)
    with fixed_noise(4, 7):
        y = layer(x)
        parts = [layer(part) for part in x.split(2)]
        torch.testing.assert_close(layer(x.flip(0)).flip(0), y)
        assert layer(x[:0]).shape == (0, *y.shape[1:])
    torch.testing.assert_close(torch.cat(parts), y)
    with fixed_noise(4, 8):
        assert not torch.equal(layer(x), y)
    with fixed_noise(4, 7, draw="activations"):
        z = layer(x)
        torch.testing.assert_close(layer(x), z)
        assert not torch.allclose(z, y)
        if name != "ConcreteDropout, tokens":  # whose row has a mask for each token then
            torch.testing.assert_close(z[:1], y[:1])


@every_layer
def test_means(backend: str, name: str) -> None:
    layer, x = made(name)
    expected = layer.layer(x) if isinstance(layer, ConcreteDropout) else x
    with posterior_means():
        assert torch.equal(layer(x), expected)
    assert torch.equal(layer(x, sample=False), expected)


@every_layer
def test_predict_and_multi_sample(backend: str, name: str) -> None:
    layer, x = made(name)
    model = nn.Sequential(layer, nn.Flatten(), nn.LazyLinear(3))
    with posterior_means():
        model(x)
    y = predict(model, x, 5, seed=2)
    torch.testing.assert_close(predict(model, x, 5, seed=2, batch_size=4), y)
    assert all(not torch.equal(y[k], y[0]) for k in range(1, 5))
    several = multi_sample(model, x, 3, seed=2)
    for k in range(3):
        with fixed_noise(2, k, model=model, draw="activations"):
            torch.testing.assert_close(several[k], model(x))


def test_two_layers_have_masks_of_their_own() -> None:
    model = nn.Sequential(MCDropout(), MCDropout())
    with fixed_noise(1, model=model):
        a, b = model[0](torch.ones(50, 200)), model[1](torch.ones(50, 200))
    assert independent(a, b)


@every_layer
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(name: str, reentrant: bool) -> None:
    """The same mask again where backward runs the forward again."""
    layer, x = made(name)
    x.requires_grad_()
    leaves = (x, *layer.parameters())
    for context in (fixed_noise(3, 1), None):
        results = []
        for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=reentrant)):
            torch.manual_seed(5)
            if context is None:
                y = run(x)
            else:
                with context:
                    y = run(x)
            for leaf in leaves:
                leaf.grad = None
            y.square().sum().backward()
            results.append([leaf.grad for leaf in leaves])
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)


@every_layer
def test_types(backend: str, name: str) -> None:
    layer, x = made(name)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        narrow = copy.deepcopy(layer).to(dtype)
        y = narrow(x.to(dtype))
        assert y.dtype == dtype and y.isfinite().all()
    with torch.autocast(DEVICE.type, torch.bfloat16), fixed_noise(1):
        y = layer(x)
    with fixed_noise(1):
        torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)


@every_layer
def test_copies(name: str) -> None:
    layer, x = made(name)
    layer(x)
    with fixed_noise(1):
        y = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        with fixed_noise(1):
            assert torch.equal(other(x), y)


# docs/layers.md's table has the others.
@pytest.mark.parametrize("name", ["MCDropout", "ConcreteDropout, conv"])
def test_compiled(name: str) -> None:
    torch._dynamo.reset()
    layer, x = made(name)
    x.requires_grad_()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with fixed_noise(5, 1, model=layer):
        y, expected = compiled(x), layer(x)
    torch.testing.assert_close(y, expected)
    leaves = (x, *layer.parameters())
    for a, b in zip(*(torch.autograd.grad(t.square().sum(), leaves) for t in (y, expected)), strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.equal(compiled(x), compiled(x))
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.inductor
def test_inductor_takes_another_rate(backend: str) -> None:
    """In the graph that a first change of the rate makes of it."""
    torch._dynamo.reset()
    layer, x = MCDropout(), torch.ones(300)
    compiled = torch.compile(layer, fullgraph=True)
    for p in (0.5, 0.25, 0.75, 0.3, 0.0, 1.0):
        layer.p = p
        with fixed_noise(5, 1, model=layer):
            torch.testing.assert_close(compiled(x), layer(x))
    torch._dynamo.reset()


@every_layer
def test_vmap(backend: str, name: str) -> None:
    layer, x = made(name)
    stacked = torch.stack((x, x.flip(0)))
    with fixed_noise(5, 1):
        y = torch.func.vmap(layer)(stacked)
        loop = torch.stack([layer(t) for t in stacked])
    torch.testing.assert_close(y, loop)
    y = torch.func.vmap(layer, randomness="different")(torch.stack((x, x)))
    assert not torch.equal(y[0], y[1])


def test_rows_alone_under_vmap(backend: str) -> None:
    """A row that torch.func takes out of its batch has the mask of a row."""
    layer, x = MCDropout(), torch.randn(4, 30)
    with fixed_noise(5):
        assert torch.equal(torch.func.vmap(layer)(x), layer(x))


@pytest.mark.parametrize(
    ("layer", "shape", "allowed"),
    [
        (MCDropout1d(), (3,), r"\[N, C, L\] or \[N, C\], got \[3\]"),
        (MCDropout2d(), (3, 4, 5), r"\[N, C, H, W\] or \[N, C\], got \[3, 4, 5\]"),
        (MCDropout3d(), (3, 4, 5, 6), r"\[N, C, D, H, W\] or \[N, C\], got \[3, 4, 5, 6\]"),
        (ConcreteDropout(nn.Conv2d(3, 4, 2)), (3, 4, 5), r"4 dimensions .* got \[3, 4, 5\]"),
    ],
)
def test_numbers_of_dimensions(layer: nn.Module, shape: tuple[int, ...], allowed: str) -> None:
    with pytest.raises(ValueError, match=f"{type(layer).__name__}: input must .*{allowed}"):
        layer(torch.randn(shape))


def test_bad_layers() -> None:
    for make in (MCDropout, MCDropout2d):
        for p in (-0.1, 1.1, math.nan):
            with pytest.raises(ValueError, match=rf"{make.__name__}: p must be in \[0, 1\]"):
                make(p)
        with pytest.raises(TypeError, match="p must be a number, got str"):
            make("0.5")  # type: ignore[arg-type]  # on purpose
    with pytest.raises(TypeError, match="MCDropout: input must be a tensor, got list"):
        MCDropout()([1.0])
    with pytest.raises(TypeError, match="dense tensor"):
        MCDropout()(torch.eye(3).to_sparse())
    linear = nn.Linear(2, 3)
    for options, message in (
        ({"p": 0.0}, r"p must be in \(0, 1\), got 0"),
        ({"p": 1.0}, r"p must be in \(0, 1\), got 1"),
        ({"length_scale": 0.0}, "length_scale must be finite and > 0"),
        ({"temperature": math.inf}, "temperature must be finite and > 0"),
    ):
        with pytest.raises(ValueError, match=f"ConcreteDropout: {message}"):
            ConcreteDropout(linear, **options)
    for layer in (nn.ReLU(), BBB.BBBLinear(2, 3), nn.Sequential(linear)):
        with pytest.raises(TypeError, match=f"linear layer or convolution, got {type(layer).__name__}"):
            ConcreteDropout(layer)
    with pytest.raises(ValueError, match="ConcreteDropout: the layer is lazy"):
        ConcreteDropout(nn.LazyLinear(3))


# ---------------------------------------------------------------- concrete dropout


def test_the_mask_of_concrete_dropout(backend: str) -> None:
    """The paper's formula, as it is written."""
    layer = ConcreteDropout(nn.Linear(5, 4), 0.3, temperature=0.2).double()
    x = torch.randn(6, 5, dtype=torch.float64)
    with fixed_noise(9, 2, draw="activations"):
        y = layer(x)
    u, p = uniform((6, 5), torch.tensor([9, 2 << 32]), dtype=torch.float64), torch.tensor(0.3).double()
    z = torch.sigmoid((p.log() - (1 - p).log() + u.log() - (1 - u).log()) / 0.2)
    torch.testing.assert_close(y, F.linear(x * (1 - z) / (1 - p), *layer.layer.parameters()))


@pytest.mark.parametrize("name", [n for n in LAYERS if n.startswith("Concrete")])
def test_gradients_of_concrete_dropout(backend: str, name: str) -> None:
    layer, x = made(name)
    layer, x = layer.double(), x.double().requires_grad_()
    names = [n for n, _ in layer.named_parameters()]
    assert "p_logit" in names

    def run(x: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        with fixed_noise(1):
            y = torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))
        return y

    assert torch.autograd.gradcheck(run, (x, *layer.parameters()))


def test_the_kl_of_concrete_dropout() -> None:
    """KL(q || p) of a mixture of a spike of width s at 0 and one at the weights that are kept, by quadrature.

    It is the paper's but for what does not depend on the weights and the rate.
    """
    s, length_scale = 1e-3, 2.0
    prior = torch.distributions.Normal(torch.tensor(0.0).double(), 1 / length_scale)

    def exact(w: float, p: float) -> float:
        kept = w / (1 - p)
        grid = torch.cat([c + torch.linspace(-9 * s, 9 * s, 4001).double() for c in (0.0, kept)])
        q = sum(
            share * torch.distributions.Normal(torch.tensor(c).double(), s).log_prob(grid).exp()
            for share, c in ((p, 0.0), (1 - p, kept))
        )
        terms = q * (q.log() - prior.log_prob(grid))
        return float(terms.sum() * 18 * s / 4000)

    def ours(w: float, p: float) -> float:
        layer = ConcreteDropout(nn.Linear(1, 1, bias=False), p, length_scale=length_scale).double()
        with torch.no_grad():
            layer.layer.weight.fill_(w)
        return layer.kl_loss().item()

    cases = [(0.7, 0.2), (0.7, 0.6), (-1.5, 0.2), (0.3, 0.9)]
    constant = exact(*cases[0]) - ours(*cases[0])
    for case in cases:
        assert exact(*case) - ours(*case) == pytest.approx(constant, abs=1e-3)


def test_kl_loss_counts_it() -> None:
    layer = ConcreteDropout(nn.Conv2d(3, 4, 2), 0.2, length_scale=0.5)
    bayesian = BBB.BBBLinear(4, 2)
    weight, bias = layer.layer.weight, layer.layer.bias
    assert bias is not None
    entropy = -(0.2 * math.log(0.2) + 0.8 * math.log(0.8))
    own = 0.125 * (weight.square().sum() / 0.8 + bias.square().sum()) - 3 * entropy
    for model in (layer, nn.Sequential(layer), nn.Sequential(nn.Sequential(layer), MCDropout())):
        torch.testing.assert_close(kl_loss(model), own)
    torch.testing.assert_close(kl_loss(nn.Sequential(layer, bayesian)), own + bayesian.kl_loss())
    torch.testing.assert_close(kl_loss(MCDropout()), torch.tensor(0.0))
    # A rate that left the range of its type has a KL and a gradient still.
    with torch.no_grad():
        layer.p_logit.fill_(-200.0)
    kl_loss(layer).backward()
    assert (
        math.isfinite(kl_loss(layer).item())
        and layer.p_logit.grad is not None
        and layer.p_logit.grad.isfinite()
    )


@pytest.mark.parametrize("others", ["keep", "weights"])
def test_convert_leaves_it(others: str) -> None:
    model: Any = nn.Sequential(ConcreteDropout(nn.Linear(3, 4)), MCDropout(), nn.Linear(4, 2))
    made: Any = convert(model, "lrt", others=others)
    assert type(made[0]) is ConcreteDropout and type(made[0].layer) is nn.Linear
    assert isinstance(made[2], BBB_LRT.BBBLinear) and made(torch.randn(5, 3)).shape == (5, 2)
    torch.testing.assert_close(kl_loss(made), model[0].kl_loss() + made[2].kl_loss())


def test_summary() -> None:
    layer = ConcreteDropout(nn.Linear(3, 4), 0.2, length_scale=2.0)
    found = summary(nn.Sequential(layer, MCDropout(), nn.Linear(4, 1)))
    first, last = found.rows
    assert (first.name, first.kind, first.parameters, first.shape) == (
        "0",
        "ConcreteDropout",
        17,
        "[4, 3], [4]",
    )
    assert (first.estimator, first.prior, first.sigma) == ("dropout", "N(0, 0.5^2)", None)
    assert found.kl == first.kl == pytest.approx(layer.kl_loss().item()) and last.estimator is None
    assert (found.bayesian_parameters, found.other_parameters) == (17, 5)
    assert "ConcreteDropout" in str(found)


def test_the_rate_is_learned(backend: str) -> None:
    """ELBO training lowers the rate where there are many data, and raises it where there are few."""
    rates = []
    for train_size in (1, 100_000):
        torch.manual_seed(0)
        layer = ConcreteDropout(nn.Linear(4, 2), 0.2, length_scale=0.1)
        x = torch.randn(64, 4)
        target = (x[:, 0] > 0).long()
        bound = ELBO(train_size, reduction="mean", from_logits=True)
        optimizer = torch.optim.Adam(layer.parameters(), 0.1)
        for _ in range(150):
            optimizer.zero_grad()
            bound(layer(x), target, kl_loss(layer), 1.0).backward()
            optimizer.step()
        rates.append(float(layer.p))
    assert rates[1] < 0.1 < 0.3 < rates[0]
