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
import torch.nn.functional as F
from torch import Tensor

from . import _checks, reference, routes
from ._backend import use_native
from ._noise import draw_rng
from ._sharded import is_sharded, kl_of_shards, refuse_sharded
from .routes import VarianceDtype

__all__ = [
    "bbb_conv1d",
    "bbb_conv2d",
    "bbb_conv3d",
    "bbb_linear",
    "draw_rng",
    "kl_divergence",
    "lrt_conv1d",
    "lrt_conv2d",
    "lrt_conv3d",
    "lrt_linear",
    "normal",
    "sample_weight",
    "sample_weights",
]

_native = torch.ops.bbb_fast
# Asked once, here: torch.compile of some releases cannot trace the question.
_AUTOCAST_DEVICES = frozenset(k for k in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(k))


def normal(size: Sequence[int] | int, rng: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal noise of shape ``size`` on ``rng``'s device: the noise every op here uses.

    Philox4x32-10 (Salmon et al. 2011) keyed by the seed, counting (index // 4, stream), and Box-Muller
    in float32, then cast to ``dtype``. Not differentiable.
    """
    size = tuple(size) if isinstance(size, Iterable) else (size,)
    if use_native(rng.device):
        return _native.normal(size, rng, dtype)
    _checks.optional_dtype("normal", "dtype", dtype)
    _checks.rng("normal", rng, rng.device)
    if any(length < 0 for length in size):
        raise ValueError(f"normal: size must be >= 0, got {list(size)}")
    return reference.normal(size, rng, dtype=dtype)


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
    (float64 for float64). Differentiable in mu and rho through both results.
    """
    mu, rho = list(mu), list(rho)
    refuse_sharded("sample_weights", mu=mu[0] if mu else None)
    if mu and use_native(mu[0].device):
        return _native.sample_weights(mu, rho, rng, prior_mu, prior_sigma, with_kl, dtype)
    device = _checks.posteriors("sample_weights", mu, rho)
    _checks.rng("sample_weights", rng, device)
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
    prior_mu: float | Sequence[float] = 0.0,
    prior_sigma: float | Sequence[float] = 0.1,
) -> Tensor:
    """KL(q || p) of q = N(mu, sigma^2) from p = N(prior_mu, prior_sigma^2), summed over all weights.

    1/2 * sum(2 ln(sigma_p / sigma) - 1 + (sigma / sigma_p)^2 + ((mu - mu_p) / sigma_p)^2), the
    closed form for Gaussians (Kingma and Welling, "Auto-encoding variational Bayes", appendix B, for a
    general prior). Accepts one tensor or a list, the priors as one number or a list of the same length;
    a list is summed in one call. Accumulated in float64.

    Of parameters that are sharded over ranks (DTensors), it is the KL of the whole, on every rank; all ranks
    call it.

    Returns a scalar, float32 (float64 for float64), differentiable in mu and rho.
    """
    mus = [mu] if isinstance(mu, Tensor) else list(mu)
    rhos = [rho] if isinstance(rho, Tensor) else list(rho)
    count = len(mus)
    prior_mus = list(prior_mu) if isinstance(prior_mu, Sequence) else [float(prior_mu)] * count
    prior_sigmas = list(prior_sigma) if isinstance(prior_sigma, Sequence) else [float(prior_sigma)] * count
    if any(is_sharded(t) for t in (*mus, *rhos)):
        return kl_of_shards(kl_divergence, mus, rhos, prior_mus, prior_sigmas)
    if mus and use_native(mus[0].device):
        return _native.kl_divergence(mus, rhos, prior_mus, prior_sigmas)
    _checks.posteriors("kl_divergence", mus, rhos)
    _checks.priors("kl_divergence", count, prior_mus, prior_sigmas)
    return reference.kl_divergence(mus, rhos, prior_mus, prior_sigmas)


def _autocast(input: Tensor) -> Tensor:
    """Under autocast the products run in its dtype; the parameters stay as they are."""
    kind = input.device.type
    if kind not in _AUTOCAST_DEVICES:
        return input
    if torch.is_autocast_enabled(kind) and input.dtype != torch.float64:
        return input.to(torch.get_autocast_dtype(kind))
    return input


def _twin(op: str, input: Tensor, *arguments: Any, **options: Any) -> Any:
    """An op of the reference path, whose products have the types of their operands under autocast too."""
    twin = getattr(reference, op)
    kind = input.device.type
    if kind not in _AUTOCAST_DEVICES or not torch.is_autocast_enabled(kind):
        return twin(input, *arguments, **options)
    with torch.autocast(kind, enabled=False):
        return twin(input, *arguments, **options)


def _decided(option: dict[str, Any], W_mu: Tensor, input: Tensor) -> dict[str, Any]:
    """An estimator's option, with a type of the variance product for "auto"."""
    if option.get("variance_dtype") != "auto":
        return option
    return {"variance_dtype": routes.variance_dtype("auto", W_mu, input)}


def _linear(
    op: str,
    input: Tensor,
    W_mu: Tensor,
    W_rho: Tensor,
    bias_mu: Tensor | None,
    bias_rho: Tensor | None,
    rng: Tensor,
    prior_mu: float,
    prior_sigma: float,
    with_kl: bool,
    **option: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    refuse_sharded(op, input=input, W_mu=W_mu)
    input = _autocast(input)
    option = _decided(option, W_mu, input)
    operands = (input, W_mu, W_rho, bias_mu, bias_rho, rng)
    if use_native(input.device):
        native = getattr(_native, op)
        output, _, kl = native(*operands, prior_mu, prior_sigma, with_kl, *option.values())
        return (output, kl) if with_kl else output
    _checks.linear(op, input, W_mu)
    _checks.layer(op, *operands, W_mu.shape[0], prior_mu, prior_sigma)
    _checks.optional_dtype(op, "variance_dtype", option.get("variance_dtype"))
    return _twin(op, *operands, prior_mu=prior_mu, prior_sigma=prior_sigma, with_kl=with_kl, **option)


def bbb_linear(
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
    recompute_weight: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """A linear layer with weights drawn from the posterior, one draw for the whole batch.

    y = x W^T + b with W and b from :func:`sample_weights` (W takes stream ``rng[1]``, b the next). Blundell
    et al., "Weight uncertainty in neural networks", ICML 2015, section 3.2.

    Args:
        input: [..., in_features]; any number of batch dimensions, possibly empty.
        W_mu, W_rho: [out_features, in_features], of input's dtype, or float32 under a narrower input.
        bias_mu, bias_rho: [out_features], or both None.
        prior_mu, prior_sigma: the prior N(prior_mu, prior_sigma^2) of the KL.
        with_kl: also return KL(q || p), formed in the same pass over the parameters, its gradient with
            the output's in one pass too.
        recompute_weight: keep nothing but ``rng`` for backward, which draws W again; else W is kept.

    Returns [..., out_features] in input's dtype, or that and the scalar KL.
    """
    return _linear(
        "bbb_linear",
        input,
        W_mu,
        W_rho,
        bias_mu,
        bias_rho,
        rng,
        prior_mu,
        prior_sigma,
        with_kl,
        recompute_weight=recompute_weight,
    )


def lrt_linear(
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
    variance_dtype: VarianceDtype = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """A Gaussian linear layer under the local reparameterization trick.

    m = x W_mu^T + b_mu, v = x^2 (sigma_W^2)^T + sigma_b^2, y = m + sqrt(v) * eps with one eps per output
    element, numbered row-major. Kingma, Salimans and Welling, "Variational dropout and the local
    reparameterization trick", NeurIPS 2015, eq. 6.

    Args:
        input: [..., in_features]; any number of batch dimensions, possibly empty.
        W_mu, W_rho: [out_features, in_features], of input's dtype, or float32 under a narrower input.
        bias_mu, bias_rho: [out_features], or both None.
        prior_mu, prior_sigma, with_kl: as in :func:`bbb_linear`.
        variance_dtype: type of the variance product's operands and result; default input's (float32 for
            float16). "auto": bfloat16 where that is faster (:mod:`bbb_fast.routes`), else the default. A CPU
            without bfloat16 instructions multiplies numbers rounded to bfloat16 in float32: no faster than
            float32 then, and the same numbers.

    Returns [..., out_features] in input's dtype, or that and the scalar KL. Where v = 0 the noise and its
    gradient are 0.
    """
    return _linear(
        "lrt_linear",
        input,
        W_mu,
        W_rho,
        bias_mu,
        bias_rho,
        rng,
        prior_mu,
        prior_sigma,
        with_kl,
        variance_dtype=variance_dtype,
    )


def _tuple(value: int | Sequence[int], length: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, Iterable) else (value,) * length


def _explicit_padding(
    op: str,
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
        raise ValueError(f"{op}: padding must be numbers, 'same' or 'valid', got {padding!r}")
    if any(s != 1 for s in stride):
        raise ValueError(f"{op}: padding='same' needs stride 1, got {stride}")
    totals = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    extra = []
    for total in reversed(totals):
        extra += [0, total % 2]
    return (F.pad(input, extra) if any(extra) else input), tuple(t // 2 for t in totals)


def _conv(
    estimator: str,
    spatial: int,
    input: Tensor,
    W_mu: Tensor,
    W_rho: Tensor,
    bias_mu: Tensor | None,
    bias_rho: Tensor | None,
    rng: Tensor,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int,
    prior_mu: float,
    prior_sigma: float,
    with_kl: bool,
    **option: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    name, op = f"{estimator}_conv{spatial}d", f"{estimator}_conv"
    if W_mu.dim() != spatial + 2:
        raise ValueError(f"{name}: W_mu must have {spatial + 2} dimensions, got {list(W_mu.shape)}")
    if input.dim() not in (spatial + 1, spatial + 2):
        raise ValueError(
            f"{name}: input must have {spatial + 1} (unbatched) or {spatial + 2} dimensions, got "
            f"{list(input.shape)}"
        )
    refuse_sharded(name, input=input, W_mu=W_mu)
    input = _autocast(input)
    option = _decided(option, W_mu, input)
    unbatched = input.dim() == spatial + 1
    if unbatched:
        input = input.unsqueeze(0)
    strides, dilations = _tuple(stride, spatial), _tuple(dilation, spatial)
    input, pads = _explicit_padding(name, input, W_mu, strides, padding, dilations)
    geometry = (strides, pads, dilations, False, (0,) * spatial, groups)
    operands = (input, W_mu, W_rho, bias_mu, bias_rho, rng)
    if use_native(input.device):
        native = getattr(_native, op)
        output, _, kl = native(*operands, *geometry, prior_mu, prior_sigma, with_kl, *option.values())
    else:
        _checks.conv(op, input, W_mu, *geometry)
        _checks.layer(op, *operands, W_mu.shape[0], prior_mu, prior_sigma)
        _checks.optional_dtype(op, "variance_dtype", option.get("variance_dtype"))
        result = _twin(
            op, *operands, *geometry, prior_mu=prior_mu, prior_sigma=prior_sigma, with_kl=with_kl, **option
        )
        output, kl = result if with_kl else (result, None)
    if unbatched:
        output = output.squeeze(0)
    return (output, kl) if with_kl else output


def bbb_conv1d(
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
    recompute_weight: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """1-d convolution with drawn weights; see :func:`bbb_conv2d`."""
    return _conv(
        "bbb",
        1,
        input,
        W_mu,
        W_rho,
        bias_mu,
        bias_rho,
        rng,
        stride,
        padding,
        dilation,
        groups,
        prior_mu,
        prior_sigma,
        with_kl,
        recompute_weight=recompute_weight,
    )


def bbb_conv2d(
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
    recompute_weight: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """A convolution with weights drawn from the posterior, one draw for the whole batch.

    W and b come from :func:`sample_weights` (W takes stream ``rng[1]``, b the next). Shridhar, Laumann and
    Liwicki, "A comprehensive guide to Bayesian convolutional neural network with variational inference",
    2019, for Blundell et al.'s estimator over convolutions.

    Args:
        input: [N, C_in, H, W] or unbatched [C_in, H, W].
        W_mu, W_rho: [C_out, C_in / groups, kH, kW], of input's dtype, or float32 under a narrower input.
        bias_mu, bias_rho: [C_out], or both None.
        stride, padding, dilation, groups: as in torch.nn.functional.conv2d.
        prior_mu, prior_sigma, with_kl, recompute_weight: as in :func:`bbb_linear`.

    Returns the output of torch.nn.functional.conv2d's shape and memory format, in input's dtype, or that and
    the scalar KL.
    """
    return _conv(
        "bbb",
        2,
        input,
        W_mu,
        W_rho,
        bias_mu,
        bias_rho,
        rng,
        stride,
        padding,
        dilation,
        groups,
        prior_mu,
        prior_sigma,
        with_kl,
        recompute_weight=recompute_weight,
    )


def bbb_conv3d(
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
    recompute_weight: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """3-d convolution with drawn weights; see :func:`bbb_conv2d`."""
    return _conv(
        "bbb",
        3,
        input,
        W_mu,
        W_rho,
        bias_mu,
        bias_rho,
        rng,
        stride,
        padding,
        dilation,
        groups,
        prior_mu,
        prior_sigma,
        with_kl,
        recompute_weight=recompute_weight,
    )


def lrt_conv1d(
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
    variance_dtype: VarianceDtype = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """1-d convolution under local reparameterization; see :func:`lrt_conv2d`."""
    return _conv(
        "lrt",
        1,
        input,
        W_mu,
        W_rho,
        bias_mu,
        bias_rho,
        rng,
        stride,
        padding,
        dilation,
        groups,
        prior_mu,
        prior_sigma,
        with_kl,
        variance_dtype=variance_dtype,
    )


def lrt_conv2d(
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
    variance_dtype: VarianceDtype = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """A Gaussian convolution under the local reparameterization trick.

    m = conv(x, W_mu) + b_mu, v = conv(x^2, sigma_W^2) + sigma_b^2, y = m + sqrt(v) * eps, one eps per
    output element: as in Molchanov, Ashukha and Vetrov, "Variational dropout sparsifies deep neural
    networks", ICML 2017, section 4.3, with Gaussian weights. eps is numbered in the output's memory order
    (channels_last if the input or W_mu is, else row-major).

    Args:
        input: [N, C_in, H, W] or unbatched [C_in, H, W].
        W_mu, W_rho: [C_out, C_in / groups, kH, kW], of input's dtype, or float32 under a narrower input.
        bias_mu, bias_rho: [C_out], or both None.
        stride, padding, dilation, groups: as in torch.nn.functional.conv2d.
        prior_mu, prior_sigma, with_kl: as in :func:`bbb_linear`.
        variance_dtype: as in :func:`lrt_linear`.

    Returns the output of torch.nn.functional.conv2d's shape, in input's dtype, or that and the scalar KL.
    """
    return _conv(
        "lrt",
        2,
        input,
        W_mu,
        W_rho,
        bias_mu,
        bias_rho,
        rng,
        stride,
        padding,
        dilation,
        groups,
        prior_mu,
        prior_sigma,
        with_kl,
        variance_dtype=variance_dtype,
    )


def lrt_conv3d(
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
    variance_dtype: VarianceDtype = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """3-d convolution under local reparameterization; see :func:`lrt_conv2d`."""
    return _conv(
        "lrt",
        3,
        input,
        W_mu,
        W_rho,
        bias_mu,
        bias_rho,
        rng,
        stride,
        padding,
        dilation,
        groups,
        prior_mu,
        prior_sigma,
        with_kl,
        variance_dtype=variance_dtype,
    )
