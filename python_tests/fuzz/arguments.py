"""What the valid calls are given: dtypes, shapes, values, geometry; drawn with a liking for edges."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from .choices import Choices
from .operands import LAYOUTS, Operand

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
BIG = (1 << 63) - 1
# Tiles of the kernels end at 16 and 4096 elements, routes change at 4, 16 and 32 channels.
FEATURES = (5, 1, 2, 3, 7, 8, 15, 16, 17, 33, 63, 64, 65, 127, 128, 129, 0)
PAIRS = ((63, 65), (64, 64), (241, 17), (1, 4095), (4097, 1))
CHANNELS = (3, 1, 2, 4, 5, 8, 15, 16, 17, 31, 32, 33, 64)
COUNTS = (5, 0, 1, 2, 3, 4, 15, 16, 17, 63, 64, 65, 127, 128, 129, 1023, 4095, 4096, 4097, 12301)
# Multiplications of a convolution: so many still take milliseconds on the slowest route.
WORK = 80_000


def rng_of(c: Choices) -> torch.Tensor:
    def number(name: str) -> int:
        anything = c.random(f"any {name}").randint(-BIG - 1, BIG)
        return c.pick(name, 5, 0, -1, BIG, BIG - 1, -BIG - 1, anything, often=0.3)

    return torch.tensor([number("seed"), number("stream")])


def draws_of(c: Choices, rng: torch.Tensor, batch: int | None = None) -> torch.Tensor:
    """``rng``, or one of several draws; of parts of a batch or all of it, where ``batch`` says its length."""
    forms = ("one", "several") if batch is None else ("one", "parts", "whole")
    form, count = c.pick("draws", *forms, often=0.7), c.pick("number of draws", 2, 1, 3)
    if form == "one" or (form == "parts" and batch is not None and batch % count):
        return rng
    rows = torch.stack([rng + torch.tensor([k, 5 * k]) for k in range(count)])
    return rows.unsqueeze(1) if form == "whole" else rows


@dataclass
class Types:
    """The dtypes of a product and what surrounds it."""

    input: torch.dtype
    parameters: torch.dtype
    autocast: torch.dtype | None
    option: dict[str, Any]  # the estimator's

    @staticmethod
    def draw(c: Choices, estimator: str) -> Types:
        dtype = c.pick("dtype", F32, F64, BF16, F16, often=0.4)
        own = F32 if dtype in (BF16, F16) and c.chance("float32 parameters", 0.4) else dtype
        # Autocast narrows the input alone.
        autocast = c.pick("autocast", None, BF16, F16, often=0.85) if own == F32 else None
        if estimator != "lrt":
            option: dict[str, Any] = {"recompute_weight": c.chance("recompute_weight", 0.4)}
        else:
            option = {"variance_dtype": c.pick("variance_dtype", None, BF16, F32, F64, F16, often=0.6)}
        return Types(dtype, own, autocast, option)

    @property
    def narrow_variance(self) -> bool:
        return self.option.get("variance_dtype") == F16

    def all(self) -> tuple[torch.dtype, ...]:
        """Whatever something on the way from the operands to the output is rounded to."""
        extra = (self.autocast, self.option.get("variance_dtype"))
        return self.input, self.parameters, *(dtype for dtype in extra if dtype is not None)

    def exact_option(self, exact: bool) -> dict[str, Any]:
        """The option of a call; in float64 all the way, without a type of its own."""
        return {} if exact and "variance_dtype" in self.option else self.option


def layout_of(c: Choices, name: str) -> str:
    return c.pick(f"layout of {name}", *LAYOUTS, often=0.5)


def extremes(c: Choices, dtype: torch.dtype) -> str:
    """Which operand has a few finite numbers far from the others."""
    if dtype == F16:
        return c.pick("extreme", "nothing", "zero input", "zero mu", often=0.8)
    return c.pick(
        "extreme", "nothing", "rho", "mu", "zero mu", "zero input", "small input", "large input", often=0.7
    )


def sprinkled(values: torch.Tensor, c: Choices, name: str, numbers: tuple[float, ...]) -> torch.Tensor:
    """A third of the elements, or a single one, replaced by the given numbers."""
    count = values.numel()
    if count:
        g = c.generator(f"{name}: extremes")
        places = torch.randint(0, count, (max(1, count // 3),), generator=g)
        picked = torch.tensor(numbers, dtype=values.dtype)
        values.view(-1)[places] = picked[torch.randint(0, len(numbers), places.shape, generator=g)]
    return values


def posterior(
    c: Choices, name: str, shape: tuple[int, ...], dtype: torch.dtype, extreme: str
) -> tuple[Operand, Operand]:
    """mu and rho: sigma around 0.1 but for the extremes."""
    mu = (torch.randn(shape, generator=c.generator(f"{name}mu")) * 0.3).to(dtype)
    rho = (torch.randn(shape, generator=c.generator(f"{name}rho")) * 0.7 - 2.0).to(dtype)
    if extreme == "mu":
        sprinkled(mu, c, f"{name}mu", (0.0, 1e4, -1e20))
    if extreme == "zero mu":
        mu.zero_()
    if extreme == "rho":
        # Not -40 to -60: the square of sigma is then a denormal of float32, or 0, as a library pleases.
        sprinkled(rho, c, f"{name}rho", (-120.0, -88.0, -30.0, -16.0, 0.0, 16.0, 30.0, 88.0, 100.0))
    return (
        Operand(mu, layout_of(c, f"{name}mu")),
        Operand(rho, layout_of(c, f"{name}rho"), signed=False),
    )


def input_of(
    c: Choices, shape: tuple[int, ...], dtype: torch.dtype, extreme: str, away_from_zero: bool
) -> Operand:
    values = torch.randn(shape, generator=c.generator("input"))
    if away_from_zero:
        values = values + values.sign() * 0.5
    if extreme == "small input":
        values = values * 1e-15
    if extreme == "large input":
        values = values * 1e15
    values = values.to(dtype)
    if extreme == "zero input":
        values.zero_()
    if c.chance("zeros in the input", 0.1):
        sprinkled(values, c, "input", (0.0,))
    return Operand(values, layout_of(c, "input"))


def nonfinite(c: Choices, operands: dict[str, Operand]) -> None:
    """NaN or an infinity in one element of one operand."""
    value = c.pick("not finite", None, math.nan, math.inf, -math.inf, often=0.96)
    # Of a convolution, in a bias alone: some ways to compute it multiply the zeros around and between rows of
    # an image, others leave them out, and how far a NaN spreads in a product is promised nowhere.
    convolution = "W_mu" in operands and operands["W_mu"].values.dim() > 2
    names = [n for n in sorted(operands) if not convolution or n.startswith("bias")]
    if not names:
        return
    name = c.random("not finite in").choice(names)
    values = operands[name].values
    if value is not None and values.numel():
        values.view(-1)[c.random("not finite at").randrange(values.numel())] = value


def gradients(c: Choices, operands: dict[str, Operand]) -> None:
    """Which operands want a gradient: all, or any subset."""
    everything = not c.chance("subset of gradients", 0.5)
    for name, operand in operands.items():
        operand.requires_grad = everything or c.pick(f"gradient of {name}", True, False)


def priors_of(c: Choices) -> dict[str, float]:
    return {
        "prior_mu": c.pick("prior_mu", 0.0, 0.05, -3.0, often=0.5),
        "prior_sigma": c.pick("prior_sigma", 0.1, 1.0, 1e-3, 50.0, often=0.5),
    }


def product_operands(
    c: Choices, shape: tuple[int, ...], weight: tuple[int, ...], types: Types, out_features: int
) -> dict[str, Operand]:
    """Input and parameters of a linear layer or a convolution."""
    # Small variances are denormals of float16: inputs keep away from 0 there.
    extreme = "nothing" if types.narrow_variance else extremes(c, types.input)
    operands = {"input": input_of(c, shape, types.input, extreme, types.narrow_variance)}
    operands["W_mu"], operands["W_rho"] = posterior(c, "W_", weight, types.parameters, extreme)
    if not c.chance("no bias", 0.3):
        operands["bias_mu"], operands["bias_rho"] = posterior(
            c, "bias_", (out_features,), types.parameters, extreme
        )
    gradients(c, operands)
    nonfinite(c, operands)
    return operands


def linear_shapes(c: Choices) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of the input and of the weight."""
    pair = c.pick("features", None, *PAIRS, often=0.85)
    i, o = pair or (c.pick("in_features", *FEATURES), c.pick("out_features", *FEATURES))
    batch = c.pick("batch", (5,), (1,), (0,), (), (3, 4), (2, 0, 3), (1, 2, 1), (16,), (17,), (65,))
    return (*batch, i), (o, i)


def each(value: int | tuple[int, ...], spatial: int) -> tuple[int, ...]:
    return (value,) * spatial if isinstance(value, int) else value


def convolution_shapes(
    c: Choices, spatial: int, types: Types
) -> tuple[tuple[int, ...], tuple[int, ...], dict[str, Any], int]:
    """Of the input and of the weight; the geometry; and how many pixels the output has in all."""
    every = range(spatial)
    kernel = tuple(c.pick(f"kernel {d}", 3, 1, 2, 5) for d in every)
    stride: Any = c.pick("stride", 1, 2, 3, tuple(1 + d % 2 for d in every), often=0.5)
    dilation: Any = c.pick("dilation", 1, 2, tuple(1 + d % 2 for d in every), often=0.6)
    padding: Any = c.pick("padding", 0, 1, 2, "same", "valid", tuple(d % 3 for d in every), often=0.3)
    groups = c.pick("groups", 1, 2, 4, often=0.6)
    i, o = c.pick("in_channels", *CHANNELS), c.pick("out_channels", *CHANNELS)
    batch = c.pick("batch", (2,), (1,), (0,), (), (3,), (16,), (17,), often=0.3)
    sizes = {1: (7, 1, 2, 12, 33), 2: (6, 1, 2, 5, 9, 12), 3: (4, 1, 3, 5)}[spatial]
    image = [c.pick(f"size {d}", *sizes) for d in every]
    if c.chance("depthwise", 0.1):
        groups, o = i, i * c.pick("multiplier", 1, 2)
    i, o = -(-i // groups), -(-o // groups) * groups
    # Shapes that csrc/products.cpp has a way of its own for, and that chance would hardly meet.
    route = c.pick("route", "any", "channels_last", "few pixels", often=0.9) if spatial == 2 else "any"
    if route != "any":
        i, o, groups, stride, dilation, kernel = max(i, 32), max(o, 32), 1, 1, 1, (3, 3)
        if route == "channels_last":
            batch, image = (1,), [7, 8]
        else:
            batch, image, padding = (16,), [1 + size % 2 for size in image], 1
    elif padding == "same":
        stride = 1

    reach = [each(dilation, spatial)[d] * (kernel[d] - 1) + 1 for d in every]
    if isinstance(padding, str):
        border = [reach[d] - 1 if padding == "same" else 0 for d in every]
    else:
        border = [2 * p for p in each(padding, spatial)]
    image = [max(image[d], reach[d] - border[d], 1) for d in every]
    if BF16 in types.all():
        # oneDNN's gradient of a bfloat16 weight is arbitrary where a tap meets nothing but the border.
        image = [max(image[d], reach[d] + each(stride, spatial)[d]) for d in every]
    pixels = [(image[d] + border[d] - reach[d]) // each(stride, spatial)[d] + 1 for d in every]

    def work() -> int:
        return math.prod(batch) * math.prod(pixels) * i * o * math.prod(kernel)

    if route == "any":
        if work() > WORK:
            batch = (1,)
        while work() > WORK and (i > 1 or o > groups):
            i, o = max(1, i // 2), max(groups, o // groups // 2 * groups)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    shapes = (*batch, i * groups, *image), (o, i, *kernel)
    return *shapes, options, math.prod(batch) * math.prod(pixels)


def transposed_shapes(
    c: Choices, spatial: int, types: Types
) -> tuple[tuple[int, ...], tuple[int, ...], dict[str, Any], int]:
    """The same of the transposed convolution that leads back from a convolution's output to its input."""
    shape, weight, geometry, rows = convolution_shapes(c, spatial, types)
    # oneDNN's gradient of a bfloat16 weight is arbitrary where a tap meets nothing but the border.
    plain = isinstance(geometry["padding"], str) or BF16 in types.all()
    padding = each(0 if plain else geometry["padding"], spatial)
    stride, dilation = (each(geometry[name], spatial) for name in ("stride", "dilation"))
    output_padding = tuple(
        c.pick(f"output_padding {d}", *range(max(stride[d], dilation[d])), often=0.6) for d in range(spatial)
    )
    image, pixels = [], 1
    for d in range(spatial):
        # And it reads past the end of a one-pixel gradient where the stride passes over the kernel.
        size = max(2 if BF16 in types.all() else 1, (shape[-spatial + d] - 1) // stride[d])

        def reached(size: int, d: int = d) -> int:
            reach = dilation[d] * (weight[2 + d] - 1) + 1
            return (size - 1) * stride[d] - 2 * padding[d] + reach + output_padding[d]

        while reached(size) < 1:
            size += 1
        image.append(size)
        pixels *= reached(size)
    options = {"stride": stride, "padding": padding, "output_padding": output_padding}
    batch = shape[: -spatial - 1]
    shape = (*batch, weight[0], *image)
    return (
        shape,
        weight,
        {**options, "groups": geometry["groups"], "dilation": dilation},
        max(rows, math.prod(batch) * pixels),
    )
