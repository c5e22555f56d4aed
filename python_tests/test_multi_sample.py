"""multi_sample: several draws in one forward, each as under fixed_noise(draw="activations")."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import compare, conv_case, linear_case, rng, unrelated
from torch import Tensor, nn

from bbb_fast import convert, fixed_noise, functional, kl_loss, multi_sample, reference
from bbb_fast.layers import BBB, BBB_LRT, FlattenLayer, Flipout, ModuleWrapper
from bbb_fast.models import BBBLeNet

# ---------------------------------------------------------------- lrt ops with an rng for each draw

SEVERAL = torch.tensor([[1, 2], [3, 4], [-5, 6]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_linear_takes_a_row_for_each_draw(isa: str, dtype: torch.dtype) -> None:
    case = linear_case((6, 5), 7, 3, dtype=dtype)
    compare(lambda: functional.lrt_linear(*case, SEVERAL), case, dtype, 2)
    x, *parameters = case
    y = functional.lrt_linear(*case, SEVERAL)
    for k, part in enumerate(x.tensor_split(3)):
        expected = functional.lrt_linear(part, *parameters, SEVERAL[k])
        torch.testing.assert_close(
            y[2 * k : 2 * k + 2], expected, rtol=1e-5, atol=2e-2 if dtype == torch.bfloat16 else 1e-5
        )


@pytest.mark.parametrize("last", [False, True])
def test_conv_takes_a_row_for_each_draw(isa: str, last: bool) -> None:
    """Each draw's noise is numbered from its first row on, in the order of memory."""
    case = conv_case(2, 9, 4, 6, (3, 3), (7, 5))
    if last:
        case[0] = case[0].detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    compare(lambda: functional.lrt_conv2d(*case, SEVERAL, padding=1), case, torch.float32)
    y = functional.lrt_conv2d(*case, SEVERAL, padding=1)
    for k in range(3):
        expected = functional.lrt_conv2d(case[0][3 * k : 3 * k + 3], *case[1:], SEVERAL[k], padding=1)
        torch.testing.assert_close(y[3 * k : 3 * k + 3], expected, rtol=1e-5, atol=1e-5)


def test_opcheck(native: None) -> None:
    case = linear_case((6,), 4, 3)
    torch.library.opcheck(torch.ops.bbb_fast.lrt_linear, (*case, SEVERAL, 0.0, 0.1, True, None))


@pytest.mark.parametrize("op", ["bbb", "flipout"])
def test_other_estimators_take_one(backend: str, op: str) -> None:
    with pytest.raises(ValueError, match=r"rng must have shape \[2\] \(seed, stream\), got \[3, 2\]"):
        getattr(functional, f"{op}_linear")(*linear_case((6,), 4, 3), SEVERAL)


def test_rows_that_do_not_divide(backend: str) -> None:
    with pytest.raises(ValueError, match="with 3 draws, the first dimension must be a multiple of that"):
        functional.lrt_linear(*linear_case((7,), 4, 3), SEVERAL)
    with pytest.raises(ValueError, match=r"or a row for each of several draws, got \[0, 2\]"):
        functional.lrt_linear(*linear_case((6,), 4, 3), SEVERAL[:0])


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


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("name", MODELS)
def test_equals_as_many_forwards(backend: str, name: str, samples: int) -> None:
    """Outputs, and the gradients of all parameters and of the input."""
    make, inputs = MODELS[name]
    model, x = make(), inputs()
    leaves = [p for p in model.parameters() if p.requires_grad]
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
        multi_sample(3, x, 2)
    for samples in (0, 1.5, True):
        with pytest.raises(ValueError, match="samples must be an int >= 1"):
            multi_sample(layer, x, samples)

    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean(0)

    with pytest.raises(ValueError, match="the first dimension of the output must be that of the rows"):
        multi_sample(nn.Sequential(layer, Mean()), x, 3)


def test_rng_of_one_draw(backend: str) -> None:
    case = linear_case((6,), 4, 3)
    assert torch.equal(functional.lrt_linear(*case, rng()), functional.lrt_linear(*case, rng().reshape(1, 2)))
