"""convert, to_deterministic, summary and posterior_to_prior, on models as people write them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import unrelated
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.prune import l1_unstructured
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from bbb_fast import (
    convert,
    fixed_noise,
    kl_loss,
    posterior_means,
    posterior_to_prior,
    predict,
    reference,
    summary,
    to_deterministic,
)
from bbb_fast.layers import BBB, BBB_LRT, Flipout, WeightSpace
from bbb_fast.layers.base import BayesianModule

# ---------------------------------------------------------------- models


class Block(nn.Module):
    """A residual block of ResNet-18."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(i, o, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(o)
        self.conv2 = nn.Conv2d(o, o, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(o)
        self.downsample = None
        if stride != 1 or i != o:
            self.downsample = nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet18(nn.Module):
    """He et al. 2016, an eighth as wide."""

    def __init__(self, width: int = 8, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        self.stages = nn.Sequential(
            *(
                nn.Sequential(
                    Block(widths[k], widths[k + 1], 1 if k == 0 else 2),
                    Block(widths[k + 1], widths[k + 1], 1),
                )
                for k in range(4)
            )
        )
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.adaptive_avg_pool2d(self.stages(self.stem(x)), 1).flatten(1))


def vgg() -> nn.Module:
    """Simonyan and Zisserman 2015, an eighth as wide."""
    layers: list[nn.Module] = []
    channels = 3
    for widths in ((8,), (16,), (32, 32)):
        for width in widths:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
            channels = width
        layers.append(nn.MaxPool2d(2))
    head = [nn.Flatten(), nn.Linear(32 * 16, 64), nn.ReLU(True), nn.Dropout(), nn.Linear(64, 10)]
    return nn.Sequential(*layers, *head)


class UNet(nn.Module):
    """Two levels; the way up gives the size of the way down, which is odd."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(1, 8, 3, padding="same", padding_mode="reflect")
        self.low = nn.Conv2d(8, 16, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(16, 8, 3, stride=2)
        self.out = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.down(x))
        b = F.relu(self.low(F.max_pool2d(a, 2)))
        return self.out(torch.cat((a, self.up(b, a.shape[-2:])), 1))


class Tagger(nn.Module):
    """A two-layer bidirectional LSTM over words, packed."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(30, 12, padding_idx=0)
        self.lstm = nn.LSTM(12, 8, 2, batch_first=True, bidirectional=True)
        self.tags = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.words(x), (x != 0).sum(1), batch_first=True, enforce_sorted=False)
        y, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        return self.tags(y)


class Tied(nn.Module):
    """A language model whose output layer is its embedding's table."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(17, 8)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, 17, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embed(x))))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.zeros(x.shape[:2], dtype=torch.bool)
        mask[0, 4:] = True
        return self.encoder(x, src_key_padding_mask=mask)[:, :4]


class Twice(nn.Module):
    """One layer at two places, and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = self.first
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x))) * self.scale


def words(*shape: int) -> Tensor:
    x = torch.randint(1, 17, shape)
    x[0, shape[1] - 2 :] = 0
    return x


IMAGES = lambda *size: lambda: torch.randn(2, *size)  # noqa: E731
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "resnet18": (ResNet18, IMAGES(3, 32, 32)),
    "vgg": (vgg, IMAGES(3, 32, 32)),
    "unet": (UNet, IMAGES(1, 11, 13)),
    "tagger": (Tagger, lambda: words(3, 7)),
    "transformer": (Encoder, IMAGES(6, 16)),
    "linear": (lambda: nn.Linear(5, 3), lambda: torch.randn(4, 5)),
    "conv_transpose3d": (
        lambda: nn.ConvTranspose3d(2, 4, 3, 2, 1, output_padding=1, groups=2, dilation=(1, 2, 1)),
        IMAGES(2, 3, 2, 3),
    ),
    "tied": (Tied, lambda: words(2, 5)),
    "twice": (Twice, lambda: torch.randn(4, 6)),
    "weight_norm": (
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, 2)),
        lambda: torch.randn(3, 4),
    ),
    "gru_cell": (lambda: nn.GRUCell(4, 3), lambda: torch.randn(2, 4)),
    "bags": (lambda: nn.EmbeddingBag(17, 3, mode="max"), lambda: words(2, 5)),
}


@pytest.fixture(params=MODELS)
def made(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    """A trained-looking model in eval mode, and an input."""
    model, x = MODELS[request.param]
    torch.manual_seed(1)
    net, inputs = model(), x()
    with torch.no_grad():
        net.train()(inputs)  # statistics of batch norms
    return net.eval(), inputs


def quietly(model: nn.Module, *args: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return convert(model, *args, **options)


def bayesian(model: nn.Module) -> list[BayesianModule]:
    return [m for m in model.modules() if isinstance(m, BayesianModule)]


# ---------------------------------------------------------------- convert and back


@pytest.mark.parametrize("estimator", ["bbb", "lrt", "flipout"])
def test_means_draws_and_back(made: tuple[nn.Module, Tensor], estimator: str) -> None:
    """At the means it is the model, in train and in eval mode; else each forward draws; back it is exact."""
    model, x = made
    before = copy.deepcopy(model.state_dict())
    net = quietly(model, estimator)
    assert bayesian(net) and not bayesian(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for training in (False, True):
        for m in (model, net):
            m.train(training)
            for part in m.modules():
                if isinstance(part, (nn.BatchNorm2d, nn.Dropout)):
                    part.eval()
        with posterior_means(), torch.set_grad_enabled(training):
            torch.testing.assert_close(net(x), model(x), rtol=1e-5, atol=1e-5)
        with torch.set_grad_enabled(training):
            assert not torch.allclose(net(x), net(x), rtol=1e-4)
    model.eval(), net.eval()
    back = to_deterministic(net)
    assert not bayesian(back) and back.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(v, before[k]) for k, v in back.state_dict().items())
    with torch.no_grad():
        assert torch.equal(back(x), model(x))
    assert [type(m) for m in back.modules()] == [type(m) for m in model.modules()]


def test_a_draw_is_a_deterministic_model(made: tuple[nn.Module, Tensor]) -> None:
    model, x = made
    net = quietly(model)
    for sample in (0, 3):
        drawn = to_deterministic(net, seed=7, sample=sample)
        with fixed_noise(7, sample, model=net), torch.no_grad():
            torch.testing.assert_close(net(x), drawn(x), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        y = predict(net, x, 4, seed=7)
        torch.testing.assert_close(y[3], drawn(x), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(drawn(x), model(x), rtol=1e-4)


@pytest.mark.parametrize("estimator", ["bbb", "lrt", "flipout"])
def test_a_training_step_moves_every_posterior(made: tuple[nn.Module, Tensor], estimator: str) -> None:
    model, x = made
    net = quietly(model, estimator).train()
    before = copy.deepcopy(net.state_dict())
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    (net(x).square().mean() + 1e-3 * kl_loss(net)).backward()
    optimizer.step()
    posteriors = {id(t) for m in bayesian(net) for pair in m.posterior() for t in pair}
    names = [name for name, p in net.named_parameters() if id(p) in posteriors]
    assert names and all(not torch.equal(net.get_parameter(n), before[n]) for n in names)


def test_kinds() -> None:
    net: Any = quietly(nn.Sequential(nn.Linear(2, 3), nn.Conv1d(1, 2, 3), nn.LSTM(2, 2)), "flipout")
    assert [type(m) for m in net] == [Flipout.BBBLinear, Flipout.BBBConv1d, BBB.BBBLSTM]
    assert type(quietly(nn.Linear(2, 3))) is BBB_LRT.BBBLinear
    tagger = quietly(Tagger())
    assert type(tagger.words) is BBB.BBBEmbedding and type(tagger.lstm) is BBB.BBBLSTM
    encoder = quietly(Encoder()).encoder.layers[0]
    assert type(encoder.self_attn) is BBB.BBBMultiheadAttention and type(encoder.linear1) is BBB_LRT.BBBLinear
    assert type(quietly(parametrizations.spectral_norm(nn.Conv2d(1, 2, 3)))) is WeightSpace


def test_arguments_are_kept() -> None:
    for point in (
        nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 0), (1, 2), 2, False, "circular"),
        nn.Conv1d(4, 6, 3, padding="same", padding_mode="replicate"),
        nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, 2, True, 2),
    ):
        layer = quietly(point)
        for name in ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"):
            assert getattr(layer, name) == getattr(point, name)
        assert (layer.bias_mu is None) == (point.bias is None)
        assert repr(to_deterministic(layer)) == repr(point)


def test_ties(estimator: str = "lrt") -> None:
    """Shared parameters stay shared, count once in the KL, and are one draw where a draw is one function."""
    net: Any = quietly(Tied(), estimator)
    assert net.embed.W_mu is net.head.W_mu and net.embed.W_rho is net.head.W_rho
    alone = [net.embed.kl_loss(), net.mix.kl_loss()]
    torch.testing.assert_close(kl_loss(net), sum(alone))
    drawn: Any = to_deterministic(net, seed=1)
    assert drawn.head.weight is drawn.embed.weight
    twice: Any = quietly(Twice())
    assert twice.first is twice.second
    torch.testing.assert_close(kl_loss(twice), twice.first.kl_loss())


def test_what_is_kept() -> None:
    """Mode, types, memory formats, hooks, and which parameters are trained."""
    model: Any = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)).double()
    model = model.to(memory_format=torch.channels_last)
    model[0].weight.requires_grad_(False)
    model[2].eval()
    calls: list[str] = []
    model[0].register_forward_hook(lambda *_: calls.append("forward"))
    model[2].register_forward_pre_hook(lambda *_: calls.append("pre"))
    net: Any = quietly(model)
    assert net[0].training and not net[2].training
    assert not net[0].W_mu.requires_grad and not net[0].W_rho.requires_grad and net[0].bias_rho.requires_grad
    for t in (net[0].W_mu, net[0].W_rho):
        assert t.dtype == torch.float64 and t.is_contiguous(memory_format=torch.channels_last)
    net(torch.randn(1, 2, 5, 5, dtype=torch.float64))
    assert calls == ["forward", "pre"]
    back: Any = to_deterministic(net)
    back(torch.randn(1, 2, 5, 5, dtype=torch.float64))
    assert calls == ["forward", "pre"] * 2 and not back[2].training and not back[0].weight.requires_grad


def test_include_and_exclude() -> None:
    def names(**options: Any) -> list[str]:
        model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Conv1d(2, 2, 1)), nn.Linear(2, 2))
        net = quietly(model, **options)
        return [name for name, m in net.named_modules() if isinstance(m, BayesianModule)]

    assert names() == ["0.0", "0.2", "1"]
    assert names(include="1") == ["1"] and names(include="0") == ["0.0", "0.2"]
    assert names(include="0.*") == ["0.0", "0.2"] and names(include=nn.Conv1d) == ["0.2"]
    assert names(include=[nn.Conv1d, "1"]) == ["0.2", "1"]
    assert names(exclude="0") == ["1"] and names(exclude=nn.Linear) == ["0.2"]
    assert names(exclude=lambda name, module: name.endswith("0")) == ["1"]
    assert names(include="0", exclude=(nn.Conv1d,)) == ["0.0"]
    last = names(include=lambda name, module: name == "1")
    assert last == ["1"]


class Odd(nn.Module):
    """A module of no kind that there is a layer for."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def test_others() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), Odd(), nn.Identity())
    with pytest.warns(UserWarning, match="left as they are, with parameters of their own: Odd;"):
        net: Any = convert(model)
    assert isinstance(net[2], Odd) and isinstance(net[1], nn.LayerNorm)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole: Any = convert(model, others="weights")
        convert(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    assert [type(m) for m in whole][1:3] == [WeightSpace, WeightSpace]
    x = torch.randn(4, 3)
    with posterior_means():
        torch.testing.assert_close(whole(x), model(x))
    assert unrelated(whole(x), whole(x))
    assert torch.equal(to_deterministic(whole)(x), model(x))


def test_layers_that_are_no_longer_what_they_were() -> None:
    """A subclass with a forward of its own is not taken for the layer; one without is."""

    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    class Named(nn.Linear):
        pass

    with pytest.warns(UserWarning, match="Scaled"):
        assert type(convert(Scaled(2, 3))) is Scaled
    assert type(quietly(Named(2, 3))) is BBB_LRT.BBBLinear
    with pytest.warns(UserWarning, match=r"LazyLinear \(not initialised\); run a forward before convert"):
        convert(nn.Sequential(nn.LazyLinear(3)))
    with pytest.warns(UserWarning, match="Embedding"):
        assert type(convert(nn.Embedding(3, 2, max_norm=1.0))) is nn.Embedding


def test_priors() -> None:
    priors = {"prior_sigma": 0.5, "posterior_rho_initial": (-4.0, 0.0), "posterior_mu_initial": (9.0, 0.0)}
    model: Any = nn.Sequential(nn.Linear(3, 2), nn.LSTM(2, 2))
    net: Any = quietly(model, priors=priors, variance_dtype=torch.bfloat16)
    assert torch.equal(net[0].W_mu, model[0].weight) and net[0].variance_dtype == torch.bfloat16
    assert torch.equal(net[1].module.weight_ih_l0, model[1].weight_ih_l0)
    for module in net:
        assert all((rho == -4).all() for _, rho in module.posterior())
        assert all(term.prior_sigma == 0.5 for term in module.terms())


@pytest.mark.parametrize("delta", [0.05, 0.3])
def test_moped(delta: float) -> None:
    """Prior N(w, (d |w|)^2), posterior sigma d |w|, with a floor where w is small."""
    model: Any = nn.Sequential(nn.Linear(30, 20), nn.ReLU(), nn.GRU(20, 3))
    with torch.no_grad():
        model[0].bias.zero_()
        model[0].weight[0, 0] = 0.0
    net: Any = quietly(model, moped_delta=delta)
    for module in (net[0], net[2]):
        for term in module.terms():
            sigma = reference.softplus(term.rho.detach())
            w = term.mu.detach()
            scale = w.square().mean().sqrt() if w.any() else torch.tensor(1.0)
            torch.testing.assert_close(sigma, delta * w.abs().clamp_min(0.1 * scale), rtol=1e-4, atol=0)
            assert torch.equal(term.prior_mu, w)
            torch.testing.assert_close(term.prior_sigma, sigma, rtol=1e-5, atol=0)
    assert abs(float(kl_loss(net))) < 1e-5
    loaded: Any = quietly(model)
    loaded.load_state_dict(net.state_dict())
    torch.testing.assert_close(kl_loss(loaded), kl_loss(net))
    assert torch.equal(loaded[0].prior_sigma, net[0].prior_sigma)


def test_posterior_to_prior() -> None:
    net: Any = quietly(nn.Sequential(nn.Linear(4, 3), nn.Embedding(5, 2, padding_idx=1), nn.LSTM(2, 2)))
    assert kl_loss(net) > 1
    same: Any = posterior_to_prior(net)
    assert same is net
    kl = kl_loss(net)
    assert abs(float(kl)) < 1e-5
    grads = torch.autograd.grad(kl, [p for p in net.parameters()], allow_unused=True)
    assert all(g is None or g.abs().max() < 1e-3 for g in grads)
    with torch.no_grad():
        net[0].W_mu.add_(0.1)
    sigma = reference.softplus(net[0].W_rho.detach())
    torch.testing.assert_close(kl_loss(net).detach(), (0.5 * (0.1 / sigma) ** 2).sum(), rtol=1e-4, atol=1e-5)
    # Priors are buffers: they are saved, and move.
    assert net.double()[0].prior_mu.dtype == torch.float64
    fresh = quietly(nn.Sequential(nn.Linear(4, 3), nn.Embedding(5, 2, padding_idx=1), nn.LSTM(2, 2))).double()
    fresh.load_state_dict(net.state_dict())
    torch.testing.assert_close(kl_loss(fresh), kl_loss(net))


def test_wrong_arguments() -> None:
    layer = nn.Linear(2, 2)
    for arguments, options, error, message in (
        ((3,), {}, TypeError, "model must be a torch.nn.Module, got int"),
        ((layer, "ltr"), {}, ValueError, "estimator must be one of bbb, lrt, flipout, got 'ltr'"),
        ((layer,), {"others": "all"}, ValueError, "others must be 'keep' or 'weights', got 'all'"),
        ((layer,), {"moped_delta": 0.0}, ValueError, "moped_delta must be > 0, got 0.0"),
        ((layer,), {"include": 3}, TypeError, "include must be a name, a type, a function"),
        ((layer,), {"priors": {"sigma": 1}}, ValueError, "unknown prior keys"),
        (
            (layer, "bbb"),
            {"variance_dtype": torch.bfloat16},
            ValueError,
            "variance_dtype is an option of lrt",
        ),
    ):
        with pytest.raises(error, match=message):
            convert(*arguments, **options)
    functions: tuple[Any, ...] = (to_deterministic, summary, posterior_to_prior)
    for function in functions:
        with pytest.raises(TypeError, match="model must be a torch.nn.Module, got str"):
            function("model")


# ---------------------------------------------------------------- summary


def test_summary() -> None:
    net: Any = quietly(
        nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.LSTM(2, 2), nn.ReLU()), moped_delta=0.1
    )
    net.append(quietly(nn.Linear(2, 2), priors={"prior_sigma": "empirical"}))
    found = summary(net)
    assert [row.name for row in found.rows] == ["0", "1", "2", "4"]
    assert [row.estimator for row in found.rows] == ["lrt", None, "bbb", "lrt"]
    assert found.rows[0].parameters == 8 and found.rows[0].shape == "[2, 3], [2]"
    assert found.rows[1].kl is None and found.other_parameters == 4
    assert found.bayesian_parameters == 8 + 48 + 6
    assert (
        found.kl
        == pytest.approx(float(kl_loss(net)))
        == pytest.approx(sum(r.kl for r in found.rows if r.kl is not None))
    )
    mu, rho = net[4].posterior()[0]
    text = str(found)
    assert "not Bayesian" in text and "N(0, empirical^2)" in text and "a tensor" in text
    assert len({len(line) for line in text.splitlines()[1:2]}) == 1 and "KL" in text.splitlines()[0]
    sigmas = torch.cat([reference.softplus(rho).flatten() for _, rho in net[4].posterior()])
    assert found.rows[3].sigma == pytest.approx(float(sigmas.mean()), rel=1e-5)
    assert found.to_dict()["rows"][0]["kind"] == "BBBLinear"


def test_summary_counts_ties_once() -> None:
    found = summary(quietly(Tied()))
    assert found.bayesian_parameters == 17 * 8 + 8 * 8 + 8
    assert found.rows[2].parameters == 0 and found.rows[2].kl == 0.0


# ---------------------------------------------------------------- torch's own module database


def test_models_of_transformers() -> None:
    """GPT-2 and BERT with random weights, if `transformers` is installed."""
    transformers = pytest.importorskip("transformers")
    small = {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 50, "n_positions": 16}
    gpt = transformers.GPT2LMHeadModel(transformers.GPT2Config(**small)).eval()
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=50
    )
    bert = transformers.BertForSequenceClassification(config).eval()
    ids = torch.randint(0, 50, (2, 9))
    for model, others in ((gpt, "keep"), (gpt, "weights"), (bert, "keep")):
        net = quietly(model, others=others)
        with posterior_means(), torch.no_grad():
            torch.testing.assert_close(net(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            assert not torch.allclose(net(ids).logits, net(ids).logits)
            assert torch.equal(to_deterministic(net)(ids).logits, model(ids).logits)
        (net.train()(ids).logits.square().mean() + 1e-3 * kl_loss(net)).backward()
        posteriors = [t for m in bayesian(net) for pair in m.posterior() for t in pair]
        assert all(t.grad is not None and t.grad.any() for t in posteriors if t.requires_grad)
        y = predict(net, ids, 2, seed=1, call=lambda m, x: m(x).logits)
        torch.testing.assert_close(
            predict(net, ids, 2, seed=1, batch_size=1, call=lambda m, x: m(x).logits), y
        )


# ---------------------------------------------------------------- what was once wrong


class Decoder(nn.Module):
    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.w = weight

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w.t()


class SharedByKinds(nn.Module):
    """Ties of a layer and a module in weight space, of biases alone, of weights with biases apart."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.bias = self.a.bias
        self.c.weight = self.a.weight
        self.rnn, self.other = nn.GRUCell(4, 4), nn.GRUCell(4, 4)
        self.other.weight_hh = self.rnn.weight_hh
        self.decode = Decoder(self.embed.get_parameter("weight"))

    def forward(self, x: Tensor) -> Tensor:
        h = self.c(self.b(self.a(self.embed(x)).tanh()).tanh())
        return self.decode(self.other(h, self.rnn(h)))


def test_ties_of_all_kinds_are_one_draw() -> None:
    net, x = quietly(SharedByKinds().eval(), others="weights"), torch.randint(0, 9, (5,))
    for sample in (0, 2):
        drawn: Any = to_deterministic(net, seed=1, sample=sample)
        assert drawn.b.bias is drawn.a.bias and drawn.c.weight is drawn.a.weight
        assert drawn.decode.w is drawn.embed.weight and drawn.other.weight_hh is drawn.rnn.weight_hh
        with fixed_noise(1, sample, model=net), torch.no_grad():
            torch.testing.assert_close(net(x), drawn(x), rtol=1e-4, atol=1e-5)
        assert unrelated(drawn.a.bias - net.a.bias_mu, drawn.c.bias - net.c.bias_mu)
    found = summary(net)
    assert sum(row.kl for row in found.rows if row.kl is not None) == pytest.approx(float(kl_loss(net)))


def test_types_do_not_change_the_order() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.zeros(3))
            self.b = nn.Parameter(torch.zeros(3, dtype=torch.float64))
            self.c = nn.Parameter(torch.full((3,), 100.0))

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([self.a.double(), self.b, self.c.double()]) + x

    net = nn.Sequential(WeightSpace(Mixed()))
    x = torch.zeros(3, dtype=torch.float64)
    with fixed_noise(1, model=net):
        torch.testing.assert_close(to_deterministic(net, seed=1)(x), net(x))


def test_modules_under_several_names_and_in_lists() -> None:
    class Aliased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
            self.head = self.body[0]
            self.plain: list[Any] = [self.body[0], {"second": self.body[1]}]

        def forward(self, x: Tensor) -> Tensor:
            return self.plain[1]["second"](self.plain[0](x))

    model, x = Aliased(), torch.randn(4, 3)
    net: Any = quietly(model)
    assert net.plain[0] is net.head is net.body[0] and unrelated(net(x), net(x))
    assert torch.equal(to_deterministic(net)(x), model(x)) and type(model.plain[0]) is nn.Linear
    only: Any = quietly(model, include="head")
    assert (
        type(only.body[0]) is BBB_LRT.BBBLinear
        and type(only.body[1]) is nn.Linear
        and unrelated(only(x), only(x))
    )
    assert type(quietly(model, exclude=model.body[1]).body[1]) is nn.Linear
    with pytest.raises(ValueError, match="include='haed' is none of the model's modules"):
        convert(model, include="haed")


def test_converting_in_two_steps_keeps_ties() -> None:
    model = Tied()
    net: Any = quietly(quietly(model, include="embed"), include="head")
    assert net.embed.W_mu is net.head.W_mu and net.embed.W_rho is net.head.W_rho
    torch.testing.assert_close(kl_loss(net), net.embed.kl_loss())


def test_the_inside_of_attention_is_left_to_it() -> None:
    class SelfAttention(nn.MultiheadAttention):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # on purpose
            return super().forward(x, x, x, need_weights=False)[0]

    x = torch.randn(2, 3, 8)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)
    net = quietly(layer, include=nn.Linear)
    assert type(net.linear1) is BBB_LRT.BBBLinear and type(net.self_attn) is nn.MultiheadAttention
    assert unrelated(net(x), net(x))
    with pytest.warns(UserWarning, match="SelfAttention"):
        assert convert(nn.Sequential(SelfAttention(8, 2)))(x).shape == x.shape
    assert unrelated(*(quietly(SelfAttention(8, 2), others="weights")(x) for _ in range(2)))


def test_pruned_and_old_weight_norm() -> None:
    x = torch.randn(4, 3)
    pruned = nn.Sequential(nn.Linear(3, 3))
    l1_unstructured(pruned[0], "weight", 0.4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        normed = nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 3)))
    for model in (pruned, normed):
        for _ in range(2):
            net: Any = quietly(model)
            assert type(net[0]) is WeightSpace
            with posterior_means():
                torch.testing.assert_close(net(x), model(x))
            assert unrelated(net(x), net(x))
            torch.testing.assert_close(to_deterministic(net)(x), model(x))
            model(x)


def test_wrappers_are_refused() -> None:
    with pytest.raises(TypeError, match="convert the model inside DataParallel and wrap the result"):
        convert(nn.DataParallel(nn.Linear(3, 3)))


def test_hooks_of_modules_in_weight_space() -> None:
    net = quietly(nn.GRUCell(3, 2))
    calls: list[int] = []
    net.register_forward_hook(lambda *_: calls.append(1))
    to_deterministic(net)(torch.randn(2, 3))
    assert calls == [1]


def test_summary_of_what_has_no_numbers() -> None:
    lazy = summary(nn.Sequential(nn.LazyLinear(3)))
    assert "not initialised" in lazy.rows[0].shape
    with torch.device("meta"):
        meta = summary(quietly(nn.Linear(3, 2)))
    assert meta.rows[0].kl is None and meta.bayesian_parameters == 8
