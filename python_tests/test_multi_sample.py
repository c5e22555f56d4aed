"""multi_sample: several draws in one forward, each as under fixed_noise(draw="activations")."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from helpers import compare, conv_case, linear_case, posterior, rng, unrelated
from torch import Tensor, nn

from bbb_fast import convert, fixed_noise, functional, kl_loss, multi_sample, reference
from bbb_fast.layers import BBB, BBB_LRT, FlattenLayer, Flipout, ModuleWrapper
from bbb_fast.models import BBBLeNet
from bbb_fast.reference import conv_memory_format

# ---------------------------------------------------------------- ops whose rng names several draws

# Their outputs are one tensor or two, by their arguments.
lrt_linear: Callable[..., Any] = functional.lrt_linear
SEVERAL = torch.tensor([[1, 2], [3, 4], [-5, 6]])
ESTIMATORS = ("bbb", "lrt", "flipout")
# Of equal parts of the batch, and of the whole batch each.
RNGS = {"parts": SEVERAL, "whole": SEVERAL.unsqueeze(1)}
SHAPES: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "linear": (partial(linear_case, (6, 5), 7, 3), {}),
    "conv1d": (partial(conv_case, 1, 6, 4, 6, (3,), (7,), groups=2), {"padding": 1, "groups": 2}),
    "conv2d": (partial(conv_case, 2, 6, 4, 5, (3, 3), (7, 5)), {"padding": 1}),
    "conv3d": (partial(conv_case, 3, 3, 2, 3, (2, 2, 2), (3, 3, 4)), {"stride": 2}),
    "conv_transpose2d": (partial(conv_case, 2, 3, 5, 5, (3, 3), (4, 3)), {"stride": 2, "output_padding": 1}),
}


def part_of(x: Tensor, k: int, form: str) -> Tensor:
    return x if form == "whole" else x.tensor_split(3)[k]


@pytest.mark.parametrize("form", RNGS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_native_equals_reference(isa: str, estimator: str, shape: str, form: str) -> None:
    make, options = SHAPES[shape]
    function = getattr(functional, f"{estimator}_{shape}")
    for bias in (True, False):
        case = make(bias=bias)
        compare(partial(function, *case, RNGS[form], with_kl=True, **options), case, torch.float32, 4)


@pytest.mark.parametrize("form", RNGS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(native: None, estimator: str, dtype: torch.dtype, form: str) -> None:
    for name in ("linear", "conv2d"):
        make, options = SHAPES[name]
        for parameter_dtype in {dtype, torch.float32 if dtype != torch.float64 else dtype}:
            case = make(dtype=dtype, parameter_dtype=parameter_dtype)
            function = getattr(functional, f"{estimator}_{name}")
            compare(partial(function, *case, RNGS[form], **options), case, dtype, 4)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("form", RNGS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_each_draw_is_that_of_its_own_rng(
    backend: str, estimator: str, shape: str, form: str, last: bool
) -> None:
    """Outputs and gradients; each draw's noise is numbered from its first row on, in the order of memory."""
    make, options = SHAPES[shape]
    function = getattr(functional, f"{estimator}_{shape}")
    case = make()
    if last and case[0].dim() < 4:
        pytest.skip("has one memory format")
    if last:
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        case[0] = case[0].detach().contiguous(memory_format=formats[case[0].dim()]).requires_grad_()
    y = function(*case, RNGS[form], **options)
    each = [function(part_of(case[0], k, form), *case[1:], SEVERAL[k], **options) for k in range(3)]
    expected = torch.cat(each)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    if case[0].dim() > 3:
        assert y.stride() == expected.contiguous(memory_format=conv_memory_format(*case[:2])).stride()
    grad = torch.randn_like(y)
    ours, theirs = (torch.autograd.grad(t, case, grad) for t in (y, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", RNGS)
@pytest.mark.parametrize("estimator", ["bbb", "flipout"])
def test_recomputed_draws(backend: str, estimator: str, form: str) -> None:
    """Of every subset of gradients, and none of the input's."""
    function = getattr(functional, f"{estimator}_linear")
    case = linear_case((6,), 7, 3)
    for wanted in (case, case[1:], case[:1], [case[0], case[2]], [case[4]]):
        results = []
        for recompute in (False, True):
            y = function(*case, RNGS[form], recompute_weight=recompute)
            results.append(torch.autograd.grad(y, wanted, torch.ones_like(y)))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("estimator", ["bbb", "flipout"])
def test_more_draws_than_go_together(native: None, estimator: str, whole: bool, recompute: bool) -> None:
    """Backward forms the gradients of some draws' weights at a time."""
    rngs = torch.stack([torch.arange(9) + 3, 7 - torch.arange(9)], 1)
    for bias in (True, False):
        case = linear_case((9, 2), 7, 3, bias=bias)
        function = partial(
            getattr(functional, f"{estimator}_linear"),
            *case,
            rngs.unsqueeze(1) if whole else rngs,
            with_kl=True,
            recompute_weight=recompute,
        )
        compare(function, case, torch.float32, 4)


@pytest.mark.parametrize("form", RNGS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradcheck(native: None, estimator: str, form: str) -> None:
    case = linear_case((6,), 3, 2, dtype=torch.float64)
    function = getattr(functional, f"{estimator}_linear")
    assert torch.autograd.gradcheck(lambda *args: function(*args, RNGS[form], with_kl=True), case)


@pytest.mark.parametrize("form", RNGS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_opcheck(native: None, estimator: str, form: str) -> None:
    option = None if estimator == "lrt" else False
    op = getattr(torch.ops.bbb_fast, f"{estimator}_linear")
    torch.library.opcheck(op, (*linear_case((6,), 4, 3), RNGS[form], 0.0, 0.1, True, option))
    op = getattr(torch.ops.bbb_fast, f"{estimator}_conv")
    case = conv_case(2, 3, 2, 3, (3, 3), (5, 4))
    geometry = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    torch.library.opcheck(op, (*case, RNGS[form], *geometry, 0.0, 0.1, False, option))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_draws_of_nothing(backend: str, estimator: str) -> None:
    """An empty batch, and layers without inputs or outputs."""
    function = getattr(functional, f"{estimator}_linear")
    for rows, i, o in ((0, 4, 3), (3, 0, 2), (3, 2, 0)):
        case = linear_case((rows,), i, o)
        for form, length in (("parts", rows), ("whole", 3 * rows)):
            y = function(*case, RNGS[form])
            assert y.shape == (length, o)
            for t, g in zip(case, torch.autograd.grad(y.sum(), case), strict=True):
                assert g.shape == t.shape
                assert g.isfinite().all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_wrong_draws(backend: str, estimator: str) -> None:
    function = getattr(functional, f"{estimator}_linear")
    with pytest.raises(ValueError, match="with 3 draws, the first dimension of input must be a multiple"):
        function(*linear_case((7,), 4, 3), SEVERAL)
    for wrong in (SEVERAL[:0], SEVERAL.reshape(3, 2, 1), SEVERAL.reshape(1, 3, 2), SEVERAL[None, None]):
        with pytest.raises(ValueError, match=r"\[S, 2\] or \[S, 1, 2\] for S draws, got \["):
            function(*linear_case((6,), 4, 3), wrong)
    for rng_ in RNGS.values():
        with pytest.raises(ValueError, match=r"with several draws, input must have a batch dimension, got"):
            function(*linear_case((), 4, 3), rng_)


@pytest.mark.parametrize("form", RNGS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_vmap(backend: str, estimator: str, form: str) -> None:
    case = [t.detach() for t in linear_case((2, 6), 4, 3)]
    function = getattr(functional, f"{estimator}_linear")
    y = torch.func.vmap(lambda x: function(x, *case[1:], RNGS[form]))(case[0])
    for k in range(2):
        torch.testing.assert_close(y[k], function(case[0][k], *case[1:], RNGS[form]))


def test_batched_gradients(native: None) -> None:
    case = linear_case((6,), 4, 3)
    for estimator in ESTIMATORS:
        y = getattr(functional, f"{estimator}_linear")(*case, SEVERAL)
        grads = torch.randn(2, *y.shape)
        batched = torch.autograd.grad(y, case, grads, retain_graph=True, is_grads_batched=True)
        for k in range(2):
            for a, b in zip(batched, torch.autograd.grad(y, case, grads[k], retain_graph=True), strict=True):
                torch.testing.assert_close(a[k], b)


# ---------------------------------------------------------------- sample_weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_sample_weights_of_several_draws(isa: str, dtype: torch.dtype) -> None:
    pairs = [posterior(5, 7, dtype=dtype), posterior(3, dtype=dtype), posterior(0, 2, dtype=dtype)]
    mu, rho = zip(*pairs, strict=True)
    leaves = [*mu, *rho]

    def run() -> Any:
        return functional.sample_weights(mu, rho, SEVERAL, 0.1, 0.3, True)

    compare(run, leaves, dtype, 2)
    weights, kl = run()
    for k in range(3):
        own, own_kl = functional.sample_weights(mu, rho, SEVERAL[k], 0.1, 0.3, True)
        assert all(torch.equal(w[k], o) for w, o in zip(weights, own, strict=True))
        assert torch.equal(kl, own_kl)
    # Of some of the tensors alone.
    g_mu, g_rho, *others = torch.autograd.grad(weights[1].sum(), [mu[1], rho[1], mu[0], rho[0]])
    torch.testing.assert_close(g_mu, torch.full_like(mu[1], 3.0))
    assert g_rho.abs().sum() > 0
    assert not any(g.any() for g in others)


def test_sample_weights_opcheck(native: None) -> None:
    mu, rho = posterior(3, 4)
    torch.library.opcheck(torch.ops.bbb_fast.sample_weights, ([mu], [rho], SEVERAL, 0.0, 0.1, True, None))
    with pytest.raises(
        ValueError, match=r"rng must have shape \[2\] \(seed, stream\), or \[S, 2\] for S draws"
    ):
        functional.sample_weights([mu], [rho], SEVERAL.unsqueeze(1))


def test_gradients_are_counted(native: None) -> None:
    mu, rho = (t.detach() for t in posterior(3, 4))
    run = torch.ops.bbb_fast.posterior_backward_out
    out, priors = ([torch.empty(3, 4)], [torch.empty(3, 4)]), ([0.0], [0.1])
    g = torch.randn(3, 4)
    with pytest.raises(ValueError, match="got 2 grad_w for 1 tensors of 3 draws"):
        run([g, g], [], None, [mu], [rho], SEVERAL, *priors, *out)
    with pytest.raises(ValueError, match="got 1 grad_spread for 1 tensors of 3 draws"):
        run([g], [g], None, [mu], [rho], SEVERAL, *priors, *out)
    with pytest.raises(ValueError, match="give grad_w of all draws of tensor 0, or of none"):
        run([g, None, g], [], None, [mu], [rho], SEVERAL, *priors, *out)
    with pytest.raises(ValueError, match="give both grad_w and grad_spread of tensor 0, or neither"):
        run([g], [g, g, None], None, [mu], [rho], SEVERAL, *priors, *out)


# ---------------------------------------------------------------- the contexts


@pytest.mark.parametrize("family", [BBB, BBB_LRT, Flipout], ids=["bbb", "lrt", "flipout"])
def test_fixed_noise_of_activations(backend: str, family: Any) -> None:
    """The estimator's own noise, pinned."""
    layer, x = family.BBBLinear(5, 3), torch.randn(4, 5)
    op = getattr(functional, f"{layer.estimator}_linear")
    with fixed_noise(3, 2, draw="activations"):
        y = layer(x)
        assert torch.equal(layer(x), y)
    parameters = (layer.W_mu, layer.W_rho, layer.bias_mu, layer.bias_rho)
    assert torch.equal(y, op(x, *parameters, torch.tensor([3, 2 << 32])))
    with fixed_noise(3, 2):
        assert (layer.estimator == "bbb") == torch.equal(layer(x), y)
    with pytest.raises(ValueError, match="draw must be 'weights' or 'activations', got 'noise'"):
        fixed_noise(1, draw="noise")


# ---------------------------------------------------------------- multi_sample


class Wrapped(ModuleWrapper):
    def __init__(self) -> None:
        super().__init__()
        self.conv = Flipout.BBBConv2d(1, 4, 3)
        self.act = nn.ReLU()
        self.flat = FlattenLayer(4 * 16)
        self.fc = BBB_LRT.BBBLinear(64, 5)


def converted() -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding="same", padding_mode="circular"),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 3, 2, 2),
        nn.Flatten(),
        nn.Linear(3 * 144, 7),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return convert(model).eval()


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "lenet lrt": (lambda: BBBLeNet(10, 1, layer_type="lrt"), lambda: torch.randn(3, 1, 32, 32)),
    "lenet bbb": (lambda: BBBLeNet(10, 1, layer_type="bbb"), lambda: torch.randn(3, 1, 32, 32)),
    "wrapped": (Wrapped, lambda: torch.randn(2, 1, 6, 6)),
    "converted": (converted, lambda: torch.randn(2, 1, 6, 6)),
    "batch norm in training": (lambda: converted().train(), lambda: torch.randn(4, 1, 6, 6)),
    "embedding": (
        lambda: nn.Sequential(BBB.BBBEmbedding(9, 4), nn.Flatten(), BBB.BBBLinear(20, 2)),
        lambda: torch.randint(0, 9, (3, 5)),
    ),
    "weight space": (
        lambda: convert(nn.Sequential(nn.Linear(4, 4), nn.GRUCell(4, 3), nn.Linear(3, 2)), "flipout"),
        lambda: torch.randn(3, 4),
    ),
    "channels_last": (
        lambda: nn.Sequential(BBB_LRT.BBBConv2d(3, 8, 3), nn.ReLU(), BBB_LRT.BBBConv2d(8, 4, 3)),
        lambda: torch.randn(4, 3, 8, 7).to(memory_format=torch.channels_last),
    ),
}


def first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


# What stands between the input, which is the same in all draws, and the first layer.
FIRST: dict[str, Callable[[], nn.Module]] = {
    "nothing": nn.Identity,
    "views": lambda: nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Flatten()),
    "a write": lambda: nn.ReLU(inplace=True),
    "a write to a view": lambda: nn.Sequential(nn.Unflatten(1, (2, 3)), nn.ReLU(inplace=True), nn.Flatten()),
}
AROUND: dict[str, Callable[..., Tensor]] = {
    "nothing": lambda run, x: run(x),
    "no_grad": lambda run, x: torch.no_grad()(run)(x),
    "inference_mode": lambda run, x: torch.inference_mode()(run)(x),
    "vmap": lambda run, x: torch.func.vmap(run, randomness="same")(torch.stack([x, x + 1]))[0],
}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("family", [BBB, BBB_LRT, Flipout], ids=["bbb", "lrt", "flipout"])
def test_what_the_input_goes_through(backend: str, family: Any, first: str, around: str) -> None:
    """A layer's products are shared by the draws only while the input is what it was."""
    model = nn.Sequential(FIRST[first](), family.BBBLinear(6, 4))
    x = torch.randn(5, 6)
    expected = []
    for k in range(3):
        with torch.no_grad(), fixed_noise(7, k, model=model, draw="activations"):
            expected.append(model(x.clone()))
    apart = torch.empty(10, 6)[::2]
    for given in (x.clone(), x.t().contiguous().t(), apart.copy_(x)):
        y = AROUND[around](lambda t: multi_sample(model, t, 3, seed=7), given)
        torch.testing.assert_close(y, torch.stack(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("name", MODELS)
def test_equals_as_many_forwards(backend: str, name: str, samples: int) -> None:
    """Outputs, and the gradients of all parameters and of the input."""
    make, inputs = MODELS[name]
    model, x = make(), inputs()
    leaves: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    if x.is_floating_point():
        leaves.append(x.requires_grad_())
    y = multi_sample(model, x, samples, seed=7)
    expected = []
    for k in range(samples):
        with fixed_noise(7, k, model=model, draw="activations"):
            expected.append(first(model(x)))
    torch.testing.assert_close(y, torch.stack(expected), rtol=1e-5, atol=1e-5)
    g = torch.randn_like(y)
    got = torch.autograd.grad(y, leaves, g)
    for a, b in zip(got, torch.autograd.grad(torch.stack(expected), leaves, g), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1.0, float(b.abs().max())))
    if samples > 1:
        assert unrelated(y[0], y[1])


def test_draws_are_independent(backend: str) -> None:
    """Over draws the mean and the variance of an output are those of theory; one shared draw fails."""
    layer, x = BBB.BBBLinear(4, 3), torch.randn(2, 4)
    y = multi_sample(layer, x, 2000).double()
    assert layer.bias_rho is not None
    v = (x**2) @ reference.softplus(layer.W_rho).square().t() + reference.softplus(layer.bias_rho).square()
    z = (y - layer(x, sample=False)) / v.sqrt()
    assert z.mean(0).abs().max() < 4.5 / 2000**0.5
    assert (z.square().mean(0) - 1).abs().max() < 4.5 * (2 / 2000) ** 0.5


def test_seeds(backend: str) -> None:
    model, x = BBBLeNet(10, 1), torch.randn(2, 1, 32, 32)
    torch.manual_seed(4)
    y = multi_sample(model, x, 3)
    assert unrelated(multi_sample(model, x, 3), y)
    torch.manual_seed(4)
    assert torch.equal(multi_sample(model, x, 3), y)
    # The first draws do not depend on how many there are.
    torch.testing.assert_close(multi_sample(model, x, 5, seed=1)[:2], multi_sample(model, x, 2, seed=1))


def test_a_training_step(backend: str) -> None:
    model, x = BBBLeNet(10, 1), torch.randn(4, 1, 32, 32)
    loss = nn.functional.cross_entropy(
        multi_sample(model, x, 3).flatten(0, 1), torch.tensor([1, 2, 3, 4]).repeat(3)
    )
    (loss + 1e-3 * kl_loss(model)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_inputs_of_other_kinds(backend: str) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = BBB_LRT.BBBLinear(3, 2)

        def forward(self, x: dict[str, Any]) -> Tensor:
            return self.fc(x["a"]) * x["scale"] + x["b"][0]

    model, x = Two(), {"a": torch.randn(4, 3), "b": (torch.randn(4, 2),), "scale": 2.0}
    y = multi_sample(model, x, 3, seed=2)
    with fixed_noise(2, 1, model=model, draw="activations"):
        torch.testing.assert_close(y[1], model(x))
    empty = multi_sample(BBB_LRT.BBBLinear(3, 2), torch.randn(0, 3), 3)
    assert empty.shape == (3, 0, 2)


def test_wrong_arguments(backend: str) -> None:
    layer, x = BBB.BBBLinear(3, 2), torch.randn(4, 3)
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got int"):
        multi_sample(3, x, 2)  # type: ignore[arg-type]  # on purpose
    wrong: tuple[Any, ...] = (0, 1.5, True)
    for samples in wrong:
        with pytest.raises(ValueError, match="samples must be an int >= 1"):
            multi_sample(layer, x, samples)

    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean(0)

    with pytest.raises(ValueError, match="the first dimension of the output must be that of the rows"):
        multi_sample(nn.Sequential(layer, Mean()), x, 3)


def test_rng_of_one_draw(backend: str) -> None:
    case = linear_case((6,), 4, 3)
    assert torch.equal(lrt_linear(*case, rng()), lrt_linear(*case, rng().reshape(1, 2)))
