"""Calls that make no sense: they must raise, in one clear line, or give what the reference gives."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import bbb_fast
from bbb_fast import _ops, functional, layers
from bbb_fast._backend import BackendName
from bbb_fast._layer_functions import ESTIMATORS

from .choices import Case, Choices
from .operands import Witness, fenced
from .outcome import Outcome, Status, one_line, shown

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
Arguments = dict[str, Any]
# What a wrong argument may raise. AttributeError: of what is no tensor, before any check meets it.
SANE = (TypeError, ValueError, RuntimeError, IndexError, OverflowError, AttributeError, MemoryError)
# A failure that no caller could act on.
INTERNAL = ("INTERNAL ASSERT", "report a bug", "Check failed", "vector::", "basic_string", "std::")
# PyTorch's own checks of an argument's type or layout, which show what they expect below their line; its two
# languages do not take the same types for a number.
DISPATCHER = (
    "bbb_fast::",
    "failed to unpack",
    "argument types are supported",
    "Could not run 'aten::",
    "no tensor arguments to this function",
    "must be tuple of ints, but found",
    "must be int, not",
)
# The memory limit of the process met: whether it is depends on the implementation.
MEMORY = ("can't allocate memory", "not enough memory", "bad_alloc", "Storage size calculation overflowed")


# -------------------------------------------------------------------------------------- calls that are right


def _tensor(c: Choices, name: str, *shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape, generator=c.generator(name)).to(dtype)


def _rng() -> Tensor:
    return torch.tensor([7, 3])


def _parameters(c: Choices, weight: tuple[int, ...]) -> Arguments:
    return {
        "W_mu": _tensor(c, "W_mu", *weight),
        "W_rho": _tensor(c, "W_rho", *weight) - 2,
        "bias_mu": _tensor(c, "bias_mu", weight[0]),
        "bias_rho": _tensor(c, "bias_rho", weight[0]) - 2,
    }


def _prior() -> Arguments:
    return {"prior_mu": 0.0, "prior_sigma": 0.1}


def _option(estimator: str) -> Arguments:
    option = ESTIMATORS[estimator].option
    return {option.name: option.default}


def _public(c: Choices, name: str) -> Arguments:
    """Arguments of a function of bbb_fast.functional."""
    mu, rho = _tensor(c, "mu", 3, 5), _tensor(c, "rho", 3, 5) - 2
    if name == "normal":
        return {"size": (3, 5), "rng": _rng(), "dtype": F32}
    if name == "uniform":
        return {"size": (3, 5), "rng": _rng(), "dtype": F32}
    if name == "dropout":
        ways = {"channels": c.chance("channels", 0.5), "one_mask": c.chance("one_mask", 0.5)}
        return {"input": mu, "rng": _rng(), "p": 0.3, **ways}
    if name == "sample_weight":
        return {"mu": mu, "rho": rho, "rng": _rng(), **_prior(), "with_kl": True, "dtype": None}
    if name == "sample_weights":
        return {"mu": [mu], "rho": [rho], "rng": _rng(), **_prior(), "with_kl": True, "dtype": None}
    if name == "kl_divergence":
        return {"mu": [mu, rho], "rho": [rho, mu], **_prior()}
    estimator, kind = name.split("_", 1)
    common = {**_prior(), "with_kl": True, **_option(estimator)}
    if kind == "linear":
        parameters = _parameters(c, (6, 5))
        return {"input": _tensor(c, "input", 4, 5), **parameters, "rng": _rng(), **common}
    spatial = int(kind[-2])
    geometry = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    x, weight = _tensor(c, "input", 2, 4, *(6,) * spatial), (6, 4, *(3,) * spatial)
    if "transpose" in kind:
        geometry = {"stride": 1, "padding": 0, "output_padding": 0, "groups": 1, "dilation": 1}
        x, weight = _tensor(c, "input", 2, 6, *(4,) * spatial), (6, 6, *(3,) * spatial)
    return {"input": x, **_parameters(c, weight), "rng": _rng(), **geometry, **common}


def _raw(c: Choices, name: str) -> Arguments:
    """Arguments of an op of torch.ops.bbb_fast, in the order of its schema."""
    x, y, z = (_tensor(c, n, 3, 5) for n in "xyz")
    rng, lists = _rng(), {"prior_mu": [0.0], "prior_sigma": [0.1]}
    gradient = {"grad_w": [x], "grad_kl": torch.tensor(0.5), "mu": [y], "rho": [z]}
    by_hand: dict[str, Arguments] = {
        "normal": {"size": [3, 5], "rng": rng, "dtype": F32},
        "uniform": {"size": [3, 5], "rng": rng, "dtype": F32},
        "dropout": {"input": x, "rng": rng, "p": 0.3, "channels": True, "one_mask": False},
        "drop_elements": {"input": x, "rng": rng, "p": 0.3},
        "sample_weights": {"mu": [x], "rho": [y], "rng": rng, **_prior(), "with_kl": True, "dtype": None},
        "kl_divergence": {"mu": [x], "rho": [y], **lists},
        "kl_tensor_prior": {"mu": x, "rho": y, "prior_mu": z, "prior_sigma": z.abs() + 0.1},
        "kl_tensor_prior_backward": {
            "grad": torch.tensor(0.5),
            "mu": x,
            "rho": y,
            "prior_mu": z,
            "prior_sigma": z.abs() + 0.1,
        },
        "posterior_backward": {**gradient, "rng": rng, **lists},
        "posterior_backward_out": {
            "grad_w": [x],
            "grad_spread": [x.abs()] if c.chance("spread", 0.5) else [],
            **{k: v for k, v in gradient.items() if k != "grad_w"},
            "rng": rng,
            **lists,
            "grad_mu": [torch.zeros(3, 5)],
            "grad_rho": [torch.zeros(3, 5)],
            "again": c.pick("again", None, F32, BF16),
        },
        "variance": {"mu": [x], "rho": [y], **_prior(), "with_kl": True, "dtype": F32},
        "square": {"input": x, "dtype": F32},
        "square_backward_": {"grad_input": x, "input": y, "grad": z},
        "lrt_sample_": {"m": x, "v": y.abs(), "rng": rng},
        "flip_signs": {"input": x, "rng": rng, "stream": 2, "channel_dim": -1},
        "add_flipped_": {"base": x, "input": y, "rng": rng, "stream": 3, "channel_dim": 1},
        "lrt_sample_backward": {"grad": x, "v": y.abs(), "rng": rng},
    }
    if name in by_hand:
        return by_hand[name]
    estimator, kind, *backward = name.split("_")
    linear = kind == "linear"
    spatial = c.pick("spatial", 2, 1, 3)
    weight = (6, 5) if linear else (6, 4, *(3,) * spatial)
    x = _tensor(c, "input", 4, 5) if linear else _tensor(c, "input", 2, 4, *(6,) * spatial)
    y = _tensor(c, "output", 4, 6) if linear else _tensor(c, "output", 2, 6, *(4,) * spatial)
    ones, none = [1] * spatial, [0] * spatial
    geometry = {
        "stride": ones,
        "padding": none,
        "dilation": list(ones),
        "transposed": False,
        "output_padding": list(none),
        "groups": 1,
    }
    arguments: Arguments = {"input": x, **_parameters(c, weight)}
    if not backward:
        arguments |= {"rng": rng, **({} if linear else geometry), **_prior(), "with_kl": True}
        return {**arguments, **_option(estimator)}
    kept = y.abs() if estimator == "lrt" else _tensor(c, "kept", *weight)
    arguments = {"grad": y, "grad_kl": torch.tensor(0.5), **arguments, "kept": kept, "rng": rng}
    mask = [True, *(c.pick(f"mask {k}", True, False) for k in range(4))]
    return {**arguments, **({} if linear else geometry), **_prior(), "output_mask": mask}


def _constructor(c: Choices, name: str) -> Arguments:
    """Arguments of a layer's class."""
    estimator = _layer_of(name).estimator
    common = {
        "bias": True,
        "priors": {"prior_sigma": 0.1},
        "device": None,
        "dtype": None,
        **_option(estimator),
    }
    if name.endswith("Linear"):
        return {"in_features": 5, "out_features": 6, **common}
    return {
        "in_channels": 4,
        "out_channels": 6,
        "kernel_size": 3,
        "stride": 1,
        "padding": 0,
        "dilation": 1,
        "groups": 1,
        "padding_mode": "zeros",
        **common,
    }


def _layer_of(name: str) -> Any:
    family, _, kind = name.partition(".")
    return getattr(getattr(layers, family), kind)


def _input(c: Choices, name: str) -> Tensor:
    return _tensor(c, "input", *((4, 5) if name.endswith("Linear") else (2, 4, *(6,) * int(name[-2]))))


def _forward(c: Choices, name: str) -> Arguments:
    """What a layer's forward is given, and what may have been set on it before."""
    estimator = _layer_of(name).estimator
    weight = (6, 5) if name.endswith("Linear") else (6, 4, *(3,) * int(name[-2]))
    arguments = {"input": _input(c, name), "sample": True, **_parameters(c, weight), **_prior()}
    return {**arguments, **_option(estimator)}


# ----------------------------------------------------------------------------------------------- and changed


class _Odd:
    """Of no type that anything expects."""

    def __repr__(self) -> str:
        return "_Odd()"


def _other_tensors(t: Tensor, c: Choices) -> dict[str, Callable[[], Any]]:
    """Tensors, and what could be taken for one, in place of ``t``."""
    shape = list(t.shape)
    axis = c.random("axis").randrange(max(1, len(shape)))

    def resized(size: int) -> Tensor:
        if not shape:
            return t.expand(3)
        return t.new_ones([*shape[:axis], size, *shape[axis + 1 :]])

    changes: dict[str, Callable[[], Any]] = {
        **{f"dtype {d}": partial(t.to, d) for d in (F64, BF16, F16, torch.int64, torch.int32)},
        **{f"dtype {d}": partial(t.to, d) for d in (torch.bool, torch.uint8, torch.complex64, F32)},
        "dtype float8": lambda: t.to(torch.float8_e4m3fn),
        "one longer": lambda: resized(shape[axis] + 1 if shape else 2),
        "one shorter": lambda: resized(max(0, shape[axis] - 1) if shape else 0),
        "much longer": lambda: resized(1000),
        "of length 1": lambda: resized(1),
        "of length 0": lambda: resized(0),
        "one dimension more": lambda: t.unsqueeze(axis),
        "one dimension less": lambda: t[0] if shape and shape[0] else t.reshape(-1),
        "flat": lambda: t.reshape(-1),
        "reversed": lambda: t.permute(list(reversed(range(t.dim())))),
        "a number": lambda: t.sum(),
        "empty": lambda: t.new_empty(0),
        "huge": lambda: t.new_ones(1).expand(1 << 40),
        "huge of the same shape": lambda: resized(1).expand(
            [1 << 31 if k == axis else n for k, n in enumerate(shape)]
        ),
        "meta": lambda: t.to("meta"),
        "sparse": lambda: t.to_sparse(),
        "csr": lambda: t.reshape(-1, max(1, shape[-1] if shape else 1)).to_sparse_csr(),
        "nested": lambda: torch.nested.nested_tensor([t, t]),
        "jagged": lambda: torch.nested.nested_tensor([t, t], layout=torch.jagged),
        "quantized": lambda: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
        "mkldnn": lambda: t.float().to_mkldnn(),
        "conjugate": lambda: torch.complex(t.float(), t.float()).conj(),
        "negative view": lambda: torch._neg_view(t),
        "NaN": lambda: torch.full_like(t, math.nan) if t.is_floating_point() else t - (1 << 62),
        "a parameter": lambda: nn.Parameter(t, requires_grad=t.is_floating_point()),
        "a list": lambda: t.tolist(),
        "an array": lambda: t.numpy(),
        "a list of it": lambda: [t],
    }
    return changes


def _of_no_type() -> dict[str, Callable[[], Any]]:
    return {
        "None": lambda: None,
        "text": lambda: "text",
        "bytes": lambda: b"\0",
        "a dict": lambda: {},
        "an object": lambda: _Odd(),
        "a class": lambda: int,
        "an empty tuple": lambda: (),
        "complex": lambda: 1j,
    }


def _itself(value: Any) -> Any:
    return value


def _under(key: Any, make: Callable[[], Any]) -> dict[Any, Any]:
    return {key: make()}


def _other_numbers(value: float) -> dict[str, Callable[[], Any]]:
    numbers = (0, -1, 1, 2, 3, 7, 1 << 31, 1 << 62, (1 << 63) - 1, -(1 << 63), 1 << 63, 10**400)
    floats = (0.5, -0.1, 1e-320, 1e300, 1e-200, math.nan, math.inf, -math.inf)
    return {
        **{str(n)[:24]: partial(_itself, n) for n in (*numbers, *floats)},
        "True": lambda: True,
        "a tensor of it": lambda: torch.tensor(float(value)),
        "two of it": lambda: (value, value),
        "four of it": lambda: [value] * 4,
        "a tensor of two": lambda: torch.tensor([1.0, 2.0]),
        "'same'": lambda: "same",
    }


def _changes(value: Any, c: Choices) -> dict[str, Callable[[], Any]]:
    """What could stand in the place of an argument, by name."""
    if isinstance(value, Tensor):
        return {**_other_tensors(value, c), **_of_no_type()}
    if isinstance(value, list) and value and isinstance(value[0], Tensor):
        k = c.random("element").randrange(len(value))

        def with_element(make: Callable[[], Any]) -> Callable[[], Any]:
            return lambda: [make() if j == k else v for j, v in enumerate(value)]

        inside = {**_other_tensors(value[k], c), **_of_no_type()}
        return {
            **{f"[{name}]": with_element(make) for name, make in inside.items()},
            "one more": lambda: [*value, value[0]],
            "one less": lambda: value[1:],
            "not a list": lambda: value[0],
            "many": lambda: value * 300,
            **_of_no_type(),
        }
    if isinstance(value, dict):  # priors
        keys = ("prior_mu", "prior_sigma", "posterior_mu_initial", "posterior_rho_initial", "sigma", 3)
        key = keys[c.random("key").randrange(len(keys))]
        numbers = {**_other_numbers(0.1), **_of_no_type()}
        inside = {f"{{{key!r}: {name}}}": partial(_under, key, make) for name, make in numbers.items()}
        return {**inside, **_of_no_type(), "a list": lambda: [1]}
    known = (F32, F64, BF16, F16, torch.int64, torch.complex64, torch.qint8)
    dtypes = {str(dtype): (lambda dtype=dtype: dtype) for dtype in known}
    if isinstance(value, (list, tuple)):
        k = c.random("element").randrange(max(1, len(value)))

        def replaced(make: Callable[[], Any]) -> Callable[[], Any]:
            return lambda: type(value)([make() if j == k else v for j, v in enumerate(value)])

        inside = {**_other_numbers(1), **_of_no_type()}
        return {
            **{f"[{name}]": replaced(make) for name, make in inside.items()},
            "one more": lambda: [*value, *value[:1]],
            "one less": lambda: value[1:],
            "many": lambda: list(value) * 40,
            **_of_no_type(),
        }
    if isinstance(value, bool):
        return {"the other": lambda: not value, **dtypes, **_of_no_type()}
    if value is None or isinstance(value, torch.dtype):
        return {**dtypes, **_of_no_type()}  # no numbers: the dispatcher takes them for names of types
    return {**_other_numbers(value if isinstance(value, (int, float)) else 1), **dtypes, **_of_no_type()}


def _changed(arguments: Arguments, c: Choices) -> Arguments:
    """One argument replaced, sometimes two; and one of the tensors shared, strided or at a memory's end."""
    result = dict(arguments)
    if c.chance("fenced", 0.5):
        for name, value in result.items():
            if isinstance(value, Tensor):
                result[name] = fenced(value)
            elif isinstance(value, list) and value and isinstance(value[0], Tensor):
                result[name] = [fenced(t) for t in value]
    for number in ("first", "second")[: 1 + c.chance("two changes", 0.3)]:
        name = c.random(f"{number} argument").choice(sorted(arguments))
        changes = _changes(arguments[name], c)
        how = c.random(f"{number} change of {name}").choice(sorted(changes))
        c.taken[number] = f"{name} = {how}"
        try:
            result[name] = changes[how]()
        except (RuntimeError, TypeError, OverflowError):  # there is no such thing: of an integer, say
            result[name] = None
    return result


# ---------------------------------------------------------------------------------------------------- running


KINDS = ("linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
PUBLIC = (
    "normal",
    "uniform",
    "dropout",
    "sample_weight",
    "sample_weights",
    "kl_divergence",
    *(f"{e}_{k}" for e in ESTIMATORS for k in KINDS),
)
LAYERS = tuple(
    f"{f}.{k}"
    for f in ("BBB", "BBB_LRT", "Flipout")
    for k in ("BBBLinear", "BBBConv1d", "BBBConv2d", "BBBConv3d")
)
TARGETS: dict[str, tuple[str, str]] = {
    **{name: ("public", name) for name in PUBLIC},
    **{f"torch.ops.{name}": ("raw", name) for name in _ops.FAKES},
    **{f"{name}()": ("constructor", name) for name in LAYERS},
    **{f"{name}.forward": ("forward", name) for name in LAYERS},
}


def op_of(case: Case) -> str:
    """What the case calls."""
    return Choices(case).random("op").choice(list(TARGETS))


def _flat(result: Any) -> list[Any]:
    if isinstance(result, (list, tuple)):
        return [t for part in result for t in _flat(part)]
    return [result]


class _Answer:
    """What a call gave: results, or an error."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.results: list[Any] = []
        self.error: Exception | None = None
        try:
            self.results = _flat(call())
        except Exception as error:
            self.error = error

    @property
    def out_of_memory(self) -> bool:
        return isinstance(self.error, MemoryError) or any(text in str(self.error) for text in MEMORY)

    @property
    def of_the_dispatcher(self) -> bool:
        """Whether it is PyTorch that complains of an argument's type, showing what it expects."""
        return any(mark in str(self.error) for mark in DISPATCHER)

    def unfit(self) -> str:
        """What is wrong with the error as an error, or nothing."""
        if self.error is None or self.out_of_memory:
            return ""
        text = str(self.error).strip()
        if not isinstance(self.error, SANE):
            return f"raises {one_line(self.error)}"
        if not text:
            return f"{type(self.error).__name__} without a message"
        if self.of_the_dispatcher:
            return ""
        if any(part in text for part in INTERNAL):
            return f"an internal error: {one_line(self.error)}"
        return f"a message of several lines: {one_line(self.error)}" if "\n" in text else ""

    @property
    def checked(self) -> bool:
        """Whether the error is one of the package's own checks, which name the op first."""
        return self.error is not None and re.match(r"\w+: ", str(self.error)) is not None


@contextlib.contextmanager
def _backend(name: BackendName) -> Iterator[None]:
    bbb_fast.set_backend(name)
    try:
        yield
    finally:
        bbb_fast.set_backend("auto")


def _agree(a: Any, b: Any) -> bool:
    """Whether two answers say the same: loosely, as valid.py looks at the digits."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b) and a == b
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device or a.layout != b.layout:
        return False
    if a.is_meta or a.layout != torch.strided:
        return True
    a, b = a.detach().double(), b.detach().double()
    scale = float(b[b.isfinite()].abs().max()) if b.isfinite().any() else 1.0
    return torch.allclose(a, b, rtol=0.05, atol=0.05 * max(scale, 1e-30), equal_nan=True)


def _both(c: Choices, name: str, arguments: Arguments, call: Callable[[], Any]) -> tuple[str, str]:
    """What is wrong with what the two implementations answer, and how; or nothing."""
    tensors = [t for t in _flat(list(arguments.values())) if isinstance(t, Tensor) and _has_bytes(t)]
    witness = Witness(tensors)
    answers = {}
    for backend in ("native", "reference"):
        with _backend(backend):
            answers[backend] = _Answer(call)
        if answers[backend].out_of_memory:
            return "", ""
        if not witness.untouched():
            return f"{backend} wrote to an argument", ""
    native, reference = answers["native"], answers["reference"]
    for backend, answer in answers.items():
        if answer.unfit():
            return f"{backend}: {answer.unfit()}", str(answer.error)
    for failing, one, other in (("native", native, reference), ("reference", reference, native)):
        if one.error is not None and other.error is None:
            return "" if one.of_the_dispatcher else f"only {failing} raises {one_line(one.error)}", ""
    if native.error is None or reference.error is None:
        if len(native.results) != len(reference.results) or not all(
            _agree(a, b) for a, b in zip(native.results, reference.results, strict=True)
        ):
            return "different answers", f"native {native.results}, reference {reference.results}"[:600]
        return "", ""
    said = one_line(native.error), one_line(reference.error)
    # A layer's two ways to its output meet its checks in different orders; so may two implementations, where
    # two arguments are wrong.
    compared = name in PUBLIC and not c.taken.get("two changes")
    if compared and native.checked and reference.checked and said[0] != said[1]:
        return "different words", f"native {said[0]}; reference {said[1]}"
    return "", ""


def _has_bytes(t: Tensor) -> bool:
    """Whether a tensor has memory that can be looked at."""
    if t.layout != torch.strided or t.is_nested or t.is_mkldnn or t.is_meta:
        return False
    return t.device.type == "cpu" and type(t) in (Tensor, nn.Parameter)


def _check_public(c: Choices, name: str, arguments: Arguments) -> tuple[str, str]:
    return _both(c, name, arguments, lambda: getattr(functional, name)(**arguments))


def _check_raw(c: Choices, name: str, arguments: Arguments) -> tuple[str, str]:
    """A raw op has no twin: it must raise, or its results must have the shapes that its fake says."""
    answer = _Answer(lambda: getattr(torch.ops.bbb_fast, name)(*arguments.values()))
    if answer.unfit():
        return answer.unfit(), str(answer.error)
    if answer.error is not None:
        return "", ""
    fake = _Answer(lambda: _ops.FAKES[name](*arguments.values()))
    if fake.error is not None:
        return "", ""
    for ours, said in zip(answer.results, fake.results, strict=False):
        if isinstance(ours, Tensor) and (ours.shape != said.shape or ours.dtype != said.dtype):
            detail = f"{list(ours.shape)} {ours.dtype}, the fake says {list(said.shape)} {said.dtype}"
            return "another shape than the fake's", detail
    return "", ""


def _check_constructor(c: Choices, name: str, arguments: Arguments) -> tuple[str, str]:
    """What torch.nn refuses, ours refuses; what ours accepts, runs alike on both implementations."""
    make = _layer_of(name)
    answer = _Answer(lambda: make(**arguments))
    if answer.unfit():
        return answer.unfit(), str(answer.error)
    if answer.error is not None:
        return "", ""
    own = ("priors", "recompute_weight", "variance_dtype")
    twin = _Answer(
        lambda: getattr(nn, make.__name__[3:])(**{k: v for k, v in arguments.items() if k not in own})
    )
    if twin.error is not None and not twin.out_of_memory:
        return f"accepts what torch.nn does not: {one_line(twin.error)}", ""
    layer = answer.results[0]
    if layer.W_mu.is_meta or layer.W_mu.numel() > 1 << 20:
        return "", ""
    x = _input(c, name).to(layer.W_mu.dtype)
    return _both(c, name, {"input": x}, lambda: _seeded(layer, x))


def _seeded(layer: Any, *arguments: Any) -> list[Any]:
    torch.manual_seed(3)
    output = layer(*arguments)
    return [output, layer.kl_loss()]


def _check_forward(c: Choices, name: str, arguments: Arguments) -> tuple[str, str]:
    layer = _layer_of(name)(*((5, 6) if name.endswith("Linear") else (4, 6, 3)))

    def call() -> Any:
        for attribute, value in arguments.items():
            if attribute in ("W_mu", "W_rho", "bias_mu", "bias_rho"):
                if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                    value = nn.Parameter(value, requires_grad=False)
                setattr(layer, attribute, value)
            elif attribute not in ("input", "sample"):
                setattr(layer, attribute, value)
        return _seeded(layer, arguments["input"], arguments["sample"])

    return _both(c, name, arguments, call)


_RIGHT: dict[str, Callable[[Choices, str], Arguments]] = {
    "public": _public,
    "raw": _raw,
    "constructor": _constructor,
    "forward": _forward,
}
_CHECKS: dict[str, Callable[[Choices, str, Arguments], tuple[str, str]]] = {
    "public": _check_public,
    "raw": _check_raw,
    "constructor": _check_constructor,
    "forward": _check_forward,
}


class Draft:
    """A case drawn but not run."""

    def __init__(self, case: Case) -> None:
        self.choices = Choices(case)
        self.op = op_of(case)
        self.kind, self.name = TARGETS[self.op]
        self.arguments = _changed(_RIGHT[self.kind](self.choices, self.name), self.choices)

    def run(self) -> Outcome:
        what, detail = _CHECKS[self.kind](self.choices, self.name, self.arguments)
        status = Status.FAULT if what else Status.OK
        return Outcome(status, self.op, what, detail, shown(self.choices.taken))
