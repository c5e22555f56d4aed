"""convert_state_dict: other libraries' checkpoints, by their names, and against the libraries themselves."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bbb_fast
from bbb_fast import convert_state_dict
from bbb_fast.layers import BBB, Flipout, WeightSpace

pytestmark = pytest.mark.cpu_only("checkpoints of layers that are made on the CPU")

SIGMA = 0.1


# ---------------------------------------------------------------- by their names


class Net(nn.Module):
    """A convolution with bias, a norm, a block with a linear layer without, and one of torch.nn."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = BBB.BBBConv2d(2, 4, 3, groups=2)
        self.norm = nn.BatchNorm2d(4)
        self.block = nn.Sequential(nn.ReLU(), BBB.BBBLinear(4, 3, bias=False))
        self.last = nn.Linear(3, 2)


SHAPES = {"conv.weight": (4, 1, 3, 3), "conv.bias": (4,), "block.1.weight": (3, 4)}
# What each library saves of these three tensors: its keys, and what they hold.
KEYS: dict[str, dict[str, tuple[str, str]]] = {
    "PyTorch-BayesianCNN": {
        "conv.W_mu": ("conv.weight", "mu"),
        "conv.W_rho": ("conv.weight", "rho"),
        "conv.bias_mu": ("conv.bias", "mu"),
        "conv.bias_rho": ("conv.bias", "rho"),
        "block.1.W_mu": ("block.1.weight", "mu"),
        "block.1.W_rho": ("block.1.weight", "rho"),
    },
    "bayesian-torch": {
        "conv.mu_kernel": ("conv.weight", "mu"),
        "conv.rho_kernel": ("conv.weight", "rho"),
        "conv.mu_bias": ("conv.bias", "mu"),
        "conv.rho_bias": ("conv.bias", "rho"),
        "conv.eps_kernel": ("conv.weight", "noise"),
        "conv.eps_bias": ("conv.bias", "noise"),
        "block.1.mu_weight": ("block.1.weight", "mu"),
        "block.1.rho_weight": ("block.1.weight", "rho"),
        "block.1.eps_weight": ("block.1.weight", "noise"),
    },
    "blitz": {
        "conv.weight_mu": ("conv.weight", "mu"),
        "conv.weight_rho": ("conv.weight", "rho"),
        "conv.bias_mu": ("conv.bias", "mu"),
        "conv.bias_rho": ("conv.bias", "rho"),
        "conv.weight_sampler.mu": ("conv.weight", "mu"),
        "conv.weight_sampler.rho": ("conv.weight", "rho"),
        "conv.weight_sampler.eps_w": ("conv.weight", "noise"),
        "conv.bias_sampler.mu": ("conv.bias", "mu"),
        "conv.bias_sampler.rho": ("conv.bias", "rho"),
        "conv.bias_sampler.eps_w": ("conv.bias", "noise"),
        "block.1.weight_mu": ("block.1.weight", "mu"),
        "block.1.weight_rho": ("block.1.weight", "rho"),
        "block.1.bias_zero": ("conv.bias", "noise"),
        "block.1.weight_sampler.mu": ("block.1.weight", "mu"),
        "block.1.weight_sampler.rho": ("block.1.weight", "rho"),
        "block.1.weight_sampler.eps_w": ("block.1.weight", "noise"),
    },
    "torchbnn": {
        "conv.weight_mu": ("conv.weight", "mu"),
        "conv.weight_log_sigma": ("conv.weight", "log_sigma"),
        "conv.bias_mu": ("conv.bias", "mu"),
        "conv.bias_log_sigma": ("conv.bias", "log_sigma"),
        "conv.weight_eps": ("conv.weight", "noise"),
        "conv.bias_eps": ("conv.bias", "noise"),
        "block.1.weight_mu": ("block.1.weight", "mu"),
        "block.1.weight_log_sigma": ("block.1.weight", "log_sigma"),
    },
}


def numbers() -> dict[tuple[str, str], Tensor]:
    """Of each tensor of the net: mu, sigma, and what libraries have for it."""
    found: dict[tuple[str, str], Tensor] = {}
    for name, shape in SHAPES.items():
        rho = torch.randn(shape) - 2
        sigma = F.softplus(rho.double())
        found |= {
            (name, "mu"): torch.randn(shape),
            (name, "rho"): rho,
            (name, "log_sigma"): sigma.log().float(),
            (name, "noise"): torch.randn(shape),
        }
    return found


def saved(library: str) -> tuple[dict[str, Tensor], dict[tuple[str, str], Tensor]]:
    """A state_dict as the library would write it, and the numbers in it."""
    of, net = numbers(), Net()
    state = {key: of[what].clone() for key, what in KEYS[library].items()}
    rest = {key: torch.randn(t.shape).to(t.dtype) for key, t in net.state_dict().items() if "_" not in key}
    rest |= {k: t + 1 for k, t in net.state_dict().items() if k.startswith("norm.") and k not in rest}
    return state | rest, of


def check(net: Any, state: dict[str, Tensor], of: dict[tuple[str, str], Tensor]) -> None:
    pairs = [*net.conv.posterior(), *net.block[1].posterior()]
    for (mu, rho), name in zip(pairs, SHAPES, strict=True):
        assert torch.equal(mu, of[name, "mu"])
        torch.testing.assert_close(F.softplus(rho), F.softplus(of[name, "rho"]), rtol=1e-6, atol=0)
    loaded = net.state_dict()
    for key in ("norm.weight", "norm.running_var", "norm.num_batches_tracked", "last.weight", "last.bias"):
        assert torch.equal(loaded[key], state[key])


@pytest.mark.parametrize("by_name", [True, False])
@pytest.mark.parametrize("library", KEYS)
def test_each_library(library: str, by_name: bool) -> None:
    state, of = saved(library)
    before = copy.deepcopy(state)
    net = Net()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = convert_state_dict(state, library if by_name else "auto")
    assert str(net.load_state_dict(made)) == "<All keys matched successfully>"
    check(net, state, of)
    assert list(state) == list(before) and all(torch.equal(t, before[key]) for key, t in state.items())
    # Under a prefix, and of a layer that is the model itself.
    deep: Any = nn.ModuleDict({"a": nn.ModuleDict({"net": Net()})})
    made = convert_state_dict({f"a.net.{key}": t for key, t in state.items()})
    assert str(deep.load_state_dict(made)) == "<All keys matched successfully>"
    check(deep["a"]["net"], state, of)
    layer = BBB.BBBConv2d(2, 4, 3, groups=2)
    layer.load_state_dict(
        convert_state_dict({k.removeprefix("conv."): t for k, t in state.items() if k.startswith("conv.")})
    )
    assert torch.equal(layer.W_mu, of["conv.weight", "mu"])


@pytest.mark.parametrize("library", KEYS)
def test_what_does_not_fit_is_said_at_once(library: str) -> None:
    """load_state_dict's own error, with all there is to say; nothing is left out in silence."""
    state, _ = saved(library)
    bias = [
        key for key, (name, _) in KEYS[library].items() if name == "conv.bias" and key.startswith("conv.")
    ]
    state = {key: t for key, t in state.items() if key not in bias} | {"conv.kernel": torch.ones(2)}
    weight = {key: torch.ones(2, 4) for key, (name, _) in KEYS[library].items() if name == "block.1.weight"}
    with pytest.raises(RuntimeError) as error:
        Net().load_state_dict(convert_state_dict(state | weight))
    text = str(error.value)
    assert 'Missing key(s) in state_dict: "conv.bias_mu", "conv.bias_rho"' in text
    assert 'Unexpected key(s) in state_dict: "conv.kernel"' in text
    assert "size mismatch for block.1.W_mu" in text and "size mismatch for block.1.W_rho" in text


@pytest.mark.parametrize("library", KEYS)
def test_incomplete_posteriors(library: str) -> None:
    state, _ = saved(library)
    for kind in ("mu", "rho"):
        gone = [
            key
            for key, (name, what) in KEYS[library].items()
            if name != "conv.weight" and (what == kind or (kind == "rho" and what == "log_sigma"))
        ]
        left = [
            key for key, (name, what) in KEYS[library].items() if name != "conv.weight" and key not in gone
        ]
        with pytest.raises(ValueError, match="got one without the other: ") as error:
            convert_state_dict({key: t for key, t in state.items() if key not in gone}, library)
        named = str(error.value).split("other: ")[1].split(", ")
        assert len(named) == 2 and set(named) <= set(left)


def test_which_library() -> None:
    blitz, torchbnn = saved("blitz")[0], saved("torchbnn")[0]
    both = {f"a.{k}": t for k, t in blitz.items()} | {f"b.{k}": t for k, t in torchbnn.items()}
    told = (
        r"keys of blitz \('a\.conv\.weight_rho'\) and torchbnn \('b\.conv\.weight_log_sigma'\); say with lib"
    )
    with pytest.raises(ValueError, match=told):
        convert_state_dict(both)
    plain = nn.Linear(2, 2).state_dict()
    for state, got in ((plain, "'weight', 'bias'"), ({}, "none at all"), ({"model": plain}, "'model'")):
        with pytest.raises(
            ValueError, match=f"no key is of a Bayesian layer of these libraries .* got {got}$"
        ):
            convert_state_dict(state)
    with pytest.raises(
        ValueError, match="library must be 'auto' or one of PyTorch-BayesianCNN, bayesian-torch"
    ):
        convert_state_dict(plain, "pyro")
    with pytest.raises(TypeError, match="state_dict must be a mapping, got Linear"):
        convert_state_dict(nn.Linear(2, 2))  # type: ignore[arg-type]  # on purpose
    with pytest.raises(TypeError, match=r"fc\.mu_weight must be a tensor, got float"):
        convert_state_dict({"fc.mu_weight": 1.0, "fc.rho_weight": torch.ones(1)})


def test_a_name_within_a_name_is_none() -> None:
    """Entries begin behind a dot, and beside a weight's posterior."""
    state = {"a.my_mu_weight": torch.ones(2), "a.eps_weight": torch.ones(2), "a.mu_bias": torch.ones(2)}
    layer = {"b.mu_weight": torch.ones(2, 2), "b.rho_weight": torch.zeros(2, 2)}
    made = convert_state_dict(state | layer)
    assert list(made) == ["b.W_mu", "b.W_rho", *state]


def test_own_checkpoints_stay() -> None:
    net = Net()
    bbb_fast.posterior_to_prior(net)
    state = net.state_dict()
    made = convert_state_dict(state)
    assert made.keys() == state.keys() and all(made[key] is state[key] for key in state)


def test_lazy_layers_take_it() -> None:
    state, of = saved("torchbnn")
    net = Net()
    net.conv = BBB.BBBLazyConv2d(4, 3, groups=2)
    net.load_state_dict(convert_state_dict(state))
    assert net.conv.in_channels == 2
    check(net, state, of)


def test_samplers_that_differ() -> None:
    """As after .to(device) in blitz, whose forward draws from, and trains, the samplers' parameters."""
    state, of = saved("blitz")
    state["conv.weight_mu"] += 1.0
    state["block.1.weight_rho"] += 1.0
    with pytest.warns(UserWarning) as caught:
        made = convert_state_dict(state)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert str(caught[0].message).endswith(
        "where two differ: conv.weight_sampler.mu and not conv.weight_mu, block.1.weight_sampler.rho and not "
        "block.1.weight_rho"
    )
    net = Net()
    net.load_state_dict(made)
    check(net, state, of)


def test_recurrent_layers_of_blitz() -> None:
    state = {
        "lstm.weight_ih_mu": torch.ones(3, 8),
        "lstm.weight_hh_mu": torch.ones(2, 8),
        "lstm.bias_sampler.mu": torch.ones(8),
    }
    with pytest.raises(ValueError, match=r"lstm\.weight_hh_mu is of a recurrent layer of blitz"):
        convert_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rho_of_ln_sigma(dtype: torch.dtype) -> None:
    log_sigma = torch.cat([torch.linspace(-90, 5, 400), torch.tensor([-2000.0, -40.0, -39.9, 0.0])]).to(dtype)
    state = {"weight_mu": torch.zeros_like(log_sigma[None]), "weight_log_sigma": log_sigma[None]}
    rho = convert_state_dict(state)["W_rho"]
    assert rho.dtype == dtype and rho.isfinite().all()
    # Of rho in float32 the last digit is worth so much of sigma.
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(
        torch.logaddexp(rho, torch.zeros_like(rho))[0, 200:400],
        log_sigma[200:400].exp(),
        rtol=tolerance,
        atol=0,
    )
    torch.testing.assert_close(rho[0, :150], log_sigma[:150])
    assert rho[0, 400] == -2000


def test_norms_of_torchbnn() -> None:
    state = {
        "0.weight_mu": torch.randn(3),
        "0.weight_log_sigma": torch.full((3,), -2.0),
        "0.bias_mu": torch.randn(3),
        "0.bias_log_sigma": torch.full((3,), -3.0),
        "0.bias_eps": torch.randn(3),
        "0.running_mean": torch.randn(3),
        "0.running_var": torch.rand(3),
        "0.num_batches_tracked": torch.tensor(7),
        "1.weight": torch.randn(2, 3),
    }
    model: Any = nn.Sequential(WeightSpace(nn.BatchNorm2d(3)), nn.Linear(3, 2, bias=False)).eval()
    assert str(model.load_state_dict(convert_state_dict(state))) == "<All keys matched successfully>"
    (weight, weight_rho), (bias, bias_rho) = model[0].posterior()
    assert torch.equal(weight, state["0.weight_mu"]) and torch.equal(bias, state["0.bias_mu"])
    torch.testing.assert_close(F.softplus(weight_rho), state["0.weight_log_sigma"].exp())
    torch.testing.assert_close(F.softplus(bias_rho), state["0.bias_log_sigma"].exp())
    assert torch.equal(model[0].module.running_mean, state["0.running_mean"])
    assert model[0].module.num_batches_tracked == 7
    # The norm alone is a model too.
    alone = {k.removeprefix("0."): t for k, t in state.items() if k.startswith("0.")}
    WeightSpace(nn.BatchNorm2d(3)).load_state_dict(convert_state_dict(alone))


def lstm_state(inputs: int = 3, hidden: int = 2) -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {
        "ih.{}_weight": (4 * hidden, inputs),
        "hh.{}_weight": (4 * hidden, hidden),
    }
    shapes |= {"ih.{}_bias": (4 * hidden,), "hh.{}_bias": (4 * hidden,)}
    return {name.format(kind): torch.randn(size) for name, size in shapes.items() for kind in ("mu", "rho")}


def test_lstms_of_bayesian_torch() -> None:
    state = lstm_state()
    model = nn.ModuleDict({"lstm": BBB.BBBLSTM(3, 2, batch_first=True)})
    model.load_state_dict(convert_state_dict({f"lstm.{key}": t for key, t in state.items()}))
    own = model.state_dict()
    for part in ("ih", "hh"):
        for kind in ("weight", "bias"):
            assert torch.equal(own[f"lstm.module.{kind}_{part}_l0"], state[f"{part}.mu_{kind}"])
            assert torch.equal(own[f"lstm.rho.{kind}_{part}_l0"], state[f"{part}.rho_{kind}"])
    # Linear layers of these names that are no LSTM's, or of other names.
    cell = {**lstm_state(), "ih.mu_weight": torch.ones(7, 3), "ih.rho_weight": torch.ones(7, 3)}
    assert {"ih.W_mu", "hh.bias_rho"} <= convert_state_dict(cell).keys()
    named = convert_state_dict({f"my_{key}": t for key, t in lstm_state().items()})
    assert {"my_ih.W_mu", "my_hh.bias_rho"} <= named.keys()


def test_priors_of_bayesian_torch() -> None:
    """Where they were saved: their sigma is the prior's, whatever its name there was."""
    state, _ = saved("bayesian-torch")
    conv = {f"prior_weight_{kind}": torch.rand(SHAPES["conv.weight"]) + 0.1 for kind in ("mu", "sigma")}
    conv |= {f"prior_bias_{kind}": torch.rand(4) + 0.1 for kind in ("mu", "sigma")}
    net = Net()
    net.load_state_dict(convert_state_dict(state | {f"conv.{key}": t for key, t in conv.items()}))
    (_, _, mu, sigma, _), (_, _, bias_mu, bias_sigma, _) = net.conv.terms()
    for found, key in (
        (mu, "weight_mu"),
        (sigma, "weight_sigma"),
        (bias_mu, "bias_mu"),
        (bias_sigma, "bias_sigma"),
    ):
        assert isinstance(found, Tensor) and torch.equal(found, conv[f"prior_{key}"])
    lstm = lstm_state() | {"hh.prior_weight_mu": torch.randn(8, 2)}
    layer: Any = BBB.BBBLSTM(3, 2)
    layer.load_state_dict(convert_state_dict(lstm))
    assert torch.equal(layer.terms()[1].prior_mu, lstm["hh.prior_weight_mu"])


# ---------------------------------------------------------------- against the libraries themselves


@pytest.fixture
def noise(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets what the layers of bayesian-torch and blitz draw, for every eps."""

    def set_to(value: float) -> None:
        monkeypatch.setattr(torch.Tensor, "normal_", lambda t, *args, **options: t.fill_(value))

    return set_to


def scattered(module: nn.Module) -> nn.Module:
    """With a sigma of each weight's own."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            if "rho" in name or "sigma" in name:
                p.uniform_(-4, 0)
            else:
                p.uniform_(-1, 1)
    return module


def loaded(ours: nn.Module, theirs: nn.Module, **options: Any) -> nn.Module:
    made = convert_state_dict(theirs.state_dict())
    assert options or str(ours.load_state_dict(made)) == "<All keys matched successfully>"
    ours.load_state_dict(made, **options)
    return ours


def with_eps_of_one(layer: Any) -> Any:
    """The layer whose means are mu + sigma."""
    layer = copy.deepcopy(layer)
    with torch.no_grad():
        for mu, rho in layer.posterior():
            mu += F.softplus(rho)
    return layer


def first(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else first(result[0])


def compare(
    ours: Any, theirs: Callable[[float], Any], x: Tensor, draws: tuple[float, ...] = (0.0, 1.0)
) -> None:
    """The outputs at the means, and with every eps 1."""
    for eps in draws:
        of = ours if eps == 0.0 else with_eps_of_one(ours)
        torch.testing.assert_close(first(of(x, sample=False)), first(theirs(eps)), rtol=1e-6, atol=1e-6)


# The plain class's arguments, and the input's shape.
PRODUCTS: dict[str, tuple[tuple[Any, ...], dict[str, Any], tuple[int, ...]]] = {
    "Linear": ((5, 3), {}, (4, 5)),
    "Conv1d": ((4, 6, 3), {"stride": 2, "padding": 1, "groups": 2}, (2, 4, 7)),
    "Conv2d": ((4, 6, (3, 2)), {"padding": 1, "dilation": 2}, (2, 4, 6, 7)),
    "Conv3d": ((2, 3, 2), {"groups": 1}, (2, 2, 3, 4, 3)),
    "ConvTranspose1d": ((4, 6, 3), {"stride": 2, "padding": 1, "groups": 2}, (2, 4, 5)),
    "ConvTranspose2d": ((4, 6, (3, 3)), {"stride": 2, "output_padding": 1}, (2, 4, 3, 4)),
    "ConvTranspose3d": ((2, 3, 2), {"dilation": 2}, (2, 2, 3, 2, 3)),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", PRODUCTS)
@pytest.mark.parametrize("family", ["Reparameterization", "Flipout"])
def test_bayesian_torch(family: str, kind: str, bias: bool, noise: Callable[[float], None]) -> None:
    theirs = pytest.importorskip("bayesian_torch.layers")
    args, options, shape = PRODUCTS[kind]
    priors = {"prior_mean": 0, "prior_variance": 1, "posterior_mu_init": 0, "posterior_rho_init": -3.0}
    their = scattered(getattr(theirs, kind + family)(*args, **options, **priors, bias=bias))
    layers: ModuleType = BBB if family == "Reparameterization" else Flipout
    our: Any = loaded(getattr(layers, f"BBB{kind}")(*args, **options, bias=bias), their)
    x = torch.randn(shape)

    def output(eps: float) -> Tensor:
        noise(eps)
        # ConvTranspose3dFlipout runs only with the KL, the other transposed Flipout layers only without.
        return first(their(x, return_kl=kind == "ConvTranspose3d"))

    compare(our, output, x, (0.0, 1.0) if family == "Reparameterization" else (0.0,))
    for (_, rho), name in zip(our.posterior(), ("weight", "bias"), strict=False):
        there: Any = getattr(their, f"rho_{name}", None)
        there = their.rho_kernel if there is None else there
        torch.testing.assert_close(F.softplus(rho), torch.log1p(torch.exp(there)), rtol=1e-6, atol=0)


def test_lstm_of_bayesian_torch(noise: Callable[[float], None]) -> None:
    theirs = pytest.importorskip("bayesian_torch.layers")
    their, x = scattered(theirs.LSTMReparameterization(5, 3)), torch.randn(2, 4, 5)
    our = loaded(BBB.BBBLSTM(5, 3, batch_first=True), their)

    def output(eps: float) -> Any:
        noise(eps)
        return their(x)

    compare(our, output, x)


def test_a_model_of_bayesian_torch(noise: Callable[[float], None]) -> None:
    """dnn_to_bnn and convert have the same names."""
    convert_there = pytest.importorskip("bayesian_torch.models.dnn_to_bnn").dnn_to_bnn

    def make() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Sequential(nn.Linear(36, 2))
        )

    there, x = make(), torch.randn(3, 1, 5, 5)
    names = ("prior_mu", "prior_sigma", "posterior_mu_init", "posterior_rho_init")
    how = dict(zip(names, (0.0, 1.0, 0.0, -3.0), strict=True))
    convert_there(there, {**how, "type": "Reparameterization", "moped_enable": False, "moped_delta": 0.5})
    noise(0.0)
    here = loaded(bbb_fast.convert(make(), "bbb"), scattered(there)).eval()
    with bbb_fast.posterior_means():
        torch.testing.assert_close(here(x), there.eval()(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["Linear", "Conv1d", "Conv2d", "Conv3d"])
def test_blitz(kind: str, bias: bool, noise: Callable[[float], None]) -> None:
    theirs = pytest.importorskip("blitz.modules")
    args, options, shape = PRODUCTS[kind]
    if kind == "Conv3d":
        args = (*args[:2], (2, 2, 2))
    their = scattered(getattr(theirs, f"Bayesian{kind}")(*args, **options, bias=bias))
    # A BayesianLinear keeps a bias that it does not use.
    strict = bias or kind != "Linear"
    our = getattr(BBB, f"BBB{kind}")(*args, **options, bias=bias)
    if strict:
        loaded(our, their)
    else:
        with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "bias_mu", "bias_rho"'):
            loaded(our, their)
        loaded(our, their, strict=False)
    x = torch.randn(shape)

    def output(eps: float) -> Tensor:
        noise(eps)
        return their(x)

    compare(our, output, x)


def test_blitz_after_another_type(noise: Callable[[float], None]) -> None:
    """What it trains, and draws from, are the samplers' parameters, which are other tensors then."""
    theirs = pytest.importorskip("blitz.modules")
    their, x = scattered(theirs.BayesianLinear(5, 3)).double(), torch.randn(4, 5).double()
    their(x).square().sum().backward()
    torch.optim.SGD(their.parameters(), 0.1).step()
    with pytest.warns(UserWarning, match=r"weight_sampler\.mu and not weight_mu"):
        made = convert_state_dict(their.state_dict())
    our = BBB.BBBLinear(5, 3, dtype=torch.float64)
    our.load_state_dict(made)

    def output(eps: float) -> Tensor:
        noise(eps)
        return their(x)

    compare(our, output, x)


def test_embedding_of_blitz(noise: Callable[[float], None]) -> None:
    theirs = pytest.importorskip("blitz.modules")
    their, x = scattered(theirs.BayesianEmbedding(7, 3)), torch.randint(7, (2, 4))
    our = loaded(BBB.BBBEmbedding(7, 3), their)

    def output(eps: float) -> Tensor:
        noise(eps)
        return their(x)

    compare(our, output, x)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["Linear", "Conv2d", "BatchNorm2d"])
def test_torchbnn(kind: str, bias: bool) -> None:
    theirs = pytest.importorskip("torchbnn")
    args, options, shape = PRODUCTS.get(kind, ((4,), {}, (3, 4, 2, 2)))
    if kind == "BatchNorm2d":
        their: Any = scattered(theirs.BayesBatchNorm2d(0, SIGMA, *args)).eval()
        our = loaded(WeightSpace(nn.BatchNorm2d(*args)).eval(), their)
    else:
        their = scattered(getattr(theirs, f"Bayes{kind}")(0, SIGMA, *args, **options, bias=bias))
        our = loaded(getattr(BBB, f"BBB{kind}")(*args, **options, bias=bias), their)
    x = torch.randn(shape)

    def output(eps: float) -> Tensor:
        their.freeze()
        for buffer in (their.weight_eps, their.bias_eps):
            if buffer is not None:
                buffer.fill_(eps)
        return their(x)

    compare(our, output, x)
