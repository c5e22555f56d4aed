"""Fake kernels (shapes without numbers, for torch.compile) and vmap rules of the native ops."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from . import _checks
from ._layer_functions import ESTIMATORS
from .reference import accumulate_dtype, channels_last, conv_memory_format, variance_dtype_for

OptionalTensor = Tensor | None


def _noise(op: str) -> Callable[..., Any]:
    def fake(size: Sequence[int], rng: Tensor, dtype: torch.dtype) -> Tensor:
        _checks.given_dtype(op, "dtype", dtype)
        return rng.new_empty(size, dtype=dtype)

    return fake


def _dropout(input: Tensor, rng: Tensor, p: float, channels: bool = False, one_mask: bool = False) -> Tensor:
    _checks.dropout("dropout", input, rng, p, channels)
    return torch.empty_like(input)


def _drop_elements(input: Tensor, rng: Tensor, p: float) -> Tensor:
    return torch.empty_like(input)


def _of_each_draw(t: Tensor, rng: Tensor | None, dtype: torch.dtype | None) -> Tensor:
    """Room for what is formed of ``t``: of each draw that an rng [2], [S, 2] or [S, 1, 2] names."""
    draws = () if rng is None or rng.dim() == 1 else (rng.shape[0],)
    return t.new_empty((*draws, *t.shape), dtype=dtype)


def _contiguous_like(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty_like(t, dtype=dtype, memory_format=torch.contiguous_format)


def _sample_weights(
    mu: list[Tensor],
    rho: list[Tensor],
    rng: Tensor,
    prior_mu: float,
    prior_sigma: float,
    with_kl: bool,
    dtype: torch.dtype | None,
    centered: bool = False,
) -> tuple[list[Tensor], Tensor]:
    weights = [_of_each_draw(m, rng, dtype) for m in mu]
    return weights, mu[0].new_empty((), dtype=accumulate_dtype(*mu))


def _kl_divergence(
    mu: list[Tensor], rho: list[Tensor], prior_mu: list[float], prior_sigma: list[float]
) -> Tensor:
    return mu[0].new_empty((), dtype=accumulate_dtype(*mu))


def _kl_tensor_prior(mu: Tensor, rho: Tensor, prior_mu: Tensor, prior_sigma: Tensor) -> Tensor:
    return mu.new_empty((), dtype=accumulate_dtype(mu))


def _kl_tensor_prior_backward(
    grad: Tensor, mu: Tensor, rho: Tensor, prior_mu: Tensor, prior_sigma: Tensor
) -> list[Tensor]:
    return [_contiguous_like(mu), _contiguous_like(mu)]


def _posterior_backward(
    grad_w: list[OptionalTensor],
    grad_kl: OptionalTensor,
    mu: list[Tensor],
    rho: list[Tensor],
    rng: OptionalTensor,
    prior_mu: list[float],
    prior_sigma: list[float],
) -> tuple[list[Tensor], list[Tensor]]:
    return [_contiguous_like(m) for m in mu], [_contiguous_like(m) for m in mu]


def _posterior_backward_out(
    grad_w: list[OptionalTensor],
    grad_spread: list[OptionalTensor],
    grad_kl: OptionalTensor,
    mu: list[Tensor],
    rho: list[Tensor],
    rng: OptionalTensor,
    prior_mu: list[float],
    prior_sigma: list[float],
    grad_mu: list[Tensor],
    grad_rho: list[Tensor],
    again: torch.dtype | None = None,
) -> Tensor:
    if again is None:
        return mu[0].new_empty(0, dtype=torch.float32)
    return _of_each_draw(mu[0], rng, again)


def _variance(
    mu: list[Tensor],
    rho: list[Tensor],
    prior_mu: float,
    prior_sigma: float,
    with_kl: bool,
    dtype: torch.dtype,
) -> tuple[list[Tensor], Tensor]:
    return [torch.empty_like(r, dtype=dtype) for r in rho], mu[0].new_empty((), dtype=accumulate_dtype(*mu))


def _square(input: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(input, dtype=dtype)


def _square_backward(grad_input: Tensor, input: Tensor, grad: Tensor) -> None:
    return None


def _lrt_sample(m: Tensor, v: Tensor, rng: Tensor) -> None:
    return None


def _lrt_sample_backward(grad: Tensor, v: Tensor, rng: Tensor) -> Tensor:
    return torch.empty_like(v)


def _flip_signs(input: Tensor, rng: Tensor, stream: int, channel_dim: int) -> Tensor:
    last = channels_last(input) if channel_dim == 1 else None
    return torch.empty_like(input, memory_format=last or torch.contiguous_format)


def _add_flipped(base: Tensor, input: Tensor, rng: Tensor, stream: int, channel_dim: int) -> None:
    return None


# ---------------------------------------------------------------- the layers: an estimator over a product


class _Linear:
    """The shapes of a linear product."""

    @staticmethod
    def output(op: str, dtype: torch.dtype, input: Tensor, W_mu: Tensor) -> Tensor:
        _checks.linear(op, input, W_mu)
        return input.new_empty((*input.shape[:-1], W_mu.shape[0]), dtype=dtype)

    @staticmethod
    def grad_input(input: Tensor, W_mu: Tensor) -> Tensor:
        return _contiguous_like(input)


class _Convolution:
    """Those of a convolution."""

    @staticmethod
    def output(op: str, dtype: torch.dtype, input: Tensor, W_mu: Tensor, *geometry: Any) -> Tensor:
        _checks.conv(op, input, W_mu, *geometry)
        stride, padding, dilation, transposed, output_padding, groups = geometry
        shape = [input.shape[0], W_mu.shape[1] * groups if transposed else W_mu.shape[0]]
        for d, length in enumerate(input.shape[2:]):
            reach = dilation[d] * (W_mu.shape[2 + d] - 1) + 1
            if transposed:
                shape.append((length - 1) * stride[d] - 2 * padding[d] + reach + output_padding[d])
            else:
                shape.append((length + 2 * padding[d] - reach) // stride[d] + 1)
        return _in_format(shape, dtype, input, W_mu)

    @staticmethod
    def grad_input(input: Tensor, W_mu: Tensor) -> Tensor:
        return _in_format(input.shape, input.dtype, input, W_mu)


def _in_format(shape: Sequence[int], dtype: torch.dtype, input: Tensor, W_mu: Tensor) -> Tensor:
    """What ``in_format`` of csrc/products.cpp makes of a convolution's output and of its input's gradient."""
    memory_format = conv_memory_format(input, W_mu)
    return torch.empty(shape, dtype=dtype, device=input.device, memory_format=memory_format)


_PRODUCTS: dict[str, type[_Linear] | type[_Convolution]] = {"linear": _Linear, "conv": _Convolution}


def _forward(estimator: str, product: str) -> Callable[..., Any]:
    op, shapes = f"{estimator}_{product}", _PRODUCTS[product]

    def fake(
        input: Tensor,
        W_mu: Tensor,
        W_rho: Tensor,
        bias_mu: OptionalTensor,
        bias_rho: OptionalTensor,
        rng: Tensor,
        *rest: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        *geometry, _, _, _, option = rest
        y = shapes.output(op, input.dtype, input, W_mu, *geometry)
        if estimator == "lrt":
            kept = shapes.output(op, variance_dtype_for(input, option), input, W_mu, *geometry)
        else:
            kept = _of_each_draw(W_mu, rng, input.dtype)
        if rng.dim() == 3:
            # Draws of the whole batch.
            y = torch.cat([y] * len(rng))
        return y, kept, W_mu.new_empty((), dtype=accumulate_dtype(W_mu))

    return fake


def _backward(product: str) -> Callable[..., Any]:
    shapes = _PRODUCTS[product]

    def fake(
        grad: Tensor,
        grad_kl: OptionalTensor,
        input: Tensor,
        W_mu: Tensor,
        W_rho: Tensor,
        bias_mu: OptionalTensor,
        bias_rho: OptionalTensor,
        kept: OptionalTensor,
        rng: Tensor,
        *rest: Any,
    ) -> list[Tensor]:
        # Of parameters contiguous, whatever these are.
        of_parameters = [None if t is None else _contiguous_like(t) for t in (W_mu, W_rho, bias_mu, bias_rho)]
        grads = [shapes.grad_input(input, W_mu), *of_parameters]
        return [g for g, wanted in zip(grads, rest[-1], strict=True) if wanted and g is not None]

    return fake


FAKES: dict[str, Callable[..., Any]] = {
    "normal": _noise("normal"),
    "uniform": _noise("uniform"),
    "dropout": _dropout,
    "drop_elements": _drop_elements,
    "sample_weights": _sample_weights,
    "kl_divergence": _kl_divergence,
    "kl_tensor_prior": _kl_tensor_prior,
    "kl_tensor_prior_backward": _kl_tensor_prior_backward,
    "posterior_backward": _posterior_backward,
    "posterior_backward_out": _posterior_backward_out,
    "variance": _variance,
    "square": _square,
    "square_backward_": _square_backward,
    "lrt_sample_": _lrt_sample,
    "lrt_sample_backward": _lrt_sample_backward,
    "flip_signs": _flip_signs,
    "add_flipped_": _add_flipped,
}
for _estimator in ESTIMATORS:
    for _product in _PRODUCTS:
        FAKES[f"{_estimator}_{_product}"] = _forward(_estimator, _product)
        FAKES[f"{_estimator}_{_product}_backward"] = _backward(_product)


def _slice(value: Any, dim: Any, i: int) -> Any:
    """Slice ``i`` of an argument along its mapped dimensions."""
    if isinstance(value, (list, tuple)) and isinstance(dim, (list, tuple)):
        return [_slice(v, d, i) for v, d in zip(value, dim, strict=True)]
    return value if dim is None else value.select(dim, i)


def _summed(value: Any, dim: Any) -> Any:
    """What stands for a slice where there is none: zeros that autograd connects with the argument."""
    if isinstance(value, (list, tuple)) and isinstance(dim, (list, tuple)):
        return [_summed(v, d) for v, d in zip(value, dim, strict=True)]
    return value if dim is None else value.sum(dim)


def _stack(parts: Sequence[Any]) -> Any:
    """The results of the slices as one; torch.stack keeps the memory order that they have in common."""
    first = parts[0]
    if first is None:
        return None
    if isinstance(first, Tensor):
        return torch.stack(list(parts))
    return type(first)(map(_stack, zip(*parts, strict=True)))


def _vmap_rule(name: str) -> Callable[..., Any]:
    """vmap by a loop over the mapped dimension: each slice may have an ``rng`` of its own."""
    op = getattr(torch.ops.bbb_fast, name).default
    arguments = op._schema.arguments
    written = [a.alias_info is not None and a.alias_info.is_write for a in arguments]

    def run(slices: list[Any]) -> Any:
        if not any(written):
            return op(*slices)
        # What is written to has to be dense, which a slice need not be.
        copies = tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, slices)
        result = op(*copies)
        for part, copy, back in zip(slices, copies, written, strict=False):
            if back:
                tree_map(Tensor.copy_, part, copy)
        return result

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        mapped = list(zip(args, in_dims, strict=True))
        for (_, dim), argument, to in zip(mapped, arguments, written, strict=False):
            if to and any(d is None for d in tree_leaves(dim, is_leaf=lambda d: d is None)):
                raise ValueError(f"{name}: vmap must map {argument.name}, which is written to")
        if info.batch_size == 0:
            result = tree_map(
                lambda t: None if t is None else t[:0], _stack([run([_summed(*a) for a in mapped])])
            )
        else:
            result = _stack([run([_slice(*a, i) for a in mapped]) for i in range(info.batch_size)])
        return result, tree_map(lambda t: None if t is None else 0, result)

    return rule


def _on_one_device(name: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """Checks the device of every tensor first, as a kernel would.

    The dispatcher sends a call with any meta tensor here, whatever the others are: without the check a
    mixed-up call would return tensors without numbers.
    """
    parameters = [a.name for a in getattr(torch.ops.bbb_fast, name).default._schema.arguments]

    @functools.wraps(fake)
    def checked(*args: Any, **options: Any) -> Any:
        named = [*zip(parameters, args, strict=False), *options.items()]
        lists = [[(label, t) for t in v] for label, v in named if isinstance(v, (list, tuple))]
        single = [(label, v) for label, v in named if not isinstance(v, (list, tuple))]
        # The first of each list, then the second: mu, rho, mu, rho, as the reference path goes.
        in_turn = [entry for entries in zip_longest(*lists) for entry in entries if entry is not None]
        tensors = [(label, t) for label, t in (*in_turn, *single) if isinstance(t, Tensor)]
        for label, t in tensors:
            _checks.same_device(name, label, t, tensors[0][1].device)
        return fake(*args, **options)

    return checked


def register() -> None:
    """Called once, when the extension is loaded."""
    for name, fake in FAKES.items():
        torch.library.register_fake(f"bbb_fast::{name}", _on_one_device(name, fake))
        torch.library.register_vmap(f"bbb_fast::{name}", _vmap_rule(name))
