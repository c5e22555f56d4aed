"""Argument checks of the reference path.

The native ops check the same things in csrc/checks.h, in the same words; python_tests/test_errors.py
holds the two against each other.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def integer(value: Any) -> int | None:
    """``value`` as an int where it is one of any kind (NumPy's too), or None; a bool is not."""
    if isinstance(value, (bool, np.bool_)) or (isinstance(value, Tensor) and value.dtype == torch.bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def number(owner: str, name: str, value: Any) -> float:
    """``value`` as a float; TypeError for what is no real number, a bool included."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
        raise TypeError(f"{owner}: {name} must be a number, got {type(value).__name__}")
    return float(value)


def is_lazy(module: nn.Module, recurse: bool = True) -> bool:
    """Whether a parameter waits for the first input to have a shape."""
    return any(isinstance(p, nn.parameter.UninitializedParameter) for p in module.parameters(recurse))


def initialised(function: str, model: nn.Module) -> None:
    """Of a model that a function must not be the first to run."""
    lazy = [f"{n or '(model)'} ({type(m).__name__})" for n, m in model.named_modules() if is_lazy(m, False)]
    if lazy:
        raise RuntimeError(
            f"{function}: the model has layers that are not initialised: {', '.join(lazy)}; run a forward "
            "first"
        )


def factory(name: str, device: Any, dtype: Any) -> None:
    """The two options of whatever makes parameters; None is PyTorch's default."""
    if dtype is None:
        dtype = torch.get_default_dtype()
    if not isinstance(dtype, torch.dtype) or dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{name}: dtype must be torch.float32, float64, bfloat16 or float16, got "
            f"{dtype if isinstance(dtype, torch.dtype) else type(dtype).__name__}"
        )
    if device is not None and not isinstance(device, (str, torch.device)) and integer(device) is None:
        raise TypeError(
            f"{name}: device must be a torch.device, a string or a number, got {type(device).__name__}"
        )


def _shape(t: Tensor) -> str:
    return str(list(t.shape))


def _numbers(values: Sequence[int]) -> list[int]:
    """As the native ops print them: True, which is taken, as the 1 that it stands for."""
    return [int(v) for v in values]


def floating(op: str, name: str, t: Tensor) -> None:
    if t.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{op}: {name} must be float32, float64, bfloat16 or float16, got {t.dtype}")
    strided(op, name, t)


def strided(op: str, name: str, t: Tensor) -> None:
    if t.layout != torch.strided:
        raise TypeError(f"{op}: {name} must be a dense tensor, not a sparse or nested one")


def rng(op: str, rng: Tensor, device: torch.device, draws: bool = False, of_batch: bool = False) -> None:
    """``draws``: whether it may name several, [S, 2]; ``of_batch``: of the whole batch each, [S, 1, 2]."""
    if rng.dtype != torch.int64:
        raise TypeError(f"{op}: rng must be int64 (seed, stream), got {rng.dtype}")
    pairs = rng.dim() > 0 and rng.shape[0] > 0 and rng.shape[-1] == 2
    batch = of_batch and rng.dim() == 3 and rng.shape[1] == 1
    if not pairs or not (rng.dim() == 1 or (draws and rng.dim() == 2) or batch):
        several = ", or [S, 2] or [S, 1, 2] for S draws" if of_batch else ", or [S, 2] for S draws"
        also = several if draws else ""
        raise ValueError(f"{op}: rng must have shape [2] (seed, stream){also}, got {_shape(rng)}")
    strided(op, "rng", rng)
    same_device(op, "rng", rng, device)


def same_device(op: str, name: str, t: Tensor, device: torch.device) -> None:
    if t.device != device:
        raise ValueError(f"{op}: {name} is on {t.device}, expected {device}")


def posterior(op: str, name: str, mu: Tensor, rho: Tensor, device: torch.device) -> None:
    """One tensor's mean and rho."""
    floating(op, f"{name}mu", mu)
    if rho.dtype != mu.dtype:
        raise TypeError(f"{op}: {name}mu and {name}rho must have one dtype, got {mu.dtype} and {rho.dtype}")
    if rho.shape != mu.shape:
        raise ValueError(
            f"{op}: {name}mu and {name}rho must have one shape, got {_shape(mu)} and {_shape(rho)}"
        )
    strided(op, f"{name}rho", rho)
    same_device(op, f"{name}mu", mu, device)
    same_device(op, f"{name}rho", rho, device)


def posteriors(op: str, mu: Sequence[Tensor], rho: Sequence[Tensor]) -> torch.device:
    if len(mu) != len(rho):
        raise ValueError(f"{op}: got {len(mu)} mu tensors and {len(rho)} rho tensors")
    if len(mu) == 0:
        raise ValueError(f"{op}: the list of tensors is empty")
    for m, r in zip(mu, rho, strict=True):
        posterior(op, "", m, r, mu[0].device)
        if m.dtype != mu[0].dtype:
            raise TypeError(f"{op}: all tensors must have one dtype, got {mu[0].dtype} and {m.dtype}")
    return mu[0].device


def prior(op: str, prior_mu: float, prior_sigma: float) -> None:
    if not math.isfinite(prior_mu):
        raise ValueError(f"{op}: prior_mu must be finite, got {prior_mu:g}")
    if not (math.isfinite(prior_sigma) and prior_sigma > 0):
        raise ValueError(f"{op}: prior_sigma must be finite and > 0, got {prior_sigma:g}")


def priors(
    op: str,
    mu: Sequence[Tensor],
    prior_mu: Sequence[float | Tensor],
    prior_sigma: Sequence[float | Tensor],
) -> None:
    """One for each of the tensors: numbers, or tensors that are scalars or have its shape."""
    if len(prior_mu) != len(mu) or len(prior_sigma) != len(mu):
        raise ValueError(
            f"{op}: {len(mu)} tensors need {len(mu)} priors, got {len(prior_mu)} prior_mu and "
            f"{len(prior_sigma)} prior_sigma"
        )
    for like, m, s in zip(mu, prior_mu, prior_sigma, strict=True):
        for name, value in (("prior_mu", m), ("prior_sigma", s)):
            if isinstance(value, Tensor):
                floating(op, name, value)
                same_device(op, name, value, like.device)
                if value.shape not in ((), like.shape):
                    raise ValueError(
                        f"{op}: {name} must be a number or have shape {_shape(like)}, got {_shape(value)}"
                    )
        prior(op, 0.0 if isinstance(m, Tensor) else m, 1.0 if isinstance(s, Tensor) else s)


def given_dtype(op: str, name: str, dtype: torch.dtype) -> None:
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"{op}: {name} must be float32, float64, bfloat16 or float16, got {dtype}")


def optional_dtype(op: str, name: str, dtype: torch.dtype | None) -> None:
    if dtype is not None:
        given_dtype(op, name, dtype)


def noise(op: str, size: Sequence[int], rng_: Tensor, dtype: torch.dtype) -> None:
    """Of the ops that return noise."""
    given_dtype(op, "dtype", dtype)
    rng(op, rng_, rng_.device)
    if any(length < 0 for length in size):
        raise ValueError(f"{op}: size must be >= 0, got {list(size)}")


def probability(op: str, name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{op}: {name} must be in [0, 1], got {value:g}")


def dropout(op: str, input: Tensor, rng_: Tensor, p: float, channels: bool) -> None:
    floating(op, "input", input)
    rng(op, rng_, input.device)
    probability(op, "p", p)
    if channels and input.dim() < 2:
        raise ValueError(f"{op}: with channels, input must have dimensions [N, C, ...], got {_shape(input)}")


def layer(
    op: str,
    input: Tensor,
    W_mu: Tensor,
    W_rho: Tensor,
    bias_mu: Tensor | None,
    bias_rho: Tensor | None,
    rng_: Tensor,
    out_features: int,
    prior_mu: float,
    prior_sigma: float,
) -> None:
    """What the ops of all layers have in common."""
    floating(op, "input", input)
    posterior(op, "W_", W_mu, W_rho, input.device)
    if W_mu.dtype not in (input.dtype, torch.float32) or (
        input.dtype == torch.float64 and W_mu.dtype != torch.float64
    ):
        raise TypeError(
            f"{op}: parameters must be {input.dtype} like the input, or float32 under a narrower "
            f"input, got {W_mu.dtype}"
        )
    if (bias_mu is None) != (bias_rho is None):
        raise ValueError(f"{op}: give both bias_mu and bias_rho, or neither")
    if bias_mu is not None and bias_rho is not None:
        posterior(op, "bias_", bias_mu, bias_rho, input.device)
        if bias_mu.dtype != W_mu.dtype:
            raise TypeError(f"{op}: all parameters must have one dtype, got {W_mu.dtype} and {bias_mu.dtype}")
        if list(bias_mu.shape) != [out_features]:
            raise ValueError(f"{op}: bias_mu must have shape [{out_features}], got {_shape(bias_mu)}")
    rng(op, rng_, input.device, draws=True, of_batch=True)
    if rng_.dim() > 1:
        if input.dim() < 2:
            raise ValueError(
                f"{op}: with several draws, input must have a batch dimension, got {_shape(input)}"
            )
        if rng_.dim() == 2 and input.shape[0] % len(rng_):
            raise ValueError(
                f"{op}: with {len(rng_)} draws, the first dimension of input must be a multiple of that, got "
                f"{_shape(input)}"
            )
    prior(op, prior_mu, prior_sigma)


def linear(op: str, input: Tensor, W_mu: Tensor) -> None:
    if W_mu.dim() != 2:
        raise ValueError(f"{op}: W_mu must be [out_features, in_features], got {_shape(W_mu)}")
    if input.dim() < 1 or input.shape[-1] != W_mu.shape[1]:
        raise ValueError(
            f"{op}: the last dimension of input must be in_features = {W_mu.shape[1]}, got input "
            f"{_shape(input)}"
        )


def conv(
    op: str,
    input: Tensor,
    W_mu: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> None:
    spatial = W_mu.dim() - 2
    if spatial not in (1, 2, 3):
        raise ValueError(f"{op}: W_mu must have 3, 4 or 5 dimensions, got {_shape(W_mu)}")
    if input.dim() != W_mu.dim():
        raise ValueError(f"{op}: input must have {W_mu.dim()} dimensions like W_mu, got {_shape(input)}")
    for name, value, least in (
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("dilation", dilation, 1),
        ("output_padding", output_padding, 0),
    ):
        if len(value) != spatial:
            raise ValueError(f"{op}: {name} must have {spatial} numbers, got {len(value)}")
        if any(v < least for v in value):
            raise ValueError(f"{op}: {name} must be >= {least}, got {_numbers(value)}")
        if any(v >= 1 << 31 for v in value):
            raise ValueError(f"{op}: {name} must be < 2^31, got {_numbers(value)}")
    if groups < 1:
        raise ValueError(f"{op}: groups must be >= 1, got {groups}")
    if groups >= 1 << 31:
        raise ValueError(f"{op}: groups must be < 2^31, got {groups}")
    channels = W_mu.shape[0] if transposed else W_mu.shape[1] * groups
    if input.shape[1] != channels or W_mu.shape[0] % groups != 0:
        raise ValueError(
            f"{op}: input must have {channels} channels for W_mu {_shape(W_mu)} and groups = {groups}, "
            f"got input {_shape(input)}"
        )
    for d in range(spatial):
        reach = dilation[d] * (W_mu.shape[2 + d] - 1) + 1
        padded = input.shape[2 + d] + 2 * padding[d]
        if transposed:
            size = (input.shape[2 + d] - 1) * stride[d] - 2 * padding[d] + reach + output_padding[d]
            if output_padding[d] >= max(stride[d], dilation[d]):
                raise ValueError(
                    f"{op}: output_padding must be smaller than stride or dilation, got "
                    f"{_numbers(output_padding)}"
                )
            if input.shape[2 + d] < 1 or size < 1:
                raise ValueError(
                    f"{op}: the output would have {size} elements in dimension {2 + d}, for input "
                    f"{_shape(input)}"
                )
        elif padded < reach:
            raise ValueError(
                f"{op}: the kernel reaches over {reach} elements, more than the padded input's "
                f"{padded}, in dimension {2 + d} of input {_shape(input)}"
            )
