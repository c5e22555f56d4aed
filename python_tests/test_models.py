"""The networks and their point-estimate twins: architecture, state_dicts, KL, errors."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE
from torch import Tensor, nn

from bbb_fast import kl_loss, models
from bbb_fast.layers import BBB, BBB_LRT
from bbb_fast.layers.base import BayesianLayer
from bbb_fast.models import (
    AlexNet,
    BBB3Conv3FC,
    BBBAlexNet,
    BBBCaffeLeNet,
    BBBLeNet,
    BBBSmallCNN,
    CaffeLeNet,
    LeNet,
    SmallCNN,
    ThreeConvThreeFC,
)  # fmt: skip
from bbb_fast.models.build import ACTIVATIONS
from bbb_fast.models.pooling import MaxPool2d

PAIRS = [
    (BBBLeNet, LeNet),
    (BBBAlexNet, AlexNet),
    (BBB3Conv3FC, ThreeConvThreeFC),
    (BBBCaffeLeNet, CaffeLeNet),
    (BBBSmallCNN, SmallCNN),
]
BAYESIAN = [bayesian for bayesian, _ in PAIRS]
POINT = [point for _, point in PAIRS]
LAYER_TYPES = {"bbb": BBB, "lrt": BBB_LRT}
NAMES = {"weight": ("W_mu", "W_rho"), "bias": ("bias_mu", "bias_rho")}

# Written out from the description of the architectures: weights of 7 classes and 3 channels.
WEIGHTS: dict[str, dict[str, tuple[int, ...]]] = {
    "LeNet": {
        "conv1": (6, 3, 5, 5),
        "conv2": (16, 6, 5, 5),
        "fc1": (120, 400),
        "fc2": (84, 120),
        "fc3": (7, 84),
    },
    "AlexNet": {
        "conv1": (64, 3, 11, 11),
        "conv2": (192, 64, 5, 5),
        "conv3": (384, 192, 3, 3),
        "conv4": (256, 384, 3, 3),
        "conv5": (128, 256, 3, 3),
        "classifier": (7, 128),
    },
    "ThreeConvThreeFC": {
        "conv1": (32, 3, 5, 5),
        "conv2": (64, 32, 5, 5),
        "conv3": (128, 64, 5, 5),
        "fc1": (1000, 512),
        "fc2": (1000, 1000),
        "fc3": (7, 1000),
    },
    "CaffeLeNet": {
        "conv1": (20, 3, 5, 5),
        "conv2": (50, 20, 5, 5),
        "fc1": (500, 1250),
        "fc2": (7, 500),
    },
    "SmallCNN": {
        "conv1": (32, 3, 3, 3),
        "conv2": (64, 32, 3, 3),
        "conv3": (64, 64, 3, 3),
        "fc1": (128, 1024),
        "fc2": (7, 128),
    },
}


def shapes(bayesian: Any) -> dict[str, tuple[int, ...]]:
    """The layers of a Bayesian model's twin."""
    return WEIGHTS[dict(PAIRS)[bayesian].__name__]


def written_out(kind: str, p: dict[str, Tensor], x: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    """The forward of each architecture, from its description alone."""

    def conv(name: str, x: Tensor, **options: int) -> Tensor:
        return act(F.conv2d(x, p[f"{name}.weight"], p[f"{name}.bias"], **options))

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])

    pool = F.max_pool2d
    if kind == "LeNet":
        x = pool(conv("conv2", pool(conv("conv1", x), 2)), 2).flatten(1)
        return linear("fc3", act(linear("fc2", act(linear("fc1", x)))))
    if kind == "AlexNet":
        x = pool(conv("conv1", x, stride=4, padding=5), 2)
        x = pool(conv("conv2", x, padding=2), 2)
        x = conv("conv4", conv("conv3", x, padding=1), padding=1)
        return linear("classifier", pool(conv("conv5", x, padding=1), 2).flatten(1))
    if kind == "CaffeLeNet":
        x = pool(conv("conv2", pool(conv("conv1", x), 2)), 2).flatten(1)
        return linear("fc2", act(linear("fc1", x)))
    if kind == "SmallCNN":
        for name in ("conv1", "conv2", "conv3"):
            x = pool(conv(name, x, padding=1), 2)
        return linear("fc2", act(linear("fc1", x.flatten(1))))
    x = pool(conv("conv1", x, padding=2), 3, 2)
    x = pool(conv("conv2", x, padding=2), 3, 2)
    x = pool(conv("conv3", x, padding=1), 3, 2).flatten(1)
    return linear("fc3", act(linear("fc2", act(linear("fc1", x)))))


def foreign_state(bayesian: type[nn.Module]) -> dict[str, Tensor]:
    """A state_dict as PyTorch-BayesianCNN writes it."""
    state = {}
    for layer, shape in shapes(bayesian).items():
        fan_in = math.prod(shape[1:])
        state[f"{layer}.W_mu"] = torch.randn(shape) / math.sqrt(fan_in)
        state[f"{layer}.W_rho"] = torch.randn(shape) * 0.1 - 5
        state[f"{layer}.bias_mu"] = torch.randn(shape[0]) * 0.1
        state[f"{layer}.bias_rho"] = torch.randn(shape[0]) * 0.1 - 5
    return state


def exact_kl(model: nn.Module) -> float:
    total = 0.0
    for layer in model.modules():
        if isinstance(layer, BayesianLayer):
            for mu, rho in layer.posterior():
                q = torch.distributions.Normal(mu.detach().double(), F.softplus(rho.detach().double()))
                p = torch.distributions.Normal(
                    torch.tensor(layer.prior_mu).double(), torch.tensor(layer.prior_sigma).double()
                )
                total += torch.distributions.kl_divergence(q, p).sum().item()
    return total


class TestArchitecture:
    @pytest.mark.parametrize("model_type", BAYESIAN)
    @pytest.mark.parametrize("layer_type", LAYER_TYPES)
    def test_bayesian_parameters(self, model_type: type[nn.Module], layer_type: str) -> None:
        model = model_type(7, 3, layer_type=layer_type)
        expected: dict[str, tuple[int, ...]] = {}
        for layer, shape in shapes(model_type).items():
            expected |= {f"{layer}.W_mu": shape, f"{layer}.W_rho": shape}
            expected |= {f"{layer}.bias_mu": shape[:1], f"{layer}.bias_rho": shape[:1]}
        assert {name: tuple(p.shape) for name, p in model.named_parameters()} == expected
        assert list(model.state_dict()) == list(expected)
        for layer in shapes(model_type):
            kind = "BBBConv2d" if layer.startswith("conv") else "BBBLinear"
            assert type(getattr(model, layer)) is getattr(LAYER_TYPES[layer_type], kind)

    @pytest.mark.parametrize("model_type", POINT)
    def test_point_parameters(self, model_type: type[nn.Module]) -> None:
        expected: dict[str, tuple[int, ...]] = {}
        for layer, shape in WEIGHTS[model_type.__name__].items():
            expected |= {f"{layer}.weight": shape, f"{layer}.bias": shape[:1]}
        model = model_type(7, 3)
        assert {name: tuple(p.shape) for name, p in model.named_parameters()} == expected

    @pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair[1].__name__)
    @pytest.mark.parametrize("activation", ["softplus", "relu"])
    def test_computes_the_described_function(
        self, pair: tuple[type[nn.Module], type[nn.Module]], activation: str
    ) -> None:
        """Twin and posterior mean against the forward written out by hand."""
        bayesian = pair[0](7, 3, activation_type=activation)
        bayesian.load_state_dict(foreign_state(pair[0]))
        point = pair[1](7, 3, activation_type=activation)
        point.load_state_dict(bayesian.state_dict())
        x = torch.randn(2, 3, 32, 32)
        act: Any = {"softplus": F.softplus, "relu": F.relu}[activation]
        with torch.no_grad():
            expected = written_out(pair[1].__name__, dict(point.named_parameters()), x, act)
            torch.testing.assert_close(point(x), expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(bayesian(x, sample=False)[0], expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("model_type", BAYESIAN)
    @pytest.mark.parametrize("layer_type", LAYER_TYPES)
    @pytest.mark.parametrize("inputs", [1, 3])
    def test_forward(self, backend: str, model_type: type[nn.Module], layer_type: str, inputs: int) -> None:
        model = model_type(4, inputs, layer_type=layer_type)
        x = torch.randn(2, inputs, 32, 32)
        y, kl = model(x)
        assert y.shape == (2, 4) and y.isfinite().all() and kl.shape == ()
        assert not torch.equal(model.eval()(x)[0], y)
        if model_type is BBBLeNet:
            (F.cross_entropy(y, torch.tensor([0, 3])) + kl / 100).backward()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
            assert all(p.grad is not None and p.grad.any() for p in model.parameters())

    @pytest.mark.parametrize("model_type", POINT)
    def test_point_forward(self, model_type: type[nn.Module]) -> None:
        model = model_type(4, 1)
        y = model(torch.randn(2, 1, 32, 32))
        assert isinstance(y, Tensor) and y.shape == (2, 4)
        y.square().sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in model.parameters())

    @pytest.mark.parametrize("model_type", [*BAYESIAN, *POINT])
    def test_no_layer_is_shared(self, model_type: type[nn.Module]) -> None:
        """Every activation and pool is an instance of its own, one name each."""
        model = model_type(4, 1, activation_type="relu")
        children = [child for _, child in model.named_children()]
        assert len(set(map(id, children))) == len(children)
        layers = len([child for child in children if list(child.parameters())])
        assert sum(isinstance(child, nn.ReLU) for child in children) == layers - 1
        assert not any(isinstance(child, nn.Softplus) for child in children)

    @pytest.mark.parametrize("model_type", [*BAYESIAN, *POINT])
    def test_empty_batch(self, backend: str, model_type: type[nn.Module]) -> None:
        y = model_type(4, 1)(torch.randn(0, 1, 32, 32))
        assert (y[0] if isinstance(y, tuple) else y).shape == (0, 4)

    @pytest.mark.parametrize("model_type", [*BAYESIAN, *POINT])
    @pytest.mark.parametrize("size", [28, 64])
    def test_other_image_sizes(self, model_type: type[nn.Module], size: int) -> None:
        """An error; never another number of rows than images."""
        if model_type in (BBBAlexNet, AlexNet) and size == 28:
            pytest.skip("a 28 x 28 image gives AlexNet's last pool an empty map")
        with pytest.raises(ValueError, match="FlattenLayer: a row of the input must have"):
            model_type(4, 1)(torch.randn(4, 1, size, size))

    def test_exported_names(self) -> None:
        assert set(models.__all__) == {m.__name__ for m in BAYESIAN + POINT} | {"VAE"}


def test_a_module_under_two_names_runs_twice() -> None:
    """As in the Bayesian twin, a ModuleWrapper."""
    model = models.LeNet(3, 1, activation_type="relu")
    model.act1 = model.act2 = nn.ReLU()
    calls: list[Tensor] = []
    model.act1.register_forward_hook(lambda module, args, output: calls.append(output))
    model(torch.randn(2, 1, 32, 32))
    assert [output.shape[1] for output in calls] == [6, 16]


class TestStateDict:
    @pytest.mark.parametrize("layer_type", LAYER_TYPES)
    @pytest.mark.parametrize("model_type", BAYESIAN)
    def test_foreign_state_loads(self, model_type: type[nn.Module], layer_type: str) -> None:
        state = foreign_state(model_type)
        model = model_type(7, 3, layer_type=layer_type)
        result = model.load_state_dict(state, strict=True)
        assert not result.missing_keys and not result.unexpected_keys
        assert all(torch.equal(p, state[name]) for name, p in model.named_parameters())

    @pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair[1].__name__)
    def test_means_load_into_the_twin(self, pair: tuple[type[nn.Module], type[nn.Module]]) -> None:
        state = foreign_state(pair[0])
        kept = dict(state)
        point = pair[1](7, 3)
        point.load_state_dict(state, strict=True)
        for name, p in point.named_parameters():
            layer, _, kind = name.rpartition(".")
            assert torch.equal(p, state[f"{layer}.{NAMES[kind][0]}"])
        assert state.keys() == kept.keys()  # the caller's dict is left alone

    @pytest.mark.parametrize("model_type", POINT)
    def test_the_twin_loads_its_own(self, model_type: type[nn.Module]) -> None:
        model, other = model_type(7, 3), model_type(7, 3)
        other.load_state_dict(model.state_dict())
        x = torch.randn(2, 3, 32, 32)
        assert torch.equal(model(x), other(x))
        copied = copy.deepcopy(model)
        copied.load_state_dict(other.state_dict())
        assert torch.equal(model(x), copied(x))

    def test_strictness_is_kept(self) -> None:
        state = foreign_state(BBBLeNet)
        state["fc4.W_mu"] = torch.zeros(3)
        for model in (LeNet(7, 3), BBBLeNet(7, 3)):
            with pytest.raises(RuntimeError, match="fc4"):
                model.load_state_dict(state)
        state = foreign_state(BBBLeNet)
        del state["fc2.W_mu"]
        with pytest.raises(RuntimeError, match=r"fc2\.weight"):
            LeNet(7, 3).load_state_dict(state)
        with pytest.raises(RuntimeError, match=r"fc2\.W_mu"):
            BBBLeNet(7, 3).load_state_dict(state)
        with pytest.raises(RuntimeError, match="size mismatch"):
            LeNet(9, 3).load_state_dict(foreign_state(BBBLeNet))

    def test_a_twin_inside_another_module(self) -> None:
        state = foreign_state(BBBLeNet)
        model: Any = nn.Sequential(LeNet(7, 3), nn.Linear(7, 2))
        outer = {f"0.{name}": value for name, value in state.items()}
        outer |= {"1.weight": torch.ones(2, 7), "1.bias": torch.zeros(2)}
        model.load_state_dict(outer, strict=True)
        assert torch.equal(model[0].conv1.weight, state["conv1.W_mu"])
        assert torch.equal(model[1].weight, outer["1.weight"])

    def test_a_twin_with_buffers(self) -> None:
        class Normalized(LeNet):
            def __init__(self) -> None:
                super().__init__(7, 3)
                self.norm = nn.BatchNorm1d(7)

        model = Normalized()
        model.load_state_dict(model.state_dict())
        result = model.load_state_dict(foreign_state(BBBLeNet), strict=False)
        assert all(name.startswith("norm.") for name in result.missing_keys)
        assert not result.unexpected_keys


class TestOptions:
    def test_defaults(self) -> None:
        model = BBBLeNet(10, 3)
        assert (model.layer_type, model.activation_type) == ("lrt", "softplus")
        assert type(model.conv1) is BBB_LRT.BBBConv2d
        assert sum(isinstance(m, nn.Softplus) for m in model.modules()) == 4
        assert (model.num_classes, model.conv1.prior_sigma) == (10, 0.1)

    def test_positional_arguments(self) -> None:
        model = BBBLeNet(10, 1, {"prior_sigma": 0.5}, "bbb", "relu")
        assert (model.layer_type, model.activation_type) == ("bbb", "relu")

    @pytest.mark.parametrize("model_type", BAYESIAN)
    def test_priors_reach_every_layer(self, model_type: type[nn.Module]) -> None:
        priors = {"prior_mu": 0.5, "prior_sigma": 0.25, "posterior_rho_initial": (-7, 0)}
        layers = [m for m in model_type(4, 1, priors).modules() if isinstance(m, BayesianLayer)]
        assert len(layers) == len(shapes(model_type))
        assert {(layer.prior_mu, layer.prior_sigma) for layer in layers} == {(0.5, 0.25)}
        assert all((rho == -7).all() for layer in layers for _, rho in layer.posterior())

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"layer_type": "flip"}, "unknown layer_type 'flip'; allowed: bbb, lrt"),
            ({"layer_type": None}, "unknown layer_type None"),
            ({"layer_type": ["lrt"]}, "unknown layer_type"),
            ({"activation_type": "tanh"}, "unknown activation_type 'tanh'; allowed: softplus, relu"),
            ({"priors": {"sigma": 1}}, "unknown prior keys"),
        ],
    )
    @pytest.mark.parametrize("model_type", BAYESIAN)
    def test_errors(self, model_type: type[nn.Module], options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError) as caught:
            model_type(4, 1, **options)
        assert message in str(caught.value)

    @pytest.mark.parametrize("model_type", POINT)
    def test_point_errors(self, model_type: type[nn.Module]) -> None:
        with pytest.raises(ValueError, match="unknown activation_type 'tanh'; allowed: softplus, relu"):
            model_type(4, 1, activation_type="tanh")


@pytest.mark.parametrize("layer_type", LAYER_TYPES)
@pytest.mark.parametrize("model_type", BAYESIAN)
def test_kl(backend: str, model_type: type[nn.Module], layer_type: str) -> None:
    """Forward's KL, kl_loss and the layers' sum against torch.distributions, in float64."""
    model = model_type(7, 3, {"prior_mu": 0.1, "prior_sigma": 0.3}, layer_type)
    exact = exact_kl(model)
    assert kl_loss(model).item() == pytest.approx(exact, rel=1e-6)
    summed = sum(m.kl_loss().item() for m in model.modules() if isinstance(m, BayesianLayer))
    assert summed == pytest.approx(exact, rel=1e-6)
    assert model(torch.randn(1, 3, 32, 32))[1].item() == pytest.approx(exact, rel=1e-6)


GEOMETRIES: list[dict[str, Any]] = [
    {"kernel_size": 2},
    {"kernel_size": 3, "stride": 2},
    {"kernel_size": (3, 2), "stride": (1, 3), "padding": (1, 0), "dilation": (2, 1)},
    {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True},
]


class TestPooling:
    """What stands between the models' layers is PyTorch's pooling to the last bit, by whatever way."""

    @staticmethod
    def image(dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Many equal numbers, a NaN and infinities among them."""
        x = torch.randint(-4, 4, (4, 17, 25, 26)).to(dtype)
        x[0, 3, 5, 7], x[1, :, 8, 9], x[2, 0] = float("nan"), float("inf"), float("-inf")
        return x

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    @pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
    def test_equals_torch(self, geometry: dict, dtype: torch.dtype) -> None:
        ours, theirs = MaxPool2d(**geometry), nn.MaxPool2d(**geometry)
        x = self.image(dtype)
        results = []
        for pool in (ours, theirs):
            leaf = x.clone().requires_grad_()
            y = pool(leaf)
            grad = torch.arange(float(y.numel())).view_as(y).to(dtype)
            results.append((y, torch.autograd.grad(y, leaf, grad)[0]))
            assert y.is_contiguous()
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)

    def test_takes_the_faster_way(self) -> None:
        pool = MaxPool2d(3, 2)
        large = torch.randn(8, 16, 20, 20, requires_grad=True)
        assert ("_RearrangedBackward" in str(pool(large).grad_fn)) == (DEVICE.type == "cpu")
        for x in (large[:1], large.to(memory_format=torch.channels_last), large.double(), large[0]):
            assert "Rearranged" not in str(pool(x).grad_fn)

    @pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
    def test_without_a_gradient(self, geometry: dict[str, Any]) -> None:
        x, pool, same = self.image(), MaxPool2d(**geometry), nn.MaxPool2d(**geometry)
        for context in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
            with context:
                y = pool(x)
                torch.testing.assert_close(y, same(x), rtol=0, atol=0, equal_nan=True)
                assert y.is_contiguous() and not y.requires_grad

    def test_transforms(self) -> None:
        pool, same = MaxPool2d(3, 2), nn.MaxPool2d(3, 2)
        x = torch.randn(3, 2, 16, 20, 20)
        assert torch.equal(torch.func.vmap(pool)(x), torch.func.vmap(same)(x))
        of = lambda f: lambda t: f(t).square().sum()  # noqa: E731
        each = [torch.func.vmap(torch.func.grad(of(f)))(x) for f in (pool, same)]
        assert torch.equal(*each)
        flat = x.flatten(0, 1)
        tangents = [torch.func.jvp(f, (flat,), (flat,))[1] for f in (pool, same)]
        assert torch.equal(*tangents)
        compiled = torch.compile(pool, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(flat), same(flat))
        leaf = flat.clone().requires_grad_()
        twice = []
        for f in (pool, same):
            (g,) = torch.autograd.grad(of(f)(leaf), leaf, create_graph=True)
            twice.append(torch.autograd.grad(g.square().sum(), leaf)[0])
        assert torch.equal(*twice)

    @pytest.mark.parametrize("activation", ["softplus", "relu"])
    def test_before_the_activation_is_behind_it(self, activation: str) -> None:
        """The models' order gives what the other one gives."""
        act, pool, x = ACTIVATIONS[activation](), nn.MaxPool2d(3, 2), torch.randn(4, 8, 15, 15) * 10
        torch.testing.assert_close(act(pool(x)), pool(act(x)), rtol=1e-6, atol=1e-7)
