"""torch.func and batched gradients: vmap of every op against a Python loop, in every mapped dimension."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import conv_case, flat, linear_case, posterior, rng
from torch import Tensor, nn
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from torch.utils._pytree import tree_map

from bbb_fast import functional, kl_loss
from bbb_fast.layers import BBB, BBB_LRT, Flipout

ops = torch.ops.bbb_fast

# Their outputs are one tensor or two, by their arguments.
sample_weight: Callable[..., Any] = functional.sample_weight
B = 3


def _detached(case: list[Any]) -> list[Any]:
    return [None if t is None else t.detach() for t in case]


def _stacked(make: Callable[[], Any]) -> list[Any]:
    """B draws of an op's tensors, each argument stacked along its first dimension."""
    return [
        None if parts[0] is None else torch.stack(parts)
        for parts in zip(*(_detached(make()) for _ in range(B)), strict=True)
    ]


def _geometry(**changed: Any) -> tuple[Any, ...]:
    values = {
        "stride": [1, 1],
        "padding": [1, 1],
        "dilation": [1, 1],
        "transposed": False,
        "output_padding": [0, 0],
        "groups": 1,
    }
    return tuple({**values, **changed}.values())


MASK = [True, True, False, True, True]
PRIOR = (0.1, 0.4)


def _layer_forward(name: str, geometry: tuple[Any, ...], option: Any) -> Callable[..., Any]:
    def run(r: Tensor, *case: Tensor) -> Any:
        return getattr(ops, name)(*case, r, *geometry, *PRIOR, True, option)

    return run


def _layer_backward(name: str, geometry: tuple[Any, ...]) -> Callable[..., Any]:
    def run(r: Tensor, g: Tensor, g_kl: Tensor, kept: Tensor, *case: Tensor) -> Any:
        return getattr(ops, f"{name}_backward")(g, g_kl, *case, kept, r, *geometry, *PRIOR, MASK)

    return run


def _rngs() -> Tensor:
    return torch.stack([rng(stream=k) for k in range(B)])


def _out(*shape: int) -> Tensor:
    return torch.zeros(B, *shape)


def _posterior_backward_out(r: Tensor, g: Tensor, g_v: Tensor, mu: Tensor, rho: Tensor, *out: Tensor) -> Any:
    again = ops.posterior_backward_out(
        [g], [g_v], None, [mu], [rho], r, [0.0], [0.1], [out[0]], [out[1]], torch.float32
    )
    return again, *out


def _writing(name: str) -> Callable[..., Any]:
    """The first argument is what the op has written to."""

    def run(r: Tensor, *args: Tensor) -> Tensor:
        getattr(ops, name)(*args, *([r] if name == "lrt_sample_" else []))
        return args[0]

    return run


def _pairs() -> list[Tensor]:
    return [torch.randn(B, 4, 5), torch.randn(B, 4, 5) - 1]


# Each: the function of an rng and of tensors, and B of these tensors each.
def _cases() -> dict[str, tuple[Callable[..., Any], Callable[[], list[Tensor]]]]:
    linear = partial(linear_case, (4, 2), 6, 5)
    conv = partial(conv_case, 2, 2, 4, 6, (3, 3), (5, 6))

    def with_grads(make: Callable[[], Any], y: tuple[int, ...], kept: tuple[int, ...]) -> list[Tensor]:
        return [torch.randn(B, *y), torch.rand(B), torch.rand(B, *kept), *_stacked(make)]

    cases: dict[str, tuple[Callable[..., Any], Callable[[], list[Tensor]]]] = {
        "normal": (lambda r, x: (ops.normal([5], r, torch.float32), x), lambda: [torch.randn(B, 2)]),
        "uniform": (lambda r, x: (ops.uniform([5], r, torch.float32), x), lambda: [torch.randn(B, 2)]),
        "dropout": (
            lambda r, x: [ops.dropout(x, r, 0.4, *how) for how in ((), (True,), (False, True))],
            lambda: [torch.randn(B, 4, 5, 3)],
        ),
        "drop_elements": (
            lambda r, x: ops.drop_elements(x.contiguous(), r, 0.4),
            lambda: [torch.randn(B, 4, 5)],
        ),
        "sample_weights": (
            lambda r, m, s: ops.sample_weights([m, m[0]], [s, s[0]], r, *PRIOR, True, None),
            _pairs,
        ),
        "kl_divergence": (lambda _, m, s: ops.kl_divergence([m], [s], [0.1], [0.4]), _pairs),
        "kl_tensor_prior": (
            lambda _, m, s, p: ops.kl_tensor_prior(m, s, p, p.abs() + 0.1),
            lambda: [*_pairs(), torch.randn(B, 4, 5)],
        ),
        "kl_tensor_prior_backward": (
            lambda _, k, m, s, p: ops.kl_tensor_prior_backward(k, m, s, p, p.abs() + 0.1),
            lambda: [torch.randn(B), *_pairs(), torch.randn(B, 4, 5)],
        ),
        "posterior_backward": (
            lambda r, g, k, m, s: ops.posterior_backward([g], k, [m], [s], r, [0.1], [0.4]),
            lambda: [torch.randn(B, 4, 5), torch.randn(B), *_pairs()],
        ),
        "posterior_backward, KL alone": (
            lambda _, k, m, s: ops.posterior_backward(
                [None, None], k, [m, m], [s, s], None, [0.1] * 2, [0.4] * 2
            ),
            lambda: [torch.randn(B), *_pairs()],
        ),
        "posterior_backward_out": (
            _posterior_backward_out,
            lambda: [torch.randn(B, 4, 5), torch.randn(B, 4, 5), *_pairs(), _out(4, 5), _out(4, 5)],
        ),
        "variance": (lambda _, m, s: ops.variance([m], [s], *PRIOR, True, torch.bfloat16), _pairs),
        "square": (lambda _, x: ops.square(x, torch.float64), lambda: [torch.randn(B, 4, 5)]),
        "square_backward_": (
            _writing("square_backward_"),
            lambda: [torch.randn(B, 4, 5) for _ in range(3)],
        ),
        "lrt_sample_": (_writing("lrt_sample_"), lambda: [torch.randn(B, 4, 5), torch.rand(B, 4, 5)]),
        "flip_signs": (lambda r, x: ops.flip_signs(x, r, 2, 1), lambda: [torch.randn(B, 4, 5, 3)]),
        "add_flipped_": (
            lambda r, y, x: (ops.add_flipped_(y, x, r, 3, -1), y)[1],
            lambda: [torch.randn(B, 4, 5) for _ in range(2)],
        ),
        "lrt_sample_backward": (
            lambda r, g, v: ops.lrt_sample_backward(g, v, r),
            lambda: [torch.randn(B, 4, 5), torch.rand(B, 4, 5)],
        ),
    }
    for estimator, option in (("bbb", True), ("lrt", torch.bfloat16), ("flipout", True)):
        cases[f"{estimator}_linear"] = (
            _layer_forward(f"{estimator}_linear", (), option),
            lambda: _stacked(linear),
        )
        cases[f"{estimator}_conv"] = (
            _layer_forward(f"{estimator}_conv", _geometry(), option),
            lambda: _stacked(conv),
        )
        shapes = ((4, 2, 5), (2, 6, 5, 6)) if estimator == "lrt" else ((5, 6), (6, 4, 3, 3))
        cases[f"{estimator}_linear_backward"] = (
            _layer_backward(f"{estimator}_linear", ()),
            partial(with_grads, linear, (4, 2, 5), shapes[0]),
        )
        cases[f"{estimator}_conv_backward"] = (
            _layer_backward(f"{estimator}_conv", _geometry()),
            partial(with_grads, conv, (2, 6, 5, 6), shapes[1]),
        )
    return cases


CASES = _cases()
IN_PLACE = {
    "posterior_backward_out": (5, 6),
    "square_backward_": (1,),
    "lrt_sample_": (1,),
    "add_flipped_": (1,),
}


def _loop(run: Callable[..., Any], args: list[Tensor], dims: list[int | None]) -> list[Tensor]:
    slices = [
        flat(run(*(a if d is None else a.select(d, i).clone() for a, d in zip(args, dims, strict=True))))
        for i in range(B)
    ]
    return [torch.stack(parts) for parts in zip(*slices, strict=True)]


def _equal(result: Any, expected: list[Tensor]) -> None:
    """Bit for bit: the same kernels run on the same slices."""
    result = flat(result)
    assert len(result) == len(expected)
    for a, b in zip(result, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("mapped", ["first", "last", "some", "one"])
@pytest.mark.parametrize("name", CASES)
def test_every_op(native: None, name: str, mapped: str) -> None:
    run, make = CASES[name]
    args = [_rngs(), *make()]
    dims: list[int | None] = [0] * len(args)
    if mapped == "last":
        args = [a if a.dim() == 1 else a.movedim(0, -1) for a in args]
        dims = [a.dim() - 1 for a in args]
    elif mapped != "first":
        keep = range(1, len(args), 2) if mapped == "some" else [1]
        for k in range(len(args)):
            if k not in keep and k not in IN_PLACE.get(name, ()):
                args[k], dims[k] = args[k][0], None
    expected = _loop(run, args, dims)
    _equal(vmap(run, tuple(dims))(*(a.clone() for a in args)), expected)
    if name not in IN_PLACE:
        _equal(vmap(run, tuple(dims), chunk_size=2)(*args), expected)


def test_every_op_has_a_rule(native: None) -> None:
    schemas = torch._C._jit_get_all_schemas()
    names = {s.name.removeprefix("bbb_fast::") for s in schemas if s.name.startswith("bbb_fast::")}
    assert names == {name.split(",")[0] for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_nested(native: None, name: str) -> None:
    run, make = CASES[name]
    args = [_rngs(), *make()]
    twice = [torch.stack([a, a.flip(0)], 1) for a in args]
    expected = [_loop(run, [t.select(1, k) for t in twice], [0] * len(args)) for k in range(2)]
    result = vmap(vmap(run), in_dims=1, out_dims=1)(*twice)
    _equal(result, [torch.stack(parts, 1) for parts in zip(*expected, strict=True)])


@pytest.mark.parametrize("name", CASES)
def test_empty_batch(native: None, name: str) -> None:
    run, make = CASES[name]
    args = [_rngs(), *make()]
    shapes = [t.shape[1:] for t in _loop(run, args, [0] * len(args))]
    result = flat(vmap(run)(*(a[:0] for a in args)))
    assert [t.shape for t in result] == [(0, *shape) for shape in shapes]


def test_written_to_must_be_mapped(native: None) -> None:
    x = torch.randn(B, 4)
    with pytest.raises(ValueError, match="square_backward_: vmap must map grad_input, which is written to"):
        vmap(lambda x: _writing("square_backward_")(x, torch.zeros(4), x, x))(x)


KINDS = ["Linear", "Conv2d", "Conv2d channels_last", "Conv2d circular", "Conv3d channels_last"]


def _layer(layers: ModuleType, kind: str) -> tuple[nn.Module, Tensor]:
    """A layer with input for B examples, each a batch of two."""
    torch.manual_seed(3)
    name, *how = kind.split()
    if name == "Linear":
        return layers.BBBLinear(6, 5), torch.randn(B, 2, 6)
    options = {"padding_mode": "circular", "padding": 1} if "circular" in how else {}
    spatial = int(name[-2])
    x = torch.randn(B, 2, 4, *[5] * spatial)
    if how:
        x = x.movedim(2, -1).contiguous().movedim(-1, 2)
    return getattr(layers, f"BBB{name}")(4, 6, 3, **options), x


def _seeded(run: Callable[..., Any], *args: Any) -> Any:
    torch.manual_seed(1)
    return run(*args)


def _close(result: Any, expected: Any) -> None:
    for a, b in zip(flat(result), flat(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.fixture(params=[BBB, BBB_LRT, Flipout], ids=["BBB", "BBB_LRT", "Flipout"])
def layers(request: pytest.FixtureRequest) -> ModuleType:
    return request.param


class WithKl(nn.Module):
    """A loss with the KL, per example."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).square().sum() + kl_loss(self)


@pytest.mark.parametrize("kind", KINDS)
class TestLayers:
    def test_forward(self, backend: str, layers: ModuleType, kind: str) -> None:
        """Also where the layer before has the images in another memory order."""
        layer, x = _layer(layers, kind)
        same = _seeded(vmap(layer, randomness="same"), x)
        _close(same, torch.stack([_seeded(layer, part) for part in x]))
        different = vmap(layer, randomness="different")(x[:1].expand_as(x))
        assert not torch.isclose(different[0], different[1]).all()

        def behind(x: Tensor) -> Tensor:
            return layer(x.relu() + 1)

        inside = _seeded(vmap(behind, in_dims=1, out_dims=1, randomness="same"), x.movedim(0, 1))
        _close(inside, torch.stack([_seeded(layer, part.relu() + 1) for part in x], 1))

    def test_two_layers(self, backend: str, layers: ModuleType, kind: str) -> None:
        """What one layer returns is for the next what it would be without vmap."""
        layer, x = _layer(layers, kind)
        second = (
            _layer(layers, kind)[0] if kind == "Linear" else getattr(layers, f"BBB{kind.split()[0]}")(6, 2, 2)
        )
        second = layers.BBBLinear(5, 2) if kind == "Linear" else second
        model = nn.Sequential(layer, nn.Softplus(), second)
        _close(_seeded(vmap(model, randomness="same"), x), torch.stack([_seeded(model, part) for part in x]))

    def test_gradients_of_examples(self, backend: str, layers: ModuleType, kind: str) -> None:
        layer, x = _layer(layers, kind)
        model = WithKl(layer)
        parameters = dict(model.named_parameters())

        def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
            return functional_call(model, parameters, (x,))

        mapped = _seeded(vmap(grad(loss, (0, 1)), (None, 0), randomness="same"), parameters, x)
        apart = [_seeded(grad(loss, (0, 1)), parameters, part) for part in x]
        expected = tree_map(lambda *parts: torch.stack(parts), *apart)
        _close(list(mapped[0].values()), list(expected[0].values()))
        _close(mapped[1], expected[1])
        total = grad(lambda p: vmap(loss, (None, 0), randomness="same")(p, x).sum())
        _close(list(_seeded(total, parameters).values()), [t.sum(0) for t in expected[0].values()])

    def test_ensemble(self, backend: str, layers: ModuleType, kind: str) -> None:
        members = [_layer(layers, kind)[0] for _ in range(B)]
        for k, member in enumerate(members):
            nn.init.constant_(member.get_parameter("W_mu"), 0.1 * k)
        x = _layer(layers, kind)[1][0]
        parameters, buffers = stack_module_state(members)

        def loss(parameters: Any, buffers: Any) -> Tensor:
            return functional_call(members[0], (parameters, buffers), (x,)).square().sum()

        mapped = _seeded(vmap(grad(loss), randomness="same"), parameters, buffers)
        for k, member in enumerate(members):
            alone = _seeded(grad(loss), {n: p.detach() for n, p in member.named_parameters()}, {})
            _close([t[k] for t in mapped.values()], list(alone.values()))

    def test_jacobians(self, backend: str, layers: ModuleType, kind: str) -> None:
        layer, x = _layer(layers, kind)
        x = x[0].clone().requires_grad_()
        y = _seeded(layer, x)
        leaves = [x, *layer.parameters()]
        rows = [torch.autograd.grad(v, leaves, retain_graph=True) for v in y.flatten()[:7]]
        unit = torch.eye(y.numel())[:7].reshape(7, *y.shape)
        batched = torch.autograd.grad(y, leaves, unit, is_grads_batched=True, retain_graph=True)
        _close(list(batched), [torch.stack(parts) for parts in zip(*rows, strict=True)])
        expected = torch.stack([row[0] for row in rows])
        pick = lambda x: layer(x).flatten()[:7]  # noqa: E731
        _close(_seeded(jacrev(pick), x.detach()), expected)
        _close(
            _seeded(partial(torch.autograd.functional.jacobian, pick, vectorize=True), x.detach()), expected
        )


def test_batched_gradients_of_the_kl(backend: str, layers: ModuleType) -> None:
    """With the output's and alone, from the layer and from the ops."""
    layer, x = layers.BBBLinear(6, 5), torch.randn(2, 6)
    y = layer(x)
    leaves = list(layer.parameters())
    kl = layer.kl_loss()
    factors = torch.tensor([1.0, 2.0, -3.0])
    alone = torch.autograd.grad(kl, leaves, factors, is_grads_batched=True, retain_graph=True)
    once = torch.autograd.grad(kl, leaves, retain_graph=True)
    _close(list(alone), [torch.stack([f * g for f in factors]) for g in once])
    both = torch.autograd.grad(y.sum() + kl, leaves, factors, is_grads_batched=True, retain_graph=True)
    once = torch.autograd.grad(y.sum() + kl, leaves)
    _close(list(both), [torch.stack([f * g for f in factors]) for g in once])
    mu, rho = posterior(4, 5)
    w, kl = sample_weight(mu, rho, rng(), with_kl=True)
    loss = w.square().sum() + kl
    both = torch.autograd.grad(loss, [mu, rho], factors, is_grads_batched=True, retain_graph=True)
    once = torch.autograd.grad(loss, [mu, rho])
    _close(list(both), [torch.stack([f * g for f in factors]) for g in once])


def test_transforms_of_sample_weight(backend: str) -> None:
    """grad, vjp and jacrev, with the weight, the KL or both in the loss."""
    mu, rho = posterior(4, 5)
    plain = mu.detach(), rho.detach()
    for use in (lambda w, kl: w.square().sum(), lambda w, kl: kl, lambda w, kl: w.sum() * kl):

        def loss(mu: Tensor, rho: Tensor, use: Any = use) -> Tensor:
            return use(*sample_weight(mu, rho, rng(), with_kl=True))

        expected = torch.autograd.grad(loss(mu, rho), [mu, rho])
        _close(list(grad(loss, (0, 1))(*plain)), list(expected))
        _close(list(jacrev(loss, (0, 1))(*plain)), list(expected))
        _close(list(vjp(loss, *plain)[1](torch.ones(()))), list(expected))
    with pytest.raises(RuntimeError, match=r"backward: second derivatives are not implemented|once"):
        w: Any = sample_weight(mu, rho, rng())
        (g,) = torch.autograd.grad(w.square().sum(), mu, create_graph=True)
        if backend == "reference":
            raise RuntimeError("the reference differentiates more than once")
        g.sum().backward()


def test_forward_mode_raises(native: None, layers: ModuleType) -> None:
    """Not zeros, and in one line."""
    layer, x = _layer(layers, "Linear")
    conv, images = _layer(layers, "Conv2d")
    mu, rho = _detached(list(posterior(4, 5)))
    calls: list[tuple[str, Callable[[Tensor], Any], Tensor]] = [
        ("_linear", layer, x[0]),
        ("_conv", conv, images[0]),
        ("kl_divergence", lambda m: functional.kl_divergence(m, rho), mu),
        ("kl_divergence", lambda r: functional.kl_divergence(mu, r), rho),
        ("sample_weights", lambda m: sample_weight(m, rho, rng()), mu),
    ]
    for name, call, at in calls:
        for run in (
            lambda: jacfwd(call, randomness="same")(at),  # noqa: B023
            lambda: jvp(call, (at,), (at,)),  # noqa: B023
        ):
            with pytest.raises(NotImplementedError, match=f"{name}: forward-mode derivatives are not"):
                run()
