"""The functions of the layers, each an estimator over a shape, for the kernels and the reference path alike.

An estimator is described once (:data:`ESTIMATORS`), a shape once (:func:`_linear`, :func:`_conv`,
:func:`_conv_transpose`), and :func:`family` puts them together. What the functions run is given by the
module that publishes them: ``functional`` or ``reference``. Static tools read what comes out in the stubs
(``functional.pyi``, ``reference.pyi``), which ``python .ci/stubs.py`` writes.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch.nn.functional as F
from torch import Tensor

__all__ = ["ESTIMATORS", "Call", "Estimator", "explicit_padding", "family"]


class Option(NamedTuple):
    """A keyword argument that one estimator's functions have."""

    name: str
    annotation: str
    default: Any
    doc: str


class Estimator(NamedTuple):
    name: str
    title: str
    # What it draws; "product" stands for the shape's.
    formula: str
    option: Option


class Geometry(NamedTuple):
    """Of a convolution, in the order of its ops."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int


class Call(NamedTuple):
    """A call, its arguments brought into one form for all shapes."""

    name: str  # of the function
    estimator: str
    # input, with a batch dimension; W_mu, W_rho, bias_mu, bias_rho, rng
    operands: tuple[Any, ...]
    geometry: Geometry | None  # None of a linear layer
    prior_mu: float
    prior_sigma: float
    with_kl: bool
    option: Any

    @property
    def op(self) -> str:
        """The op behind the function; its checks speak in its name."""
        return f"{self.estimator}_{'linear' if self.geometry is None else 'conv'}"


class Run(Protocol):
    def __call__(self, call: Call) -> tuple[Tensor, Tensor | None]:
        """The output, and the KL if ``call.with_kl``."""


_RECOMPUTE = Option(
    "recompute_weight",
    "bool",
    False,
    "keep nothing but ``rng`` for backward, which draws {what} again; else {what} is kept.",
)

ESTIMATORS = {
    estimator.name: estimator
    for estimator in (
        Estimator(
            "bbb",
            "with weights drawn from the posterior, one draw for the whole batch",
            """
            y = product(x, W) + b with W and b from :func:`sample_weights` (W takes stream ``rng[1]``, b the
            next). Blundell et al., "Weight uncertainty in neural networks", ICML 2015, section 3.2.
            """,
            _RECOMPUTE._replace(doc=_RECOMPUTE.doc.format(what="W")),
        ),
        Estimator(
            "lrt",
            "under the local reparameterization trick, one draw an output element",
            """
            m = product(x, W_mu) + b_mu, v = product(x^2, sigma_W^2) + sigma_b^2, y = m + sqrt(v) * eps, eps
            numbered in the order in which the output lies in memory. Where v = 0 the noise and its gradient
            are 0. Kingma, Salimans and Welling, "Variational dropout and the local reparameterization trick",
            NeurIPS 2015, eq. 6.
            """,
            Option(
                "variance_dtype",
                "VarianceDtype",
                None,
                "type of the variance product's operands and result; default input's (float32 for "
                'float16). "auto": bfloat16 where that is faster (:mod:`bbb_fast.routes`), else the '
                "default. A CPU without bfloat16 instructions multiplies numbers rounded to bfloat16 in "
                "float32: no faster than float32 then, and the same numbers.",
            ),
        ),
        Estimator(
            "flipout",
            "with one draw of the weights' deviations, whose signs each row draws anew",
            """
            y = product(x, W_mu) + b_mu + (product(x * s, sigma_W * eps) + sigma_b * eps_b) * r with random
            signs s of each row and input channel and r of each row and output channel. eps is that of the
            bbb functions; the signs are bits of streams ``rng[1] + 2`` and ``+ 3`` (docs/noise.md), never
            stored. A row alone is distributed as under bbb, and two rows are uncorrelated. Wen, Vicol, Ba,
            Tran and Grosse, "Flipout: efficient pseudo-independent weight perturbations on mini-batches",
            ICLR 2018, eq. 4.
            """,
            _RECOMPUTE._replace(doc=_RECOMPUTE.doc.format(what="sigma_W * eps")),
        ),
    )
}

_ARGUMENTS = """\
    bias_mu, bias_rho: [{out}], or both None.
    rng: int64 [2], seed and stream. [S, 2] names S draws, each of an equal part of the input's
        first dimension; [S, 1, 2] S draws of the whole input each, whose outputs follow each other
        in the output's first dimension, S times as long.
    {geometry}prior_mu, prior_sigma: the prior N(prior_mu, prior_sigma^2) of the KL.
    with_kl: also return KL(q || p), formed in the same pass over the parameters, its gradient with
        the output's in one pass too."""


_RETURNS = "Returns [N, out_channels, ...] in input's dtype, or that and the scalar KL. product: {}"


def _published(
    function: Any, estimator: Estimator, module: str, name: str, title: str, arguments: str, returns: str
) -> Callable[..., Any]:
    """The function with its name, its estimator's option in its signature, and what ``help`` says of it."""
    parameters = [
        p
        for p in inspect.signature(function).parameters.values()
        if p.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    option = estimator.option
    parameters.append(
        inspect.Parameter(
            option.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=option.default,
            annotation=option.annotation,
        )
    )
    function.__signature__ = inspect.Signature(parameters, return_annotation="Tensor | tuple[Tensor, Tensor]")
    function.__name__ = function.__qualname__ = name
    function.__module__ = module
    if module.endswith(".reference"):
        function.__doc__ = f"See :func:`bbb_fast.functional.{name}`."
    else:
        wrapped = textwrap.fill(
            f"{option.name}: {option.doc}", 106, initial_indent="    ", subsequent_indent="        "
        )
        function.__doc__ = (
            f"{title} {estimator.title}.\n\n{inspect.cleandoc(estimator.formula)}\n\nArgs:\n{arguments}\n"
            f"{wrapped}\n\n{returns}"
        )
    published: Callable[..., Any] = function
    return published


def _chosen(estimator: Estimator, name: str, given: dict[str, Any]) -> Any:
    """The option's value."""
    for key in given:
        if key != estimator.option.name:
            raise TypeError(f"{name}() got an unexpected keyword argument {key!r}")
    return given.get(estimator.option.name, estimator.option.default)


def _result(run: Run, call: Call, unbatched: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """What a function returns."""
    output, kl = run(call)
    output = output.squeeze(0) if unbatched else output
    return output if kl is None else (output, kl)


def _linear(estimator: Estimator, run: Run, module: str) -> Callable[..., Any]:
    name = f"{estimator.name}_linear"

    def function(
        input: Tensor,
        W_mu: Tensor,
        W_rho: Tensor,
        bias_mu: Tensor | None,
        bias_rho: Tensor | None,
        rng: Tensor,
        *,
        prior_mu: float = 0.0,
        prior_sigma: float = 0.1,
        with_kl: bool = False,
        **option: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        operands = (input, W_mu, W_rho, bias_mu, bias_rho, rng)
        chosen = _chosen(estimator, name, option)
        return _result(
            run, Call(name, estimator.name, operands, None, prior_mu, prior_sigma, with_kl, chosen)
        )

    arguments = (
        "    input: [..., in_features]; any number of batch dimensions, possibly empty.\n"
        "    W_mu, W_rho: [out_features, in_features], of input's dtype, or float32 under a narrower input.\n"
        + _ARGUMENTS.format(out="out_features", geometry="")
    )
    returns = (
        "Returns [..., out_features] in input's dtype, or that and the scalar KL; product(x, W) is x W^T."
    )
    return _published(function, estimator, module, name, "A linear layer", arguments, returns)


def _tuple(value: int | Sequence[int], length: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, Iterable) else (value,) * length


def explicit_padding(
    name: str,
    input: Tensor,
    weight: Tensor,
    stride: tuple[int, ...],
    padding: int | Sequence[int] | str,
    dilation: tuple[int, ...],
) -> tuple[Tensor, tuple[int, ...]]:
    """Turns ``padding`` into numbers; an uneven "same" pads the input as torch.nn.functional does."""
    spatial = len(stride)
    if not isinstance(padding, str):
        return input, _tuple(padding, spatial)
    if padding == "valid":
        return input, (0,) * spatial
    if padding != "same":
        raise ValueError(f"{name}: padding must be numbers, 'same' or 'valid', got {padding!r}")
    if any(s != 1 for s in stride):
        raise ValueError(f"{name}: padding='same' needs stride 1, got {stride}")
    totals = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    extra = []
    for total in reversed(totals):
        extra += [0, total % 2]
    return (F.pad(input, extra) if any(extra) else input), tuple(t // 2 for t in totals)


def _batched(name: str, spatial: int, input: Tensor, W_mu: Tensor) -> Tensor:
    """``input`` with its batch dimension."""
    if W_mu.dim() != spatial + 2:
        raise ValueError(f"{name}: W_mu must have {spatial + 2} dimensions, got {list(W_mu.shape)}")
    if input.dim() not in (spatial + 1, spatial + 2):
        raise ValueError(
            f"{name}: input must have {spatial + 1} (unbatched) or {spatial + 2} dimensions, got "
            f"{list(input.shape)}"
        )
    return input.unsqueeze(0) if input.dim() == spatial + 1 else input


def _conv(estimator: Estimator, spatial: int, run: Run, module: str) -> Callable[..., Any]:
    name = f"{estimator.name}_conv{spatial}d"

    def function(
        input: Tensor,
        W_mu: Tensor,
        W_rho: Tensor,
        bias_mu: Tensor | None,
        bias_rho: Tensor | None,
        rng: Tensor,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        *,
        prior_mu: float = 0.0,
        prior_sigma: float = 0.1,
        with_kl: bool = False,
        **option: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        x = _batched(name, spatial, input, W_mu)
        strides, dilations = _tuple(stride, spatial), _tuple(dilation, spatial)
        x, pads = explicit_padding(name, x, W_mu, strides, padding, dilations)
        geometry = Geometry(strides, pads, dilations, False, (0,) * spatial, groups)
        operands = (x, W_mu, W_rho, bias_mu, bias_rho, rng)
        chosen = _chosen(estimator, name, option)
        call = Call(name, estimator.name, operands, geometry, prior_mu, prior_sigma, with_kl, chosen)
        return _result(run, call, unbatched=input.dim() == spatial + 1)

    shape, kernel = _SIZES[spatial]
    arguments = (
        f"    input: [N, in_channels, {shape}], or without N, of any memory format.\n"
        f"    W_mu, W_rho: [out_channels, in_channels / groups, {kernel}], of input's dtype, or float32\n"
        "        under a narrower input.\n"
        + _ARGUMENTS.format(
            out="out_channels",
            geometry="stride, padding, dilation, groups: as in "
            f"``torch.nn.functional.conv{spatial}d``.\n    ",
        )
    )
    returns = _RETURNS.format(f"conv{spatial}d")
    return _published(function, estimator, module, name, f"A {spatial}-d convolution", arguments, returns)


def _conv_transpose(estimator: Estimator, spatial: int, run: Run, module: str) -> Callable[..., Any]:
    name = f"{estimator.name}_conv_transpose{spatial}d"

    def function(
        input: Tensor,
        W_mu: Tensor,
        W_rho: Tensor,
        bias_mu: Tensor | None,
        bias_rho: Tensor | None,
        rng: Tensor,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        output_padding: int | Sequence[int] = 0,
        groups: int = 1,
        dilation: int | Sequence[int] = 1,
        *,
        prior_mu: float = 0.0,
        prior_sigma: float = 0.1,
        with_kl: bool = False,
        **option: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        x = _batched(name, spatial, input, W_mu)
        numbers = [_tuple(n, spatial) for n in (stride, padding, dilation, output_padding)]
        geometry = Geometry(numbers[0], numbers[1], numbers[2], True, numbers[3], groups)
        operands = (x, W_mu, W_rho, bias_mu, bias_rho, rng)
        chosen = _chosen(estimator, name, option)
        call = Call(name, estimator.name, operands, geometry, prior_mu, prior_sigma, with_kl, chosen)
        return _result(run, call, unbatched=input.dim() == spatial + 1)

    shape, kernel = _SIZES[spatial]
    arguments = (
        f"    input: [N, in_channels, {shape}], or without N, of any memory format.\n"
        f"    W_mu, W_rho: [in_channels, out_channels / groups, {kernel}], of input's dtype, or float32\n"
        "        under a narrower input.\n"
        + _ARGUMENTS.format(
            out="out_channels",
            geometry="stride, padding, output_padding, groups, dilation: as in\n"
            f"        ``torch.nn.functional.conv_transpose{spatial}d``.\n    ",
        )
    )
    returns = _RETURNS.format(f"conv_transpose{spatial}d")
    title = f"A transposed {spatial}-d convolution"
    return _published(function, estimator, module, name, title, arguments, returns)


# Of images, and of kernels.
_SIZES = {1: ("L", "K"), 2: ("H, W", "kH, kW"), 3: ("D, H, W", "kD, kH, kW")}


def family(estimator: str, run: Run, module: str) -> Iterator[Callable[..., Any]]:
    """An estimator's functions: linear, conv1d to conv3d, conv_transpose1d to conv_transpose3d."""
    described = ESTIMATORS[estimator]
    yield _linear(described, run, module)
    for shape in (_conv, _conv_transpose):
        for spatial in _SIZES:
            yield shape(described, spatial, run, module)
