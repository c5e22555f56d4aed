"""The ops, typed and documented. Each runs on the native kernels or on its reference twin.

Every random op takes ``rng``, an int64 tensor [seed, stream] on the device of the other tensors
(:func:`draw_rng` makes a fresh one). The same ``rng`` gives the same noise on every device and backend;
see docs/noise.md. sigma = softplus(rho) = ln(1 + e^rho) throughout.

dtypes: float32, float64, bfloat16, float16. The elementwise mathematics runs in float32 (float64 for
float64). Wrong dtypes raise TypeError, wrong shapes, devices and values ValueError; the message names the
argument, what it was and what is allowed.

NaN in an argument gives NaN in whatever that argument has a part in, on every path; rho may be anything. Of
other numbers, x^2, sigma^2, 1 / prior_sigma^2 and their products with incoming gradients have to be in the
range of the type the mathematics runs in; beyond it results are infinite or NaN. Where an operand of a
product is infinite or NaN, how far that spreads is the library's affair.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _autocast, _checks, reference, routes
from ._backend import use_native
from ._layer_functions import Call, family
from ._noise import draw_rng
from ._sharded import is_sharded, kl_of_shards, refuse_sharded

__all__ = [
    "bbb_conv1d",
    "bbb_conv2d",
    "bbb_conv3d",
    "bbb_conv_transpose1d",
    "bbb_conv_transpose2d",
    "bbb_conv_transpose3d",
    "bbb_linear",
    "draw_rng",
    "dropout",
    "flipout_conv1d",
    "flipout_conv2d",
    "flipout_conv3d",
    "flipout_conv_transpose1d",
    "flipout_conv_transpose2d",
    "flipout_conv_transpose3d",
    "flipout_linear",
    "kl_divergence",
    "lrt_conv1d",
    "lrt_conv2d",
    "lrt_conv3d",
    "lrt_conv_transpose1d",
    "lrt_conv_transpose2d",
    "lrt_conv_transpose3d",
    "lrt_linear",
    "normal",
    "sample_weight",
    "sample_weights",
    "uniform",
]

_native = torch.ops.bbb_fast


def normal(size: Sequence[int] | int, rng: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal noise of shape ``size`` on ``rng``'s device: the noise every op here uses.

    Philox4x32-10 (Salmon et al. 2011) keyed by the seed, counting (index // 4, stream), and Box-Muller
    in float32, then cast to ``dtype``. ``rng`` is int64 [2]: seed, stream. Not differentiable.
    """
    size = tuple(size) if isinstance(size, Iterable) else (size,)
    if use_native(rng.device):
        return _native.normal(size, rng, dtype)
    _checks.noise("normal", size, rng, dtype)
    return reference.normal(size, rng, dtype=dtype)


def uniform(size: Sequence[int] | int, rng: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform noise of shape ``size`` on ``rng``'s device, in the open interval (0, 1).

    u = (k + 1/2) / 2^b, k the upper b bits of the element's 32-bit word of Philox4x32-10, numbered as
    :func:`normal` numbers them; b is 23 in float32 and float64, 10 in float16, 7 in bfloat16. So u and 1 - u
    are exact in the type, never 0 or 1, and the same bits on every device. ``rng`` is int64 [2]; ``dtype`` is
    the result's. Not differentiable.
    """
    size = tuple(size) if isinstance(size, Iterable) else (size,)
    if use_native(rng.device):
        return _native.uniform(size, rng, dtype)
    _checks.noise("uniform", size, rng, dtype)
    return reference.uniform(size, rng, dtype=dtype)


def dropout(
    input: Tensor, rng: Tensor, p: float = 0.5, *, channels: bool = False, one_mask: bool = False
) -> Tensor:
    """input * mask / (1 - p): each element of the mask is 0 with probability ``p``, else 1.

    Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting", JMLR 2014. Element
    i is kept where its 32-bit word of Philox4x32-10, numbered as :func:`normal` numbers them, is at least
    round(p 2^32): the same elements on every device, in every dtype and memory format, and those of a smaller
    ``p`` among them. The gradient is the incoming one under the same mask.

    Args:
        input: [N, ...] of any shape; with ``channels``, [N, C, ...].
        rng: int64 [2].
        p: in [0, 1]; 1 gives zeros.
        channels: one mask element for each row and channel (dimensions 0 and 1), instead of each element.
        one_mask: all rows (dimension 0) share the first row's mask, so that one ``rng`` is one function of a
            row, whatever the batch. An input of one dimension is one row.

    Returns a tensor like input. Raises TypeError for a dtype that is not floating, ValueError for ``p``
    outside [0, 1] and, with ``channels``, for fewer than two dimensions.
    """
    refuse_sharded("dropout", input=input)
    if use_native(input.device):
        return _native.dropout(input, rng, p, channels, one_mask)
    _checks.dropout("dropout", input, rng, p, channels)
    return reference.dropout(input, rng, p, channels=channels, one_mask=one_mask)


def sample_weights(
    mu: Sequence[Tensor],
    rho: Sequence[Tensor],
    rng: Tensor,
    prior_mu: float = 0.0,
    prior_sigma: float = 0.1,
    with_kl: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Draws w = mu + sigma * eps for a list of tensors (a layer's weight and bias) in one call.

    Tensor k takes stream ``rng[1] + k``; eps is numbered row-major in each. With ``with_kl`` the same
    pass also forms KL(q || p), summed over all the tensors, against the prior
    N(prior_mu, prior_sigma^2) (see :func:`kl_divergence`); without, the second result is 0.

    Blundell et al., "Weight uncertainty in neural networks", ICML 2015, section 3.2.

    Returns the weights, shaped like ``mu``, in ``dtype`` (default: mu's), and the scalar KL in float32
    (float64 for float64). ``rng`` is int64 [2]; [S, 2] names S draws, which take one pass over mu and rho
    (on the CPU) and have a dimension before the others: [S, ...]. Differentiable in mu and rho through both
    results.
    """
    mu, rho = list(mu), list(rho)
    refuse_sharded("sample_weights", mu=mu[0] if mu else None)
    if mu and use_native(mu[0].device):
        return _native.sample_weights(mu, rho, rng, prior_mu, prior_sigma, with_kl, dtype)
    device = _checks.posteriors("sample_weights", mu, rho)
    _checks.rng("sample_weights", rng, device, draws=True)
    _checks.prior("sample_weights", prior_mu, prior_sigma)
    _checks.optional_dtype("sample_weights", "dtype", dtype)
    return reference.sample_weights(mu, rho, rng, prior_mu, prior_sigma, with_kl, dtype)


def sample_weight(
    mu: Tensor,
    rho: Tensor,
    rng: Tensor,
    prior_mu: float = 0.0,
    prior_sigma: float = 0.1,
    with_kl: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`sample_weights` of one tensor: returns w, or (w, kl) with ``with_kl=True``."""
    weights, kl = sample_weights([mu], [rho], rng, prior_mu, prior_sigma, with_kl, dtype)
    return (weights[0], kl) if with_kl else weights[0]


def kl_divergence(
    mu: Tensor | Sequence[Tensor],
    rho: Tensor | Sequence[Tensor],
    prior_mu: float | Tensor | Sequence[float | Tensor] = 0.0,
    prior_sigma: float | Tensor | Sequence[float | Tensor] = 0.1,
) -> Tensor:
    """KL(q || p) of q = N(mu, sigma^2) from p = N(prior_mu, prior_sigma^2), summed over all weights.

    1/2 * sum(2 ln(sigma_p / sigma) - 1 + (sigma / sigma_p)^2 + ((mu - mu_p) / sigma_p)^2), the
    closed form for Gaussians (Kingma and Welling, "Auto-encoding variational Bayes", appendix B, for a
    general prior). Accepts one tensor or a list, the priors as one for all or as a list of the same length;
    a list is summed in one call. A prior is a number or a tensor, a scalar or of mu's shape; where that wants
    a gradient it gets one, and PyTorch's ops form the KL. Accumulated in float64.

    Of parameters that are sharded over ranks (DTensors), it is the KL of the whole, on every rank; all ranks
    call it, and the priors are numbers (NotImplementedError otherwise).

    Returns a scalar, float32 (float64 for float64), differentiable in mu and rho.
    """
    mus, rhos, prior_mus, prior_sigmas = reference.as_lists(mu, rho, prior_mu, prior_sigma)
    by_tensors = [
        isinstance(m, Tensor) or isinstance(s, Tensor) for m, s in zip(prior_mus, prior_sigmas, strict=False)
    ]
    if any(is_sharded(t) for t in (*mus, *rhos)):
        if any(by_tensors):
            raise NotImplementedError("kl_divergence: of DTensors the priors must be numbers")
        return kl_of_shards(kl_divergence, mus, rhos, prior_mus, prior_sigmas)
    if mus and use_native(mus[0].device) and not any(by_tensors):
        return _native.kl_divergence(mus, rhos, prior_mus, prior_sigmas)
    _checks.posteriors("kl_divergence", mus, rhos)
    _checks.priors("kl_divergence", mus, prior_mus, prior_sigmas)
    if all(by_tensors) and use_native(mus[0].device) and not _want_gradients(prior_mus, prior_sigmas):
        return _kl_of_tensor_priors(mus, rhos, prior_mus, prior_sigmas)
    if all(by_tensors) or not any(by_tensors):
        return reference.kl_divergence(mus, rhos, prior_mus, prior_sigmas)
    groups: tuple[list[Any], list[Any]] = ([], [])
    for by_tensor, each in zip(by_tensors, zip(mus, rhos, prior_mus, prior_sigmas, strict=True), strict=True):
        groups[by_tensor].append(each)
    numbers, tensors = (kl_divergence(*map(list, zip(*group, strict=True))) for group in groups)
    return numbers + tensors


def _want_gradients(*priors: Sequence[float | Tensor]) -> bool:
    return any(isinstance(p, Tensor) and p.requires_grad for each in priors for p in each)


def _kl_of_tensor_priors(
    mus: Sequence[Tensor],
    rhos: Sequence[Tensor],
    prior_mus: Sequence[float | Tensor],
    prior_sigmas: Sequence[float | Tensor],
) -> Tensor:
    parts = []
    for mu, rho, *prior in zip(mus, rhos, prior_mus, prior_sigmas, strict=True):
        tensors = (
            p if isinstance(p, Tensor) else torch.full((), p, dtype=torch.float64, device=mu.device)
            for p in prior
        )
        parts.append(_native.kl_tensor_prior(mu, rho, *tensors))
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum()


def _run(call: Call) -> tuple[Tensor, Tensor | None]:
    """A layer's function, on the native kernels or the reference path."""
    input, W_mu, *others = call.operands
    refuse_sharded(call.name, input=input, W_mu=W_mu)
    input = _autocast.narrowed(input)
    operands = (input, W_mu, *others)
    option = call.option
    if call.estimator == "lrt" and option == "auto":
        option = routes.variance_dtype("auto", W_mu, input)
    geometry = call.geometry or ()
    if use_native(input.device):
        op = getattr(_native, call.op)
        output, _, kl = op(*operands, *geometry, call.prior_mu, call.prior_sigma, call.with_kl, option)
        return output, kl if call.with_kl else None
    if call.geometry is None:
        _checks.linear(call.op, input, W_mu)
    else:
        _checks.conv(call.op, input, W_mu, *geometry)
    transposed = call.geometry is not None and call.geometry.transposed
    out_features = W_mu.shape[1] * call.geometry.groups if transposed else W_mu.shape[0]
    _checks.layer(call.op, *operands, out_features, call.prior_mu, call.prior_sigma)
    if call.estimator == "lrt":
        _checks.optional_dtype(call.op, "variance_dtype", option)
    call = call._replace(operands=operands, option=option)
    if not _autocast.enabled(input.device):
        return reference.run(call)
    # Its products have the types of their operands under autocast too.
    with torch.autocast(input.device.type, enabled=False):
        return reference.run(call)


(
    bbb_linear,
    bbb_conv1d,
    bbb_conv2d,
    bbb_conv3d,
    bbb_conv_transpose1d,
    bbb_conv_transpose2d,
    bbb_conv_transpose3d,
) = family("bbb", _run, __name__)
(
    lrt_linear,
    lrt_conv1d,
    lrt_conv2d,
    lrt_conv3d,
    lrt_conv_transpose1d,
    lrt_conv_transpose2d,
    lrt_conv_transpose3d,
) = family("lrt", _run, __name__)
(
    flipout_linear,
    flipout_conv1d,
    flipout_conv2d,
    flipout_conv3d,
    flipout_conv_transpose1d,
    flipout_conv_transpose2d,
    flipout_conv_transpose3d,
) = family("flipout", _run, __name__)
