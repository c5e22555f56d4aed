"""Written by .ci/stubs.py."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._layer_functions import Call
from .routes import VarianceDtype

def accumulate_dtype(*tensors: Tensor) -> torch.dtype:
    """The type the elementwise mathematics runs in: float64 if any tensor is, else float32."""

def as_lists(
    mu: Tensor | Sequence[Tensor],
    rho: Tensor | Sequence[Tensor],
    prior_mu: float | Tensor | Sequence[float | Tensor],
    prior_sigma: float | Tensor | Sequence[float | Tensor],
) -> tuple[list[Tensor], list[Tensor], list[float | Tensor], list[float | Tensor]]:
    """The arguments of ``kl_divergence`` with a list for each, of one tensor too."""

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
    """See :func:`bbb_fast.functional.bbb_conv1d`."""

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
    """See :func:`bbb_fast.functional.bbb_conv2d`."""

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
    """See :func:`bbb_fast.functional.bbb_conv3d`."""

def bbb_conv_transpose1d(
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
    recompute_weight: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """See :func:`bbb_fast.functional.bbb_conv_transpose1d`."""

def bbb_conv_transpose2d(
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
    recompute_weight: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """See :func:`bbb_fast.functional.bbb_conv_transpose2d`."""

def bbb_conv_transpose3d(
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
    recompute_weight: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """See :func:`bbb_fast.functional.bbb_conv_transpose3d`."""

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
    """See :func:`bbb_fast.functional.bbb_linear`."""

def channels_last(t: Tensor) -> torch.memory_format | None:
    """The channels_last format of ``t``'s dimensions, if it is stored so and not contiguous as well."""

def conv_memory_format(input: Tensor, weight: Tensor) -> torch.memory_format:
    """The memory format of a convolution's output, which numbers its noise.

    channels_last if the input or the weight is stored so and not at the same time contiguous (a single
    channel or a single pixel is both), else contiguous. The same rule stands in csrc/products.cpp."""

def dropout(
    input: Tensor, rng: Tensor, p: float = 0.5, *, channels: bool = False, one_mask: bool = False
) -> Tensor:
    """See :func:`bbb_fast.functional.dropout`."""

def flipout_conv1d(
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
    """See :func:`bbb_fast.functional.flipout_conv1d`."""

def flipout_conv2d(
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
    """See :func:`bbb_fast.functional.flipout_conv2d`."""

def flipout_conv3d(
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
    """See :func:`bbb_fast.functional.flipout_conv3d`."""

def flipout_conv_transpose1d(
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
    recompute_weight: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """See :func:`bbb_fast.functional.flipout_conv_transpose1d`."""

def flipout_conv_transpose2d(
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
    recompute_weight: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """See :func:`bbb_fast.functional.flipout_conv_transpose2d`."""

def flipout_conv_transpose3d(
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
    recompute_weight: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """See :func:`bbb_fast.functional.flipout_conv_transpose3d`."""

def flipout_linear(
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
    """See :func:`bbb_fast.functional.flipout_linear`."""

def in_format(t: Tensor, memory_format: torch.memory_format) -> Tensor:
    """``t.contiguous(memory_format=memory_format)``, which vmap refuses for channels_last."""

def kl_divergence(
    mu: Tensor | Sequence[Tensor],
    rho: Tensor | Sequence[Tensor],
    prior_mu: float | Tensor | Sequence[float | Tensor] = 0.0,
    prior_sigma: float | Tensor | Sequence[float | Tensor] = 0.1,
) -> Tensor:
    """See :func:`bbb_fast.functional.kl_divergence`. Every term is formed in float64."""

def log_softplus(rho: Tensor) -> Tensor:
    """ln(sigma), finite for every finite rho."""

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
    """See :func:`bbb_fast.functional.lrt_conv1d`."""

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
    """See :func:`bbb_fast.functional.lrt_conv2d`."""

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
    """See :func:`bbb_fast.functional.lrt_conv3d`."""

def lrt_conv_transpose1d(
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
    variance_dtype: VarianceDtype = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """See :func:`bbb_fast.functional.lrt_conv_transpose1d`."""

def lrt_conv_transpose2d(
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
    variance_dtype: VarianceDtype = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """See :func:`bbb_fast.functional.lrt_conv_transpose2d`."""

def lrt_conv_transpose3d(
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
    variance_dtype: VarianceDtype = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """See :func:`bbb_fast.functional.lrt_conv_transpose3d`."""

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
    """See :func:`bbb_fast.functional.lrt_linear`."""

def lrt_sample(m: Tensor, v: Tensor, rng: Tensor, memory_format: torch.memory_format) -> Tensor:
    """m + sqrt(v) * eps in m's dtype, stored in ``memory_format``, in whose order the noise is numbered."""

def normal(size: Sequence[int] | int, rng: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """See :func:`bbb_fast.functional.normal`."""

def normal_like(input: Tensor, rng: Tensor, memory_format: torch.memory_format) -> Tensor:
    """Noise of ``input``'s shape whose index runs in the order of ``memory_format``; no gradient."""

def normal_rows(index: Tensor, width: int, rng: Tensor) -> Tensor:
    """Rows ``index`` of the noise of a matrix of this width, float32: [...] -> [..., width]; no gradient."""

def philox4x32(
    counter: Sequence[Tensor], key: Sequence[Tensor], rounds: int = 10
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32 (Salmon et al. 2011) on int64 tensors that hold unsigned 32-bit numbers.

    ``counter``: four broadcastable tensors; ``key``: two. Returns the four output words."""

def run(call: Call) -> tuple[Tensor, Tensor | None]:
    """A call of a layer's function; its arguments have been checked."""

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

def signs(shape: Sequence[int], rng: Tensor, stream: int, channel_dim: int) -> Tensor:
    """Random signs, float32: one for each row and channel of a tensor of this shape, to broadcast.

    The channels are the last dimension (``channel_dim`` -1; all others are rows) or dimension 1 (0 are the
    rows). Number q = row * channels + channel is bit q % 32 of word q / 32 % 4 of Philox block q / 128 of
    ``rng``'s stream plus ``stream``; a set bit is a minus."""

def softplus(rho: Tensor) -> Tensor:
    """sigma = ln(1 + e^rho): no overflow or cancellation at any rho, in its first two derivatives neither."""

def square(input: Tensor, dtype: torch.dtype) -> Tensor:
    """input^2 as ``dtype``, squared before it is rounded."""

def uniform(size: Sequence[int] | int, rng: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """See :func:`bbb_fast.functional.uniform`."""

def variance(rho: Tensor, dtype: torch.dtype) -> Tensor:
    """sigma^2 = softplus(rho)^2, computed in float32 (float64 for float64) and stored as ``dtype``."""

def variance_dtype_for(input: Tensor, variance_dtype: torch.dtype | None) -> torch.dtype:
    """The type of the variance product: as asked, else the input's; float32 for float16.

    Squares of float16 numbers leave its range (x > 256, sigma < 2.4e-4), so float16 is never the
    default there."""
