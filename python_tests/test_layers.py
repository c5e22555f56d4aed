"""Layers of every estimator: construction, forward, KL, gradients; ModuleWrapper and FlattenLayer."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import math
import pickle
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, alike, rng_state, unrelated
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import bbb_fast
from bbb_fast import functional, layers, reference
from bbb_fast.functional import draw_rng
from bbb_fast.layers import BBB, BBB_LRT, FlattenLayer, Flipout, ModuleWrapper
from bbb_fast.layers.base import BayesianLayer

NAMES = ["W_mu", "W_rho", "bias_mu", "bias_rho"]
KINDS = [
    "Linear",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
]
ARGUMENTS: dict[str, tuple[tuple[Any, ...], tuple[int, ...]]] = {
    "Linear": ((6, 5), (4, 6)),
    "Conv1d": ((4, 6, 3), (2, 4, 9)),
    "Conv2d": ((4, 6, (3, 2)), (2, 4, 7, 6)),
    "Conv3d": ((4, 6, 2), (2, 4, 4, 5, 3)),
    "ConvTranspose1d": ((4, 6, 3, 2, 1), (2, 4, 5)),
    "ConvTranspose2d": ((4, 6, (3, 2), (2, 1)), (2, 4, 4, 6)),
    "ConvTranspose3d": ((4, 6, 2, 2), (2, 4, 2, 3, 2)),
}


@pytest.fixture(params=[BBB, BBB_LRT, Flipout], ids=["bbb", "lrt", "flipout"])
def estimator(request: pytest.FixtureRequest) -> ModuleType:
    """The module that holds the layers of one estimator."""
    return request.param


def make(estimator: ModuleType, kind: str, *args: Any, **options: Any) -> Any:
    """A layer with sigma around 0.2, so that the noise shows."""
    layer = getattr(estimator, f"BBB{kind}")(*(args or ARGUMENTS[kind][0]), **options)
    with torch.no_grad():
        for mu, rho in layer.posterior():
            mu.normal_(0, 0.5)
            rho.normal_(-1.5, 0.3)
    return layer


def example(kind: str, **options: Any) -> Tensor:
    return torch.randn(ARGUMENTS[kind][1], **options)


def twin(kind: str, *args: Any, **options: Any) -> Any:
    return getattr(nn, kind)(*(args or ARGUMENTS[kind][0]), **options)


def with_weights(module: nn.Module, *arguments: Any) -> Tensor:
    """What a torch.nn layer gives with a weight, a bias (or None) and an input."""
    weight, bias, x = arguments
    named = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    return torch.func.functional_call(module, named, (x,))


def seeded(seed: int, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    torch.manual_seed(seed)
    return function(*args, **options)


def sigma(rho: Tensor | None) -> Tensor | None:
    return None if rho is None else F.softplus(rho)


def squared(t: Tensor | None) -> Tensor | None:
    return None if t is None else t * t


def exact_kl(layer: BayesianLayer, swapped: bool = False) -> Tensor:
    """The KL in float64, by torch.distributions."""
    total = torch.zeros((), dtype=torch.float64)
    prior = torch.distributions.Normal(
        torch.tensor(layer.prior_mu, dtype=torch.float64),
        torch.tensor(layer.prior_sigma, dtype=torch.float64),
    )
    for mu, of_rho in layer.posterior():
        rho = of_rho.double()
        q = torch.distributions.Normal(mu.double(), torch.logaddexp(rho, torch.zeros_like(rho)))
        pair = (prior.expand(mu.shape), q) if swapped else (q, prior.expand(mu.shape))
        total = total + torch.distributions.kl_divergence(*pair).sum()
    return total


class TestConstruction:
    @pytest.mark.parametrize("kind", KINDS)
    def test_parameters_are_shaped_as_in_torch_nn(self, estimator: ModuleType, kind: str) -> None:
        layer, point = make(estimator, kind), twin(kind)
        assert [name for name, _ in layer.named_parameters()] == NAMES
        assert list(layer.state_dict()) == NAMES
        assert layer.W_mu.shape == layer.W_rho.shape == point.weight.shape
        assert layer.bias_mu.shape == layer.bias_rho.shape == point.bias.shape
        assert not list(layer.buffers())
        assert all(p.requires_grad and p.is_leaf for p in layer.parameters())

    @pytest.mark.parametrize("kind", KINDS)
    def test_without_bias(self, estimator: ModuleType, kind: str) -> None:
        layer = make(estimator, kind, bias=False)
        assert list(layer.state_dict()) == ["W_mu", "W_rho"]
        assert layer.bias_mu is None and layer.bias_rho is None
        assert dict(layer._parameters).keys() == set(NAMES)
        assert layer(example(kind)).shape == twin(kind)(example(kind)).shape
        with_bias = make(estimator, kind)
        with pytest.raises(RuntimeError, match="bias_mu"):
            layer.load_state_dict(with_bias.state_dict())

    @pytest.mark.parametrize("groups", [1, 2, 4])
    def test_groups_shape_the_weight(self, estimator: ModuleType, groups: int) -> None:
        layer = estimator.BBBConv2d(4, 8, (3, 5), groups=groups)
        assert layer.W_mu.shape == nn.Conv2d(4, 8, (3, 5), groups=groups).weight.shape

    def test_signatures(self, estimator: ModuleType) -> None:
        """Order and defaults are public: users call these by position."""
        linear = inspect.signature(estimator.BBBLinear).parameters
        options = ["recompute_weight", "variance_dtype"]
        assert list(linear) == ["in_features", "out_features", "bias", "priors", "device", "dtype", *options]
        conv = inspect.signature(estimator.BBBConv2d).parameters
        order = "in_channels out_channels kernel_size stride padding dilation bias priors groups"
        assert list(conv) == [*order.split(), "padding_mode", "device", "dtype", *options]
        defaults = {name: p.default for name, p in conv.items() if p.default is not p.empty}
        assert defaults == {
            "stride": 1,
            "padding": 0,
            "dilation": 1,
            "bias": True,
            "priors": None,
            "groups": 1,
            "padding_mode": "zeros",
            "device": None,
            "dtype": None,
            "recompute_weight": False,
            "variance_dtype": None,
        }
        for signature in (linear, conv):
            keyword = [n for n, p in signature.items() if p.kind is p.KEYWORD_ONLY]
            allowed = ("groups", "padding_mode", "device", "dtype", *options)
            assert keyword == [n for n in allowed if n in signature]

    def test_aliases(self) -> None:
        assert layers.BBB_Linear is BBB.BBBLinear and layers.BBB_LRT_Linear is BBB_LRT.BBBLinear
        assert layers.BBB_Conv2d is BBB.BBBConv2d and layers.BBB_LRT_Conv2d is BBB_LRT.BBBConv2d
        assert layers.misc.ModuleWrapper is layers.ModuleWrapper
        assert layers.misc.FlattenLayer is layers.FlattenLayer

    @pytest.mark.parametrize("kind", ["Linear", "Conv2d"])
    def test_device_and_dtype(self, estimator: ModuleType, kind: str) -> None:
        build = getattr(estimator, f"BBB{kind}")
        for dtype in (torch.float64, torch.bfloat16, torch.float16):
            layer = build(*ARGUMENTS[kind][0], dtype=dtype)
            assert {p.dtype for p in layer.parameters()} == {dtype}
        layer = build(*ARGUMENTS[kind][0], device="meta", dtype=torch.float64)
        assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.float64)}
        materialized = layer.to_empty(device="cpu")
        materialized.reset_parameters()
        assert all(p.isfinite().all() for p in materialized.parameters())

    @pytest.mark.parametrize("kind", KINDS)
    def test_meta_device(self, backend: str, estimator: ModuleType, kind: str) -> None:
        """Shapes without numbers, as tools that only count want them."""
        layer = make(estimator, kind, device="meta")
        y = layer(example(kind, device="meta"))
        assert y.device.type == "meta" and y.shape == twin(kind)(example(kind)).shape
        assert layer.kl_loss().device.type == "meta"

    @pytest.mark.parametrize(
        ("kind", "options", "text"),
        [
            ("Linear", {}, "6, 5, bias=True"),
            ("Linear", {"bias": False}, "6, 5, bias=False"),
            ("Conv1d", {}, "4, 6, kernel_size=(3,), stride=(1,), padding=(0,), bias=True"),
            (
                "Conv2d",
                {
                    "padding": "same",
                    "dilation": 2,
                    "groups": 2,
                    "padding_mode": "reflect",
                    "bias": False,
                },
                "4, 6, kernel_size=(3, 2), stride=(1, 1), padding='same', dilation=(2, 2), groups=2, "
                "padding_mode='reflect', bias=False",
            ),
        ],
    )
    def test_repr(self, estimator: ModuleType, kind: str, options: dict[str, Any], text: str) -> None:
        name = {BBB: "bbb", BBB_LRT: "lrt", Flipout: "flipout"}[estimator]
        assert repr(make(estimator, kind, **options)) == f"BBB{kind}({text}, estimator='{name}')"

    def test_repr_of_what_is_not_a_default(self, estimator: ModuleType) -> None:
        option = {"variance_dtype": torch.bfloat16} if estimator is BBB_LRT else {"recompute_weight": True}
        priors = {"prior_sigma": 0.2, "posterior_rho_initial": (-5, 0.1)}
        model = nn.Sequential(make(estimator, "Linear", priors=priors, **option))
        name, value = next(iter(option.items()))
        assert f"{name}={value}, prior_sigma=0.2, posterior_rho_initial=(-5.0, 0.1))" in repr(model)

    def test_integers_of_other_kinds(self, estimator: ModuleType) -> None:
        """NumPy's and torch.Size's are kept as Python's, so that a layer prints and pickles as any."""
        i = np.int64
        linear = estimator.BBBLinear(i(3), torch.Size([4])[0])
        conv = estimator.BBBConv2d(
            i(4),
            np.uint8(6),
            i(3),
            (i(1), i(2)),
            i(1),
            np.int32(1),
            groups=np.int16(2),
            priors={"prior_mu": i(0)},
        )
        assert repr(conv) == (
            "BBBConv2d(4, 6, kernel_size=(3, 3), stride=(1, 2), padding=(1, 1), groups=2, bias=True, "
            f"estimator={conv.estimator!r})"
        )
        numbers = [linear.in_features, linear.out_features, conv.in_channels, conv.out_channels, conv.groups]
        numbers += [*conv.kernel_size, *conv.stride, *conv.padding, *conv.dilation]
        assert {type(n) for n in numbers} == {int}
        assert conv(torch.randn(2, 4, 8, 8)).shape == (2, 6, 8, 4)
        assert linear(torch.randn(2, 3)).shape == (2, 4)
        assert estimator.BBBLinear(3, 2, priors={"prior_sigma": np.float32(0.5)}).prior_sigma == 0.5

    @pytest.mark.parametrize(
        ("kind", "args", "options", "message"),
        [
            ("Linear", (-1, 2), {}, "in_features must be an int >= 0, got -1"),
            ("Linear", (3, 2.0), {}, "out_features must be an int >= 0, got 2.0"),
            ("Linear", (True, 2), {}, "in_features must be an int >= 0, got True"),
            ("Conv2d", (4, 6, 3), {"groups": 0}, "groups must be an int >= 1"),
            ("Conv2d", (4, 6, 3), {"groups": 3}, "in_channels must be positive and divisible"),
            ("Conv2d", (4, 6, 3), {"groups": 4}, "out_channels must be positive and divisible"),
            ("Conv1d", (0, 6, 3), {}, "in_channels must be positive"),
            ("Conv2d", (4, 6, (3, 3, 3)), {}, "kernel_size must be an int >= 1 or 2 of them"),
            ("Conv3d", (4, 6, (3, 3)), {}, "kernel_size must be an int >= 1 or 3 of them"),
            ("Conv2d", (4, 6, 0), {}, "kernel_size must be an int >= 1"),
            ("Conv2d", (4, 6, (3, 2.5)), {}, "kernel_size must be an int >= 1"),
            ("Conv2d", (4, 6, 3), {"stride": 0}, "stride must be an int >= 1"),
            ("Conv2d", (4, 6, 3), {"padding": -1}, "padding must be an int >= 0"),
            ("Conv1d", (4, 6, 3), {"padding": (1, 1)}, "padding must be an int >= 0 or 1 of them"),
            ("Conv2d", (4, 6, 3), {"padding": "full"}, "padding must be numbers, 'same' or 'valid'"),
            (
                "Conv2d",
                (4, 6, 3),
                {"padding": "same", "stride": (1, 2)},
                "padding='same' needs stride 1",
            ),
            ("Conv2d", (4, 6, 3), {"dilation": (0, 1)}, "dilation must be an int >= 1"),
            ("Linear", (np.bool_(True), 2), {}, "in_features must be an int >= 0"),
            ("Linear", (3, np.float64(2)), {}, "out_features must be an int >= 0"),
            ("Linear", (3, None), {}, "out_features must be an int >= 0, got None"),
            ("Conv2d", (4.0, 6, 3), {}, "in_channels must be positive and divisible"),
            ("Conv2d", (4, 6, None), {}, "kernel_size must be an int >= 1"),
            ("Conv2d", (4, 6, torch.tensor(True)), {}, "kernel_size must be an int >= 1"),
            ("Conv2d", (4, 6, 3), {"groups": 1.5}, "groups must be an int >= 1, got 1.5"),
            ("Conv2d", (4, 6, 3), {"groups": True}, "groups must be an int >= 1, got True"),
            (
                "Conv2d",
                (4, 6, 3),
                {"padding_mode": "mirror"},
                "padding_mode must be one of zeros, reflect",
            ),
        ],
    )
    def test_wrong_arguments(
        self,
        estimator: ModuleType,
        kind: str,
        args: tuple[Any, ...],
        options: dict[str, Any],
        message: str,
    ) -> None:
        with pytest.raises(ValueError, match=f"^BBB{kind}: ") as caught:
            getattr(estimator, f"BBB{kind}")(*args, **options)
        assert message in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("dtype", torch.int32, "dtype must be torch.float32, float64, bfloat16 or float16, got torch.int32"),
        ("dtype", torch.complex64, "got torch.complex64"),
        ("dtype", torch.float8_e4m3fn, "got torch.float8_e4m3fn"),
        ("dtype", "float32", "got str"),
        ("dtype", {}, "got dict"),
        ("device", torch.float32, "device must be a torch.device, a string or a number, got dtype"),
        ("device", complex, "got type"),
        ("device", True, "got bool"),
    ],
)
def test_what_no_parameter_can_be(
    estimator: ModuleType, kind: str, option: str, value: Any, message: str
) -> None:
    with pytest.raises(TypeError, match=message) as caught:
        make(estimator, kind, **{option: value})
    assert "\n" not in str(caught.value) and str(caught.value).startswith("BBB")


class TestPriors:
    def test_defaults(self, estimator: ModuleType) -> None:
        for priors in (None, {}, {"prior_mu": 0}):
            layer = estimator.BBBLinear(2, 2, priors=priors)
            assert (layer.prior_mu, layer.prior_sigma) == (0.0, 0.1)
            assert layer.posterior_mu_initial == (0.0, 0.1)
            assert layer.posterior_rho_initial == (-3.0, 0.1)

    def test_missing_keys_take_defaults(self, estimator: ModuleType) -> None:
        given = {"prior_sigma": 2, "posterior_mu_initial": [1, 0]}
        layer = estimator.BBBConv1d(1, 1, 1, priors=given)
        assert (layer.prior_mu, layer.prior_sigma) == (0.0, 2.0)
        assert layer.posterior_mu_initial == (1.0, 0.0)
        assert layer.posterior_rho_initial == (-3.0, 0.1)
        assert given == {"prior_sigma": 2, "posterior_mu_initial": [1, 0]}

    def test_unknown_key_lists_the_known_ones(self, estimator: ModuleType) -> None:
        with pytest.raises(ValueError, match="prior_sigm") as caught:
            estimator.BBBLinear(2, 2, priors={"prior_sigm": 0.1, "prior_mu": 0})
        for key in ("prior_mu", "prior_sigma", "posterior_mu_initial", "posterior_rho_initial"):
            assert key in str(caught.value).split("known:")[1]

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("prior_mu", math.nan),
            ("prior_mu", "0"),
            ("prior_mu", None),
            ("prior_mu", True),
            ("prior_sigma", 0),
            ("prior_sigma", -0.1),
            ("prior_sigma", math.inf),
            ("posterior_mu_initial", 0.1),
            ("posterior_mu_initial", (0, 0.1, 0.2)),
            ("posterior_mu_initial", "ab"),
            ("posterior_rho_initial", (-3, -0.1)),
            ("posterior_rho_initial", (math.inf, 0.1)),
            ("posterior_rho_initial", (None, 0.1)),
        ],
    )
    def test_bad_values(self, estimator: ModuleType, key: str, value: Any) -> None:
        with pytest.raises(ValueError, match=key):
            estimator.BBBLinear(2, 2, priors={key: value})

    def test_not_a_mapping(self, estimator: ModuleType) -> None:
        with pytest.raises(TypeError, match="priors must be a dict or None"):
            estimator.BBBLinear(2, 2, priors=[0.1])

    @pytest.mark.parametrize("kind", ["Linear", "Conv2d"])
    def test_initial_distribution(self, estimator: ModuleType, kind: str) -> None:
        args = (200, 150) if kind == "Linear" else (40, 150, 5)
        mu, rho = (0.3, 0.02), (-2.0, 0.5)
        priors = {"posterior_mu_initial": mu, "posterior_rho_initial": rho}
        layer = getattr(estimator, f"BBB{kind}")(*args, priors=priors)
        for name, (mean, std) in zip(NAMES, (mu, rho, mu, rho), strict=True):
            values = getattr(layer, name).detach().double()
            error = std / math.sqrt(values.numel())
            assert abs(float(values.mean()) - mean) < 5 * error, name
            assert abs(float(values.std()) - std) < 5 * error, name

    def test_reset_draws_anew_from_the_generator(self, estimator: ModuleType) -> None:
        layer = seeded(3, estimator.BBBLinear, 4, 3)
        first = copy.deepcopy(layer.state_dict())
        layer.reset_parameters()
        assert not any(torch.equal(first[name], p) for name, p in layer.named_parameters())
        seeded(3, layer.reset_parameters)
        assert all(torch.equal(first[name], p) for name, p in layer.named_parameters())

    def test_zero_spread_starts_at_the_mean(self, estimator: ModuleType) -> None:
        priors = {"posterior_mu_initial": (0.25, 0), "posterior_rho_initial": (-4, 0)}
        layer = estimator.BBBLinear(4, 3, priors=priors)
        assert torch.equal(layer.W_mu, torch.full((3, 4), 0.25))
        assert torch.equal(layer.bias_rho, torch.full((3,), -4.0))


class TestDistribution:
    @pytest.mark.parametrize("kind", ["Linear", "Conv2d"])
    def test_mean_and_variance(self, backend: str, estimator: ModuleType, kind: str) -> None:
        """N(m, v) with v = x^2 sigma^2 + sigma_b^2, whatever the estimator."""
        draws, out = 300, 32
        args = (6, out) if kind == "Linear" else (3, out, (2, 3))
        layer = make(estimator, kind, *args)
        x = torch.randn(1, 6) if kind == "Linear" else torch.randn(1, 3, 2, 3)
        with torch.no_grad():
            mean = layer(x, sample=False).flatten().double()
            variances = (squared(sigma(layer.W_rho)), squared(sigma(layer.bias_rho)))
            v = with_weights(twin(kind, *args), *variances, x * x).flatten().double()
            if estimator is BBB_LRT:  # rows are independent
                y = layer(x.expand(draws, *x.shape[1:])).flatten(1).double()
            else:
                y = torch.stack([layer(x).flatten() for _ in range(draws)]).double()
        standard = (y - mean) / v.sqrt()
        # Every one of the 32 outputs, and all together: their weights are independent.
        assert standard.mean(0).abs().max() < 4.5 / math.sqrt(draws)
        assert (standard.square().mean(0) - 1).abs().max() < 4.5 * math.sqrt(2 / draws)
        assert abs(standard.mean()) < 4 / math.sqrt(draws * out)
        assert abs(standard.square().mean() - 1) < 4 * math.sqrt(2 / (draws * out))

    @pytest.mark.parametrize("kind", KINDS)
    def test_only_bbb_shares_a_draw(self, backend: str, estimator: ModuleType, kind: str) -> None:
        layer = make(estimator, kind)
        y = layer(example(kind)[:1].expand(5, *ARGUMENTS[kind][1][1:]))
        same = torch.stack([alike(y[0], row) for row in y[1:]])
        assert same.all() if estimator is BBB else not same.all()
        assert estimator is not BBB_LRT or not same.any()

    def test_only_lrt_draws_for_each_position(self, backend: str, estimator: ModuleType) -> None:
        y = make(estimator, "Conv2d", 2, 3, 3)(torch.ones(1, 2, 6, 6)).flatten(2)
        same = alike(y[..., :1], y[..., 1:])
        assert not same.any() if estimator is BBB_LRT else same.all()

    @pytest.mark.parametrize("kind", KINDS)
    def test_means_draw_nothing(self, backend: str, estimator: ModuleType, kind: str) -> None:
        layer, x = make(estimator, kind), example(kind)
        before = rng_state()
        first, second = layer(x, sample=False), layer(x, sample=False)
        assert torch.equal(first, second)
        assert torch.equal(rng_state(), before)
        assert torch.equal(first, with_weights(twin(kind), layer.W_mu, layer.bias_mu, x))

    @pytest.mark.parametrize("training", [True, False])
    def test_train_and_eval_both_sample(self, backend: str, estimator: ModuleType, training: bool) -> None:
        layer, x = make(estimator, "Linear").train(training), example("Linear")
        assert unrelated(layer(x), layer(x))
        assert unrelated(layer(x), layer(x, sample=False))

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_generator_governs(self, backend: str, estimator: ModuleType, kind: str) -> None:
        layer, x = make(estimator, kind), example(kind)
        first = seeded(7, layer, x)
        second = layer(x)
        assert unrelated(first, second)
        assert torch.equal(seeded(7, layer, x), first)
        assert torch.equal(layer(x), second)
        assert unrelated(seeded(8, layer, x), first)

    def test_layers_do_not_share_noise(self, backend: str, estimator: ModuleType) -> None:
        """Not even two copies of one layer in one forward."""
        layer = make(estimator, "Linear")
        other, x = copy.deepcopy(layer), example("Linear")
        assert unrelated(layer(x), other(x))

    def test_a_forward_leaves_nothing_behind(self, backend: str, estimator: ModuleType) -> None:
        """No noise, sampled weight or counter on the layer; a trace at most, which keeps nothing."""
        layer = make(estimator, "Conv2d")
        before = {name: id(value) for name, value in vars(layer).items()}
        y = layer(example("Conv2d"))
        left = {name: value for name, value in vars(layer).items() if id(value) != before.get(name)}
        assert list(left) == (["_trace"] if backend == "native" else [])
        (y.sum() + layer.kl_loss()).backward()
        after = {name: id(value) for name, value in vars(layer).items() if name != "_trace"}
        assert after == before
        assert not list(layer.buffers())


MODES = ["zeros", "reflect", "replicate", "circular"]
# A layer, its arguments and options, and the shape of its input.
Geometry = tuple[str, tuple[Any, ...], dict[str, Any], tuple[int, ...]]
IN_EVERY_MODE: list[Geometry] = [
    ("Conv2d", (4, 6, (3, 2)), {"padding": 1, "stride": (2, 1), "groups": 2}, (2, 4, 7, 6)),
    ("Conv2d", (4, 6, (3, 2)), {"padding": (2, 1), "dilation": (2, 3), "bias": False}, (2, 4, 7, 6)),
    ("Conv2d", (4, 6, (3, 2)), {"padding": "same"}, (2, 4, 7, 6)),
    ("Conv2d", (4, 6, (3, 2)), {"padding": "same", "dilation": (3, 1), "groups": 2}, (2, 4, 7, 6)),
    ("Conv2d", (4, 6, (3, 2)), {"padding": "valid", "stride": 3}, (2, 4, 7, 6)),
    ("Conv1d", (2, 4, 4), {"padding": "same", "groups": 2}, (3, 2, 9)),
    ("Conv1d", (2, 4, 3), {"padding": 2, "stride": 2, "dilation": 2}, (3, 2, 9)),
    ("Conv3d", (2, 4, (1, 2, 3)), {"padding": "same"}, (2, 2, 4, 3, 4)),
    (
        "Conv3d",
        (2, 4, (2, 1, 3)),
        {"padding": (1, 0, 2), "stride": (1, 2, 1), "bias": False},
        (2, 2, 4, 3, 4),
    ),
]
GEOMETRIES: list[Geometry] = [
    *(
        (kind, arguments, {**options, "padding_mode": mode}, shape)
        for mode in MODES
        for kind, arguments, options, shape in IN_EVERY_MODE
    ),
    ("Conv2d", (6, 6, 3), {"groups": 6, "padding": 1}, (2, 6, 5, 5)),
    ("Conv2d", (3, 5, (1, 4)), {"stride": (1, 3), "padding": [0, 2]}, (1, 3, 1, 9)),
    ("Linear", (6, 5), {}, (4, 6)),
    ("Linear", (6, 5), {"bias": False}, (2, 3, 6)),
]


@pytest.mark.parametrize(("kind", "args", "options", "shape"), GEOMETRIES)
def test_equals_the_formulas_over_torch_nn(
    backend: str,
    estimator: ModuleType,
    kind: str,
    args: tuple[Any, ...],
    options: dict[str, Any],
    shape: tuple[int, ...],
) -> None:
    """Output and all gradients against a torch.nn layer fed with means, variances or drawn weights."""
    layer = make(estimator, kind, *args, dtype=torch.float64, **options)
    point = twin(kind, *args, dtype=torch.float64, **options)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    W, b = (layer.W_mu, layer.W_rho), (layer.bias_mu, layer.bias_rho)
    mean = with_weights(point, layer.W_mu, layer.bias_mu, x)
    torch.testing.assert_close(layer(x, sample=False), mean, rtol=1e-12, atol=1e-12)

    rng = seeded(5, draw_rng)
    if estimator is BBB:
        steps = torch.tensor([[0, 0], [0, 1]])
        drawn = [
            None if mu is None else mu + F.softplus(rho) * functional.normal(mu.shape, rng + step).double()
            for (mu, rho), step in zip((W, b), steps, strict=True)
        ]
        expected = with_weights(point, *drawn, x)
    elif estimator is Flipout:
        drawn = [
            None if mu is None else F.softplus(rho) * functional.normal(mu.shape, rng + step).double()
            for (mu, rho), step in zip((W, b), torch.tensor([[0, 0], [0, 1]]), strict=True)
        ]
        unbatched = kind != "Linear" and x.dim() < layer.W_mu.dim()

        def flipped(t: Tensor, stream: int) -> Tensor:
            rows = t.unsqueeze(0) if unbatched else t
            flipped = rows * reference.signs(rows.shape, rng, stream, -1 if kind == "Linear" else 1)
            return flipped.reshape(t.shape)

        expected = mean + flipped(with_weights(point, *drawn, flipped(x, 2)), 3)
    else:
        variances = [squared(sigma(rho)) for _, rho in (W, b)]
        v = with_weights(point, *variances, x * x)
        expected = mean + v.sqrt() * functional.normal(mean.shape, rng).double()
    y = seeded(5, layer, x)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    grad = torch.randn_like(y)
    inputs = [x, *layer.parameters()]
    for got, want in zip(
        torch.autograd.grad(y, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-5)


class TestInputs:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("mode", ["zeros", "circular"])
    def test_unbatched(self, backend: str, estimator: ModuleType, kind: str, mode: str) -> None:
        options = {} if kind == "Linear" else {"padding": 1, "padding_mode": mode}
        if "Transpose" in kind:
            options = {"dilation": 2, "output_padding": 1 if mode == "zeros" else 0}
        layer, x = make(estimator, kind, **options), example(kind)[0]
        for sample in (True, False):
            alone = seeded(1, layer, x, sample=sample)
            torch.testing.assert_close(alone, seeded(1, layer, x[None], sample=sample)[0])

    def test_linear_takes_any_batch_dimensions(self, backend: str, estimator: ModuleType) -> None:
        layer, x = make(estimator, "Linear"), torch.randn(3, 2, 4, 6)
        y = seeded(1, layer, x)
        assert y.shape == (3, 2, 4, 5)
        torch.testing.assert_close(y, seeded(1, layer, x.flatten(0, 2)).reshape(y.shape))

    @pytest.mark.parametrize("kind", KINDS)
    def test_non_contiguous(self, backend: str, estimator: ModuleType, kind: str) -> None:
        layer = make(estimator, kind)
        x = example(kind).repeat_interleave(2, dim=-1)[..., ::2]
        assert not x.is_contiguous()
        torch.testing.assert_close(seeded(1, layer, x), seeded(1, layer, x.contiguous()))

    @pytest.mark.parametrize("kind", KINDS)
    def test_empty_batch(self, backend: str, estimator: ModuleType, kind: str) -> None:
        layer = make(estimator, kind)
        x = example(kind)[:0].requires_grad_()
        y = layer(x)
        assert y.shape == twin(kind)(x).shape and y.shape[0] == 0
        y.sum().backward()
        for p in (x, *layer.parameters()):
            assert p.grad is not None and p.grad.shape == p.shape and not p.grad.any()

    def test_zero_features(self, backend: str, estimator: ModuleType) -> None:
        y = make(estimator, "Linear", 0, 3)(torch.randn(4, 0))
        assert y.shape == (4, 3) and y.isfinite().all()
        empty = make(estimator, "Linear", 3, 0)
        assert empty(torch.randn(4, 3)).shape == (4, 0)
        assert empty.kl_loss().item() == 0

    def test_channels_last_changes_no_bbb_output(self, backend: str) -> None:
        layer = make(BBB, "Conv2d")
        x = example("Conv2d")
        last = x.contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(seeded(1, layer, last), seeded(1, layer, x))

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("weight_too", [False, True])
    def test_channels_last_numbers_lrt_noise(self, backend: str, mode: str, weight_too: bool) -> None:
        """The noise index runs in the input's memory format, also behind a padding mode."""
        layer = make(BBB_LRT, "Conv2d", 3, 5, (3, 2), padding="same", padding_mode=mode)
        x = torch.randn(2, 3, 6, 5).contiguous(memory_format=torch.channels_last)
        if weight_too:
            layer = layer.to(memory_format=torch.channels_last)
        y = seeded(1, layer, x)
        assert y.is_contiguous(memory_format=torch.channels_last)
        rng = seeded(1, draw_rng)
        eps = functional.normal((2, 6, 5, 5), rng).permute(0, 3, 1, 2)
        point = twin("Conv2d", 3, 5, (3, 2), padding="same", padding_mode=mode)
        v = with_weights(point, squared(sigma(layer.W_rho)), squared(sigma(layer.bias_rho)), x * x)
        torch.testing.assert_close(y, layer(x, sample=False) + v.sqrt() * eps)

    def test_wrong_inputs_raise(self, backend: str, estimator: ModuleType) -> None:
        linear, conv = make(estimator, "Linear"), make(estimator, "Conv2d")
        for layer, x in [
            (linear, torch.randn(4, 5)),
            (linear, torch.ones(4, 6, dtype=torch.int64)),
            (linear, torch.randn(4, 6, dtype=torch.float64)),
            (conv, torch.randn(2, 3, 7, 6)),
            (conv, torch.randn(2, 7)),
            (conv, torch.randn(2, 4, 2, 6)),
            (conv, torch.randn(1, 2, 4, 7, 6)),
        ]:
            for sample in (True, False):
                with pytest.raises((RuntimeError, ValueError, TypeError)):
                    layer(x, sample=sample)

    @pytest.mark.parametrize("pinned", [False, True])
    @pytest.mark.parametrize(
        ("kind", "layout"),
        [("Linear", layout) for layout in ("coo", "csr", "nested", "jagged", "mkldnn")]
        + [("Conv2d", layout) for layout in ("coo", "nested", "jagged", "mkldnn")],
    )
    @pytest.mark.filterwarnings("ignore:.*beta state", "ignore:.*prototype")
    @pytest.mark.cpu_only("layouts of the CPU")
    def test_layouts(self, backend: str, estimator: ModuleType, kind: str, layout: str, pinned: bool) -> None:
        """Sparse and mkldnn inputs have a product with a drawn weight, and no square or convolution."""
        layer, dense = make(estimator, kind), example(kind)
        x = {
            "coo": lambda: dense.to_sparse(),
            "csr": lambda: dense.to_sparse_csr(),
            "nested": lambda: torch.nested.nested_tensor(list(dense)),
            "jagged": lambda: torch.nested.nested_tensor(list(dense), layout=torch.jagged),
            "mkldnn": lambda: dense.to_mkldnn(),
        }[layout]()
        context = bbb_fast.fixed_noise(1) if pinned else contextlib.nullcontext()
        weight_space = pinned or estimator is BBB
        with context, torch.no_grad():
            if kind == "Linear" and weight_space and layout in ("coo", "csr", "mkldnn"):
                torch.manual_seed(1)
                y = layer(x)
                torch.manual_seed(1)
                expected = layer(dense)
                torch.testing.assert_close(y if y.layout is torch.strided else y.to_dense(), expected)
            else:
                with pytest.raises(TypeError, match="input must be a dense tensor, got a"):
                    layer(x)

    @pytest.mark.parametrize("sample", [False, True])
    @pytest.mark.parametrize("x", [None, [1.0, 2.0], np.zeros((2, 6)), 3.0])
    def test_no_tensors(self, backend: str, estimator: ModuleType, x: Any, sample: bool) -> None:
        with pytest.raises(TypeError, match=f"BBBLinear: input must be a tensor, got {type(x).__name__}"):
            make(estimator, "Linear")(x, sample=sample)

    @pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn])
    def test_other_types(self, backend: str, estimator: ModuleType, dtype: torch.dtype) -> None:
        for kind in ("Linear", "Conv1d"):
            with pytest.raises(TypeError, match="input must be float32, float64, bfloat16 or float16, got"):
                make(estimator, kind)(example(kind).to(dtype))


def encoder_layer(estimator: ModuleType, **options: Any) -> nn.TransformerEncoderLayer:
    layer: Any = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, **options)
    layer.linear1, layer.linear2 = make(estimator, "Linear", 8, 16), make(estimator, "Linear", 16, 8)
    return layer


class TestWeightAttribute:
    """``layer.weight`` is there for torch.nn's transformers, and is never the means."""

    @pytest.mark.parametrize("options", [{}, {"norm_first": True}, {"activation": "gelu"}])
    @pytest.mark.parametrize("batch_first", [True, False])
    @pytest.mark.parametrize("compiled", [False, True])
    def test_encoder_layers_sample_in_eval_mode(
        self, estimator: ModuleType, options: dict[str, Any], batch_first: bool, compiled: bool
    ) -> None:
        torch._dynamo.reset()
        layer, x = encoder_layer(estimator, batch_first=batch_first, **options), torch.randn(3, 5, 8)
        run: Any = torch.compile(layer, fullgraph=True, backend="eager") if compiled else layer
        with bbb_fast.fixed_noise(0), torch.no_grad():
            expected = layer.train()(x)
            torch.testing.assert_close(run.eval()(x), expected)
        with torch.no_grad():
            assert not torch.equal(run(x), run(x))
        y = bbb_fast.predict(run, x, 2, seed=0)
        torch.testing.assert_close(y[0], expected)
        assert not torch.equal(y[0], y[1])

    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.filterwarnings("ignore:.*nested tensors")
    def test_encoders_sample_in_eval_mode(self, estimator: ModuleType, masked: bool) -> None:
        encoder = nn.TransformerEncoder(encoder_layer(estimator, batch_first=True), 2)
        x, mask = torch.randn(3, 5, 8), torch.zeros(3, 5, dtype=torch.bool)
        mask[1, 3:] = True

        def call(model: nn.Module, x: Tensor) -> Tensor:
            return model(x, src_key_padding_mask=mask if masked else None)

        with bbb_fast.fixed_noise(0), torch.no_grad():
            expected = call(encoder, x)
        y = bbb_fast.predict(encoder, x, 3, seed=0, call=call)
        torch.testing.assert_close(y[0][~mask], expected[~mask])
        assert not torch.equal(y[0], y[1])

    def test_decoders_and_whole_transformers(self, estimator: ModuleType) -> None:
        model = nn.Transformer(8, 2, 1, 1, 16, batch_first=True, dropout=0.0)
        for part in (model.encoder.layers[0], model.decoder.layers[0]):
            part.linear1, part.linear2 = make(estimator, "Linear", 8, 16), make(estimator, "Linear", 16, 8)
        x = torch.randn(3, 5, 8)
        whole = bbb_fast.predict(model, (x, x), 3, seed=0, call=lambda m, v: m(*v))
        parts = bbb_fast.predict(model, (x, x), 3, seed=0, call=lambda m, v: m(*v), batch_size=2)
        torch.testing.assert_close(parts, whole)
        assert not torch.equal(whole[0], whole[1])

    @pytest.mark.parametrize("training", [False, True])
    def test_attention_that_wants_the_numbers(self, estimator: ModuleType, training: bool) -> None:
        attention: Any = nn.MultiheadAttention(8, 2, batch_first=True).train(training)
        attention.out_proj = make(estimator, "Linear", 8, 8)
        x = torch.randn(3, 5, 8)
        with torch.no_grad(), pytest.raises(TypeError, match="BBBLinear.weight has no numbers"):
            attention(x, x, x)

    def test_what_may_be_read(self, estimator: ModuleType) -> None:
        layer = make(estimator, "Conv2d", 4, 6, 3, dtype=torch.float64)
        for name, mean in (("weight", layer.W_mu), ("bias", layer.bias_mu)):
            stand_in = getattr(layer, name)
            assert (stand_in.shape, stand_in.dtype, stand_in.device) == (mean.shape, mean.dtype, mean.device)
            assert stand_in.requires_grad and repr(stand_in).startswith(f"<BBBConv2d.{name} ")
            assert hasattr(layer, name) and not hasattr(stand_in, "__array_interface__")
        assert make(estimator, "Linear", 3, 2, bias=False).bias is None
        assert list(layer.state_dict()) == NAMES

    @pytest.mark.parametrize(
        "use",
        [
            lambda w: F.linear(torch.ones(4, 3), w),
            lambda w: torch.stack([torch.ones(2, 3), w]),
            lambda w: torch.sum(input=w),
            lambda w: nn.init.normal_(w),
            lambda w: nn.init.xavier_uniform_(w),
            lambda w: w.data,
            lambda w: w.detach(),
            lambda w: w + 1,
            lambda w: torch.ones(2, 3) * w,
            lambda w: w[0],
            lambda w: float(w),
            lambda w: np.asarray(w),
        ],
    )
    def test_what_may_not(self, estimator: ModuleType, use: Callable[[Any], Any]) -> None:
        with pytest.raises(TypeError, match="BBBLinear.weight has no numbers|DrawnAtEachForward"):
            use(make(estimator, "Linear", 3, 2).weight)

    def test_nothing_may_take_their_place(self, estimator: ModuleType) -> None:
        with pytest.raises((KeyError, AttributeError)):
            make(estimator, "Linear", 3, 2).weight = nn.Parameter(torch.ones(2, 3))


class TestPrecision:
    @pytest.mark.parametrize("kind", ["Linear", "Conv2d"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_autocast(self, backend: str, estimator: ModuleType, kind: str, dtype: torch.dtype) -> None:
        """The products narrow; parameters, their gradients and the KL do not."""
        layer, x = make(estimator, kind), example(kind).requires_grad_()
        full = seeded(1, layer, x).detach()
        kl = layer.kl_loss()
        with torch.autocast(DEVICE.type, dtype):
            y = seeded(1, layer, x)
            assert y.dtype == layer(x, sample=False).dtype == dtype
            inside = layer.kl_loss()
        assert inside.dtype == torch.float32 and torch.equal(inside, kl)
        torch.testing.assert_close(y.float(), full, rtol=0.05, atol=0.1)
        (y.float().sum() + inside).backward()
        assert {p.dtype for p in layer.parameters()} == {torch.float32}
        assert {p.grad.dtype for p in (x, *layer.parameters()) if p.grad is not None} == {torch.float32}
        assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())

    def test_autocast_leaves_float64_alone(self, backend: str, estimator: ModuleType) -> None:
        layer, x = make(estimator, "Linear").double(), example("Linear").double()
        with torch.autocast(DEVICE.type, torch.bfloat16):
            assert layer(x).dtype == torch.float64

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
    def test_converted_layers(
        self, backend: str, estimator: ModuleType, kind: str, dtype: torch.dtype
    ) -> None:
        layer, x = make(estimator, kind), example(kind)
        full, kl = seeded(1, layer, x), layer.kl_loss()
        layer = layer.to(dtype)
        y = seeded(1, layer, x.to(dtype))
        assert y.dtype == dtype
        tolerance = 1e-5 if dtype == torch.float64 else 0.1
        torch.testing.assert_close(y.float(), full, rtol=tolerance, atol=tolerance)
        assert layer.kl_loss().dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(
            layer.kl_loss().float(), kl, rtol=1e-6 if tolerance < 0.1 else 0.02, atol=0
        )
        (y.float().sum() + layer.kl_loss()).backward()
        for p in layer.parameters():
            assert p.grad is not None and p.grad.isfinite().all()
            assert p.is_leaf and p.dtype == p.grad.dtype == dtype

    def test_half_without_variance(self, backend: str, estimator: ModuleType) -> None:
        """Zero input, no bias: v = 0 exactly, and sigma too small for float16's squares."""
        layer = make(estimator, "Linear", 6, 5, bias=False).half()
        with torch.no_grad():
            layer.W_rho.fill_(-12.0)
        x = torch.zeros(3, 6, dtype=torch.float16, requires_grad=True)
        y = layer(x)
        assert torch.equal(y, torch.zeros_like(y))
        y.float().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in (x, *layer.parameters()))


class TestKl:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_equals_torch_distributions(
        self, backend: str, estimator: ModuleType, kind: str, bias: bool, dtype: torch.dtype
    ) -> None:
        priors = {"prior_mu": 0.3, "prior_sigma": 0.7}
        layer = make(estimator, kind, bias=bias, priors=priors, dtype=dtype)
        kl, exact = layer.kl_loss(), exact_kl(layer)
        assert kl.shape == () and kl.dtype == dtype
        torch.testing.assert_close(kl.double(), exact, rtol=1e-6, atol=0)
        for got, want in zip(
            torch.autograd.grad(kl, list(layer.parameters())),
            torch.autograd.grad(exact, list(layer.parameters())),
            strict=True,
        ):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)

    def test_is_posterior_against_prior_and_summed(self, backend: str, estimator: ModuleType) -> None:
        """One weight whose KL is known by hand; the other direction and the mean are other numbers."""
        layer = estimator.BBBLinear(1, 1, bias=False, priors={"prior_mu": 1.0, "prior_sigma": 2.0})
        with torch.no_grad():
            layer.W_mu.fill_(0.0)
            layer.W_rho.fill_(math.log(math.expm1(0.5)))
        by_hand = math.log(2 / 0.5) + (0.5**2 + 1) / (2 * 2**2) - 0.5
        other_way = math.log(0.5 / 2) + (2**2 + 1) / (2 * 0.5**2) - 0.5
        assert abs(by_hand - other_way) > 1
        assert layer.kl_loss().item() == pytest.approx(by_hand, rel=1e-6)
        many = estimator.BBBLinear(30, 20, priors={"prior_mu": 1.0, "prior_sigma": 2.0})
        with torch.no_grad():
            for mu, rho in many.posterior():
                mu.fill_(0.0)
                rho.fill_(math.log(math.expm1(0.5)))
        assert many.kl_loss().item() == pytest.approx(620 * by_hand, rel=1e-6)

    def test_is_zero_at_the_prior(self, backend: str, estimator: ModuleType) -> None:
        start = {"posterior_mu_initial": (0.2, 0), "posterior_rho_initial": (-1.0, 0)}
        prior_sigma = math.log1p(math.exp(-1))
        layer = estimator.BBBLinear(9, 9, priors={**start, "prior_mu": 0.2, "prior_sigma": prior_sigma})
        assert abs(layer.kl_loss().item()) < 1e-5

    def test_any_time(self, backend: str, estimator: ModuleType) -> None:
        """Before a forward, after one, under no_grad, after an optimizer step, in eval mode."""
        layer, x = make(estimator, "Linear"), example("Linear")
        before = rng_state()
        fresh = layer.kl_loss()
        assert torch.equal(rng_state(), before)
        torch.testing.assert_close(fresh.double(), exact_kl(layer), rtol=1e-6, atol=0)
        loss = layer(x).square().mean() + layer.kl_loss()
        assert torch.equal(layer.kl_loss(), fresh)
        with torch.no_grad():
            quiet = layer.kl_loss()
        assert torch.equal(quiet, fresh) and not quiet.requires_grad and fresh.requires_grad
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
        loss.backward()
        optimizer.step()
        stepped = layer.eval().kl_loss()
        assert stepped.item() < fresh.item()
        torch.testing.assert_close(stepped.double(), exact_kl(layer), rtol=1e-6, atol=0)

    @pytest.mark.parametrize("rho", [-200.0, -90.0, -30.0, 0.0, 30.0, 100.0])
    def test_extreme_rho(self, backend: str, estimator: ModuleType, rho: float) -> None:
        start = {"posterior_mu_initial": (0, 0), "posterior_rho_initial": (rho, 0)}
        layer = estimator.BBBLinear(3, 2, priors=start)
        kl = layer.kl_loss()
        torch.testing.assert_close(kl.double(), exact_kl(layer), rtol=1e-6, atol=0)
        kl.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
        assert layer(torch.randn(4, 3)).isfinite().all()

    def test_follows_the_attributes(self, backend: str, estimator: ModuleType) -> None:
        layer = make(estimator, "Linear")
        layer.set_flag("prior_sigma", 0.5)
        torch.testing.assert_close(layer.kl_loss().double(), exact_kl(layer), rtol=1e-6, atol=0)


def change_in_place(layer: BayesianLayer) -> None:
    with torch.no_grad():
        layer.W_mu.add_(0.3)


def change_bias_in_place(layer: Any) -> None:
    with torch.no_grad():
        layer.bias_rho.mul_(1.5)


def step(layer: BayesianLayer) -> None:
    layer(example("Linear")).sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    layer.zero_grad()


def replace(layer: BayesianLayer) -> None:
    new = nn.Parameter(torch.full_like(layer.W_rho, -1.0))
    with torch.no_grad():  # of the same version: it is another parameter all the same
        while new._version < layer.W_rho._version:
            new.mul_(1)
    layer.W_rho = new


def replace_data(layer: BayesianLayer) -> None:
    layer.W_mu.data = torch.ones_like(layer.W_mu)


def write_data(layer: BayesianLayer) -> None:
    layer.W_mu.data.add_(0.5)


def write_numpy(layer: BayesianLayer) -> None:
    layer.W_rho.detach().cpu().numpy()[:] = -0.5  # on a GPU, of a copy


def fused_step(name: str) -> Callable[[BayesianLayer], None]:
    """A step of an optimizer that writes past autograd's version counters."""

    def step(layer: BayesianLayer) -> None:
        for p in layer.parameters():
            p.grad = torch.ones_like(p)
        getattr(torch.optim, name)(layer.parameters(), lr=0.1, fused=True).step()
        layer.zero_grad()

    return step


def drop_bias(layer: BayesianLayer) -> None:
    layer.bias_mu = layer.bias_rho = None


def load(layer: BayesianLayer) -> None:
    layer.load_state_dict({name: p + 0.2 for name, p in layer.state_dict().items()})


def assign(layer: BayesianLayer) -> None:
    layer.load_state_dict({name: p + 0.2 for name, p in layer.state_dict().items()}, assign=True)


# What may happen to a layer between its forward and kl_loss().
CHANGES: dict[str, Callable[[BayesianLayer], Any]] = {
    "nothing": lambda layer: None,
    "in place": change_in_place,
    "bias in place": change_bias_in_place,
    "optimizer step": step,
    "SGD, fused": fused_step("SGD"),
    "Adam, fused": fused_step("Adam"),
    "AdamW, fused": fused_step("AdamW"),
    "Adagrad, fused": fused_step("Adagrad"),
    "written to .data": write_data,
    "written by numpy": write_numpy,
    "shared memory": lambda layer: layer.share_memory(),
    "another parameter": replace,
    "other data": replace_data,
    "no bias": drop_bias,
    "reset": lambda layer: layer.reset_parameters(),
    "load_state_dict": load,
    "load_state_dict, assign": assign,
    "prior_sigma": lambda layer: layer.set_flag("prior_sigma", 0.7),
    "prior_mu": lambda layer: setattr(layer, "prior_mu", -0.4),
    "float64": lambda layer: layer.double(),
    "bfloat16": lambda layer: layer.bfloat16(),
    "frozen": lambda layer: layer.W_mu.requires_grad_(False),
    "other forwards": lambda layer: [layer(example("Linear")) for _ in range(2)],
    "forward of the means": lambda layer: layer(example("Linear"), sample=False),
    "no_grad forward": torch.no_grad()(lambda layer: layer(example("Linear"))),
}


class TestForwardKl:
    """kl_loss() after a forward: of the parameters as they are, and its backward beside the output's."""

    @pytest.mark.parametrize("change", CHANGES)
    def test_is_the_kl_of_now(self, backend: str, estimator: ModuleType, change: str) -> None:
        """Value and gradients, whatever happened since the forward."""
        if change == "Adagrad, fused" and DEVICE.type == "cuda":
            pytest.skip("PyTorch's fused Adagrad is for the CPU")
        layer = make(estimator, "Linear", priors={"prior_mu": 0.1, "prior_sigma": 0.4})
        layer(example("Linear"))
        CHANGES[change](layer)
        mu, rho = zip(*layer.posterior(), strict=True)
        wanted = [p for p in layer.parameters() if p.requires_grad]
        expected = functional.kl_divergence(mu, rho, layer.prior_mu, layer.prior_sigma)
        for kl in (layer.kl_loss(), layer.kl_loss()):
            assert kl.dtype == expected.dtype and kl.shape == ()
            torch.testing.assert_close(kl, expected, rtol=1e-6, atol=0)
            for got, want in zip(
                torch.autograd.grad(kl, wanted),
                torch.autograd.grad(expected, wanted, retain_graph=True),
                strict=True,
            ):
                assert got.dtype == want.dtype
                torch.testing.assert_close(
                    got, want, rtol=1e-6 if got.dtype != torch.bfloat16 else 0.02, atol=1e-6
                )

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("bias", [True, False])
    def test_is_that_of_the_forward(self, native: None, estimator: ModuleType, kind: str, bias: bool) -> None:
        """The same number and gradients as without a forward, as often as it is asked for."""
        layer = make(estimator, kind, bias=bias)
        parameters = list(layer.parameters())
        before = layer.kl_loss()
        expected = torch.autograd.grad(before, parameters)
        y = layer(example(kind))
        torch.testing.assert_close(before.double(), exact_kl(layer), rtol=1e-6, atol=0)
        for kl in (layer.kl_loss(), layer.kl_loss()):
            assert torch.equal(kl, before)
            assert all(map(torch.equal, torch.autograd.grad(kl, parameters), expected))
        assert y.requires_grad

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("order", ["output first", "KL first"])
    def test_one_backward_after_the_other(
        self, backend: str, estimator: ModuleType, kind: str, order: str
    ) -> None:
        """The same gradients as those of the sum."""
        layer, x = make(estimator, kind), example(kind).requires_grad_()
        leaves = [x, *layer.parameters()]
        y = seeded(3, layer, x)
        expected = torch.autograd.grad(y.square().sum() + layer.kl_loss(), leaves)
        y = seeded(3, layer, x)
        parts = [y.square().sum(), layer.kl_loss()]
        for part in parts if order == "output first" else parts[::-1]:
            part.backward()
        torch.testing.assert_close([t.grad for t in leaves], list(expected), rtol=1e-5, atol=1e-5)

    def test_gradient_of_the_kl_alone(self, backend: str, estimator: ModuleType) -> None:
        """The input and the output have no part in it."""
        layer, x = make(estimator, "Linear"), example("Linear").requires_grad_()
        layer(x)
        kl = layer.kl_loss()
        *gradients, none = torch.autograd.grad(kl, [*layer.parameters(), x], allow_unused=True)
        assert none is None or not none.any()
        expected = torch.autograd.grad(exact_kl(layer), list(layer.parameters()))
        torch.testing.assert_close(gradients, list(expected), rtol=1e-5, atol=1e-6)

    def test_two_forwards_then_one_kl(self, backend: str, estimator: ModuleType) -> None:
        layer, x = make(estimator, "Linear"), example("Linear")
        parameters = list(layer.parameters())
        first, second = seeded(5, layer, x), layer(x)
        kl = layer.kl_loss()
        together = torch.autograd.grad((first - second).square().sum() + kl, parameters)
        first, second = seeded(5, layer, x), layer(x)
        apart = torch.autograd.grad((first - second).square().sum(), parameters)
        exact = torch.autograd.grad(exact_kl(layer), parameters)
        for got, a, b in zip(together, apart, exact, strict=True):
            torch.testing.assert_close(got, a + b, rtol=1e-5, atol=1e-5)

    def test_a_second_loss(self, backend: str, estimator: ModuleType) -> None:
        """It meets no graph whose backward is done."""
        layer, x = make(estimator, "Linear"), example("Linear")
        y = layer(x)
        (y.square().sum() + layer.kl_loss()).backward()
        again = layer.kl_loss()
        layer.zero_grad()
        again.backward()
        expected = torch.autograd.grad(exact_kl(layer), list(layer.parameters()))
        torch.testing.assert_close([p.grad for p in layer.parameters()], list(expected), rtol=1e-5, atol=1e-6)

    def test_without_grad(self, backend: str, estimator: ModuleType) -> None:
        """A logged KL has no graph, and takes nothing from the loss."""
        layer, x = make(estimator, "Linear"), example("Linear")
        layer(x)
        with torch.no_grad():
            quiet = layer.kl_loss()
        with torch.inference_mode():
            layer.kl_loss()
        assert not quiet.requires_grad
        kl = layer.kl_loss()
        assert torch.equal(kl, quiet) and kl.requires_grad

    def test_a_forward_under_no_grad_leaves_none(self, backend: str, estimator: ModuleType) -> None:
        layer, x = make(estimator, "Linear"), example("Linear")
        with torch.no_grad():
            layer(x)
        assert layer._trace is None
        assert layer.kl_loss().requires_grad

    def test_unfrozen_after_the_forward(self, backend: str, estimator: ModuleType) -> None:
        layer = make(estimator, "Linear").requires_grad_(False)
        layer(example("Linear"))
        layer.requires_grad_(True)
        torch.autograd.grad(layer.kl_loss(), list(layer.parameters()))

    def test_parameters_changed_before_backward(self, native: None, estimator: ModuleType) -> None:
        """PyTorch's error, not the gradient of other numbers."""
        layer = make(estimator, "Linear")
        y = layer(example("Linear"))
        kl = layer.kl_loss()
        change_in_place(layer)
        for result in (y.sum(), kl):
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                result.backward()

    def test_backward_twice(self, backend: str, estimator: ModuleType) -> None:
        """PyTorch's own error without retain_graph; with it, the same gradients again."""
        layer, x = make(estimator, "Linear"), example("Linear").requires_grad_()
        leaves = [x, *layer.parameters()]
        loss = layer(x).square().sum() + layer.kl_loss()
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        second = torch.autograd.grad(loss, leaves)
        assert all(map(torch.equal, first, second))
        y = layer(x).sum()
        y.backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            y.backward()

    @pytest.mark.parametrize("of", ["output", "kl"])
    def test_second_derivative_raises(self, native: None, estimator: ModuleType, of: str) -> None:
        layer, x = make(estimator, "Linear"), example("Linear")
        y = layer(x).square().sum()
        result = y if of == "output" else layer.kl_loss()
        (g,) = torch.autograd.grad(result, layer.W_rho, create_graph=True)
        with pytest.raises(RuntimeError, match="_backward: second derivatives are not implemented"):
            g.sum().backward()

    @pytest.mark.parametrize("wrt", ["input", "parameters"])
    def test_forward_mode_raises(self, native: None, estimator: ModuleType, wrt: str) -> None:
        layer, x = make(estimator, "Linear"), example("Linear")
        with pytest.raises(
            NotImplementedError, match="_linear: forward-mode derivatives are not implemented"
        ):
            if wrt == "input":
                torch.func.jvp(layer, (x,), (x,))
            else:
                p = {name: t.detach() for name, t in layer.named_parameters()}
                torch.func.jvp(lambda p: torch.func.functional_call(layer, p, (x,)), (p,), (p,))

    @pytest.mark.parametrize("kind", KINDS)
    def test_copies_after_a_forward(self, backend: str, estimator: ModuleType, kind: str) -> None:
        """The copy has no trace of it; the layer keeps its own."""
        layer = make(estimator, kind, priors={"prior_sigma": 0.3})
        y = layer(example(kind))
        trace = layer._trace
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        copies = [
            copy.deepcopy(layer),
            copy.copy(layer),
            pickle.loads(pickle.dumps(layer)),
            torch.load(file, weights_only=False),
        ]
        kl = layer.kl_loss()
        for copied in copies:
            assert copied._trace is None
            theirs = copied.kl_loss()
            torch.testing.assert_close(theirs, kl, rtol=1e-6, atol=0)
            torch.autograd.grad(theirs, list(copied.parameters()))
        assert layer._trace is trace and (trace is None) == (backend == "reference") and y.requires_grad

    def test_functional_call_leaves_the_layer_its_own(self, backend: str, estimator: ModuleType) -> None:
        layer, x = make(estimator, "Linear"), example("Linear")
        others = {name: (p.detach() + 1).requires_grad_() for name, p in layer.named_parameters()}
        torch.func.functional_call(layer, others, (x,))
        kl = layer.kl_loss()
        torch.testing.assert_close(kl.double(), exact_kl(layer), rtol=1e-6, atol=0)
        torch.autograd.grad(kl, list(layer.parameters()))
        seen = [weakref.ref(p) for p in others.values()]
        del others
        assert not any(ref() is not None for ref in seen)

    @pytest.mark.parametrize("ask", [False, True])
    def test_a_forward_keeps_no_parameter_alive(self, backend: str, estimator: ModuleType, ask: bool) -> None:
        """torch swaps a parameter's contents only where nobody else holds it."""
        layer = make(estimator, "Linear")
        layer(example("Linear"))
        if ask:
            (layer(example("Linear")).sum() + layer.kl_loss()).backward()
        before = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            layer.to(torch.float64)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(before)
        assert layer.kl_loss().dtype == torch.float64

    @pytest.mark.parametrize("reentrant", [True, False])
    @pytest.mark.parametrize("separately", [True, False])
    def test_activation_checkpointing(
        self, backend: str, estimator: ModuleType, reentrant: bool, separately: bool
    ) -> None:
        """The KL of a layer inside, and another one after its recomputation."""
        layer, x = make(estimator, "Linear"), example("Linear").requires_grad_()
        leaves = [x, *layer.parameters()]
        y = seeded(4, layer, x)
        expected = torch.autograd.grad(y.square().sum() + layer.kl_loss(), leaves)
        y = seeded(4, checkpoint, layer, x, use_reentrant=reentrant)
        kl = layer.kl_loss()
        if separately:
            y.square().sum().backward()
            kl.backward()
        else:
            (y.square().sum() + kl).backward()
        torch.testing.assert_close([t.grad for t in leaves], list(expected), rtol=1e-5, atol=1e-5)
        layer.zero_grad()
        layer.kl_loss().backward()
        exact = torch.autograd.grad(exact_kl(layer), list(layer.parameters()))
        torch.testing.assert_close([p.grad for p in layer.parameters()], list(exact), rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("transform", ["vmap", "grad", "vjp", "fake"])
    def test_after_a_transform(self, native: None, estimator: ModuleType, transform: str) -> None:
        """Nothing of a torch.func transform, or of a run without numbers, outlives it."""
        layer, x = make(estimator, "Linear"), example("Linear")
        if transform == "vmap":
            torch.vmap(layer, randomness="different")(x.expand(3, 4, 6))
        elif transform == "grad":
            torch.func.grad(lambda x: layer(x).sum())(x)
        elif transform == "vjp":
            torch.func.vjp(layer, x)
        else:
            with FakeTensorMode(allow_non_fake_inputs=True):
                layer(x)
        kl = layer.kl_loss()
        assert kl.item() == pytest.approx(exact_kl(layer).item(), rel=1e-6)
        torch.autograd.grad(kl, list(layer.parameters()))

    def test_parameters_of_inference_mode(self, backend: str, estimator: ModuleType) -> None:
        """They have no version; a layer of theirs runs all the same."""
        with torch.inference_mode():
            layer = make(estimator, "Linear").requires_grad_(False)
        assert layer(example("Linear")).shape == (4, 5)
        torch.testing.assert_close(layer.kl_loss().double(), exact_kl(layer), rtol=1e-6, atol=0)

    def test_of_a_layer_pickled_before_there_was_one(self, backend: str, estimator: ModuleType) -> None:
        old = make(estimator, "Linear")
        for name in ("_trace", "recompute_weight", "variance_dtype"):
            vars(old).pop(name, None)
        layer = pickle.loads(pickle.dumps(old))
        del layer._trace
        torch.testing.assert_close(layer.kl_loss().double(), exact_kl(layer), rtol=1e-6, atol=0)
        (layer(example("Linear")).sum() + layer.kl_loss()).backward()


class TestAtOnce:
    """A forward is one call of the extension, unless someone must see the op being called."""

    @pytest.mark.parametrize("kind", KINDS)
    def test_same_draw_as_through_the_op(self, native: None, estimator: ModuleType, kind: str) -> None:
        """Numbers and gradients; a tensor of another class takes the long way."""
        layer, x = make(estimator, kind), example(kind).requires_grad_()
        results = []
        for one in (x, nn.Parameter(x.detach())):
            y = seeded(3, layer, one)
            results.append((y, *torch.autograd.grad(y.square().sum(), [one, *layer.parameters()])))
        assert all(map(torch.equal, *results))

    def test_torch_function_mode_sees_the_op(self, native: None, estimator: ModuleType) -> None:
        seen = []

        class Mode(TorchFunctionMode):
            def __torch_function__(
                self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
            ) -> Any:
                seen.append(str(func))
                return func(*args, **(kwargs or {}))

        for default_device in (False, True):
            seen.clear()
            with Mode(), torch.device(DEVICE) if default_device else contextlib.nullcontext():
                make(estimator, "Linear")(example("Linear"))
            assert any("bbb_fast" in name for name in seen)

    @pytest.mark.parametrize("default_device", [False, True])
    def test_hooks_of_saved_tensors_run_as_elsewhere(
        self, native: None, estimator: ModuleType, default_device: bool
    ) -> None:
        """The one call that a forward is switches nothing off for the Python code that runs within it."""
        seen = []

        class Watching(torch.Tensor):
            @classmethod
            def __torch_function__(
                cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
            ) -> Any:
                seen.append(func)
                return super().__torch_function__(func, types, args, kwargs)

        def pack(t: Tensor) -> Tensor:
            torch.add(torch.zeros(2).as_subclass(Watching), 1)
            return t

        layer, x = make(estimator, "Linear"), example("Linear")
        with (
            torch.device(DEVICE) if default_device else contextlib.nullcontext(),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        ):
            layer(x)
        assert torch.add in seen

    def test_a_default_device_is_no_detour(self, native: None, estimator: ModuleType) -> None:
        """torch.set_default_device and torch.device as a context are torch function modes too."""
        layer, x = make(estimator, "Linear"), example("Linear")
        expected = seeded(3, layer, x)
        with torch.device(DEVICE):
            layer._trace = None
            y = seeded(3, layer, x)
            assert torch.equal(y, expected) and layer._trace is not None
            assert torch.zeros(1).device.type == DEVICE.type
            (y.sum() + layer.kl_loss()).backward()

    def test_torch_dispatch_mode_sees_the_op(self, native: None, estimator: ModuleType) -> None:
        layer, seen = make(estimator, "Linear"), []

        class Mode(TorchDispatchMode):
            def __torch_dispatch__(
                self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
            ) -> Any:
                seen.append(func)
                return func(*args, **(kwargs or {}))

        with Mode():
            layer(example("Linear")).sum().backward()
        name = layer.estimator + "_linear"
        ops = torch.ops.bbb_fast
        assert getattr(ops, name).default in seen and getattr(ops, name + "_backward").default in seen

    def test_parametrized_weight(self, backend: str, estimator: ModuleType) -> None:
        """torch.nn.utils.parametrize takes W_mu out of the layer's own parameters."""
        layer, x = make(estimator, "Linear"), example("Linear")
        nn.utils.parametrize.register_parametrization(layer, "W_mu", nn.Softplus())
        original: Any = layer.parametrizations.W_mu.original
        expected = torch.autograd.grad(exact_kl(layer), original)
        y, kl = layer(x), layer.kl_loss()
        torch.testing.assert_close(kl.double(), exact_kl(layer), rtol=1e-6, atol=0)
        torch.testing.assert_close(torch.autograd.grad(kl, original), expected, rtol=1e-5, atol=1e-6)
        assert torch.autograd.grad(y.sum(), original)[0].abs().sum() > 0

    @pytest.mark.parametrize("attribute", ["stride", "padding", "dilation"])
    def test_geometry_changed_later(self, native: None, estimator: ModuleType, attribute: str) -> None:
        layer = make(estimator, "Conv2d")
        setattr(layer, attribute, (2, 1))
        expected = getattr(functional, f"{layer.estimator}_conv2d")
        x, own = example("Conv2d"), (layer.W_mu, layer.W_rho, layer.bias_mu, layer.bias_rho)
        geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
        want = expected(x, *own, seeded(4, draw_rng), *geometry)
        assert torch.equal(seeded(4, layer, x), want)


class TestOptions:
    """recompute_weight and variance_dtype."""

    @pytest.mark.parametrize("kind", KINDS)
    def test_recompute_weight_changes_no_bit(self, backend: str, kind: str) -> None:
        layer, x = make(BBB, kind), example(kind).requires_grad_()
        again = getattr(BBB, f"BBB{kind}")(*ARGUMENTS[kind][0], recompute_weight=True)
        again.load_state_dict(layer.state_dict())
        assert again.recompute_weight and not layer.recompute_weight
        results = []
        for model in (layer, again):
            y = seeded(1, model, x)
            loss = y.square().sum() + model.kl_loss()
            results.append([y, loss, *torch.autograd.grad(loss, [x, *model.parameters()])])
        assert all(map(torch.equal, *results))

    @pytest.mark.parametrize("kind", KINDS)
    def test_variance_dtype_is_that_of_the_op(self, backend: str, kind: str) -> None:
        layer, x = make(BBB_LRT, kind), example(kind)
        narrow = getattr(BBB_LRT, f"BBB{kind}")(*ARGUMENTS[kind][0], variance_dtype=torch.bfloat16)
        narrow.load_state_dict(layer.state_dict())
        assert narrow.variance_dtype == torch.bfloat16 and layer.variance_dtype is None
        op = getattr(functional, f"lrt_{layer._shape_name}")
        parameters = (layer.W_mu, layer.W_rho, layer.bias_mu, layer.bias_rho)
        geometry = {"stride": layer.stride, "padding": layer.padding} if "Conv" in kind else {}
        expected = op(x, *parameters, seeded(1, draw_rng), variance_dtype=torch.bfloat16, **geometry)
        y = seeded(1, narrow, x)
        assert torch.equal(y, expected) and y.dtype == torch.float32
        assert not torch.equal(y, seeded(1, layer, x))
        layer.variance_dtype = torch.bfloat16
        assert torch.equal(y, seeded(1, layer, x))

    def test_set_flag_reaches_the_layers_of_a_model(self, backend: str) -> None:
        """Each reads its own option; a layer of the other estimator does not mind."""
        bbb, lrt = make(BBB, "Linear", 6, 6), make(BBB_LRT, "Linear", 6, 6)
        model, x = Wrapper(first=bbb, second=lrt), torch.randn(4, 6)
        before = seeded(1, model, x)[0]
        model.set_flag("recompute_weight", True)
        assert bbb.recompute_weight and torch.equal(seeded(1, model, x)[0], before)
        model.set_flag("variance_dtype", torch.bfloat16)
        assert lrt.variance_dtype == torch.bfloat16
        after, kl = seeded(1, model, x)
        assert not torch.equal(after, before)
        (after.sum() + kl).backward()

    def test_fixed_noise_draws_weights_under_any_option(self, backend: str) -> None:
        """An LRT layer has drawn weights there, to which its variance's type means nothing."""
        layer, x = make(BBB_LRT, "Linear"), example("Linear")
        with bbb_fast.fixed_noise(3):
            expected = layer(x)
        layer.variance_dtype = torch.bfloat16
        with bbb_fast.fixed_noise(3):
            assert torch.equal(layer(x), expected)

    @pytest.mark.parametrize("kind", KINDS)
    def test_of_the_other_estimator(self, kind: str) -> None:
        arguments = ARGUMENTS[kind][0]
        with pytest.raises(ValueError) as caught:
            getattr(BBB_LRT, f"BBB{kind}")(*arguments, recompute_weight=True)
        assert str(caught.value) == (
            f"BBB{kind}: recompute_weight is an option of bbb and flipout, and this layer's estimator is lrt"
        )
        with pytest.raises(ValueError) as caught:
            getattr(BBB, f"BBB{kind}")(*arguments, variance_dtype=torch.bfloat16)
        assert str(caught.value) == (
            f"BBB{kind}: variance_dtype is an option of lrt, and this layer's estimator is bbb"
        )

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, "bfloat16"])
    def test_variance_dtype_must_be_floating(self, backend: str, kind: str, dtype: Any) -> None:
        """In the constructor, and at the forward when it was set later."""
        message = "variance_dtype must be float32, float64, bfloat16"
        with pytest.raises(TypeError, match=f"^BBB{kind}: {message}, float16 or 'auto', got"):
            getattr(BBB_LRT, f"BBB{kind}")(*ARGUMENTS[kind][0], variance_dtype=dtype)
        layer = make(BBB_LRT, kind)
        layer.variance_dtype = dtype
        with pytest.raises(
            (TypeError, RuntimeError), match=message if isinstance(dtype, torch.dtype) else None
        ):
            layer(example(kind))


class TestGradients:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("bias", [True, False])
    def test_reach_every_parameter(self, backend: str, estimator: ModuleType, kind: str, bias: bool) -> None:
        layer, x = make(estimator, kind, bias=bias), example(kind).requires_grad_()
        layer(x).square().sum().backward()
        for p in (x, *layer.parameters()):
            assert p.grad is not None and p.grad.isfinite().all() and p.grad.all()

    @pytest.mark.parametrize("kind", KINDS)
    def test_several_forwards_before_one_backward(
        self, backend: str, estimator: ModuleType, kind: str
    ) -> None:
        """Each output differentiates with its own noise: no buffer is shared between calls."""
        layer = make(estimator, kind, dtype=torch.float64)
        inputs = [example(kind, dtype=torch.float64) for _ in range(3)]
        torch.manual_seed(2)
        outputs = [layer(x) for x in inputs]
        weights = [torch.randn_like(y) for y in outputs]
        together = torch.autograd.grad(
            sum((y * w).sum() for y, w in zip(outputs, weights, strict=True)), list(layer.parameters())
        )
        torch.manual_seed(2)
        apart = [torch.zeros_like(p) for p in layer.parameters()]
        for x, w in zip(inputs, weights, strict=True):
            for total, g in zip(
                apart, torch.autograd.grad((layer(x) * w).sum(), list(layer.parameters())), strict=True
            ):
                total += g
        torch.testing.assert_close(list(together), apart, rtol=1e-10, atol=1e-10)

    def test_several_backwards_through_one_forward(self, backend: str, estimator: ModuleType) -> None:
        layer = make(estimator, "Conv2d")
        y, parameters = layer(example("Conv2d")).sum(), list(layer.parameters())
        first = torch.autograd.grad(y, parameters, retain_graph=True)
        layer(example("Conv2d"))
        assert all(map(torch.equal, first, torch.autograd.grad(y, parameters)))

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_activation_checkpointing(self, backend: str, estimator: ModuleType, reentrant: bool) -> None:
        model = nn.Sequential(
            make(estimator, "Conv2d"), nn.Softplus(), nn.Flatten(), make(estimator, "Linear", 150, 3)
        )
        x, parameters = example("Conv2d").requires_grad_(), list(model.parameters())
        plain = seeded(4, model, x)
        expected = torch.autograd.grad(plain.square().sum(), parameters)
        y = seeded(4, checkpoint, model, x, use_reentrant=reentrant, preserve_rng_state=True)
        torch.manual_seed(99)  # as any later forward would move the generator
        assert torch.equal(y, plain)
        y.square().sum().backward()
        torch.testing.assert_close([p.grad for p in parameters], list(expected), rtol=1e-6, atol=1e-6)

    def test_frozen_parameters(self, backend: str, estimator: ModuleType) -> None:
        """Only what wants a gradient gets one, also after a conversion."""
        layer = make(estimator, "Linear")
        layer.W_rho.requires_grad_(False)
        layer.bias_mu.requires_grad_(False)
        layer = layer.double()
        (layer(example("Linear").double()).square().sum() + layer.kl_loss()).backward()
        assert [n for n, p in layer.named_parameters() if p.grad is not None] == ["W_mu", "bias_rho"]
        assert layer.W_mu.grad.all() and layer.bias_rho.grad.all()

    def test_no_grad_and_inference_mode(self, backend: str, estimator: ModuleType) -> None:
        layer, x = make(estimator, "Linear"), example("Linear")
        with torch.no_grad():
            quiet = seeded(1, layer, x)
        with torch.inference_mode():
            inference = seeded(1, layer, x)
            layer.kl_loss()
        assert not quiet.requires_grad and torch.equal(quiet, inference)
        assert torch.equal(seeded(1, layer, x), quiet)

    def test_training_lowers_the_loss(self, backend: str, estimator: ModuleType) -> None:
        """A line through noise: the mean weights approach it, and sigma shrinks."""
        x = torch.randn(64, 3)
        target = x @ torch.tensor([[1.0], [-2.0], [0.5]]) + 0.3
        layer = make(estimator, "Linear", 3, 1, priors={"prior_sigma": 1.0})
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
        for _ in range(150):
            optimizer.zero_grad()
            loss = 64 * (layer(x) - target).square().mean() / 0.02 + layer.kl_loss()
            loss.backward()
            optimizer.step()
        assert (layer.W_mu - torch.tensor([[1.0, -2.0, 0.5]])).abs().max() < 0.15
        # The GPU's generator draws another run, and one run in twenty ends a little above 0.15.
        assert F.softplus(layer.W_rho).max() < (0.15 if DEVICE.type == "cpu" else 0.2)


class TestCopies:
    @pytest.mark.parametrize("kind", KINDS)
    def test_deepcopy(self, backend: str, estimator: ModuleType, kind: str) -> None:
        layer, x = make(estimator, kind, priors={"prior_sigma": 0.3}), example(kind)
        layer(x).sum().backward()
        copied = copy.deepcopy(layer)
        assert torch.equal(seeded(1, copied, x), seeded(1, layer, x))
        assert torch.equal(copied.kl_loss(), layer.kl_loss())
        with torch.no_grad():
            copied.W_mu.add_(1)
        assert not torch.equal(copied.W_mu, layer.W_mu)

    @pytest.mark.parametrize("kind", KINDS)
    def test_pickle(self, estimator: ModuleType, kind: str) -> None:
        layer, x = make(estimator, kind, priors={"prior_sigma": 0.3}), example(kind)
        loaded = pickle.loads(pickle.dumps(layer))
        assert torch.equal(seeded(1, loaded, x), seeded(1, layer, x))
        assert torch.equal(loaded.kl_loss(), layer.kl_loss())

    @pytest.mark.parametrize("kind", KINDS)
    def test_state_dict(self, estimator: ModuleType, kind: str) -> None:
        layer, other, x = make(estimator, kind), make(estimator, kind), example(kind)
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True), strict=True)
        assert torch.equal(seeded(1, other, x), seeded(1, layer, x))

    def test_estimators_exchange_parameters(self) -> None:
        source, target = make(BBB, "Conv2d"), make(BBB_LRT, "Conv2d")
        target.load_state_dict(source.state_dict())
        x = example("Conv2d")
        assert torch.equal(target(x, sample=False), source(x, sample=False))
        assert torch.equal(target.kl_loss(), source.kl_loss())


class TestTransforms:
    def test_vmap_over_inputs(self, backend: str, estimator: ModuleType) -> None:
        layer, x = make(estimator, "Linear"), example("Linear")
        same = torch.vmap(layer, randomness="same")(x.expand(3, 4, 6))
        torch.testing.assert_close(same[0], same[1])
        different = torch.vmap(layer, randomness="different")(x.expand(3, 4, 6))
        assert different.shape == (3, 4, 5)
        assert unrelated(different[0], different[1])

    def test_vmap_over_an_ensemble(self, backend: str, estimator: ModuleType) -> None:
        members = [make(estimator, "Linear") for _ in range(3)]
        parameters, buffers = torch.func.stack_module_state(members)
        x = example("Linear")

        def run(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(members[0], (parameters, buffers), (x,))

        torch.manual_seed(1)
        stacked = torch.vmap(run, randomness="same")(parameters, buffers)
        for y, member in zip(stacked, members, strict=True):
            torch.testing.assert_close(y, seeded(1, member, x))

    @pytest.mark.parametrize("kind", KINDS)
    def test_grad_over_parameters(self, backend: str, estimator: ModuleType, kind: str) -> None:
        """torch.func.grad of a loss with the KL: the gradients of backward()."""
        layer, x = make(estimator, kind), example(kind)

        class Loss(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = layer

            def forward(self, x: Tensor) -> Tensor:
                return self.layer(x).square().sum() + self.layer.kl_loss()

        model = Loss()
        parameters = dict(model.named_parameters())

        def loss(parameters: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(model, parameters, (x,))

        functional_grads = seeded(1, torch.func.grad(loss), parameters)
        expected = torch.autograd.grad(seeded(1, model, x), list(parameters.values()))
        torch.testing.assert_close(list(functional_grads.values()), list(expected), rtol=1e-6, atol=1e-6)

    def test_grad_over_the_input(self, backend: str, estimator: ModuleType) -> None:
        layer, x = make(estimator, "Linear"), example("Linear").requires_grad_()

        def loss(x: Tensor) -> Tensor:
            return layer(x).square().sum()

        g = seeded(1, torch.func.grad(loss), x.detach())
        (expected,) = torch.autograd.grad(seeded(1, layer, x).square().sum(), x)
        torch.testing.assert_close(g, expected)

    def test_second_derivatives_raise(self, native: None, estimator: ModuleType) -> None:
        layer, x = make(estimator, "Linear"), example("Linear")
        with pytest.raises(RuntimeError, match="_backward: second derivatives are not implemented"):
            torch.func.grad(lambda x: torch.func.grad(lambda x: layer(x).square().sum())(x).sum())(x)


@pytest.mark.parametrize("kind", ["Linear", "Conv2d"])
def test_threads_change_no_noise(native: None, estimator: ModuleType, kind: str, threads: None) -> None:
    """Inputs whose products are exact, so that only the noise, the KL and their gradients are left."""
    if estimator is BBB_LRT:
        layer = make(estimator, kind, *((8, 300) if kind == "Linear" else (3, 16, 3)))
        x = torch.zeros(200, 8) if kind == "Linear" else torch.zeros(8, 3, 24, 24)
    elif kind == "Linear":
        layer, x = make(estimator, kind, 200, 300), torch.eye(200)
    else:
        layer, x = make(estimator, kind, 200, 300, 1), torch.eye(200).reshape(200, 200, 1, 1)
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        y, kl = seeded(1, layer, x), layer.kl_loss()
        results.append([y.detach(), kl.detach(), *torch.autograd.grad(kl, list(layer.parameters()))])
    assert all(map(torch.equal, *results))


class Counter(nn.Module):
    """Adds 1 and counts how often it ran."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + 1


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class Wrapper(ModuleWrapper):
    """Registers the given modules in order."""

    def __init__(self, **modules: nn.Module | None) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


class TestModuleWrapper:
    def test_runs_in_order_of_registration(self) -> None:
        x = torch.tensor([3.0])
        assert float(Wrapper(a=Counter(), b=Double())(x)[0]) == 8
        assert float(Wrapper(a=Double(), b=Counter())(x)[0]) == 7
        assert float(Wrapper(b=Double(), a=Counter())(x)[0]) == 7

    def test_a_module_under_two_names_runs_twice(self) -> None:
        act = Counter()
        y, _ = Wrapper(a=act, b=Double(), c=act)(torch.tensor([3.0]))
        assert act.calls == 2 and float(y) == 9

    def test_none_is_skipped(self) -> None:
        assert float(Wrapper(a=Counter(), skip=None, b=Double())(torch.tensor([3.0]))[0]) == 8

    def test_returns_output_and_kl(self, backend: str, estimator: ModuleType) -> None:
        first, second = make(estimator, "Conv2d"), make(estimator, "Linear", 150, 3)
        model = Wrapper(conv=first, act=nn.ReLU(), flatten=FlattenLayer(150), fc=second)
        x = example("Conv2d")
        result = seeded(1, model, x)
        assert isinstance(result, tuple) and len(result) == 2
        torch.manual_seed(1)
        assert torch.equal(result[0], second(first(x).relu().flatten(1)))
        exact = exact_kl(first) + exact_kl(second)
        torch.testing.assert_close(result[1].double(), exact, rtol=1e-6, atol=0)
        result[1].backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        torch.testing.assert_close(
            first.W_mu.grad, torch.autograd.grad(exact, first.W_mu)[0], rtol=1e-5, atol=1e-6
        )

    def test_a_shared_layer_runs_twice_and_its_kl_counts_once(self, estimator: ModuleType) -> None:
        layer = make(estimator, "Linear", 6, 6)
        x = torch.randn(4, 6)
        y, kl = seeded(1, Wrapper(a=layer, b=layer), x)
        torch.manual_seed(1)
        assert torch.equal(y, layer(layer(x)))
        torch.testing.assert_close(kl, layer.kl_loss())

    def test_nested(self, estimator: ModuleType) -> None:
        inner: Any = Wrapper(fc=make(estimator, "Linear", 6, 6), act=Counter())
        last = make(estimator, "Linear", 6, 2)
        sequential: Any = nn.Sequential(make(estimator, "Linear", 6, 6), Double())
        model = Wrapper(inner=inner, body=sequential, last=last)
        x = torch.randn(4, 6)
        y, kl = seeded(1, model, x)
        torch.manual_seed(1)
        torch.testing.assert_close(y, last(2 * sequential[0](inner.fc(x) + 1)))
        exact = exact_kl(inner.fc) + exact_kl(sequential[0]) + exact_kl(last)
        torch.testing.assert_close(kl.double(), exact, rtol=1e-6, atol=0)

    def test_nested_wrapper_with_its_own_forward(self, estimator: ModuleType) -> None:
        class Twice(Wrapper):
            def forward(self, x: Tensor, sample: bool = True) -> tuple[Tensor, Tensor]:
                y, kl = super().forward(x, sample)
                return 2 * y, kl

        layer = make(estimator, "Linear", 6, 6)
        model, x = Wrapper(inner=Twice(fc=layer)), torch.randn(4, 6)
        y, kl = model(x, sample=False)
        torch.testing.assert_close(y, 2 * layer(x, sample=False))
        torch.testing.assert_close(kl, layer.kl_loss())

    def test_means(self, backend: str, estimator: ModuleType) -> None:
        first, second = make(estimator, "Linear", 6, 6), make(estimator, "Linear", 6, 3)
        model, x = Wrapper(inner=Wrapper(a=first), b=second), torch.randn(4, 6)
        before = rng_state()
        y, kl = model(x, sample=False)
        assert torch.equal(rng_state(), before)
        assert torch.equal(y, second(first(x, sample=False), sample=False))
        assert torch.equal(kl, bbb_fast.kl_loss(model))

    def test_set_flag_recurses(self, estimator: ModuleType) -> None:
        direct, deep = make(estimator, "Linear"), make(estimator, "Linear")
        plain = nn.Sequential(nn.Linear(2, 2), nn.Sequential(deep))
        inner = Wrapper(body=plain)
        model = Wrapper(fc=direct, inner=inner, act=nn.ReLU())
        model.set_flag("prior_sigma", 0.25)
        assert model.prior_sigma == inner.prior_sigma == direct.prior_sigma == deep.prior_sigma == 0.25
        assert not hasattr(plain, "prior_sigma") and not hasattr(model.act, "prior_sigma")
        torch.testing.assert_close(deep.kl_loss().double(), exact_kl(deep), rtol=1e-6, atol=0)
        model.set_flag("anything", "else")
        assert deep.anything == "else"

    def test_without_bayesian_layers(self) -> None:
        y, kl = Wrapper(fc=nn.Linear(3, 2))(torch.randn(4, 3))
        assert y.shape == (4, 2) and kl.shape == () and float(kl) == 0

    def test_empty(self) -> None:
        x = torch.randn(2, 3)
        y, kl = Wrapper()(x)
        assert torch.equal(y, x) and float(kl) == 0


class TestFlattenLayer:
    def test_reshapes(self) -> None:
        x = torch.randn(4, 3, 2, 5)
        assert torch.equal(FlattenLayer(30)(x), x.reshape(4, 30))
        last = x.contiguous(memory_format=torch.channels_last)
        assert torch.equal(FlattenLayer(30)(last), x.reshape(4, 30))
        assert FlattenLayer(30)(x[:0]).shape == (0, 30)
        assert repr(FlattenLayer(30)) == "FlattenLayer(30)"

    @pytest.mark.parametrize("shape", [(4, 3, 4, 5), (4, 31), (4,), (2, 15)])
    def test_rows_of_another_size(self, shape: tuple[int, ...]) -> None:
        """An error, not other rows made of parts of several images."""
        with pytest.raises(ValueError, match="must have 30 elements"):
            FlattenLayer(30)(torch.zeros(shape))


def test_sample_false_reaches_every_layer_of_a_model(backend: str) -> None:
    """Also those inside a plain container."""

    class Net(ModuleWrapper):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(BBB.BBBLinear(3, 4), nn.ReLU(), BBB_LRT.BBBLinear(4, 2))

    net, x = Net(), torch.randn(5, 3)
    assert torch.equal(net(x, sample=False)[0], net(x, sample=False)[0])
    assert not torch.equal(net(x)[0], net(x)[0])


@pytest.mark.parametrize("layers", [BBB, BBB_LRT, Flipout])
@pytest.mark.parametrize("sample", [True, False])
def test_float32_parameters_follow_a_narrow_input(backend: str, layers: Any, sample: bool) -> None:
    layer, x = layers.BBBLinear(3, 4), torch.randn(5, 3)
    y = layer(x.bfloat16(), sample=sample)
    assert y.dtype == torch.bfloat16
    with bbb_fast.fixed_noise(1):
        assert layer(x.bfloat16()).dtype == torch.bfloat16
