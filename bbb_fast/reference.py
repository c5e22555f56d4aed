"""The pure-PyTorch twin of every native op: same names, same arguments, same numbers.

Nothing here needs a compiler. Each function is ordinary differentiable PyTorch, so its gradients come
from autograd; the native kernels are tested against them element by element, which is possible because
both sides form the same noise from the same ``rng`` (docs/noise.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

_MASK = 0xFFFFFFFF
# Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011: multipliers and Weyl keys of
# Philox4x32.
_PHILOX_M = (0xD2511F53, 0xCD9E8D57)
_PHILOX_W = (0x9E3779B9, 0xBB67AE85)
# Blocks a chunk: small enough that the int64 temporaries stay in cache.
_CHUNK = 1 << 15


def accumulate_dtype(*tensors: Tensor) -> torch.dtype:
    """The type the elementwise mathematics runs in: float64 if any tensor is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def philox4x32(
    counter: Sequence[Tensor], key: Sequence[Tensor], rounds: int = 10
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32 (Salmon et al. 2011) on int64 tensors that hold unsigned 32-bit numbers.

    ``counter``: four broadcastable tensors; ``key``: two. Returns the four output words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # The product wraps modulo 2^64 in int64; shifting arithmetically and masking still gives the
        # exact upper word.
        p0 = c0 * _PHILOX_M[0]
        p1 = c2 * _PHILOX_M[1]
        c0, c2 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, ((p0 >> 32) & _MASK) ^ c3 ^ k1
        c1, c3 = p1 & _MASK, p0 & _MASK
        k0 = (k0 + _PHILOX_W[0]) & _MASK
        k1 = (k1 + _PHILOX_W[1]) & _MASK
    return c0, c1, c2, c3


def _box_muller(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Two standard normals from two 32-bit words (Box and Muller 1958), in float32.

    The radius uses u = (x + 1/2) / 2^32, which is never 0. The angle is y / 2^32 of a turn, cut into a
    quadrant and a remainder of at most an eighth of a turn, so that no large argument is reduced.
    """
    u = x.to(torch.float32) * 2.0**-32 + 2.0**-33
    radius = torch.sqrt(-2.0 * torch.log(u))
    quadrant = (y + (1 << 29)) >> 30
    angle = (y - (quadrant << 30)).to(torch.float32) * (torch.pi / 2 * 2.0**-30)
    sin, cos = torch.sin(angle), torch.cos(angle)
    swap = (quadrant & 1).bool()
    sin, cos = torch.where(swap, cos, sin), torch.where(swap, sin, cos)
    cos = torch.where(((quadrant + 1) & 2).bool(), -cos, cos)
    sin = torch.where((quadrant & 2).bool(), -sin, sin)
    return radius * cos, radius * sin


def _normal_blocks(block: Tensor, rng: Tensor) -> Tensor:
    """Noise of the given blocks: int64 [B] -> float32 [B, 4]."""
    seed, stream = rng[0], rng[1]
    words = philox4x32(
        (block & _MASK, block >> 32, stream & _MASK, (stream >> 32) & _MASK),
        (seed & _MASK, (seed >> 32) & _MASK),
    )
    z0, z1 = _box_muller(words[0], words[1])
    z2, z3 = _box_muller(words[2], words[3])
    return torch.stack((z0, z1, z2, z3), dim=-1)


def normal(size: Sequence[int], rng: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """See :func:`bbb_fast.functional.normal`."""
    count = 1
    for length in size:
        count *= length
    blocks = (count + 3) // 4
    edges = [0, blocks]
    if not torch.compiler.is_compiling():
        edges = [*range(0, blocks, _CHUNK), blocks]
    parts = [
        _normal_blocks(torch.arange(start, stop, device=rng.device), rng) for start, stop in pairwise(edges)
    ] or [torch.empty(0, 4, device=rng.device)]
    noise = torch.cat(parts) if len(parts) > 1 else parts[0]
    return noise.reshape(-1)[:count].reshape(tuple(size)).to(dtype)


def normal_like(input: Tensor, rng: Tensor, memory_format: torch.memory_format) -> Tensor:
    """Noise of ``input``'s shape whose index runs in the order of ``memory_format``; no gradient."""
    if memory_format is torch.contiguous_format:
        return normal(input.shape, rng)
    n, c, *spatial = input.shape
    return normal((n, *spatial, c), rng).movedim(-1, 1)


def softplus(rho: Tensor) -> Tensor:
    """sigma = ln(1 + e^rho), without overflow or cancellation at any rho."""
    return torch.logaddexp(rho, torch.zeros((), dtype=rho.dtype, device=rho.device))


def _log_softplus(rho: Tensor) -> Tensor:
    # Below -30, ln(sigma) = rho - e^rho / 2 + ..., whose second term no dtype here can hold; taking the
    # logarithm of sigma would meet denormals and zeros. The clamp keeps the branch not taken finite; it
    # ends apart from the branch taken, since releases of torch differ in its gradient there.
    return torch.where(rho < -30, rho, torch.log(softplus(rho.clamp(min=-31))))


def variance(rho: Tensor, dtype: torch.dtype) -> Tensor:
    """sigma^2 = softplus(rho)^2, computed in float32 (float64 for float64) and stored as ``dtype``."""
    sigma = softplus(rho.to(accumulate_dtype(rho)))
    return (sigma * sigma).to(dtype)


def square(input: Tensor, dtype: torch.dtype) -> Tensor:
    """input^2 as ``dtype``, squared before it is rounded."""
    x = input.to(torch.promote_types(input.dtype, dtype))
    return (x * x).to(dtype)


def sample_weights(
    mu: Sequence[Tensor],
    rho: Sequence[Tensor],
    rng: Tensor,
    prior_mu: float = 0.0,
    prior_sigma: float = 0.1,
    with_kl: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[list[Tensor], Tensor]:
    """See :func:`bbb_fast.functional.sample_weights`."""
    step = torch.tensor([0, 1], device=rng.device)
    weights = []
    for k, (m, r) in enumerate(zip(mu, rho, strict=True)):
        acc = accumulate_dtype(m, r)
        eps = normal(m.shape, rng + k * step, dtype=acc)
        weight = m.to(acc) + softplus(r.to(acc)) * eps
        weights.append(weight.to(dtype or m.dtype).contiguous())
    if with_kl:
        kl = kl_divergence(mu, rho, [prior_mu] * len(mu), [prior_sigma] * len(mu))
    else:
        kl = torch.zeros((), dtype=accumulate_dtype(*mu), device=rng.device)
    return weights, kl


def kl_divergence(
    mu: Sequence[Tensor],
    rho: Sequence[Tensor],
    prior_mu: Sequence[float],
    prior_sigma: Sequence[float],
) -> Tensor:
    """See :func:`bbb_fast.functional.kl_divergence`. Every term is formed in float64."""
    total = torch.zeros((), dtype=torch.float64, device=mu[0].device)
    for m, r, m_p, s_p in zip(mu, rho, prior_mu, prior_sigma, strict=True):
        m, r, m_p, s_p = m.double(), r.double(), float(m_p), float(s_p)
        ratio = softplus(r) / s_p
        log_ratio = _log_softplus(r) - torch.log(torch.tensor(s_p, dtype=torch.float64)).item()
        total = total + 0.5 * (ratio**2 - 1 - 2 * log_ratio + ((m - m_p) / s_p) ** 2).sum()
    return total.to(accumulate_dtype(*mu))


def _lrt_noise(v: Tensor, eps: Tensor) -> Tensor:
    """sqrt(v) * eps, with gradient 0 where v = 0 (there the derivative of the root is infinite)."""
    # Not torch.where, whose backward would hide an incoming NaN.
    zero = (v == 0).to(v.dtype)
    return (v + zero).sqrt() * (1 - zero) * eps


def lrt_sample(m: Tensor, v: Tensor, rng: Tensor, memory_format: torch.memory_format) -> Tensor:
    """m + sqrt(v) * eps in m's dtype, stored in ``memory_format``, in whose order the noise is numbered."""
    acc = accumulate_dtype(m)
    eps = normal_like(m, rng, memory_format).to(acc)
    return in_format((m.to(acc) + _lrt_noise(v.to(acc), eps)).to(m.dtype), memory_format)


def variance_dtype_for(input: Tensor, variance_dtype: torch.dtype | None) -> torch.dtype:
    """The type of the variance product: as asked, else the input's; float32 for float16.

    Squares of float16 numbers leave its range (x > 256, sigma < 2.4e-4), so float16 is never the
    default there.
    """
    if variance_dtype is not None:
        return variance_dtype
    return torch.float32 if input.dtype == torch.float16 else input.dtype


def _parameters_as(dtype: torch.dtype, mu: Tensor | None) -> Tensor | None:
    return None if mu is None else mu.to(dtype)


def _layer_kl(
    W_mu: Tensor,
    W_rho: Tensor,
    bias_mu: Tensor | None,
    bias_rho: Tensor | None,
    prior_mu: float,
    prior_sigma: float,
) -> Tensor:
    mu = [W_mu] if bias_mu is None else [W_mu, bias_mu]
    rho = [W_rho] if bias_rho is None else [W_rho, bias_rho]
    return kl_divergence(mu, rho, [prior_mu] * len(mu), [prior_sigma] * len(mu))


def _drawn(
    input: Tensor,
    W_mu: Tensor,
    W_rho: Tensor,
    bias_mu: Tensor | None,
    bias_rho: Tensor | None,
    rng: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """A draw of a layer's weight and bias, in the type of its input."""
    mu = [W_mu] if bias_mu is None else [W_mu, bias_mu]
    rho = [W_rho] if bias_rho is None else [W_rho, bias_rho]
    weights, _ = sample_weights(mu, rho, rng, dtype=input.dtype)
    return weights[0], weights[1] if len(weights) > 1 else None


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
    """See :func:`bbb_fast.functional.bbb_linear`. ``recompute_weight`` changes nothing here."""
    y = F.linear(input, *_drawn(input, W_mu, W_rho, bias_mu, bias_rho, rng))
    return (y, _layer_kl(W_mu, W_rho, bias_mu, bias_rho, prior_mu, prior_sigma)) if with_kl else y


def bbb_conv(
    input: Tensor,
    W_mu: Tensor,
    W_rho: Tensor,
    bias_mu: Tensor | None,
    bias_rho: Tensor | None,
    rng: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    *,
    prior_mu: float = 0.0,
    prior_sigma: float = 0.1,
    with_kl: bool = False,
    recompute_weight: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolution of any dimension with drawn weights; backs ``bbb_conv1d/2d/3d``."""
    geometry = (stride, padding, dilation, transposed, output_padding, groups)
    y = torch.convolution(input, *_drawn(input, W_mu, W_rho, bias_mu, bias_rho, rng), *geometry)
    y = in_format(y, conv_memory_format(input, W_mu))
    return (y, _layer_kl(W_mu, W_rho, bias_mu, bias_rho, prior_mu, prior_sigma)) if with_kl else y


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
    variance_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """See :func:`bbb_fast.functional.lrt_linear`."""
    vdtype = variance_dtype_for(input, variance_dtype)
    m = F.linear(input, W_mu.to(input.dtype), _parameters_as(input.dtype, bias_mu))
    b_var = None if bias_rho is None else variance(bias_rho, vdtype)
    v = F.linear(square(input, vdtype), variance(W_rho, vdtype), b_var)
    y = lrt_sample(m, v, rng, torch.contiguous_format)
    return (y, _layer_kl(W_mu, W_rho, bias_mu, bias_rho, prior_mu, prior_sigma)) if with_kl else y


def lrt_conv(
    input: Tensor,
    W_mu: Tensor,
    W_rho: Tensor,
    bias_mu: Tensor | None,
    bias_rho: Tensor | None,
    rng: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    *,
    prior_mu: float = 0.0,
    prior_sigma: float = 0.1,
    with_kl: bool = False,
    variance_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolution of any dimension under local reparameterization; backs ``lrt_conv1d/2d/3d``."""
    vdtype = variance_dtype_for(input, variance_dtype)
    geometry = (stride, padding, dilation, transposed, output_padding, groups)
    m = torch.convolution(input, W_mu.to(input.dtype), _parameters_as(input.dtype, bias_mu), *geometry)
    b_var = None if bias_rho is None else variance(bias_rho, vdtype)
    v = torch.convolution(square(input, vdtype), variance(W_rho, vdtype), b_var, *geometry)
    y = lrt_sample(m, v, rng, conv_memory_format(input, W_mu))
    return (y, _layer_kl(W_mu, W_rho, bias_mu, bias_rho, prior_mu, prior_sigma)) if with_kl else y


def _is_channels_last(t: Tensor, memory_format: torch.memory_format) -> bool:
    try:
        return t.is_contiguous(memory_format=memory_format)
    except RuntimeError:
        # Under vmap only the strides tell.
        step = 1
        for d in (1, *range(t.dim() - 1, 1, -1), 0):
            if t.shape[d] != 1 and t.stride(d) != step:
                return False
            step *= t.shape[d]
        return True


def conv_memory_format(input: Tensor, weight: Tensor) -> torch.memory_format:
    """The memory format of a convolution's output, which numbers its noise.

    channels_last if the input or the weight is stored so and not at the same time contiguous (a single
    channel or a single pixel is both), else contiguous. The same rule stands in csrc/products.cpp.
    """
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(input.dim())
    if channels_last is not None:
        for t in (input, weight):
            if not t.is_contiguous() and _is_channels_last(t, channels_last):
                return channels_last
    return torch.contiguous_format


def in_format(t: Tensor, memory_format: torch.memory_format) -> Tensor:
    """``t.contiguous(memory_format=memory_format)``, which vmap refuses for channels_last."""
    if memory_format is torch.contiguous_format:
        return t.contiguous()
    return t.movedim(1, -1).contiguous().movedim(-1, 1)
