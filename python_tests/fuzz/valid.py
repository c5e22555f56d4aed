"""Calls that must work: drawn, run on both implementations, compared."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bbb_fast
from bbb_fast import _backend, fixed_noise, functional, kl_loss, layers, routes
from bbb_fast._backend import BackendName
from bbb_fast._noise import posterior_means
from bbb_fast.layers import FlattenLayer, ModuleWrapper
from bbb_fast.routes import Routes

from .arguments import (
    BF16,
    BIG,
    COUNTS,
    F16,
    F32,
    F64,
    Types,
    convolution_shapes,
    draws_of,
    each,
    extremes,
    gradients,
    input_of,
    layout_of,
    linear_shapes,
    nonfinite,
    posterior,
    priors_of,
    product_operands,
    rng_of,
    transposed_shapes,
)
from .bounds import bound, positive_world
from .choices import Case, Choices
from .operands import LAYOUTS, Operand, Witness, same_bits
from .outcome import Outcome, Status, one_line, shown

Tensors = dict[str, Any]
ISAS = ("base", "avx2", "avx512")
RULES = ("intel-avx512", "amd-zen5", "other")


def instruction_sets() -> list[str]:
    """Those of this CPU, the best one first."""
    _backend._C.set_isa("auto")
    best = _backend._C.build_info()["instruction_set"]
    return list(reversed(ISAS[: ISAS.index(best) + 1]))


@dataclass
class Problem:
    """What a case calls."""

    operands: dict[str, Operand]
    # From tensors made of the operands to named results; ``exact`` asks for float64 all the way.
    run: Callable[[Tensors, bool], Tensors]
    dtypes: tuple[torch.dtype, ...]  # what something on the way from the operands to the output is rounded to
    terms: int = 1  # of the longest sum
    kernels_alone: bool = False  # no product by a library: no bit depends on the number of threads
    records: bool = True  # gradients
    joint: bool = False  # several outputs of one op, all of which require a gradient if one does
    depth: int = 1  # layers, each of which passes on the errors of those before it
    routes: Routes | None = None  # taken by the native implementation; by default those in use


# ------------------------------------------------------------------------------------ the ops by themselves


def noise(name: str) -> Callable[[Choices], Problem]:
    """normal and uniform."""
    op = getattr(functional, name)

    def problem(c: Choices) -> Problem:
        size = c.pick("size", *((n,) for n in COUNTS), (3, 5), (2, 0, 3), (), 7)
        rng, dtype = rng_of(c), c.pick("dtype", F32, F64, BF16, F16)

        def run(_: Tensors, exact: bool) -> Tensors:
            return {"output": op(size, rng, dtype=F64 if exact else dtype)}

        return Problem({}, run, (F32, dtype), kernels_alone=True, records=False)

    return problem


def dropout(c: Choices) -> Problem:
    shapes = ((3, 5), (1, 7), (2, 0, 3), (3, 2, 5), (2, 5, 3, 4), (2, 3, 4, 3, 2), (0, 4))
    channels = c.chance("channels", 0.3)
    shape = c.pick("shape", *shapes, *(() if channels else ((), *((n,) for n in COUNTS))))
    dtype = c.pick("dtype", F32, F64, BF16, F16, often=0.4)
    operands = {"input": input_of(c, shape, dtype, extremes(c, dtype), False)}
    gradients(c, operands)
    nonfinite(c, operands)
    rng, one_mask = rng_of(c), c.chance("one_mask", 0.3)
    p = c.pick("p", 0.5, 0.0, 0.1, 0.9, 1.0, 1 - 2.0**-40, 2.0**-40, often=0.5)

    def run(t: Tensors, exact: bool) -> Tensors:
        return {"output": functional.dropout(t["input"], rng, p, channels=channels, one_mask=one_mask)}

    return Problem(operands, run, (dtype,), kernels_alone=not channels and not one_mask)


def _posteriors(c: Choices, most: int) -> tuple[dict[str, Operand], torch.dtype]:
    dtype = c.pick("dtype", F32, F64, BF16, F16, often=0.4)
    extreme = extremes(c, dtype)
    operands = {}
    for k in range(c.pick("tensors", *range(1, most + 1))):
        shape = c.pick(f"shape {k}", *((n,) for n in COUNTS), (3, 5), (1, 7), (2, 0, 3), (), (3, 2, 3, 3))
        operands[f"mu {k}"], operands[f"rho {k}"] = posterior(c, f"{k}.", shape, dtype, extreme)
    gradients(c, operands)
    nonfinite(c, operands)
    return operands, dtype


def _pairs(t: Tensors) -> tuple[list[Tensor], list[Tensor]]:
    return [v for k, v in t.items() if k[:2] == "mu"], [v for k, v in t.items() if k[:3] == "rho"]


def _count(operands: dict[str, Operand]) -> int:
    return sum(o.values.numel() for o in operands.values()) + 1


def sample_weights(c: Choices, most: int = 3) -> Problem:
    operands, own = _posteriors(c, most)
    rng, with_kl, priors = draws_of(c, rng_of(c)), c.chance("with_kl", 0.5), priors_of(c)
    dtype = c.pick("weight dtype", None, F32, F64, BF16, F16, often=0.6)

    def run(t: Tensors, exact: bool) -> Tensors:
        options: dict[str, Any] = {**priors, "with_kl": with_kl, "dtype": F64 if exact else dtype}
        mu, rho = _pairs(t)
        if most == 1:
            result = functional.sample_weight(mu[0], rho[0], rng, **options)
            return {"output": result[0], "kl": result[1]} if with_kl else {"output": result}
        weights, kl = functional.sample_weights(mu, rho, rng, **options)
        return {**{f"output {k}": w for k, w in enumerate(weights)}, "kl": kl}

    return Problem(operands, run, (own, dtype or own), _count(operands), kernels_alone=True, joint=True)


def sample_weight(c: Choices) -> Problem:
    return sample_weights(c, 1)


def kl_divergence(c: Choices) -> Problem:
    operands, own = _posteriors(c, 3)
    priors = priors_of(c)
    each = c.pick("priors as lists", False, True)
    tensors = c.chance("priors as tensors", 0.3)
    if tensors:
        for name in [name for name in operands if name[:2] == "mu"]:
            like = operands[name].values
            m = torch.randn(like.shape, generator=c.generator(f"prior_mu of {name}"))
            s = torch.rand(like.shape, generator=c.generator(f"prior_sigma of {name}")) + 0.05
            operands[f"prior_{name}"] = Operand(m.to(own), layout_of(c, f"prior_mu of {name}"))
            operands[f"prior_sigma of {name}"] = Operand(s.to(own), signed=False)

    def run(t: Tensors, exact: bool) -> Tensors:
        mu, rho = _pairs(t)
        m: Any = priors["prior_mu"]
        s: Any = priors["prior_sigma"]
        if each:
            m, s = [m + k for k in range(len(mu))], [s + k for k in range(len(mu))]
        if tensors:
            m, s = ([v for k, v in t.items() if k.startswith(f"prior_{of}")] for of in ("mu", "sigma"))
        return {"kl": functional.kl_divergence(mu, rho, m, s)}

    return Problem(operands, run, (own,), _count(operands), kernels_alone=True)


# --------------------------------------------------------------------------------- linear and convolutions


@contextlib.contextmanager
def _under_autocast(dtype: torch.dtype | None) -> Iterator[None]:
    with torch.autocast("cpu", dtype or BF16, enabled=dtype is not None):
        yield


def routes_of(
    c: Choices, shape: tuple[int, ...], weight: tuple[int, ...], geometry: dict[str, Any]
) -> Routes:
    """The rules of some CPU, or one of the ways that a product has, whatever the rules say."""
    own = routes.rules_of_this_cpu()
    rules = c.pick("rules", own, *(name for name in RULES if name != own), often=0.5)
    spatial = len(weight) - 2
    if spatial == 0:
        key = routes.linear_key(shape, weight)
        ways, _ = _backend._C.linear_ways(shape, weight)
    else:
        padding = geometry["padding"]
        if isinstance(padding, str) or geometry.get("padding_mode", "zeros") != "zeros":
            return Routes(rules)
        batched = shape if len(shape) == spatial + 2 else (1, *shape)
        stride, padding, dilation = (
            each(geometry[name], spatial) for name in ("stride", "padding", "dilation")
        )
        numbers = (stride, padding, dilation, geometry["groups"])
        key = routes.conv_key(batched, weight, *numbers)
        ways, _ = _backend._C.conv_ways(batched, weight, *numbers)
    way = c.pick("way", "by rule", *ways, often=0.5)
    return Routes(rules, {} if way == "by rule" else {key: way})


def product(name: str) -> Callable[[Choices], Problem]:
    """lrt_linear, bbb_conv2d, flipout_conv_transpose1d and so on."""
    estimator, kind = name.split("_", 1)
    op = getattr(functional, name)

    def problem(c: Choices) -> Problem:
        types = Types.draw(c, estimator)
        if kind == "linear":
            shape, weight = linear_shapes(c)
            geometry: dict[str, Any] = {}
            rows = math.prod(shape[:-1])
        else:
            shapes = transposed_shapes if "transpose" in kind else convolution_shapes
            shape, weight, geometry, rows = shapes(c, int(kind[-2]), types)
        features = weight[1] * geometry["groups"] if "transpose" in kind else weight[0]
        operands, priors = product_operands(c, shape, weight, types, features), priors_of(c)
        batched = len(shape) > 1 if kind == "linear" else len(shape) == len(weight)
        rng = draws_of(c, rng_of(c), shape[0]) if batched else rng_of(c)
        with_kl = c.chance("with_kl", 0.5)
        taken = None if "transpose" in kind else routes_of(c, shape, weight, geometry)

        def run(t: Tensors, exact: bool) -> Tensors:
            parameters = t["W_mu"], t["W_rho"], t.get("bias_mu"), t.get("bias_rho")
            options = {**geometry, **priors, **types.exact_option(exact)}
            with _under_autocast(None if exact else types.autocast):
                result = op(t["input"], *parameters, rng, **options, with_kl=with_kl)
            return {"output": result[0], "kl": result[1]} if with_kl else {"output": result}

        summands = rows * (len(rng) if rng.dim() == 3 else 1)
        return Problem(operands, run, types.all(), max(summands, math.prod(weight), 1), routes=taken)

    return problem


# ------------------------------------------------------------------------------------- layers and models


@dataclass
class Use:
    """How a module is used: what surrounds its forward, and where its KL is asked for."""

    seed: int
    mode: str
    fixed: tuple[int, int]
    autocast: torch.dtype | None
    checkpointed: bool
    forwards: int
    kl: str

    @staticmethod
    def draw(c: Choices, autocast: torch.dtype | None, wrapper: bool = False) -> Use:
        modes = ("draw", "sample=False", "posterior_means", "fixed_noise", "no_grad", "inference_mode")
        kls = ("after", "none", "before", "twice", "model")
        mode = c.pick("mode", *modes, often=0.5)
        return Use(
            seed=c.random("generator").randrange(1 << 30),
            mode=mode,
            fixed=(c.pick("noise seed", 0, -1, BIG, -BIG - 1), c.pick("noise sample", 0, 1, 2**31 - 1)),
            autocast=autocast,
            checkpointed=not wrapper and mode == "draw" and c.chance("checkpoint", 0.1),
            forwards=c.pick("forwards", 1, 2, often=0.8),
            kl="own" if wrapper else c.pick("kl", *kls, often=0.4),
        )

    @property
    def records(self) -> bool:
        """Whether gradients are recorded."""
        return self.mode not in ("no_grad", "inference_mode")

    @contextlib.contextmanager
    def _around(self, exact: bool) -> Iterator[None]:
        contexts: dict[str, Callable[[], Any]] = {
            "posterior_means": posterior_means,
            "fixed_noise": lambda: fixed_noise(self.fixed[0], sample=self.fixed[1]),
            "no_grad": torch.no_grad,
            "inference_mode": torch.inference_mode,
        }
        autocast = _under_autocast(None if exact else self.autocast)
        with contexts.get(self.mode, contextlib.nullcontext)(), autocast:
            yield

    def run(self, module: Any, x: Tensor, exact: bool) -> Tensors:
        torch.manual_seed(self.seed)
        results: Tensors = {}
        options: Any = {"sample": False} if self.mode == "sample=False" else {}
        if self.kl == "before":
            results["kl"] = module.kl_loss()
        with self._around(exact):
            for k in range(self.forwards):
                if self.checkpointed:
                    output = checkpoint(module, x, use_reentrant=False, **options)
                else:
                    output = module(x, **options)
                if self.kl == "own":
                    output, results["kl"] = output
                results[f"output {k}" if k else "output"] = output
        if self.kl in ("after", "twice"):
            results["kl"] = module.kl_loss()
        if self.kl == "twice":
            results["kl again"] = module.kl_loss()
        if self.kl == "model":
            results["kl"] = kl_loss(module)
        results["state of the generator"] = torch.get_rng_state()
        return results


def _set_parameters(module: nn.Module, t: Tensors, prefix: str = "") -> None:
    for name in ("W_mu", "W_rho", "bias_mu", "bias_rho"):
        if prefix + name in t:
            setattr(module, name, t[prefix + name])


def layer(family: str, kind: str) -> Callable[[Choices], Problem]:
    """A layer of bbb_fast.layers.BBB, BBB_LRT or Flipout."""
    make = getattr(getattr(layers, family), kind)
    estimator = make.estimator

    def problem(c: Choices) -> Problem:
        types = Types.draw(c, estimator)
        if kind == "BBBLinear":
            shape, weight = linear_shapes(c)
            arguments: tuple[Any, ...] = (weight[1], weight[0])
            geometry: dict[str, Any] = {}
            rows = math.prod(shape[:-1])
        else:
            spatial = int(kind[-2])
            shape, weight, geometry, rows = convolution_shapes(c, spatial, types)
            arguments = (weight[1] * geometry["groups"], weight[0], weight[2:])
            mode = c.pick("padding_mode", "zeros", "reflect", "replicate", "circular", often=0.7)
            # What torch pads with in these modes comes from the image: it must be large enough.
            geometry["padding_mode"] = mode if min(shape[-spatial:]) > 4 and 0 not in shape else "zeros"
        operands, priors = product_operands(c, shape, weight, types, weight[0]), priors_of(c)
        use = Use.draw(c, types.autocast)
        for name, operand in operands.items():
            operand.parameter = name != "input"
        options = {"bias": "bias_mu" in operands, "priors": priors, **geometry}

        def run(t: Tensors, exact: bool) -> Tensors:
            dtype = F64 if exact else types.parameters
            module = make(*arguments, dtype=dtype, **options, **types.exact_option(exact))
            _set_parameters(module, t)
            return use.run(module, t["input"], exact)

        terms, taken = max(rows, math.prod(weight), 1), routes_of(c, shape, weight, geometry)
        return Problem(operands, run, types.all(), terms, records=use.records, routes=taken)

    return problem


class _Stack(ModuleWrapper):
    """Modules in a row."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


def _model(
    c: Choices,
    shape: tuple[int, ...],
    parts: Callable[[torch.dtype], dict[str, nn.Module]],
    terms: int,
) -> Problem:
    """A ModuleWrapper of layers; their activations are smooth, so that no rounding decides a gradient."""
    dtype = c.pick("dtype", F32, F64, often=0.8)
    use = Use.draw(c, c.pick("autocast", None, BF16, often=0.9) if dtype == F32 else None, wrapper=True)
    operands = {"input": input_of(c, shape, dtype, "nothing", False)}
    bayesian = {k: m for k, m in parts(dtype).items() if isinstance(m, layers.base.BayesianLayer)}
    for name, module in bayesian.items():
        pairs = zip(("W_", "bias_"), module.posterior(), strict=False)
        for part, (mu, _) in pairs:
            pair = posterior(c, f"{name}.{part}", tuple(mu.shape), dtype, "nothing")
            for kind, operand in zip(("mu", "rho"), pair, strict=True):
                operand.parameter = True
                operands[f"{name}.{part}{kind}"] = operand
    gradients(c, operands)

    def run(t: Tensors, exact: bool) -> Tensors:
        modules = parts(F64 if exact else dtype)
        for name in bayesian:
            _set_parameters(modules[name], t, f"{name}.")
        return use.run(_Stack(modules), t["input"], exact)

    dtypes = (dtype,) if use.autocast is None else (dtype, use.autocast)
    return Problem(operands, run, dtypes, terms, records=use.records, depth=len(bayesian))


def _family(c: Choices, name: str) -> Any:
    return c.pick(f"estimator of {name}", layers.BBB, layers.BBB_LRT, layers.Flipout)


def linear_model(c: Choices) -> Problem:
    widths = [c.pick(f"width {k}", 4, 1, 3, 16, 33) for k in range(c.pick("layers", 2, 1, 3) + 1)]
    families = [_family(c, f"layer {k}") for k in range(len(widths) - 1)]
    bias = not c.chance("no bias", 0.2)

    def parts(dtype: torch.dtype) -> dict[str, nn.Module]:
        modules: dict[str, nn.Module] = {}
        for k, family in enumerate(families):
            modules[f"fc{k}"] = family.BBBLinear(widths[k], widths[k + 1], bias, dtype=dtype)
            if k + 2 < len(widths):
                modules[f"act{k}"] = nn.Softplus()
        return modules

    return _model(c, (c.pick("rows", 5, 1, 0, 17), widths[0]), parts, 17 * 33)


def convolution_model(c: Choices) -> Problem:
    """A small LeNet; average pooling, as the largest of two near ones is a rounding's choice."""
    channels, maps, size = c.pick("channels", 1, 3), c.pick("maps", 4, 6, 16), c.pick("size", 10, 9, 12)
    family = {name: _family(c, name) for name in ("conv1", "conv2", "fc1", "fc2")}
    left = (((size - 2) // 2) + 2 - 2) // 2

    def parts(dtype: torch.dtype) -> dict[str, nn.Module]:
        return {
            "conv1": family["conv1"].BBBConv2d(channels, maps, 3, dtype=dtype),
            "act1": nn.Softplus(),
            "pool1": nn.AvgPool2d(2),
            "conv2": family["conv2"].BBBConv2d(maps, 8, 3, padding=1, dtype=dtype),
            "act2": nn.Softplus(),
            "pool2": nn.AvgPool2d(2),
            "flatten": FlattenLayer(8 * left * left),
            "fc1": family["fc1"].BBBLinear(8 * left * left, 12, dtype=dtype),
            "act3": nn.Softplus(),
            "fc2": family["fc2"].BBBLinear(12, 3, dtype=dtype),
        }

    return _model(c, (c.pick("rows", 3, 1, 16), channels, size, size), parts, 16 * 100)


_ESTIMATORS = ("bbb", "lrt", "flipout")
_FAMILIES = ("BBB", "BBB_LRT", "Flipout")
_PRODUCTS = ("conv", "conv_transpose")
_KINDS = ("BBBLinear", "BBBConv1d", "BBBConv2d", "BBBConv3d")
OPS: dict[str, Callable[[Choices], Problem]] = {
    "normal": noise("normal"),
    "uniform": noise("uniform"),
    "dropout": dropout,
    "sample_weight": sample_weight,
    "sample_weights": sample_weights,
    "kl_divergence": kl_divergence,
    **{f"{e}_linear": product(f"{e}_linear") for e in _ESTIMATORS},
    **{f"{e}_{k}{d}d": product(f"{e}_{k}{d}d") for e in _ESTIMATORS for k in _PRODUCTS for d in (1, 2, 3)},
    **{f"{family}.{kind}": layer(family, kind) for family in _FAMILIES for kind in _KINDS},
    "linear_model": linear_model,
    "convolution_model": convolution_model,
}


def op_of(case: Case) -> str:
    """What the case calls."""
    return Choices(case).random("op").choice(list(OPS))


# ------------------------------------------------------------------------------------ running and comparing


@dataclass
class Derivative:
    """How gradients are asked for."""

    through: str
    kl_weight: float
    route: str
    layout: str
    dtype: torch.dtype = F32  # of the incoming gradient: what the implementations' output has

    @staticmethod
    def draw(c: Choices) -> Derivative:
        return Derivative(
            through=c.pick("through", "both", "output", "kl", often=0.4),
            kl_weight=c.pick("kl weight", 1.0, 0.0, 0.37, often=0.5),
            route=c.pick("route of gradients", "grad", "backward", "twice", "parts", "subset", "nested"),
            layout=c.pick("layout of grad", *(name for name in LAYOUTS if name != "fenced"), often=0.5),
        )

    def incoming(self, outputs: Tensors, c: Choices, magnitudes: bool) -> tuple[list[Tensor], list[Tensor]]:
        """The outputs that a gradient goes through, and their gradients."""
        through, given = [], []
        for name, value in outputs.items():
            is_kl = name.startswith("kl")
            wanted = self.through == "both" or (self.through == "kl") == is_kl
            if not wanted or not value.requires_grad:
                continue
            if is_kl:
                g = torch.full_like(value, self.kl_weight)
            else:
                values = torch.randn(value.shape, generator=c.generator(f"gradient of {name}")).to(self.dtype)
                values = values.double().abs() if magnitudes else values
                g = LAYOUTS[self.layout](values)
            through.append(value)
            given.append(g)
        return through, given


def _differentiate(
    outputs: Tensors, leaves: Tensors, how: Derivative, c: Choices, magnitudes: bool
) -> Tensors:
    """The leaves' gradients by name."""
    floating = {k: v for k, v in outputs.items() if isinstance(v, Tensor) and v.is_floating_point()}
    if not magnitudes:
        how.dtype = next((v.dtype for k, v in floating.items() if not k.startswith("kl")), F32)
    through, given = how.incoming(floating, c, magnitudes)
    names = [name for name, leaf in leaves.items() if leaf.requires_grad]
    if not through or not names:
        return {}
    wanted = [leaves[name] for name in names]

    def grad(outputs: list[Tensor], gradients: list[Tensor], **options: Any) -> list[Tensor | None]:
        return list(torch.autograd.grad(outputs, wanted, gradients, allow_unused=True, **options))

    def named(label: str, gradients: list[Tensor | None]) -> Tensors:
        return {f"{label} {name}": g for name, g in zip(names, gradients, strict=True)}

    if how.route == "backward":
        torch.autograd.backward(through, given)
        return named("grad", [leaf.grad for leaf in wanted])
    if how.route == "twice":
        first = named("grad", grad(through, given, retain_graph=True))
        return {**first, **named("again: grad", grad(through, given))}
    if how.route == "parts":
        labels = [
            f"grad of {name} for" for name, value in floating.items() if any(value is t for t in through)
        ]
        parts: Tensors = {}
        for label, output, g in zip(labels, through, given, strict=True):
            parts |= named(label, grad([output], [g], retain_graph=True))
        return parts
    if how.route == "subset":
        kept = [c.random(f"subset {name}").random() < 0.6 for name in names]
        names = [name for name, keep in zip(names, kept, strict=True) if keep] or names[:1]
        wanted = [leaves[name] for name in names]
    if how.route == "nested":
        inner: list[Tensors] = []

        def once(_: Tensor) -> None:
            if not inner:
                inner.append({})
                inner[0] = named("nested grad", grad(through, given, retain_graph=True))

        handle = through[0].register_hook(once)
        outer = named("grad", grad(through, given, retain_graph=True))
        handle.remove()
        return {**outer, **inner[0]}
    return named("grad", grad(through, given))


@contextlib.contextmanager
def _setting(backend: BackendName, isa: str, threads: int, taken: Routes | None = None) -> Iterator[None]:
    before = routes.current()
    routes.use(taken or before)
    bbb_fast.set_backend(backend)
    _backend._C.set_isa(isa)
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        routes.use(before)
        bbb_fast.set_backend("auto")
        _backend._C.set_isa("auto")
        torch.set_num_threads(1)


class _TouchedError(Exception):
    """A call wrote to an operand."""


def _results(problem: Problem, c: Choices, how: Derivative, magnitudes: bool = False) -> Tensors:
    """Everything a run of the problem returns, by name."""
    leaves = {name: operand.make(magnitudes) for name, operand in problem.operands.items()}
    witness = Witness(list(leaves.values()))
    outputs = problem.run(leaves, magnitudes)
    results = dict(outputs)
    if problem.records:
        results.update(_differentiate(outputs, leaves, how, c, magnitudes))
    if not witness.untouched():
        raise _TouchedError("an operand was written to")
    return results


def _stride_of(t: Tensor) -> list[int]:
    """The strides that mean something."""
    return [s for size, s in zip(t.shape, t.stride(), strict=True) if size > 1] if t.numel() else []


class _Compare:
    """The results of the two implementations, held against each other."""

    def __init__(self, problem: Problem, c: Choices, how: Derivative) -> None:
        self.problem, self.c, self.how = problem, c, how
        self.margin = 0.0
        self._worlds: tuple[Tensors, Tensors | None] | None = None

    def _magnitudes(self) -> tuple[Tensors, Tensors | None]:
        if self._worlds is None:

            def world(noise: bool) -> Tensors:
                with _setting("reference", "auto", 1), positive_world(noise):
                    return _results(self.problem, self.c, self.how, magnitudes=True)

            double = all(dtype == F64 for dtype in self.problem.dtypes)
            self._worlds = world(True), world(False) if double else None
        return self._worlds

    def _limit(self, name: str, ours: Tensor) -> tuple[Tensor, Tensor]:
        """Elementwise, the largest difference, and where there is none: beyond the dtypes' range."""
        with_noise, without = self._magnitudes()
        magnitude = with_noise[name].detach()
        if self.problem.depth > 1:
            # A layer's slopes in the positive world belong to other inputs there.
            magnitude = magnitude.clamp(min=float(ours.detach().abs().amax()) if ours.numel() else 0.0)
        dtypes, terms = [*self.problem.dtypes, ours.dtype], self.problem.terms
        operands = self.problem.operands.values()
        if name.startswith("kl"):
            dtypes = [F64 if ours.dtype == F64 else F32]
            if any(
                o.layout == "expanded" for name, o in self.problem.operands.items() if "input" not in name
            ):
                # The roundings of equal terms are equal: no random walk, which is the root of so many terms.
                terms **= 2
        values = [o.values.double().abs() for o in operands if o.values.numel()]
        operand = max((float(v.max()) for v in values), default=0.0)
        noiseless = None if without is None else without[name].detach()
        if noiseless is not None and self.problem.depth > 1:
            # Noise of the layers before is in everything.
            noiseless = torch.zeros_like(noiseless)
        limit = self.problem.depth * bound(magnitude, noiseless, dtypes, terms, operand)
        # There the last roundings need not agree on which side of its end a number is.
        largest = min(torch.finfo(dtype).max for dtype in dtypes)
        return limit, magnitude > largest / 4

    def __call__(self, native: Tensors, reference: Tensors) -> tuple[str, str] | None:
        """What differs and by how much, or None."""
        if native.keys() != reference.keys() and not self.problem.joint:
            return "results differ in number", f"native {list(native)}, reference {list(reference)}"
        for name in {**native, **reference}:
            difference = self._one(name, native.get(name), reference.get(name))
            if difference is not None:
                return difference
        return None

    def _one(self, name: str, ours: Any, theirs: Any) -> tuple[str, str] | None:
        if ours is None or theirs is None:
            # Outputs of one op have one node: it passes on zeros where the reference's graph has no way.
            some = theirs if ours is None else ours
            if some is None or (self.problem.joint and not some.any()):
                return None
            return f"{name} is None on one path", f"native {ours}, reference {theirs}"
        for what in ("shape", "dtype", *(() if self.problem.joint else ("requires_grad",))):
            if getattr(ours, what) != getattr(theirs, what):
                return f"{what} of {name}", f"native {getattr(ours, what)}, reference {getattr(theirs, what)}"
        if name.startswith("output") and _stride_of(ours) != _stride_of(theirs):
            return f"strides of {name}", f"{list(ours.shape)}: {ours.stride()}, reference {theirs.stride()}"
        if not ours.is_floating_point():
            return None if torch.equal(ours, theirs) else (name, "differs")
        if self.c.taken.get("not finite") is not None:
            # Terms that are not numbers have no magnitudes; but what is made of them is NaN on both paths.
            limit, wrong = torch.zeros(ours.shape), ours.isnan() != theirs.isnan()
            if self.c.taken.get("draws") == "whole":
                # Draws that share an input may add gradients first: inf * (a + b), not inf * a + inf * b.
                wrong &= ~(ours.isinf() & theirs.isnan())
        else:
            limit, beyond = self._limit(name, ours)
            ours, theirs = ours.detach().double(), theirs.detach().double()
            same = (ours == theirs) | (ours.isnan() & theirs.isnan())
            difference = torch.where(same | beyond, 0.0, (ours - theirs).abs())
            wrong = ~(difference <= limit)
            ratio = (difference / limit).nan_to_num(0.0, posinf=0.0)
            self.margin = max(self.margin, float(ratio.max()) if ratio.numel() else 0.0)
        if not wrong.any():
            return None
        at = tuple(wrong.nonzero()[0].tolist())
        return (
            f"value of {name}",
            f"{int(wrong.sum())} of {wrong.numel()} elements, first at {list(at)}: native {ours[at]:.9g}, "
            f"reference {theirs[at]:.9g}, may differ by {limit[at]:.3g}",
        )


class Draft:
    """A case drawn but not run."""

    def __init__(self, case: Case) -> None:
        self.choices = c = Choices(case)
        self.op = op_of(case)
        self.problem = OPS[self.op](c)
        self.how = Derivative.draw(c)
        self.isa = c.pick("isa", *instruction_sets())
        self.threads = c.pick("threads", 1, 2, 4, often=0.4)

    def _attempt(self, backend: BackendName, threads: int) -> Tensors | Exception:
        with _setting(backend, self.isa, threads, self.problem.routes):
            try:
                return _results(self.problem, self.choices, self.how)
            except Exception as error:
                return error

    def _outcome(self, status: Status, what: str = "", detail: str = "", margin: float = 0.0) -> Outcome:
        return Outcome(status, self.op, what, detail, shown(self.choices.taken), margin)

    def run(self) -> Outcome:
        """Both implementations, then the native one again."""
        native, reference = self._attempt("native", self.threads), self._attempt("reference", self.threads)
        for name, result, other in (("native", native, reference), ("reference", reference, native)):
            if isinstance(result, _TouchedError):
                return self._outcome(Status.FAULT, f"{name}: {result}")
            # Of torch's own convolutions, about strides; the kernels may give an answer.
            strides = re.search("grad_weight (must|needs to) be contiguous", str(result))
            allowed = name == "reference" and "conv" in self.op and strides is not None
            if isinstance(result, Exception) and not isinstance(other, Exception) and not allowed:
                return self._outcome(Status.FAULT, f"{name} raises {one_line(result)}")
        if isinstance(reference, Exception):
            return self._outcome(Status.REFUSED, one_line(reference))
        assert not isinstance(native, Exception)  # or it would have been a fault
        compare = _Compare(self.problem, self.choices, self.how)
        difference = compare(native, reference) or self._repeated(native)
        if difference is not None:
            return self._outcome(Status.FAULT, *difference)
        return self._outcome(Status.OK, margin=compare.margin)

    def _repeated(self, native: Tensors) -> tuple[str, str] | None:
        """What changes when the same call is made again, or a graph is gone through again."""
        for threads in (self.threads, *((3,) if self.problem.kernels_alone else ())):
            repeated = self._attempt("native", threads)
            if isinstance(repeated, Exception):
                return f"the second call raises {one_line(repeated)}", ""
            for name, value in native.items():
                if not same_bits(value, repeated[name]):
                    return f"bits of {name} in the second call", f"{self.threads} and {threads} threads"
        for name, value in native.items():
            if not same_bits(value, native[name.removeprefix("again: ")]):
                return f"{name} over the retained graph", ""
        return None
