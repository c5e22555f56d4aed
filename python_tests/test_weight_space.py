"""WeightSpace and what is built on it: recurrent layers and attention."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from helpers import unrelated
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from bbb_fast import fixed_noise, functional, kl_loss, predict
from bbb_fast._noise import posterior_means
from bbb_fast.layers import BBB, BBB_LRT, WeightSpace
from bbb_fast.layers.base import DrawnAtEachForward


def sequence(*extra: int) -> Tensor:
    return torch.randn(2, 5, 3, *extra)


# Each: a Bayesian layer, torch.nn's, and the arguments of a forward.
KINDS: dict[str, tuple[type, type, tuple[Any, ...], dict[str, Any], Callable[[], tuple[Any, ...]]]] = {
    "RNN": (BBB.BBBRNN, nn.RNN, (3, 4), {"num_layers": 2}, lambda: (sequence().transpose(0, 1),)),
    "LSTM": (
        BBB.BBBLSTM,
        nn.LSTM,
        (3, 4, 2),
        {"bidirectional": True, "batch_first": True, "proj_size": 2},
        lambda: (sequence(),),
    ),
    "GRU": (BBB.BBBGRU, nn.GRU, (3, 4), {"bias": False, "batch_first": True}, lambda: (sequence()[0],)),
    "RNNCell": (BBB.BBBRNNCell, nn.RNNCell, (3, 4), {}, lambda: (torch.randn(2, 3),)),
    "LSTMCell": (BBB.BBBLSTMCell, nn.LSTMCell, (3, 4), {}, lambda: (torch.randn(2, 3),)),
    "GRUCell": (BBB.BBBGRUCell, nn.GRUCell, (3, 4), {}, lambda: (torch.randn(2, 3), torch.randn(2, 4))),
    "MultiheadAttention": (
        BBB.BBBMultiheadAttention,
        nn.MultiheadAttention,
        (8, 2),
        {"kdim": 6, "vdim": 5, "batch_first": True},
        lambda: (torch.randn(2, 4, 8), torch.randn(2, 7, 6), torch.randn(2, 7, 5)),
    ),
}


def first(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else first(result[0])


def made(kind: str) -> tuple[Any, nn.Module, tuple[Any, ...]]:
    """A layer, torch.nn's with its means, and arguments."""
    ours, theirs, arguments, options, inputs = KINDS[kind]
    layer, point = ours(*arguments, **options), theirs(*arguments, **options)
    point.load_state_dict(layer.module.state_dict())
    return layer, point, inputs()


def with_weights(point: nn.Module, weights: dict[str, Tensor], arguments: tuple[Any, ...]) -> Tensor:
    """torch.nn's own forward on a copy that holds these weights."""
    point = copy.deepcopy(point)
    point.load_state_dict(weights)
    return first(point(*arguments))


@pytest.mark.parametrize("kind", KINDS)
def test_means_are_torch_nns(backend: str, kind: str) -> None:
    layer, point, x = made(kind)
    assert torch.equal(first(layer(*x, sample=False)), first(point(*x)))
    with posterior_means():
        assert torch.equal(first(layer(*x)), first(point(*x)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_draw_is_torch_nns_forward_with_drawn_weights(backend: str, kind: str) -> None:
    layer, point, x = made(kind)
    with fixed_noise(3, sample=2):
        y = first(layer(*x))
    mus, rhos = zip(*layer.posterior(), strict=True)
    weights, _ = functional.sample_weights(mus, rhos, torch.tensor([3, 2 << 32]))
    names = [name for name, _ in layer.module.named_parameters()]
    expected = with_weights(point, dict(zip(names, (w.detach() for w in weights), strict=True)), x)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_each_forward_draws(backend: str, kind: str, training: bool) -> None:
    layer, _, x = made(kind)
    layer.train(training)
    with torch.set_grad_enabled(training):
        assert unrelated(first(layer(*x)), first(layer(*x)))


@pytest.mark.parametrize("kind", KINDS)
def test_every_posterior_gets_its_gradient(backend: str, kind: str) -> None:
    """Through the draw, against the formulas, and through the KL."""
    layer, point, x = made(kind)
    with fixed_noise(7):
        y = first(layer(*x))
    g = torch.randn_like(y)
    pairs = layer.posterior()
    got = torch.autograd.grad(y, [t for pair in pairs for t in pair], g, retain_graph=True)
    mus, rhos = zip(*pairs, strict=True)
    weights, _ = functional.sample_weights(mus, rhos, torch.tensor([7, 0]))
    drawn = [w.detach().requires_grad_() for w in weights]
    names = [name for name, _ in point.named_parameters()]
    z = first(torch.func.functional_call(point, dict(zip(names, drawn, strict=True)), x))
    for k, ((mu, rho), of_weight) in enumerate(zip(pairs, torch.autograd.grad(z, drawn, g), strict=True)):
        torch.testing.assert_close(got[2 * k], of_weight, rtol=1e-5, atol=1e-6)
        eps = (drawn[k].detach() - mu.detach()) / nn.functional.softplus(rho.detach())
        torch.testing.assert_close(
            got[2 * k + 1], of_weight * eps * torch.sigmoid(rho.detach()), rtol=1e-3, atol=1e-5
        )
    kl = layer.kl_loss()
    mus, rhos = zip(*pairs, strict=True)
    torch.testing.assert_close(kl, functional.kl_divergence(mus, rhos, 0.0, 0.1))
    assert all(t.abs().sum() > 0 for t in torch.autograd.grad(kl, rhos))


def test_packed_sequences(backend: str) -> None:
    """One draw for all steps of sequences of different lengths: each as if it were alone."""
    layer = BBB.BBBLSTM(3, 4, 2, bidirectional=True, batch_first=True)
    x, lengths = torch.randn(3, 6, 3), [6, 4, 1]
    with fixed_noise(1):
        packed, _ = layer(pack_padded_sequence(x, lengths, batch_first=True))
        y, _ = pad_packed_sequence(packed, batch_first=True)
        for row, length in enumerate(lengths):
            alone, _ = layer(x[row : row + 1, :length])
            torch.testing.assert_close(y[row, :length], alone[0])
            assert not y[row, length:].any()


def test_one_draw_a_sequence_of_cells(backend: str) -> None:
    """Under fixed_noise a loop over a cell is what the layer computes with the same weights."""
    cell = BBB.BBBGRUCell(3, 4)
    x, h = torch.randn(5, 2, 3), torch.zeros(2, 4)
    with fixed_noise(2):
        for step in x:
            h = cell(step, h)
        weights = cell.draw(torch.tensor([2, 0]))
    layer = nn.GRU(3, 4)
    layer.load_state_dict({f"{name}_l0": w.detach() for name, w in weights.items()})
    torch.testing.assert_close(h, layer(x)[1][0])


def test_what_is_read_of_the_module() -> None:
    layer = BBB.BBBLSTM(3, 4, 2, batch_first=True)
    assert (layer.hidden_size, layer.num_layers, layer.batch_first) == (4, 2, True)
    assert isinstance(layer.weight_ih_l0, DrawnAtEachForward)
    with pytest.raises(TypeError, match=r"BBBLSTM.weight_ih_l0 has no numbers"):
        torch.add(cast(Any, layer.weight_ih_l0), 1)
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        layer.nothing_of_the_kind  # noqa: B018


class Tied(nn.Module):
    """An embedding whose table is also the output's weight, a buffer, and an integer parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.table.weight
        self.norm = nn.BatchNorm1d(4)
        self.steps = nn.Parameter(torch.tensor([3]), requires_grad=False)

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        return {"logits": self.out(self.norm(self.table(x))) * scale}


def test_any_module(backend: str) -> None:
    layer: Any = WeightSpace(Tied())
    assert list(layer.rho._parameters) == ["table:weight", "norm:weight", "norm:bias"]
    x = torch.tensor([1, 5, 5])
    with fixed_noise(4):
        y = layer(x, scale=2.0)["logits"]
    # Tied: the drawn table is also the drawn output's weight.
    drawn = layer.draw(torch.tensor([4, 0]))
    h = drawn["table.weight"][x]
    h = (h - h.mean(0)) / (h.var(0, unbiased=False) + 1e-5).sqrt() * drawn["norm.weight"] + drawn["norm.bias"]
    torch.testing.assert_close(y, h @ drawn["table.weight"].t() * 2, rtol=1e-4, atol=1e-5)
    assert layer.module.norm.num_batches_tracked == 1 and layer.module.table.weight is layer.module.out.weight
    total = sum(functional.kl_divergence(mu, rho) for mu, rho in layer.posterior())
    torch.testing.assert_close(kl_loss(nn.Sequential(layer)), total)


def test_predict_draws_one_function(backend: str) -> None:
    model = nn.Sequential(nn.Flatten(), WeightSpace(nn.Linear(12, 5)), nn.Tanh(), BBB_LRT.BBBLinear(5, 2))
    x = torch.randn(9, 3, 4)
    y = predict(model, x, 4, seed=1)
    torch.testing.assert_close(predict(model, x, 4, seed=1, batch_size=2), y)
    assert unrelated(y[0], y[1])


def test_many_parameters_take_no_other_layers_streams(backend: str) -> None:
    """More tensors than a layer has streams: the next layer's noise is its own."""
    many = nn.ParameterList([nn.Parameter(torch.zeros(4)) for _ in range(300)])

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.many = many

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.stack(list(self.many)).sum()

    model: Any = nn.Sequential(WeightSpace(Holder()), BBB.BBBLinear(4, 1, bias=False))
    with fixed_noise(5) as draw, torch.no_grad():
        model(torch.zeros(2, 4))
        rows = [draw.rng(model[k], torch.device("cpu")) for k in (0, 1)]
    assert rows[1][1] - rows[0][1] >= 300
    eps = torch.stack([functional.normal((4,), rows[0] + torch.tensor([0, k])) for k in range(300)])
    assert not (eps == functional.normal((1, 4), rows[1])).all(1).any()


def test_priors(backend: str) -> None:
    """Numbers for all parameters, or a tensor for each, which its checkpoint brings along."""
    layer = WeightSpace(nn.Linear(3, 2), {"prior_mu": 0.2, "prior_sigma": 0.5})
    mus, rhos = zip(*layer.posterior(), strict=True)
    torch.testing.assert_close(layer.kl_loss(), functional.kl_divergence(mus, rhos, 0.2, 0.5))
    priors = [(torch.randn_like(mu), torch.rand_like(mu) + 0.1) for mu in mus]
    layer.set_priors(priors)
    expected = functional.kl_divergence(mus, rhos, *map(list, zip(*priors, strict=True)))
    torch.testing.assert_close(layer.kl_loss(), expected)
    other = WeightSpace(nn.Linear(3, 2))
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other.kl_loss(), expected)
    empirical = WeightSpace(nn.Linear(3, 2), {"prior_sigma": "empirical"})
    assert empirical.kl_loss() < WeightSpace.kl_loss(WeightSpace(empirical.module))


def test_initialisation() -> None:
    module = nn.LSTM(3, 4)
    kept = copy.deepcopy(module.state_dict())
    layer: Any = BBB.BBBLSTM.of(module, {"posterior_rho_initial": (-5, 0)})
    assert all(torch.equal(layer.module.state_dict()[k], v) for k, v in kept.items())
    assert all(torch.equal(rho, torch.full_like(rho, -5)) for _, rho in layer.posterior())
    other = BBB.BBBLSTM(3, 4, priors={"posterior_mu_initial": (1.0, 0.0)})
    assert all((mu == 1).all() for mu, _ in other.posterior())
    layer.reset_parameters()
    assert not torch.equal(layer.module.weight_ih_l0, kept["weight_ih_l0"])


def test_copies_and_pickles() -> None:
    layer = BBB.BBBLSTM(3, 4)
    layer(torch.randn(2, 1, 3))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.state_dict().keys() == layer.state_dict().keys()
        results = []
        for one in (layer, other):
            with fixed_noise(1):
                results.append(one(torch.ones(2, 1, 3))[0])
        assert torch.equal(*results)
    assert next(iter(layer.state_dict())) == "module.weight_ih_l0"
    layer.module.load_state_dict(nn.LSTM(3, 4).state_dict())


def test_threads_do_not_see_each_others_weights() -> None:
    layer, x = WeightSpace(nn.Linear(64, 64)), torch.randn(8, 64)
    with fixed_noise(1):
        expected = layer(x).detach()
    wrong = []

    def work() -> None:
        with torch.no_grad():
            for _ in range(200):
                with fixed_noise(1):
                    if not torch.equal(layer(x), expected):
                        wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    ("module", "error", "message"),
    [
        (3, TypeError, "module must be a torch.nn.Module, got int"),
        (nn.ReLU(), ValueError, "has no floating-point parameters"),
        (nn.Sequential(BBB.BBBLinear(2, 3)), ValueError, "has Bayesian layers"),
        (nn.LazyLinear(3), ValueError, "is lazy"),
    ],
)
def test_wrong_modules(module: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        WeightSpace(module)


def test_compiles(backend: str) -> None:
    """In one graph, with the numbers of eager under the same draw."""
    layer, x = WeightSpace(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))), torch.randn(3, 6)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with fixed_noise(6, model=layer):
        torch.testing.assert_close(compiled(x), layer(x))
    assert unrelated(compiled(x), compiled(x))


@pytest.mark.parametrize("training", [True, False])
def test_in_a_transformer_of_torch_nn(backend: str, training: bool) -> None:
    """In eval mode too, where torch.nn hands the attention's own weights to a fused kernel if it can."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2)
    for layer in encoder.layers:
        layer.self_attn = BBB.BBBMultiheadAttention.of(layer.self_attn)
    encoder.train(training)
    x = torch.randn(2, 5, 8)
    with torch.set_grad_enabled(training):
        assert unrelated(encoder(x), encoder(x))
        mask = torch.zeros(2, 5, dtype=torch.bool)
        mask[1, 3:] = True
        with posterior_means():
            means = encoder(x, src_key_padding_mask=mask)
        plain = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2)
        plain.load_state_dict(
            {k.replace(".module", ""): v for k, v in encoder.state_dict().items() if ".rho." not in k}
        )
        plain.train(training)
        expected = plain(x, src_key_padding_mask=mask)
    torch.testing.assert_close(means[0], expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(means[1, :3], expected[1, :3], rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- what was once wrong


class Checkpointed(nn.Module):
    def __init__(self, how: bool | None) -> None:
        super().__init__()
        self.a, self.how = nn.Linear(4, 4), how

    def body(self, x: Tensor) -> Tensor:
        return self.a(x).tanh()

    def forward(self, x: Tensor) -> Tensor:
        if self.how is None:
            return self.body(x)
        return torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=self.how)


@pytest.mark.parametrize("how", [False, True])
def test_a_checkpoint_within_finds_the_drawn_weights(backend: str, how: bool) -> None:
    grads = []
    for kind in (None, how):
        torch.manual_seed(1)
        layer, x = WeightSpace(Checkpointed(kind)), torch.randn(2, 4, requires_grad=True)
        with fixed_noise(1):
            y = layer(x)
        y.sum().backward()
        if how and kind is not None:  # of tensors that are no arguments, a reentrant checkpoint gives none
            continue
        grads.append([p.grad for p in layer.parameters()])
    for a, b in zip(grads[0], grads[-1], strict=True):
        torch.testing.assert_close(a, b)


class Slow(nn.Linear):
    """Waits within its forward, until it is told to go on."""

    # Shared by copies, as functions are.
    entered: threading.Event
    go_on: threading.Event

    def forward(self, x: Tensor) -> Tensor:
        if threading.current_thread() is not threading.main_thread():
            self.entered.set()
            assert self.go_on.wait(10)
        return super().forward(x)


def test_another_threads_forward_is_not_seen() -> None:
    """While it runs, a state_dict, the means, the KL and predictions are what they are without it."""
    inner = Slow(3, 3)
    Slow.entered, Slow.go_on = threading.Event(), threading.Event()
    layer, x = WeightSpace(inner), torch.eye(3)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    mean, kl, seen = layer(x, sample=False), kl_loss(layer), predict(layer, x, 2, seed=1)
    thread = threading.Thread(target=lambda: layer(x))
    thread.start()
    try:
        assert Slow.entered.wait(10)
        assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
        assert torch.equal(layer(x, sample=False), mean) and torch.equal(kl_loss(layer), kl)
        assert torch.equal(predict(layer, x, 2, seed=1), seen)
    finally:
        Slow.go_on.set()
        thread.join()


@pytest.mark.parametrize("kind", ["GRUCell", "MultiheadAttention", "LSTM"])
def test_functional_calls(backend: str, kind: str) -> None:
    """Parameters that are given, and gradients by torch.func."""
    layer, _, x = made(kind)
    given = {k: v.detach() * 1.5 for k, v in layer.named_parameters()}
    with fixed_noise(2):
        y = first(torch.func.functional_call(layer, given, x))
    other = copy.deepcopy(layer)
    other.load_state_dict(given, strict=False)
    with fixed_noise(2):
        torch.testing.assert_close(y, first(other(*x)))
    with fixed_noise(2):
        grads = torch.func.grad(lambda p: first(torch.func.functional_call(layer, p, x)).sum())(given)
    with fixed_noise(2):
        expected = torch.autograd.grad(first(other(*x)).sum(), list(other.parameters()))
    for (name, _), g in zip(other.named_parameters(), expected, strict=True):
        torch.testing.assert_close(grads[name], g)


def test_names_that_dicts_have(backend: str) -> None:
    class Memory(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.keys, self.values = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(5, 2))

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.keys.t()).softmax(-1) @ self.values

    layer = WeightSpace(Memory())
    assert layer(torch.randn(2, 3)).shape == (2, 2) and len(layer.posterior()) == 2


def test_other_methods_draw_too(backend: str) -> None:
    class Both(nn.Linear):
        def encode(self, x: Tensor) -> Tensor:
            return self(x).tanh()

    layer, x = WeightSpace(Both(3, 2)), torch.randn(4, 3)
    with fixed_noise(1):
        torch.testing.assert_close(layer.encode(x), layer(x).tanh())
    assert unrelated(layer.encode(x), layer.encode(x))


def test_what_a_forward_stores_stays(backend: str) -> None:
    class Counting(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 2)
            self.calls = 0
            self.total: Tensor
            self.register_buffer("total", torch.zeros(2))

        def forward(self, x: Tensor) -> Tensor:
            y: Any = super().forward(x)
            self.calls += 1
            self.total = self.total + y.detach().sum(0)
            self.last = y
            return y

    layer: Any = WeightSpace(Counting())
    y = [layer(torch.randn(4, 3)) for _ in range(2)]
    assert layer.module.calls == 2 and layer.module.last is y[1]
    torch.testing.assert_close(layer.module.total, y[0].sum(0) + y[1].sum(0))


def test_a_tensor_is_no_prior_of_all_parameters() -> None:
    with pytest.raises(
        ValueError, match=r"priors\['prior_sigma'\] must be a number, as it is of all parameters"
    ):
        WeightSpace(nn.Linear(3, 2), {"prior_sigma": torch.ones(2, 3)})
