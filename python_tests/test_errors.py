"""Wrong arguments of the ops: the same exception and the same words from both implementations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import DEVICE, on

from bbb_fast import functional
from bbb_fast._layer_functions import ESTIMATORS

f32, f64, bf16, i64 = torch.float32, torch.float64, torch.bfloat16, torch.int64


LINEARS = [f"{estimator}_linear" for estimator in ESTIMATORS]
CONVS = [f"{estimator}_conv{spatial}d" for estimator in ESTIMATORS for spatial in (1, 2, 3)]
TRANSPOSED = [f"{estimator}_conv_transpose{spatial}d" for estimator in ESTIMATORS for spatial in (1, 2, 3)]
LAYERS = LINEARS + CONVS + TRANSPOSED
SAMPLERS = ["sample_weights", "sample_weight"]
NOISE = ["normal", "uniform"]
OPS = [*NOISE, "dropout", *SAMPLERS, "kl_divergence", *LAYERS]


def zeros(*shape: int, dtype: torch.dtype = f32, device: torch.device | str = DEVICE) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def rng(dtype: torch.dtype = i64, device: torch.device | str = DEVICE, count: int = 2) -> torch.Tensor:
    return torch.ones(count, dtype=dtype, device=device)


def _conv(spatial: int) -> dict[str, Any]:
    kernel, image = (3,) * spatial, (5,) * spatial
    return {
        "input": zeros(2, 4, *image),
        "W_mu": zeros(6, 4, *kernel),
        "W_rho": zeros(6, 4, *kernel),
        "bias_mu": zeros(6),
        "bias_rho": zeros(6),
        "rng": rng(),
    }


def valid(op: str) -> dict[str, Any]:
    """Arguments that ``op`` accepts."""
    if op in CONVS:
        return _conv(int(op[-2]))
    if op in TRANSPOSED:
        bias = {"bias_mu": zeros(4), "bias_rho": zeros(4)}
        return {**_conv(int(op[-2])), "input": zeros(2, 6, *(5,) * int(op[-2])), **bias}
    if op in LAYERS:
        return {
            "input": zeros(5, 4),
            "W_mu": zeros(3, 4),
            "W_rho": zeros(3, 4),
            "bias_mu": zeros(3),
            "bias_rho": zeros(3),
            "rng": rng(),
        }
    made: dict[str, Callable[[], dict[str, Any]]] = {
        "normal": lambda: {"size": (3, 2), "rng": rng()},
        "uniform": lambda: {"size": (3, 2), "rng": rng()},
        "dropout": lambda: {"input": zeros(3, 2), "rng": rng(), "p": 0.5},
        "sample_weights": lambda: {"mu": [zeros(3, 2)], "rho": [zeros(3, 2)], "rng": rng()},
        "sample_weight": lambda: {"mu": zeros(3, 2), "rho": zeros(3, 2), "rng": rng()},
        "kl_divergence": lambda: {"mu": [zeros(3, 2)], "rho": [zeros(3, 2)]},
    }
    return made[op]()


def call(op: str, changes: dict[str, Any]) -> Any:
    return getattr(functional, op)(**{**valid(op), **changes})


def native_name(op: str) -> str:
    """The name in which an op's own checks speak."""
    return op if op.endswith("linear") else op[: op.index("_") + len("_conv")]


# op, changed arguments, exception, a part of the message.
Case = tuple[str, dict[str, Any], type[Exception], str]
CASES: list[Case] = []


def case(op: str, error: type[Exception], message: str, **changes: Any) -> None:
    CASES.append((op, changes, error, message))


for _op in OPS:
    if _op != "kl_divergence":
        case(_op, TypeError, "rng must be int64", rng=rng(f32))
        case(_op, TypeError, "rng must be int64", rng=rng(torch.int32))
        case(_op, ValueError, "rng must have shape [2]", rng=rng(count=3))
        case(_op, ValueError, "rng must have shape [2]", rng=rng(count=0))
        case(_op, ValueError, "rng must have shape [2]", rng=rng().reshape(2, 1))
        several = (1, 2) if _op in (*NOISE, "dropout") else (1, 1, 1, 2)
        case(_op, ValueError, "rng must have shape [2]", rng=rng().reshape(several))
        case(_op, ValueError, "rng must have shape [2]", rng=rng()[0])
for _op in NOISE:
    case(_op, ValueError, "size must be >= 0", size=(3, -1))
    case(_op, ValueError, "size must be >= 0", size=-1)
    case(_op, TypeError, "dtype must be float32", dtype=i64)
    case(_op, TypeError, "dtype must be float32", dtype=torch.complex64)
for _value in (-0.1, 1.5, -math.inf, math.nan):
    case("dropout", ValueError, "p must be in [0, 1]", p=_value)
case("dropout", TypeError, "input must be float32", input=zeros(3, 2, dtype=i64))
case("dropout", ValueError, "input must have dimensions [N, C, ...]", input=zeros(3), channels=True)

for _op in SAMPLERS + LAYERS:
    for _value in (math.inf, -math.inf, math.nan):
        case(_op, ValueError, "prior_mu must be finite", prior_mu=_value)
    for _value in (0.0, -0.1, math.inf, math.nan):
        case(_op, ValueError, "prior_sigma must be finite and > 0", prior_sigma=_value)
for _op in SAMPLERS:
    case(_op, TypeError, "dtype must be float32", dtype=torch.int32)
case(
    "sample_weight",
    ValueError,
    "mu and rho must have one shape, got [3, 2] and [2, 3]",
    rho=zeros(2, 3),
)
case("sample_weight", TypeError, "mu and rho must have one dtype", rho=zeros(3, 2, dtype=f64))
case(
    "sample_weight",
    TypeError,
    "mu must be float32",
    mu=zeros(3, 2, dtype=i64),
    rho=zeros(3, 2, dtype=i64),
)
case("sample_weights", ValueError, "the list of tensors is empty", mu=[], rho=[])
case("sample_weights", ValueError, "got 1 mu tensors and 0 rho tensors", rho=[])
case("sample_weights", ValueError, "got 1 mu tensors and 2 rho tensors", rho=[zeros(3, 2)] * 2)
case(
    "sample_weights",
    TypeError,
    "all tensors must have one dtype",
    mu=[zeros(2), zeros(2, dtype=f64)],
    rho=[zeros(2), zeros(2, dtype=f64)],
)
case(
    "sample_weights",
    ValueError,
    "mu and rho must have one shape, got [] and [1]",
    mu=[zeros(2), zeros()],
    rho=[zeros(2), zeros(1)],
)

for _value in (math.inf, math.nan):
    case("kl_divergence", ValueError, "prior_mu must be finite", prior_mu=_value)
for _value in (0.0, -1.0, math.inf, math.nan):
    case("kl_divergence", ValueError, "prior_sigma must be finite and > 0", prior_sigma=_value)
case(
    "kl_divergence",
    ValueError,
    "prior_sigma must be finite and > 0, got 0",
    mu=[zeros(1)] * 2,
    rho=[zeros(1)] * 2,
    prior_sigma=[1.0, 0.0],
)
case(
    "kl_divergence",
    ValueError,
    "1 tensors need 1 priors, got 2 prior_mu and 1 prior_sigma",
    prior_mu=[0.0, 0.0],
)
case(
    "kl_divergence",
    ValueError,
    "1 tensors need 1 priors, got 1 prior_mu and 0 prior_sigma",
    prior_sigma=[],
)
case("kl_divergence", ValueError, "the list of tensors is empty", mu=[], rho=[])
case("kl_divergence", ValueError, "got 1 mu tensors and 2 rho tensors", rho=[zeros(3, 2)] * 2)
case("kl_divergence", ValueError, "mu and rho must have one shape", rho=[zeros(3, 1)])
case("kl_divergence", ValueError, "mu and rho must have one shape", mu=zeros(2), rho=zeros(3))
case("kl_divergence", TypeError, "mu and rho must have one dtype", rho=[zeros(3, 2, dtype=bf16)])
case(
    "kl_divergence",
    TypeError,
    "mu must be float32",
    mu=[zeros(3, 2, dtype=i64)],
    rho=[zeros(3, 2, dtype=i64)],
)

for _op in LAYERS:
    _ok = valid(_op)
    _name = native_name(_op)
    _out = _ok["bias_mu"].shape[0]
    case(_op, TypeError, f"{_name}: input must be float32", input=_ok["input"].to(i64))
    case(_op, TypeError, "W_mu and W_rho must have one dtype", W_rho=_ok["W_rho"].double())
    case(_op, TypeError, "W_mu must be float32", W_mu=_ok["W_mu"].int(), W_rho=_ok["W_rho"].int())
    case(_op, TypeError, "parameters must be torch.float64 like the input", input=_ok["input"].double())
    case(
        _op,
        TypeError,
        "parameters must be torch.float32 like the input",
        W_mu=_ok["W_mu"].bfloat16(),
        W_rho=_ok["W_rho"].bfloat16(),
    )
    case(
        _op,
        TypeError,
        "parameters must be torch.float16",
        input=_ok["input"].half(),
        W_mu=_ok["W_mu"].bfloat16(),
        W_rho=_ok["W_rho"].bfloat16(),
    )
    case(_op, ValueError, "W_mu and W_rho must have one shape", W_rho=_ok["W_rho"][1:])
    case(_op, ValueError, "give both bias_mu and bias_rho, or neither", bias_mu=None)
    case(_op, ValueError, "give both bias_mu and bias_rho, or neither", bias_rho=None)
    case(_op, ValueError, "bias_mu and bias_rho must have one shape", bias_rho=zeros(_out + 1))
    case(
        _op,
        ValueError,
        f"bias_mu must have shape [{_out}]",
        bias_mu=zeros(_out + 1),
        bias_rho=zeros(_out + 1),
    )
    case(
        _op,
        ValueError,
        f"bias_mu must have shape [{_out}]",
        bias_mu=zeros(1, _out),
        bias_rho=zeros(1, _out),
    )
    case(_op, TypeError, "bias_mu and bias_rho must have one dtype", bias_rho=zeros(_out, dtype=f64))
    case(
        _op,
        TypeError,
        "all parameters must have one dtype",
        bias_mu=zeros(_out, dtype=f64),
        bias_rho=zeros(_out, dtype=f64),
    )
    case(_op, ValueError, f"{_name}: prior_sigma must be", prior_sigma=0.0, with_kl=True)
    if _op.startswith("lrt"):
        case(_op, TypeError, "variance_dtype must be float32", variance_dtype=i64)

for _op in LINEARS:
    case(_op, ValueError, "the last dimension of input must be in_features = 4", input=zeros(5, 3))
    case(_op, ValueError, "the last dimension of input must be in_features = 4", input=zeros())
    case(_op, ValueError, "W_mu must be [out_features, in_features]", W_mu=zeros(4), W_rho=zeros(4))
    case(
        _op,
        ValueError,
        "W_mu must be [out_features, in_features]",
        W_mu=zeros(1, 3, 4),
        W_rho=zeros(1, 3, 4),
    )

for _op in CONVS:
    _spatial = int(_op[-2])
    _wide = zeros(2, 5, *(5,) * _spatial)
    case(_op, ValueError, "W_mu must have", W_mu=zeros(6, 4), W_rho=zeros(6, 4))
    case(_op, ValueError, "input must have", input=zeros(4))
    case(_op, ValueError, "input must have", input=zeros(*(2,) * (_spatial + 3)))
    case(_op, ValueError, "input must have 4 channels", input=_wide)
    case(_op, ValueError, "input must have 4 channels", input=_wide[0])
    case(_op, ValueError, "stride must be >= 1", stride=0)
    case(_op, ValueError, f"stride must have {_spatial} numbers", stride=(1,) * (_spatial + 1))
    case(_op, ValueError, "padding must be >= 0", padding=-1)
    case(_op, ValueError, f"padding must have {_spatial} numbers", padding=())
    case(_op, ValueError, "padding must be numbers, 'same' or 'valid', got 'full'", padding="full")
    case(_op, ValueError, "padding='same' needs stride 1", padding="same", stride=2)
    case(_op, ValueError, "dilation must be >= 1", dilation=0)
    case(_op, ValueError, f"dilation must have {_spatial} numbers", dilation=(1,) * (_spatial + 1))
    case(_op, ValueError, "groups must be >= 1", groups=0)
    case(_op, ValueError, "groups must be >= 1", groups=-2)
    case(_op, ValueError, "groups = 2", groups=2)
    case(_op, ValueError, "groups = 4", groups=4, input=zeros(2, 16, *(5,) * _spatial))
    case(_op, ValueError, "the kernel reaches over 3 elements", input=zeros(2, 4, *(2,) * _spatial))
    case(_op, ValueError, "the kernel reaches over 9 elements", dilation=4)
    case(_op, ValueError, "the kernel reaches over 3 elements", input=zeros(2, 4, *(0,) * _spatial))

for _op in TRANSPOSED:
    _spatial = int(_op[-2])
    _ok = valid(_op)
    case(_op, ValueError, "W_mu must have", W_mu=zeros(6, 4), W_rho=zeros(6, 4))
    case(_op, ValueError, "input must have", input=zeros(6))
    case(_op, ValueError, "input must have 6 channels", input=zeros(2, 5, *(5,) * _spatial))
    case(_op, ValueError, "stride must be >= 1", stride=0)
    case(_op, ValueError, "padding must be >= 0", padding=-1)
    case(_op, ValueError, "output_padding must be >= 0", output_padding=-1)
    case(_op, ValueError, f"output_padding must have {_spatial} numbers", output_padding=())
    case(_op, ValueError, "output_padding must be smaller than stride or dilation", output_padding=1)
    case(_op, ValueError, "dilation, got [" + ", ".join("1" * _spatial), output_padding=(True,) * _spatial)
    case(_op, ValueError, "stride must be >= 1, got [0", stride=(False,) * _spatial)
    case(
        _op,
        ValueError,
        "output_padding must be smaller than stride or dilation",
        output_padding=(2,) * _spatial,
        stride=2,
        dilation=2,
    )
    case(_op, ValueError, "dilation must be >= 1", dilation=0)
    case(_op, ValueError, "groups must be >= 1", groups=0)
    case(_op, ValueError, "groups = 4", groups=4)
    case(_op, ValueError, "the output would have -1 elements in dimension 2", padding=4)
    case(_op, ValueError, "the output would have 2 elements", input=zeros(2, 6, *(0,) * _spatial))

ELSEWHERE = [
    *[
        (op, {name: valid(op)[name].to("meta")}, name)
        for op in LAYERS
        for name in valid(op)
        if name != "input"
    ],
    *[(op, {"rng": rng(device="meta")}, "rng") for op in [*SAMPLERS, "dropout"]],
    ("sample_weight", {"rho": zeros(3, 2, device="meta")}, "rho"),
    ("sample_weights", {"rho": [zeros(3, 2, device="meta")]}, "rho"),
    ("kl_divergence", {"rho": [zeros(3, 2, device="meta")]}, "rho"),
]


def message_of(function: Callable[..., Any], *args: Any) -> tuple[type[Exception], str]:
    try:
        function(*args)
    except Exception as error:
        return type(error), str(error)
    raise AssertionError("no error")


def _id(value: Any) -> str:
    if isinstance(value, dict):
        return "-".join(value)
    return value if isinstance(value, str) and " " not in value else ""


@pytest.mark.parametrize(("op", "changes", "error", "message"), CASES, ids=_id)
def test_wrong_argument(
    backend: str, op: str, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    """The exception is exactly the documented one and its message names the op and the argument."""
    kind, text = message_of(call, op, changes)
    assert kind is error, text
    assert message in text
    assert text.startswith((f"{op}: ", f"{native_name(op) if op in LAYERS else op}: ", "sample_weights: "))


@pytest.mark.parametrize(("op", "changes", "error", "message"), CASES, ids=_id)
def test_both_implementations_say_the_same(
    native: None, op: str, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    assert on("native", message_of, call, op, changes) == on("reference", message_of, call, op, changes)


@pytest.mark.parametrize("op", OPS)
def test_the_unchanged_arguments_are_accepted(backend: str, op: str) -> None:
    """Otherwise the cases above would test nothing."""
    call(op, {})


@pytest.mark.parametrize(("op", "changes", "name"), ELSEWHERE, ids=_id)
def test_tensor_on_another_device(backend: str, op: str, changes: dict[str, Any], name: str) -> None:
    """Never an answer made of memory nobody wrote."""
    kind, text = message_of(call, op, changes)
    assert kind in (ValueError, RuntimeError)
    assert "meta" in text and str(DEVICE) in text, text


@pytest.mark.parametrize("op", OPS)
def test_wrong_type_of_argument(backend: str, op: str) -> None:
    """Not a tensor at all: an ordinary Python error (the dispatcher's are RuntimeErrors)."""
    for name in valid(op):
        if name not in ("size", "bias_mu", "bias_rho"):
            kind, _ = message_of(call, op, {name: "text"})
            assert kind in (TypeError, AttributeError, ValueError, RuntimeError)


@pytest.mark.parametrize("op", ["sample_weight", *LINEARS, *(f"{e}_conv2d" for e in ESTIMATORS)])
def test_nothing_is_written_before_an_error(backend: str, op: str) -> None:
    """A failed call leaves its arguments as they were."""
    arguments = valid(op)
    before = {k: v.clone() for k, v in arguments.items() if isinstance(v, torch.Tensor)}
    with pytest.raises(TypeError):
        call(op, {**arguments, "rng": rng(f32)})
    assert all(torch.equal(arguments[k], v) for k, v in before.items())


def backward_arguments(op: str) -> dict[str, Any]:
    """What a layer's backward op accepts, by name."""
    kind = valid("bbb_linear" if op.endswith("linear") else "bbb_conv2d")
    tensors = ("input", "W_mu", "W_rho", "bias_mu", "bias_rho")
    rest: dict[str, Any] = {} if op.endswith("linear") else dict(GEOMETRY)
    rest |= {"prior_mu": 0.0, "prior_sigma": 0.1}
    forward = getattr(torch.ops.bbb_fast, op)
    output, kept, _ = forward(*kind.values(), *rest.values(), False, None if op.startswith("lrt") else False)
    return {
        "grad": torch.ones_like(output),
        "grad_kl": None,
        **{name: kind[name] for name in tensors},
        "kept": kept,
        "rng": kind["rng"],
        **rest,
        "output_mask": [True] * 5,
    }


GEOMETRY: dict[str, Any] = {
    "stride": [1, 1],
    "padding": [0, 0],
    "dilation": [1, 1],
    "transposed": False,
    "output_padding": [0, 0],
    "groups": 1,
}
LAYER_OPS = [f"{estimator}_{product}" for estimator in ESTIMATORS for product in ("linear", "conv")]
# Changed arguments of the backward ops, each made from the valid one.
BACKWARD_CASES: list[tuple[str, Callable[[Any], Any], type[Exception], str]] = [
    ("grad", lambda t: t[:1], ValueError, r"grad must have shape \[.*\], got"),
    ("grad", lambda t: t.sum(), ValueError, r"grad must have shape \[.*\], got \[\]"),
    ("grad", lambda t: t.transpose(0, -1), ValueError, "grad must have shape"),
    ("grad", lambda t: t[..., :1].contiguous(), ValueError, "grad must have shape"),
    ("grad", lambda t: t.new_empty(0), ValueError, "grad must have shape"),
    ("grad", lambda t: t.double(), TypeError, "grad must be torch.float32, got torch.float64"),
    ("grad", lambda t: t.long(), TypeError, "grad must be float32, float64, bfloat16 or float16"),
    ("grad", lambda t: t.to_sparse(), TypeError, "grad must be a dense tensor"),
    ("grad", lambda t: t.to("meta"), ValueError, "is on"),
    ("grad_kl", lambda _: zeros(2), ValueError, "grad_kl must be a scalar"),
    ("grad_kl", lambda _: zeros(1, dtype=i64), TypeError, "grad_kl must be float32"),
    ("input", lambda t: t[:1], ValueError, "grad must have shape"),
    ("input", lambda t: t[:0], ValueError, "grad must have shape"),
    ("input", lambda t: t.double(), TypeError, "must be torch.float64 like the input"),
    ("W_mu", lambda t: t[:1], ValueError, "W_mu and W_rho must have one shape"),
    ("W_rho", lambda t: t.to_sparse(), TypeError, "W_rho must be a dense tensor"),
    ("bias_mu", lambda t: t[:1], ValueError, "bias_mu and bias_rho must have one shape"),
    ("bias_mu", lambda _: None, ValueError, "give both bias_mu and bias_rho, or neither"),
    ("kept", lambda t: t[:1], ValueError, r"kept must have shape \[.*\], got"),
    ("kept", lambda t: t.flatten(), ValueError, r"kept must have shape"),
    ("kept", lambda t: t.long(), TypeError, "kept must be float32, float64, bfloat16 or float16"),
    ("kept", lambda t: t.to_sparse(), TypeError, "kept must be a dense tensor"),
    ("rng", lambda t: t[:1], ValueError, r"rng must have shape \[2\]"),
    ("rng", lambda t: t.float(), TypeError, "rng must be int64"),
    ("output_mask", lambda m: m[:4], ValueError, "output_mask must have 5 entries, got 4"),
    ("prior_sigma", lambda _: -1.0, ValueError, "prior_sigma must be finite and > 0"),
]


@pytest.mark.parametrize("op", LAYER_OPS)
@pytest.mark.parametrize(("name", "change", "error", "message"), BACKWARD_CASES)
def test_backward_ops_check_what_they_are_given(
    native: None, op: str, name: str, change: Callable[[Any], Any], error: type[Exception], message: str
) -> None:
    arguments = backward_arguments(op)
    backward = getattr(torch.ops.bbb_fast, f"{op}_backward")
    backward(*arguments.values())
    arguments[name] = change(arguments[name])
    with pytest.raises(error, match=message):
        backward(*arguments.values())


@pytest.mark.parametrize("op", LAYER_OPS)
def test_backward_ops_know_what_the_layer_has(native: None, op: str) -> None:
    arguments = backward_arguments(op)
    backward = getattr(torch.ops.bbb_fast, f"{op}_backward")
    if not op.startswith("lrt"):
        with pytest.raises(TypeError, match="kept must be torch.float32, got torch.float64"):
            backward(*{**arguments, "kept": arguments["kept"].double()}.values())
    else:
        with pytest.raises(ValueError, match="kept, the variance of the output, is missing"):
            backward(*{**arguments, "kept": None}.values())
    arguments |= {"bias_mu": None, "bias_rho": None}
    with pytest.raises(ValueError, match="output_mask asks for the gradient of a bias, and there is none"):
        backward(*arguments.values())
    arguments["output_mask"] = [True, True, True, False, False]
    assert len(backward(*arguments.values())) == 3


@pytest.mark.parametrize("least", [1 << 31, 1 << 62, (1 << 63) - 1])
@pytest.mark.parametrize("name", ["stride", "padding", "dilation", "groups"])
@pytest.mark.parametrize("op", CONVS)
def test_numbers_that_would_overflow(backend: str, op: str, name: str, least: int) -> None:
    with pytest.raises(ValueError, match=f"{name} must be < 2\\^31, got"):
        call(op, {name: least})


def test_one_result_twice(native: None) -> None:
    one, other = zeros(3), zeros(3)
    arguments: Any = ([zeros(3)], [], None, [one], [other], rng(), [0.0], [0.1])
    result = zeros(3)
    with pytest.raises(ValueError, match="result 0 must be two tensors, got one twice"):
        torch.ops.bbb_fast.posterior_backward_out(*arguments, [result], [result])


def test_lists_of_meta_tensors(native: None) -> None:
    """Their fake kernels check nothing; what autograd keeps of them is checked all the same."""
    one = [zeros(3, device="meta").requires_grad_()]
    wrong: Any = ((one, [], [0.0], [0.1]), (one, one, [], [0.1]), (one, one, [0.0], []))
    for arguments in wrong:
        with pytest.raises(ValueError, match="kl_divergence: "):
            torch.ops.bbb_fast.kl_divergence(*arguments)
    bias, x, W = (
        zeros(2, device="meta").requires_grad_(),
        zeros(5, 3, device="meta"),
        zeros(2, 3, device="meta"),
    )
    with pytest.raises(ValueError, match="got 2 mu tensors and 1 rho tensors"):
        torch.ops.bbb_fast.bbb_linear(x, W, W, bias, None, rng(device="meta"), 0.0, 0.1, True, False)
