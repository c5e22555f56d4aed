"""Lazy layers of every estimator: the first input, or a checkpoint, makes the plain layer of them."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import rng_state
from torch import Tensor, nn

import bbb_fast
from bbb_fast import convert, fixed_noise, kl_loss, multi_sample, predict, summary, to_deterministic
from bbb_fast.layers import BBB, BBB_LRT, Flipout
from bbb_fast.layers.base import BayesianLayer
from bbb_fast.layers.lazy import Lazy
from bbb_fast.priors import DEFAULT_PRIORS

FAMILIES = {"bbb": BBB, "lrt": BBB_LRT, "flipout": Flipout}
# The size that is inferred, the other arguments, an input's shape.
CASES: dict[str, tuple[int, tuple[Any, ...], dict[str, Any], tuple[int, ...]]] = {
    "Linear": (5, (3,), {}, (2, 4, 5)),
    "Conv1d": (4, (6, 3), {"groups": 2, "bias": False}, (2, 4, 7)),
    "Conv2d": (3, (4, (3, 2)), {"padding": "same"}, (2, 3, 5, 4)),
    "Conv3d": (2, (3, 2), {}, (2, 2, 3, 4, 3)),
    "ConvTranspose1d": (4, (6, 3), {"stride": 2, "groups": 2}, (2, 4, 5)),
    "ConvTranspose2d": (6, (3, (3, 2)), {"groups": 3, "output_padding": 1, "stride": 2}, (2, 6, 3, 4)),
    "ConvTranspose3d": (2, (3, 2), {"bias": False}, (2, 2, 3, 2, 3)),
}


@pytest.fixture(params=list(FAMILIES.values()), ids=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> ModuleType:
    return request.param


def lazy(family: ModuleType, kind: str, **options: Any) -> Any:
    _, args, own, _ = CASES[kind]
    return getattr(family, f"BBBLazy{kind}")(*args, **own, **options)


def plain(family: ModuleType, kind: str, **options: Any) -> BayesianLayer:
    size, args, own, _ = CASES[kind]
    return getattr(family, f"BBB{kind}")(size, *args, **own, **options)


def example(kind: str) -> Tensor:
    return torch.randn(CASES[kind][-1])


def assert_same(layer: nn.Module, other: nn.Module) -> None:
    assert type(layer) is type(other) and repr(layer) == repr(other)
    # Nothing of the lazy layer is left.
    assert vars(layer).keys() == vars(other).keys()
    assert not layer._forward_pre_hooks and not layer._load_state_dict_pre_hooks
    state, expected = layer.state_dict(), other.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(value, expected[name]) for name, value in state.items())


@pytest.mark.parametrize("kind", CASES)
def test_the_first_forward_makes_the_plain_layer(backend: str, family: ModuleType, kind: str) -> None:
    """Bit for bit what the plain layer is, made with the same seed, and what it gives."""
    x, priors = example(kind), {"posterior_mu_initial": (1.0, 0.3), "prior_sigma": 0.4}
    layer = lazy(family, kind, priors=priors)
    assert isinstance(layer, Lazy) and not isinstance(plain(family, kind), Lazy)
    torch.manual_seed(3)
    y = layer(x)
    torch.manual_seed(3)
    expected = plain(family, kind, priors=priors)
    assert torch.equal(y, expected(x))
    layer._trace = expected._trace = None
    assert_same(layer, expected)
    assert torch.equal(layer.kl_loss(), expected.kl_loss())
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in layer.parameters())
    # As torch.nn infers it.
    size, args, own, _ = CASES[kind]
    point = getattr(nn, f"Lazy{kind}")(*args, **own)
    assert point(x).shape == y.shape and point.weight.shape == layer.W_mu.shape


def test_nothing_is_drawn_before(family: ModuleType) -> None:
    before = rng_state()
    layer = lazy(family, "Linear")
    layer.reset_parameters()
    assert torch.equal(rng_state(), before)
    assert layer.in_features == 0 and layer.out_features == 3


@pytest.mark.parametrize("kind", CASES)
def test_signatures(family: ModuleType, kind: str) -> None:
    """The plain layer's, without the first argument."""
    layer = getattr(family, f"BBBLazy{kind}")
    of_plain = list(inspect.signature(layer.cls_to_become).parameters.values())
    assert layer.cls_to_become is getattr(family, f"BBB{kind}")
    assert list(inspect.signature(layer).parameters.values()) == of_plain[1:]
    assert of_plain[0].name in str(inspect.getdoc(layer))
    assert layer.__name__ in family.__all__


def test_subclasses_become_the_plain_class() -> None:
    class Mine(BBB.BBBLazyLinear):
        pass

    layer = Mine(3)
    layer(torch.randn(2, 5))
    assert type(layer) is BBB.BBBLinear


def test_arguments_are_checked_at_once() -> None:
    for make, message in (
        (lambda: BBB.BBBLazyLinear(-1), "BBBLazyLinear: out_features must be an int >= 0, got -1"),
        (lambda: BBB.BBBLazyConv2d(3, 0), "BBBLazyConv2d: kernel_size must be an int >= 1"),
        (lambda: BBB.BBBLazyConv2d(3, 2, groups=2), "out_channels must be positive and divisible by groups"),
        (lambda: BBB.BBBLazyConv2d(3, 2, groups=0), "groups must be an int >= 1, got 0"),
        (lambda: BBB.BBBLazyLinear(3, priors={"mu": 1}), r"unknown prior keys \['mu'\]"),
        (lambda: BBB.BBBLazyLinear(3, variance_dtype="auto"), "variance_dtype is an option of lrt"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    for arguments in ((), (3, True, None, 4)):
        with pytest.raises(TypeError, match="argument"):
            BBB.BBBLazyLinear(*arguments)


@pytest.mark.parametrize("kind", ["Linear", "ConvTranspose2d"])
def test_before_the_first_forward(backend: str, family: ModuleType, kind: str) -> None:
    """What needs the posterior says so, and changes nothing."""
    model: Any = nn.Sequential(lazy(family, kind), nn.ReLU())
    x, layer, name = example(kind), model[0], f"BBBLazy{kind}"
    size = "in_features" if kind == "Linear" else "in_channels"
    of_layer = rf"{name}: not initialised; run a forward first, whose input says what {size} is"
    of_model = rf"the model has layers that are not initialised: 0 \({name}\); run a forward first"
    functions: tuple[Callable[[], Any], ...] = (
        layer.kl_loss,
        layer.posterior,
        lambda: kl_loss(model),
        lambda: to_deterministic(model),
        lambda: bbb_fast.posterior_to_prior(model),
        lambda: bbb_fast.sparsity(model),
        lambda: layer.forward(x),
    )
    for function in functions:
        with pytest.raises(RuntimeError, match=of_layer):
            function()
    for of in (predict, multi_sample):
        with pytest.raises(RuntimeError, match=f"{of.__name__}: {of_model}"):
            of(model, x, 3)
    shown = summary(model)
    assert (shown.rows[0].estimator, shown.rows[0].kl) == (layer.estimator, None)
    assert "not initialised" in str(shown) and shown.other_parameters == 0
    assert type(layer).__name__ == name and layer.has_uninitialized_params()
    model(x)
    assert predict(model, x, 3).shape == multi_sample(model, x, 3).shape
    assert kl_loss(model) > 0


def test_wrong_first_inputs(family: ModuleType) -> None:
    linear, conv = lazy(family, "Linear"), family.BBBLazyConv2d(4, 3, groups=2)
    for layer, x, error, message in (
        (linear, torch.tensor(1.0), ValueError, r"BBBLazyLinear: input must have a dimension, .* got \[\]"),
        (linear, [1.0], TypeError, "BBBLazyLinear: input must be a tensor, got list"),
        (
            conv,
            torch.randn(2, 4, 5, 5, 5),
            ValueError,
            r"BBBLazyConv2d: input must have 3 \(unbatched\) or 4 dimensions, of which one is in_channels, "
            r"got \[2, 4, 5, 5, 5\]",
        ),
        (conv, torch.randn(5, 5), ValueError, r"3 \(unbatched\) or 4 dimensions"),
        (
            conv,
            torch.randn(1, 3, 5, 5),
            ValueError,
            "in_channels must be positive and divisible by groups = 2, got 3",
        ),
    ):
        with pytest.raises(error, match=message):
            layer(x)
        assert isinstance(layer, Lazy) and layer.has_uninitialized_params()
    assert conv(torch.randn(4, 5, 5)).shape == (4, 3, 3) and conv.in_channels == 4
    assert linear(torch.randn(5)).shape == (3,)
    assert family.BBBLazyLinear(3)(input=torch.randn(2, 0)).shape == (2, 3)


def test_priors(backend: str, family: ModuleType) -> None:
    """Tensors meet the weight's shape at the first forward; the empirical sigma needs none."""
    shape, x = (3, 5), torch.randn(2, 5)
    priors = {
        "prior_mu": torch.randn(shape),
        "prior_sigma": torch.rand(shape) + 0.1,
        "bias_prior_sigma": torch.rand(3) + 0.1,
    }
    for given in (priors, {"prior_sigma": "empirical"}, {"prior": bbb_fast.priors.LogUniform()}):
        layer = family.BBBLazyLinear(3, priors=given)
        torch.manual_seed(3)
        layer(x)
        torch.manual_seed(3)
        expected = family.BBBLinear(5, 3, priors=given)
        assert torch.equal(kl_loss(layer), kl_loss(expected))
        assert list(layer.state_dict()) == list(expected.state_dict())
    wrong = family.BBBLazyLinear(3, priors={"prior_mu": torch.zeros(3, 4)})
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"BBBLazyLinear: priors\['prior_mu'\] must have shape \[3, 5\], got \[3, 4\]"
        ):
            wrong(x)
        assert wrong.has_uninitialized_params() and wrong.in_features == 0
    assert wrong(torch.randn(2, 4)).shape == (2, 3)
    wrong = family.BBBLazyConv1d(4, 2, priors={"bias_prior_mu": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"priors\['bias_prior_mu'\] must have shape \[4\], got \[3\]"):
        wrong(torch.randn(1, 2, 3))


def test_dtype(family: ModuleType) -> None:
    for layer in (lazy(family, "Linear", dtype=torch.float64), lazy(family, "Linear").double()):
        layer(torch.randn(2, 5).double())
        assert {p.dtype for p in layer.parameters()} == {torch.float64}
    layer = family.BBBLazyLinear(3, priors={"prior_mu": torch.zeros(3, 5)}).double()
    layer(torch.randn(2, 5).double())
    assert layer.prior_mu.dtype == torch.float64
    with pytest.raises(TypeError, match="dtype must be"):
        family.BBBLazyLinear(3, dtype=torch.int64)


@pytest.mark.parametrize("kind", CASES)
def test_a_state_dict_of_the_plain_layer(backend: str, family: ModuleType, kind: str) -> None:
    """It initialises the layer, which needs no forward then."""
    of, x = plain(family, kind), example(kind)
    model = nn.Sequential(lazy(family, kind))
    assert str(model.load_state_dict(nn.Sequential(of).state_dict())) == "<All keys matched successfully>"
    assert_same(model[0], of)
    assert torch.equal(kl_loss(model), kl_loss(of))
    results = []
    for layer in (model[0], of):
        with fixed_noise(3, draw="activations"):
            results.append(layer(x))
    assert torch.equal(*results)


def test_a_state_dict_with_priors(family: ModuleType) -> None:
    of = plain(family, "Linear")
    bbb_fast.posterior_to_prior(of)
    for options in ({}, {"assign": True}):
        layer = lazy(family, "Linear")
        layer.load_state_dict(of.state_dict(), **options)
        assert_same(layer, of)
        assert kl_loss(layer) < 1e-9


def test_state_dicts_that_do_not_fit(family: ModuleType) -> None:
    def state(size: int = 5, outputs: int = 3, **more: Any) -> dict[str, Tensor]:
        return {**family.BBBLinear(size, outputs).state_dict(), **more}

    without = {name: t for name, t in state().items() if name != "W_mu"}
    for given, strict, message in (
        (
            state(outputs=4),
            True,
            r"size mismatch for W_mu, which in_features is taken from: it must be \[3, any\]",
        ),
        (state(W_mu=torch.zeros(3, 5, 1)), True, r"any\], got \[3, 5, 1\]"),
        (without, True, r"any\], got none"),
        (without, False, r"any\], got none"),
    ):
        layer = lazy(family, "Linear")
        with pytest.raises(RuntimeError, match=message):
            layer.load_state_dict(given, strict=strict)
        assert isinstance(layer, Lazy) and layer.in_features == 0
        assert all(isinstance(p, nn.parameter.UninitializedParameter) for p in layer.parameters())
    # What the plain layer would say.
    for given, message in (
        ({n: t for n, t in state().items() if n != "W_rho"}, r'Missing key\(s\) in state_dict: "W_rho"'),
        (state(W_rho=torch.zeros(3, 4)), "size mismatch for W_rho"),
        (state(weight=torch.zeros(3, 5)), r'Unexpected key\(s\) in state_dict: "weight"'),
        ({}, r'Missing key\(s\) in state_dict: "W_mu", "W_rho", "bias_mu", "bias_rho"'),
    ):
        with pytest.raises(RuntimeError, match=message):
            lazy(family, "Linear").load_state_dict(given)
    wrong = family.BBBLazyLinear(3, priors={"prior_mu": torch.zeros(3, 4)})
    with pytest.raises(RuntimeError, match=r"priors\['prior_mu'\] must have shape \[3, 5\], got \[3, 4\]"):
        wrong.load_state_dict(state())
    assert wrong.has_uninitialized_params()
    untouched = lazy(family, "Linear")
    assert len(untouched.load_state_dict({}, strict=False).missing_keys) == 4
    assert untouched.has_uninitialized_params()
    conv = family.BBBLazyConvTranspose1d(4, 2, groups=2)
    with pytest.raises(RuntimeError, match="in_channels must be positive and divisible by groups = 2, got 3"):
        conv.load_state_dict(
            {**family.BBBConvTranspose1d(4, 4, 2, groups=2).state_dict(), "W_mu": torch.ones(3, 2, 2)}
        )


def test_copies_before_and_after(backend: str, family: ModuleType) -> None:
    x = torch.randn(2, 5)
    model: Any = nn.Sequential(lazy(family, "Linear"), nn.ReLU(), family.BBBLazyLinear(2))
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    loaded = nn.Sequential(lazy(family, "Linear"), nn.ReLU(), family.BBBLazyLinear(2))
    loaded.load_state_dict(model.state_dict())
    for other in (*copies, loaded):
        torch.manual_seed(1)
        y = other(x)
        assert type(other[0]) is family.BBBLinear
        assert model[0].has_uninitialized_params()
        again = copy.deepcopy(model)
        torch.manual_seed(1)
        assert torch.equal(y, again(x))
        assert torch.equal(pickle.loads(pickle.dumps(other))[0].W_mu, other[0].W_mu)


def test_a_pinned_first_forward(backend: str, family: ModuleType) -> None:
    """Its noise is that of the layer's place in the model; the posterior comes of PyTorch's generator."""
    x = torch.randn(2, 5)
    results = []
    for make in (lambda: lazy(family, "Linear"), lambda: plain(family, "Linear")):
        torch.manual_seed(1)
        model = nn.Sequential(make())
        with fixed_noise(3, 1, model=model):
            results.append(model(x))
    assert torch.equal(*results)


def test_compiled(family: ModuleType) -> None:
    torch._dynamo.reset()
    model = nn.Sequential(lazy(family, "Linear"), nn.ReLU(), family.BBBLazyLinear(2))
    compiled, x = torch.compile(model, fullgraph=True, backend="aot_eager"), torch.randn(2, 5)
    assert compiled(x).shape == (2, 2)
    assert type(model[0]) is family.BBBLinear and model[2].in_features == 3
    with fixed_noise(2, model=model):
        torch.testing.assert_close(compiled(x), model(x))


def test_convert_keeps_them(family: ModuleType) -> None:
    net: Any = convert(nn.Sequential(lazy(family, "Linear"), nn.Linear(3, 2)), "bbb")
    assert type(net[0]) is family.BBBLazyLinear and type(net[1]) is BBB.BBBLinear
    net(torch.randn(2, 5))
    assert type(net[0]) is family.BBBLinear
    assert type(to_deterministic(net).get_submodule("0")) is nn.Linear


def test_defaults_are_the_plain_layers(family: ModuleType) -> None:
    layer = family.BBBLazyLinear(200)
    layer(torch.randn(1, 200))
    for t, name in ((layer.W_mu, "posterior_mu_initial"), (layer.W_rho, "posterior_rho_initial")):
        mean, std = DEFAULT_PRIORS[name]
        assert abs(t.mean() - mean) < 0.01 and abs(t.std() - std) < 0.01
