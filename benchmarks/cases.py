"""The tables of cases: layers, parameter kernels, models, predictions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import eager
import torch
from torch import Tensor, nn

from bbb_fast import functional, models
from bbb_fast.layers import BBB, BBB_LRT

PRECISIONS = {
    "float32": "float32",  # tf32 products on a GPU
    "autocast": "bf16 autocast",  # float32 parameters, bfloat16 activations and products
    "bfloat16": "bf16 throughout",
}

# Ours with a flag set: the estimator, the flag and its value.
VARIANTS: dict[str, tuple[str, str, Any]] = {
    "bbb_recompute": ("bbb", "recompute_weight", True),
    "lrt_bf16": ("lrt", "variance_dtype", torch.bfloat16),
    "lrt_auto": ("lrt", "variance_dtype", "auto"),
}


def _with_flag(name: str, make: Callable[[str], Any]) -> nn.Module:
    """What ``make`` builds for a name, or for a variant's estimator, with its flag set."""
    estimator, *flag = VARIANTS.get(name, (name,))
    thing = make(estimator)
    if flag:
        thing.set_flag(*flag)
    return thing


@dataclass(frozen=True)
class Case:
    """A layer and its input: ``kernel`` 0 means linear, else a 2-d convolution on ``size``^2 images.

    ``targets`` says by contender how many times torch.nn's step one may take. ``overhead``: starting the work
    is most of the time. ``repeat``: calls in a row that are timed as one, where one is too short.
    ``compiled`` names the estimators whose textbook formulas are also timed under torch.compile, where a
    benchmark does that (it takes seconds each); ``autotuned`` also under its mode "max-autotune".
    """

    name: str
    inputs: int
    outputs: int
    batch: int
    kernel: int = 0
    padding: int = 0
    size: int = 0
    precision: str = "float32"
    channels_last: bool = False
    compiled: tuple[str, ...] = ()
    autotuned: bool = False
    targets: Mapping[str, float] = field(default_factory=dict, hash=False)
    overhead: bool = False
    repeat: int = 1

    def place(self, thing: Any, device: torch.device | str | None, dtype: torch.dtype | None) -> Any:
        """A tensor or module, moved there, in this case's memory format."""
        if self.channels_last:
            return thing.to(device=device, dtype=dtype, memory_format=torch.channels_last)
        return thing.to(device=device, dtype=dtype)

    @property
    def output_size(self) -> int:
        """Height and width of a convolution's output."""
        return self.size + 2 * self.padding - self.kernel + 1

    def input(self, device: torch.device | str | None = None) -> Tensor:
        """Standard normal numbers, of the type that activations have in this precision."""
        shape = (self.inputs, self.size, self.size) if self.kernel else (self.inputs,)
        x = torch.randn(self.batch, *shape, device=device)
        return self.place(x, device, None if self.precision == "float32" else torch.bfloat16)

    def layer(self, name: str, device: torch.device | str | None = None) -> nn.Module:
        """The contender "nn", "bbb", "lrt", "eager_bbb", "eager_lrt" or one of VARIANTS."""
        with torch.device(device or "cpu"):
            layer = _with_flag(name, self._make)
        return self.place(layer, device, torch.bfloat16 if self.precision == "bfloat16" else None)

    def _make(self, name: str) -> nn.Module:
        i, o, k, p = self.inputs, self.outputs, self.kernel, self.padding
        if name == "nn":
            return nn.Conv2d(i, o, k, padding=p) if k else nn.Linear(i, o)
        if name.startswith("eager_"):
            estimator = name.removeprefix("eager_")
            return eager.conv2d(i, o, k, p, estimator) if k else eager.linear(i, o, estimator)
        layers = {"bbb": BBB, "lrt": BBB_LRT}[name]
        return layers.BBBConv2d(i, o, k, padding=p) if k else layers.BBBLinear(i, o)

    def smaller(self) -> Case:
        """The same layer with a sixteenth of the batch, for a run that only shows that it runs."""
        batch = max(2, self.batch // 16)
        name = self.name.replace(f"batch {self.batch}", f"batch {batch}")
        return replace(self, name=name, batch=batch, repeat=1, targets={}, overhead=False)


def _targets(*most: float) -> dict[str, float]:
    return dict(zip(("bbb", "lrt", "lrt_bf16"), most, strict=True))


# Of the layers' benchmark: the sizes users meet, then one where nothing but overhead is left.
CASES = (
    Case("linear 1200x1200, batch 128", 1200, 1200, 128, targets=_targets(1.8, 2.6, 1.9)),
    Case("linear 784x400, batch 128", 784, 400, 128, targets=_targets(1.8, 2.6, 1.9)),
    Case("linear 1024x1024, batch 512", 1024, 1024, 512, targets=_targets(1.25, 2.25, 1.5)),
    Case("conv 6-16 k5, 14^2, batch 256", 6, 16, 256, 5, 0, 14, targets=_targets(1.05, 2.3, 1.8)),
    Case("conv 32-64 k5 p2, 15^2, batch 256", 32, 64, 256, 5, 2, 15, targets=_targets(1.03, 2.15, 1.4)),
    Case("conv 64-64 k3 p1, 32^2, batch 128", 64, 64, 128, 3, 1, 32, targets=_targets(1.03, 2.15, 1.5)),
    Case("linear 16x16, batch 8", 16, 16, 8, repeat=200, overhead=True),
)


def _linear(size: int, batch: int, precision: str, **options: Any) -> Case:
    name = f"linear {size}x{size}, batch {batch}, {PRECISIONS[precision]}"
    return Case(name, size, size, batch, precision=precision, **options)


def _conv(channels: int, size: int, batch: int, precision: str, **options: Any) -> Case:
    last = precision != "float32"
    name = f"conv {channels}-{channels} k3 p1, {size}^2, batch {batch}, {PRECISIONS[precision]}"
    name += " channels_last" if last else ""
    return Case(
        name, channels, channels, batch, 3, 1, size, precision=precision, channels_last=last, **options
    )


_BOTH = ("lrt", "bbb")

# For benchmarks/gpu.py, the most important first: a run that is short of time leaves out the last ones.
GPU_CASES = (
    _linear(4096, 4096, "autocast", compiled=_BOTH),
    _conv(256, 14, 64, "autocast", compiled=_BOTH),
    _linear(1024, 1024, "autocast", compiled=_BOTH),
    _linear(4096, 4096, "bfloat16", compiled=("lrt",)),
    _linear(4096, 4096, "float32", compiled=("lrt",)),
    _conv(64, 56, 64, "autocast", compiled=("lrt",)),
    _linear(4096, 128, "autocast", compiled=_BOTH),
    _linear(8192, 8192, "autocast"),
    _linear(2048, 1024, "autocast"),
    _conv(64, 56, 64, "float32", compiled=("lrt",)),
    _conv(128, 28, 64, "autocast"),
    _conv(512, 7, 64, "autocast"),
    _linear(1024, 128, "float32"),
    _linear(8192, 1024, "float32"),
    _conv(256, 14, 64, "float32"),
)
# Autotuning takes a minute, so it has cases of its own, which come last.
GPU_AUTOTUNED_CASES = (
    _linear(4096, 4096, "autocast", autotuned=True),
    _conv(256, 14, 64, "autocast", autotuned=True),
)
# Every path of the above in seconds, for a machine without a GPU.
GPU_SMOKE_CASES = (
    _linear(32, 16, "autocast", compiled=("lrt",)),
    _linear(32, 16, "bfloat16"),
    _linear(32, 16, "float32", compiled=("bbb",)),
    _conv(8, 7, 2, "autocast", compiled=("lrt",)),
    _conv(8, 7, 2, "float32"),
)
GPU_SMOKE_AUTOTUNED_CASES = (_linear(32, 16, "float32", autotuned=True),)


@dataclass(frozen=True)
class Kernel:
    """An elementwise pass: the bytes an element that it has to move, our op, and the textbook formula.

    ``arguments`` picks the op's arguments out of ``tensors``; ``inputs`` names the formula's. With ``leaves``
    the formula's backward is meant, for those inputs. ``compiled``: time it under torch.compile too.
    """

    name: str
    bytes_per_element: int
    op: str
    arguments: Callable[[dict[str, Tensor]], tuple[Any, ...]]
    formula: Callable[..., Any] | None = None
    inputs: tuple[str, ...] = ()
    leaves: tuple[str, ...] = ()
    compiled: bool = True
    dtype: torch.dtype = torch.float32

    def tensors(self, n: int, device: torch.device) -> dict[str, Tensor]:
        """Every tensor that a pass may want: parameters, activations ``m`` and ``v``, gradients, outputs."""

        def normal() -> Tensor:
            return torch.randn(n, device=device).to(self.dtype)

        return {
            "mu": normal() * 0.1, "rho": normal() * 0.1 - 3, "m": normal(), "v": normal().abs() + 0.1,
            "grad": normal(), "grad_variance": normal(), "out": normal(), "out_rho": normal(),
            "one": torch.ones((), device=device), "rng": functional.draw_rng(device),
        }  # fmt: skip


def _sample(t: dict[str, Tensor], with_kl: bool, to: torch.dtype | None = None) -> tuple[Any, ...]:
    return [t["mu"]], [t["rho"]], t["rng"], 0.0, 0.1, with_kl, to


def _backward(t: dict[str, Tensor], grad: str, kl: str, noise: str) -> tuple[Any, ...]:
    """Of ``posterior_backward``: the tensors of these names; "" is none."""
    return [t.get(grad)], t.get(kl), [t["mu"]], [t["rho"]], t.get(noise), [0.0], [0.1]


def _kl(mu: Tensor, rho: Tensor) -> Tensor:
    return eager.kl(mu, eager.sigma(rho))


def _variance_and_kl(mu: Tensor, rho: Tensor) -> tuple[Tensor, Tensor]:
    sig = eager.sigma(rho)
    return sig**2, eager.kl(mu, sig)


def _narrow_sample(mu: Tensor, rho: Tensor) -> tuple[Tensor, Tensor]:
    w, kl = eager.sample_and_kl(mu, rho)
    return w.to(torch.bfloat16), kl


def _epilogues(name: str, dtype: torch.dtype, compiled: bool) -> tuple[Kernel, Kernel]:
    forward = Kernel(
        name, 3 * dtype.itemsize, "lrt_sample_", lambda t: (t["m"], t["v"], t["rng"]),
        eager.lrt_sample, ("m", "v"), compiled=compiled, dtype=dtype,
    )  # fmt: skip
    # The gradient of m is the gradient given: v's is all that a backward has to form.
    backward = replace(
        forward, name=f"{name}, backward", op="lrt_sample_backward", leaves=("v",),
        arguments=lambda t: (t["grad"], t["v"], t["rng"]),
    )  # fmt: skip
    return forward, backward


_BF16, _MU_RHO = torch.bfloat16, ("mu", "rho")

KERNELS = (
    Kernel(
        "sampling + KL", 12, "sample_weights", lambda t: _sample(t, True), eager.sample_and_kl, _MU_RHO
    ),
    Kernel(
        "sampling + KL, backward", 20, "posterior_backward", lambda t: _backward(t, "grad", "one", "rng"),
        eager.sample_and_kl, _MU_RHO, _MU_RHO,
    ),
    Kernel("KL", 8, "kl_divergence", lambda t: ([t["mu"]], [t["rho"]], [0.0], [0.1]), _kl, _MU_RHO),
    Kernel(
        "KL, backward", 16, "posterior_backward", lambda t: _backward(t, "", "one", ""),
        _kl, _MU_RHO, _MU_RHO,
    ),
    Kernel(
        "variance + KL", 12, "variance", lambda t: ([t["mu"]], [t["rho"]], 0.0, 0.1, True, torch.float32),
        _variance_and_kl, _MU_RHO,
    ),
    Kernel(
        "variance + KL, backward", 24, "posterior_backward_out",
        lambda t: (
            [t["grad"]], [t["grad_variance"]], t["one"], [t["mu"]], [t["rho"]], None, [0.0], [0.1],
            [t["out"]], [t["out_rho"]],
        ),
    ),
    *_epilogues("LRT epilogue", torch.float32, True),
    Kernel("sampling, no KL", 12, "sample_weights", lambda t: _sample(t, False)),
    Kernel(
        "sampling, no KL, backward", 20, "posterior_backward", lambda t: _backward(t, "grad", "", "rng")
    ),
    Kernel(
        "sampling + KL to bf16", 10, "sample_weights", lambda t: _sample(t, True, _BF16), _narrow_sample,
        _MU_RHO, compiled=False,
    ),
    Kernel(
        "variance to bf16", 6, "variance", lambda t: ([t["rho"]], [t["rho"]], 0.0, 0.1, False, _BF16),
        lambda rho: eager.variance(rho).to(_BF16), ("rho",), compiled=False,
    ),
    *_epilogues("LRT epilogue, bf16", _BF16, False),
    Kernel(
        "square, bf16", 4, "square", lambda t: (t["m"], _BF16), lambda x: x**2, ("m",), compiled=False,
        dtype=_BF16,
    ),
    Kernel(
        "square, bf16, backward", 8, "square_backward_", lambda t: (t["v"], t["m"], t["grad"]),
        lambda g, x, grad: g + 2 * x * grad, ("v", "m", "grad"), compiled=False, dtype=_BF16,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class ModelCase:
    """A model's training step on ``batch`` images, float32: a class of ``bbb_fast.models`` and its twin.

    ``variant`` "compiled" sets it against the formulas under torch.compile; "CUDA graphs" replays it as one.
    An image has ``channels`` of 32 x 32.
    """

    bayesian: type
    point: type
    batch: int
    variant: str = ""
    channels: int = 3

    @property
    def architecture(self) -> str:
        return self.bayesian.__name__.removeprefix("BBB")

    @property
    def name(self) -> str:
        return f"{self.architecture}, batch {self.batch}, float32{self.variant and f', {self.variant}'}"

    def model(self, name: str, device: torch.device | str | None = None) -> nn.Module:
        """The contender "nn", "bbb", "lrt", "eager_bbb", "eager_lrt" or one of VARIANTS."""
        with torch.device(device or "cpu"):
            return _with_flag(name, self._make)

    def _make(self, name: str) -> nn.Module:
        if name == "nn":
            return self.point(10, self.channels)
        if name.startswith("eager_"):
            return eager.EagerModel(self.bayesian, 10, self.channels, name.removeprefix("eager_"))
        return self.bayesian(10, self.channels, layer_type=name)

    def alike(self, names: Sequence[str]) -> dict[str, nn.Module]:
        """Models that start from one state: the twin's weights as means, and small standard deviations.

        The default posterior, drawn alike for every width, makes the deeper models' outputs so large that the
        softmax underflows and the backward is full of denormal numbers, several times slower on a CPU.
        """
        point = self.model("nn").state_dict()
        found = {}
        for name in names:
            model = found[name] = self.model(name)
            for key, value in model.state_dict().items():
                if name == "nn":
                    value.copy_(point[key])
                elif key.endswith("_rho"):
                    value.fill_(-5.0)
                else:
                    value.copy_(point[key.replace("W_mu", "weight").replace("bias_mu", "bias")])
        return found

    def input(self, device: torch.device | str | None = None) -> Tensor:
        return torch.randn(self.batch, self.channels, 32, 32, device=device)


def model_cases(batch: int, channels: int = 3) -> list[ModelCase]:
    pairs = (
        (models.BBBLeNet, models.LeNet),
        (models.BBBAlexNet, models.AlexNet),
        (models.BBB3Conv3FC, models.ThreeConvThreeFC),
    )
    return [ModelCase(bayesian, point, batch, channels=channels) for bayesian, point in pairs]
