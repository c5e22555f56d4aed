"""The pure-PyTorch twin of every native op: same names, same arguments, same numbers.

Nothing here needs a compiler. Each function is ordinary differentiable PyTorch, so its gradients come
from autograd; the native kernels are tested against them element by element, which is possible because
both sides form the same noise from the same ``rng`` (docs/noise.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise, repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._layer_functions import Call, family

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


def _words(block: Tensor, seed: Tensor, stream: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four 32-bit words of each of a stream's blocks, which are int64 [B]."""
    return philox4x32(
        (block & _MASK, block >> 32, stream & _MASK, (stream >> 32) & _MASK),
        (seed & _MASK, (seed >> 32) & _MASK),
    )


def _normal_blocks(block: Tensor, rng: Tensor) -> Tensor:
    """Noise of the given blocks: int64 [B] -> float32 [B, 4]."""
    words = _words(block, rng[0], rng[1])
    z0, z1 = _box_muller(words[0], words[1])
    z2, z3 = _box_muller(words[2], words[3])
    return torch.stack((z0, z1, z2, z3), dim=-1)


def _word_blocks(block: Tensor, rng: Tensor) -> Tensor:
    """The words themselves: int64 [B] -> int64 [B, 4]."""
    return torch.stack(_words(block, rng[0], rng[1]), dim=-1)


def _numbered(size: Sequence[int], rng: Tensor, of_blocks: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """A tensor of this size, four elements of which each block gives, in row-major order."""
    count = math.prod(size)
    blocks = (count + 3) // 4
    edges = [0, blocks]
    if not torch.compiler.is_compiling():
        edges = [*range(0, blocks, _CHUNK), blocks]
    starts = [torch.arange(start, stop, device=rng.device) for start, stop in pairwise(edges)]
    parts = [of_blocks(block, rng) for block in starts or [torch.arange(0, device=rng.device)]]
    noise = torch.cat(parts) if len(parts) > 1 else parts[0]
    return noise.reshape(-1)[:count].reshape(tuple(size))


def normal(size: Sequence[int] | int, rng: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """See :func:`bbb_fast.functional.normal`."""
    size = tuple(size) if isinstance(size, Iterable) else (size,)
    return _numbered(size, rng, _normal_blocks).to(dtype)


# The numbers k + 1/2 for k of so many bits are exact in these types, and so are their products with 2^-bits.
_UNIFORM_BITS = {torch.float32: 23, torch.float64: 23, torch.float16: 10, torch.bfloat16: 7}


def uniform(size: Sequence[int] | int, rng: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """See :func:`bbb_fast.functional.uniform`."""
    size = tuple(size) if isinstance(size, Iterable) else (size,)
    bits = _UNIFORM_BITS[dtype]
    upper = _numbered(size, rng, _word_blocks) >> (32 - bits)
    return ((upper.to(torch.float32) + 0.5) * 2.0**-bits).to(dtype)


def dropout(
    input: Tensor, rng: Tensor, p: float = 0.5, *, channels: bool = False, one_mask: bool = False
) -> Tensor:
    """See :func:`bbb_fast.functional.dropout`."""
    drawn = tuple(input.shape[:2] if channels else input.shape)
    if one_mask and len(drawn) > 1:
        drawn = (1, *drawn[1:])
    p, acc = float(p), accumulate_dtype(input)
    words = _numbered(drawn, rng, _word_blocks)
    # A tensor's round: of a number that varies from call to call, torch.compile keeps an earlier one's.
    least = (words.new_zeros((), dtype=torch.float64) + p * 2.0**32).round()
    kept = words.to(torch.float64) >= least
    factor = kept.to(acc) * (1 / (1 - p) if p < 1 else 0.0)
    if channels:
        factor = factor.reshape(*drawn, *(1 for _ in input.shape[2:]))
    return (input.to(acc) * factor).to(input.dtype)


def normal_rows(index: Tensor, width: int, rng: Tensor) -> Tensor:
    """Rows ``index`` of the noise of a matrix of this width, float32: [...] -> [..., width]; no gradient."""
    with torch.no_grad():
        first = index.reshape(-1, 1).to(torch.int64) * width
        blocks = first // 4 + torch.arange((width + 6) // 4, device=index.device)
        noise = _normal_blocks(blocks.reshape(-1), rng).reshape(len(first), 4 * blocks.shape[1])
        places = first % 4 + torch.arange(width, device=index.device)
        return noise.gather(1, places).reshape(*index.shape, width)


def normal_like(input: Tensor, rng: Tensor, memory_format: torch.memory_format) -> Tensor:
    """Noise of ``input``'s shape whose index runs in the order of ``memory_format``; no gradient."""
    if memory_format is torch.contiguous_format:
        return normal(input.shape, rng)
    n, c, *spatial = input.shape
    return normal((n, *spatial, c), rng).movedim(-1, 1)


def softplus(rho: Tensor) -> Tensor:
    """sigma = ln(1 + e^rho): no overflow or cancellation at any rho, in its first two derivatives neither."""
    # From 40 on it is rho in every dtype. (The second derivative of logaddexp is NaN where e^-rho overflows.)
    return F.softplus(rho, beta=1.0, threshold=40.0)


def log_softplus(rho: Tensor) -> Tensor:
    """ln(sigma), finite for every finite rho."""
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


def _draws(
    mu: Sequence[Tensor],
    rho: Sequence[Tensor],
    rng: Tensor,
    dtype: torch.dtype | None,
    centered: bool = False,
) -> list[Tensor]:
    """mu + sigma * eps of each tensor, or sigma * eps, eps of stream ``rng[1] + k``; [S, ...] of S draws."""
    if rng.dim() == 2:
        draws = [_draws(mu, rho, own, dtype, centered) for own in rng.unbind()]
        return [torch.stack(of_tensor) for of_tensor in zip(*draws, strict=True)]
    step = torch.tensor([0, 1], device=rng.device)
    draws = []
    for k, (m, r) in enumerate(zip(mu, rho, strict=True)):
        acc = accumulate_dtype(m, r)
        draw = softplus(r.to(acc)) * normal(m.shape, rng + k * step, dtype=acc)
        if not centered:
            draw = m.to(acc) + draw
        draws.append(draw.to(dtype or m.dtype).contiguous())
    return draws


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
    weights = _draws(mu, rho, rng, dtype)
    if with_kl:
        kl = kl_divergence(mu, rho, [prior_mu] * len(mu), [prior_sigma] * len(mu))
    else:
        kl = torch.zeros((), dtype=accumulate_dtype(*mu), device=rng.device)
    return weights, kl


def sample_weight(
    mu: Tensor,
    rho: Tensor,
    rng: Tensor,
    prior_mu: float = 0.0,
    prior_sigma: float = 0.1,
    with_kl: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """See :func:`bbb_fast.functional.sample_weight`."""
    weights, kl = sample_weights([mu], [rho], rng, prior_mu, prior_sigma, with_kl, dtype)
    return (weights[0], kl) if with_kl else weights[0]


def as_lists(
    mu: Tensor | Sequence[Tensor],
    rho: Tensor | Sequence[Tensor],
    prior_mu: float | Tensor | Sequence[float | Tensor],
    prior_sigma: float | Tensor | Sequence[float | Tensor],
) -> tuple[list[Tensor], list[Tensor], list[float | Tensor], list[float | Tensor]]:
    """The arguments of ``kl_divergence`` with a list for each, of one tensor too."""
    mus = [mu] if isinstance(mu, Tensor) else list(mu)
    rhos = [rho] if isinstance(rho, Tensor) else list(rho)

    def one_each(prior: Any) -> list[float | Tensor]:
        if isinstance(prior, Sequence):
            return list(prior)
        return [prior if isinstance(prior, Tensor) else float(prior)] * len(mus)

    return mus, rhos, one_each(prior_mu), one_each(prior_sigma)


def kl_divergence(
    mu: Tensor | Sequence[Tensor],
    rho: Tensor | Sequence[Tensor],
    prior_mu: float | Tensor | Sequence[float | Tensor] = 0.0,
    prior_sigma: float | Tensor | Sequence[float | Tensor] = 0.1,
) -> Tensor:
    """See :func:`bbb_fast.functional.kl_divergence`. Every term is formed in float64."""
    mu, rho, prior_mu, prior_sigma = as_lists(mu, rho, prior_mu, prior_sigma)
    total = torch.zeros((), dtype=torch.float64, device=mu[0].device)
    for m, r, m_p, s_p in zip(mu, rho, prior_mu, prior_sigma, strict=True):
        m, r = m.double(), r.double()
        m_p = m_p.double() if isinstance(m_p, Tensor) else float(m_p)
        s_p = s_p.double() if isinstance(s_p, Tensor) else float(s_p)
        log_prior = s_p.log() if isinstance(s_p, Tensor) else math.log(s_p)
        log_ratio = log_softplus(r) - log_prior
        total = total + 0.5 * ((softplus(r) / s_p) ** 2 - 1 - 2 * log_ratio + ((m - m_p) / s_p) ** 2).sum()
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


def signs(shape: Sequence[int], rng: Tensor, stream: int, channel_dim: int) -> Tensor:
    """Random signs, float32: one for each row and channel of a tensor of this shape, to broadcast.

    The channels are the last dimension (``channel_dim`` -1; all others are rows) or dimension 1 (0 are the
    rows). Number q = row * channels + channel is bit q % 32 of word q / 32 % 4 of Philox block q / 128 of
    ``rng``'s stream plus ``stream``; a set bit is a minus.
    """
    own = tuple(shape) if channel_dim == -1 else (*shape[:2], *(1 for _ in shape[2:]))
    count = math.prod(own)
    block = torch.arange((count + 127) // 128, device=rng.device)
    words = torch.stack(_words(block, rng[0], rng[1] + stream), dim=-1)
    bits = words.unsqueeze(-1) >> torch.arange(32, device=rng.device) & 1
    return (1 - 2 * bits).reshape(-1)[:count].reshape(own).to(torch.float32)


# ---------------------------------------------------------------- the layers: an estimator over a product

# (input, weight, bias) -> output
Product = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]
# W_mu, W_rho, bias_mu, bias_rho
Parameters = Sequence["Tensor | None"]


def _as(dtype: torch.dtype, t: Tensor | None) -> Tensor | None:
    return None if t is None else t.to(dtype)


def _posterior(parameters: Parameters) -> tuple[list[Tensor], list[Tensor]]:
    """The mus and the rhos of a layer: of the weight and, if there is one, of the bias."""
    W_mu, W_rho, bias_mu, bias_rho = parameters
    return ([W_mu], [W_rho]) if bias_mu is None else ([W_mu, bias_mu], [W_rho, bias_rho])


def _bbb(product: Product, x: Tensor, parameters: Parameters, rng: Tensor, call: Call) -> Tensor:
    # call.option, recompute_weight, changes nothing here.
    W, *bias = _draws(*_posterior(parameters), rng, x.dtype)
    return in_format(product(x, W, bias[0] if bias else None), _output_format(call))


def _lrt(product: Product, x: Tensor, parameters: Parameters, rng: Tensor, call: Call) -> Tensor:
    W_mu, W_rho, bias_mu, bias_rho = parameters
    # "auto" asks how fast the kernels are.
    vdtype = variance_dtype_for(x, None if call.option == "auto" else call.option)
    m = product(x, W_mu.to(x.dtype), _as(x.dtype, bias_mu))
    b_var = None if bias_rho is None else variance(bias_rho, vdtype)
    v = product(square(x, vdtype), variance(W_rho, vdtype), b_var)
    return lrt_sample(m, v, rng, _output_format(call))


def _flipout(product: Product, x: Tensor, parameters: Parameters, rng: Tensor, call: Call) -> Tensor:
    W_mu, _, bias_mu, _ = parameters
    channel_dim = -1 if call.geometry is None else 1
    W, *bias = _draws(*_posterior(parameters), rng, x.dtype, centered=True)
    y = product(x, W_mu.to(x.dtype), _as(x.dtype, bias_mu))
    flipped = x * signs(x.shape, rng, 2, channel_dim).to(x.dtype)
    deviation = product(flipped, W, bias[0] if bias else None)
    acc = accumulate_dtype(x)
    total = y.to(acc) + deviation.to(acc) * signs(y.shape, rng, 3, channel_dim).to(acc)
    return in_format(total.to(x.dtype), _output_format(call))


_ESTIMATORS = {"bbb": _bbb, "lrt": _lrt, "flipout": _flipout}


def run(call: Call) -> tuple[Tensor, Tensor | None]:
    """A call of a layer's function; its arguments have been checked."""
    input, *parameters, rng = call.operands
    if call.geometry is None:
        product = F.linear
    else:

        def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return torch.convolution(x, weight, bias, *call.geometry)

    estimator = _ESTIMATORS[call.estimator]
    if rng.dim() == 1:
        output = estimator(product, input, parameters, rng, call)
    else:
        # The same for each draw, of its part of the input or of all of it.
        rngs = rng.reshape(-1, 2).unbind()
        parts = [input] * len(rngs) if rng.dim() == 3 else input.tensor_split(len(rngs))
        outputs = [
            estimator(product, *part, call) for part in zip(parts, repeat(parameters), rngs, strict=False)
        ]
        output = in_format(torch.cat(outputs), _output_format(call))
    if not call.with_kl:
        return output, None
    return output, kl_divergence(*_posterior(parameters), call.prior_mu, call.prior_sigma)


(
    bbb_linear,
    bbb_conv1d,
    bbb_conv2d,
    bbb_conv3d,
    bbb_conv_transpose1d,
    bbb_conv_transpose2d,
    bbb_conv_transpose3d,
) = family("bbb", run, __name__)
(
    lrt_linear,
    lrt_conv1d,
    lrt_conv2d,
    lrt_conv3d,
    lrt_conv_transpose1d,
    lrt_conv_transpose2d,
    lrt_conv_transpose3d,
) = family("lrt", run, __name__)
(
    flipout_linear,
    flipout_conv1d,
    flipout_conv2d,
    flipout_conv3d,
    flipout_conv_transpose1d,
    flipout_conv_transpose2d,
    flipout_conv_transpose3d,
) = family("flipout", run, __name__)


def _output_format(call: Call) -> torch.memory_format:
    if call.geometry is None:
        return torch.contiguous_format
    return conv_memory_format(call.operands[0], call.operands[1])


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


def channels_last(t: Tensor) -> torch.memory_format | None:
    """The channels_last format of ``t``'s dimensions, if it is stored so and not contiguous as well."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(t.dim())
    return last if last is not None and not t.is_contiguous() and _is_channels_last(t, last) else None


def conv_memory_format(input: Tensor, weight: Tensor) -> torch.memory_format:
    """The memory format of a convolution's output, which numbers its noise.

    channels_last if the input or the weight is stored so and not at the same time contiguous (a single
    channel or a single pixel is both), else contiguous. The same rule stands in csrc/products.cpp.
    """
    return channels_last(input) or channels_last(weight) or torch.contiguous_format


def in_format(t: Tensor, memory_format: torch.memory_format) -> Tensor:
    """``t.contiguous(memory_format=memory_format)``, which vmap refuses for channels_last."""
    if memory_format is torch.contiguous_format:
        return t.contiguous()
    return t.movedim(1, -1).contiguous().movedim(-1, 1)
