"""Written by .ci/stubs.py."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .routes import VarianceDtype

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
    """A 1-d convolution with weights drawn from the posterior, one draw for the whole batch.

    y = product(x, W) + b with W and b from :func:`sample_weights` (W takes stream ``rng[1]``, b the
    next). Blundell et al., "Weight uncertainty in neural networks", ICML 2015, section 3.2.

    Args:
        input: [N, in_channels, L], or without N, of any memory format.
        W_mu, W_rho: [out_channels, in_channels / groups, K], of input's dtype, or float32
            under a narrower input.
        bias_mu, bias_rho: [out_channels], or both None.
        rng: int64 [2], seed and stream. [S, 2] names S draws, each of an equal part of the input's
            first dimension; [S, 1, 2] S draws of the whole input each, whose outputs follow each other
            in the output's first dimension, S times as long.
        stride, padding, dilation, groups: as in ``torch.nn.functional.conv1d``.
        prior_mu, prior_sigma: the prior N(prior_mu, prior_sigma^2) of the KL.
        with_kl: also return KL(q || p), formed in the same pass over the parameters, its gradient with
            the output's in one pass too.
        recompute_weight: keep nothing but ``rng`` for backward, which draws W again; else W is kept.

    Returns [N, out_channels, ...] in input's dtype, or that and the scalar KL. product: conv1d"""

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
    """A 2-d convolution with weights drawn from the posterior, one draw for the whole batch.

    y = product(x, W) + b with W and b from :func:`sample_weights` (W takes stream ``rng[1]``, b the
    next). Blundell et al., "Weight uncertainty in neural networks", ICML 2015, section 3.2.

    Args:
        input: [N, in_channels, H, W], or without N, of any memory format.
        W_mu, W_rho: [out_channels, in_channels / groups, kH, kW], of input's dtype, or float32
            under a narrower input.
        bias_mu, bias_rho: [out_channels], or both None.
        rng: int64 [2], seed and stream. [S, 2] names S draws, each of an equal part of the input's
            first dimension; [S, 1, 2] S draws of the whole input each, whose outputs follow each other
            in the output's first dimension, S times as long.
        stride, padding, dilation, groups: as in ``torch.nn.functional.conv2d``.
        prior_mu, prior_sigma: the prior N(prior_mu, prior_sigma^2) of the KL.
        with_kl: also return KL(q || p), formed in the same pass over the parameters, its gradient with
            the output's in one pass too.
        recompute_weight: keep nothing but ``rng`` for backward, which draws W again; else W is kept.

    Returns [N, out_channels, ...] in input's dtype, or that and the scalar KL. product: conv2d"""

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
    """A 3-d convolution with weights drawn from the posterior, one draw for the whole batch.

    y = product(x, W) + b with W and b from :func:`sample_weights` (W takes stream ``rng[1]``, b the
    next). Blundell et al., "Weight uncertainty in neural networks", ICML 2015, section 3.2.

    Args:
        input: [N, in_channels, D, H, W], or without N, of any memory format.
        W_mu, W_rho: [out_channels, in_channels / groups, kD, kH, kW], of input's dtype, or float32
            under a narrower input.
        bias_mu, bias_rho: [out_channels], or both None.
        rng: int64 [2], seed and stream. [S, 2] names S draws, each of an equal part of the input's
            first dimension; [S, 1, 2] S draws of the whole input each, whose outputs follow each other
            in the output's first dimension, S times as long.
        stride, padding, dilation, groups: as in ``torch.nn.functional.conv3d``.
        prior_mu, prior_sigma: the prior N(prior_mu, prior_sigma^2) of the KL.
        with_kl: also return KL(q || p), formed in the same pass over the parameters, its gradient with
            the output's in one pass too.
        recompute_weight: keep nothing but ``rng`` for backward, which draws W again; else W is kept.

    Returns [N, out_channels, ...] in input's dtype, or that and the scalar KL. product: conv3d"""

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
    """A transposed 1-d convolution with weights drawn from the posterior, one draw for the whole batch.

    y = product(x, W) + b with W and b from :func:`sample_weights` (W takes stream ``rng[1]``, b the
    next). Blundell et al., "Weight uncertainty in neural networks", ICML 2015, section 3.2.

    Args:
        input: [N, in_channels, L], or without N, of any memory format.
        W_mu, W_rho: [in_channels, out_channels / groups, K], of input's dtype, or float32
            under a narrower input.
        bias_mu, bias_rho: [out_channels], or both None.
        rng: int64 [2], seed and stream. [S, 2] names S draws, each of an equal part of the input's
            first dimension; [S, 1, 2] S draws of the whole input each, whose outputs follow each other
            in the output's first dimension, S times as long.
        stride, padding, output_padding, groups, dilation: as in
            ``torch.nn.functional.conv_transpose1d``.
        prior_mu, prior_sigma: the prior N(prior_mu, prior_sigma^2) of the KL.
        with_kl: also return KL(q || p), formed in the same pass over the parameters, its gradient with
            the output's in one pass too.
        recompute_weight: keep nothing but ``rng`` for backward, which draws W again; else W is kept.

    Returns [N, out_channels, ...] in input's dtype, or that and the scalar KL. product: conv_transpose1d"""

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
    """A transposed 2-d convolution with weights drawn from the posterior, one draw for the whole batch.

    y = product(x, W) + b with W and b from :func:`sample_weights` (W takes stream ``rng[1]``, b the
    next). Blundell et al., "Weight uncertainty in neural networks", ICML 2015, section 3.2.

    Args:
        input: [N, in_channels, H, W], or without N, of any memory format.
        W_mu, W_rho: [in_channels, out_channels / groups, kH, kW], of input's dtype, or float32
            under a narrower input.
        bias_mu, bias_rho: [out_channels], or both None.
        rng: int64 [2], seed and stream. [S, 2] names S draws, each of an equal part of the input's
            first dimension; [S, 1, 2] S draws of the whole input each, whose outputs follow each other
            in the output's first dimension, S times as long.
        stride, padding, output_padding, groups, dilation: as in
            ``torch.nn.functional.conv_transpose2d``.
        prior_mu, prior_sigma: the prior N(prior_mu, prior_sigma^2) of the KL.
        with_kl: also return KL(q || p), formed in the same pass over the parameters, its gradient with
            the output's in one pass too.
        recompute_weight: keep nothing but ``rng`` for backward, which draws W again; else W is kept.

    Returns [N, out_channels, ...] in input's dtype, or that and the scalar KL. product: conv_transpose2d"""

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
    """A transposed 3-d convolution with weights drawn from the posterior, one draw for the whole batch.

    y = product(x, W) + b with W and b from :func:`sample_weights` (W takes stream ``rng[1]``, b the
    next). Blundell et al., "Weight uncertainty in neural networks", ICML 2015, section 3.2.

    Args:
        input: [N, in_channels, D, H, W], or without N, of any memory format.
        W_mu, W_rho: [in_channels, out_channels / groups, kD, kH, kW], of input's dtype, or float32
            under a narrower input.
        bias_mu, bias_rho: [out_channels], or both None.
        rng: int64 [2], seed and stream. [S, 2] names S draws, each of an equal part of the input's
            first dimension; [S, 1, 2] S draws of the whole input each, whose outputs follow each other
            in the output's first dimension, S times as long.
        stride, padding, output_padding, groups, dilation: as in
            ``torch.nn.functional.conv_transpose3d``.
        prior_mu, prior_sigma: the prior N(prior_mu, prior_sigma^2) of the KL.
        with_kl: also return KL(q || p), formed in the same pass over the parameters, its gradient with
            the output's in one pass too.
        recompute_weight: keep nothing but ``rng`` for backward, which draws W again; else W is kept.

    Returns [N, out_channels, ...] in input's dtype, or that and the scalar KL. product: conv_transpose3d"""

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

    y = product(x, W) + b with W and b from :func:`sample_weights` (W takes stream ``rng[1]``, b the
    next). Blundell et al., "Weight uncertainty in neural networks", ICML 2015, section 3.2.

    Args:
        input: [..., in_features]; any number of batch dimensions, possibly empty.
        W_mu, W_rho: [out_features, in_features], of input's dtype, or float32 under a narrower input.
        bias_mu, bias_rho: [out_features], or both None.
        rng: int64 [2], seed and stream. [S, 2] names S draws, each of an equal part of the input's
            first dimension; [S, 1, 2] S draws of the whole input each, whose outputs follow each other
            in the output's first dimension, S times as long.
        prior_mu, prior_sigma: the prior N(prior_mu, prior_sigma^2) of the KL.
        with_kl: also return KL(q || p), formed in the same pass over the parameters, its gradient with
            the output's in one pass too.
        recompute_weight: keep nothing but ``rng`` for backward, which draws W again; else W is kept.

    Returns [..., out_features] in input's dtype, or that and the scalar KL; product(x, W) is x W^T."""

def draw_rng(device: torch.device | str | None = None) -> Tensor:
    """A fresh ``rng`` (int64 [2]: seed, stream) from PyTorch's generator of ``device``.

    Ranks of an initialised ``torch.distributed`` group get different ones, also where every rank was
    seeded alike. Raises RuntimeError under torch.compile where that would draw again in backward."""

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
    outside [0, 1] and, with ``channels``, for fewer than two dimensions."""

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
    """A 1-d convolution with one draw of the weights' deviations, whose signs each row draws anew.

    y = product(x, W_mu) + b_mu + (product(x * s, sigma_W * eps) + sigma_b * eps_b) * r with random
    signs s of each row and input channel and r of each row and output channel. eps is that of the
    bbb functions; the signs are bits of streams ``rng[1] + 2`` and ``+ 3`` (docs/noise.md), never
    stored. A row alone is distributed as under bbb, and two rows are uncorrelated. Wen, Vicol, Ba,
    Tran and Grosse, "Flipout: efficient pseudo-independent weight perturbations on mini-batches",
    ICLR 2018, eq. 4.

    Args:
        input: [N, in_channels, L], or without N, of any memory format.
        W_mu, W_rho: [out_channels, in_channels / groups, K], of input's dtype, or float32
            under a narrower input.
        bias_mu, bias_rho: [out_channels], or both None.
        rng: int64 [2], seed and stream. [S, 2] names S draws, each of an equal part of the input's
            first dimension; [S, 1, 2] S draws of the whole input each, whose outputs follow each other
            in the output's first dimension, S times as long.
        stride, padding, dilation, groups: as in ``torch.nn.functional.conv1d``.
        prior_mu, prior_sigma: the prior N(prior_mu, prior_sigma^2) of the KL.
        with_kl: also return KL(q || p), formed in the same pass over the parameters, its gradient with
            the output's in one pass too.
        recompute_weight: keep nothing but ``rng`` for backward, which draws sigma_W * eps again; else sigma_W
            * eps is kept.

    Returns [N, out_channels, ...] in input's dtype, or that and the scalar KL. product: conv1d"""

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
    """A 2-d convolution with one draw of the weights' deviations, whose signs each row draws anew.

    y = product(x, W_mu) + b_mu + (product(x * s, sigma_W * eps) + sigma_b * eps_b) * r with random
    signs s of each row and input channel and r of each row and output channel. eps is that of the
    bbb functions; the signs are bits of streams ``rng[1] + 2`` and ``+ 3`` (docs/noise.md), never
    stored. A row alone is distributed as under bbb, and two rows are uncorrelated. Wen, Vicol, Ba,
    Tran and Grosse, "Flipout: efficient pseudo-independent weight perturbations on mini-batches",
    ICLR 2018, eq. 4.

    Args:
        input: [N, in_channels, H, W], or without N, of any memory format.
        W_mu, W_rho: [out_channels, in_channels / groups, kH, kW], of input's dtype, or float32
            under a narrower input.
        bias_mu, bias_rho: [out_channels], or both None.
        rng: int64 [2], seed and stream. [S, 2] names S draws, each of an equal part of the input's
            first dimension; [S, 1, 2] S draws of the whole input each, whose outputs follow each other
            in the output's first dimension, S times as long.
        stride, padding, dilation, groups: as in ``torch.nn.functional.conv2d``.
        prior_mu, prior_sigma: the prior N(prior_mu, prior_sigma^2) of the KL.
        with_kl: also return KL(q || p), formed in the same pass over the parameters, its gradient with
            the output's in one pass too.
        recompute_weight: keep nothing but ``rng`` for backward, which draws sigma_W * eps again; else sigma_W
            * eps is kept.

    Returns [N, out_channels, ...] in input's dtype, or that and the scalar KL. product: conv2d"""

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
    """A 3-d convolution with one draw of the weights' deviations, whose signs each row draws anew.

    y = product(x, W_mu) + b_mu + (product(x * s, sigma_W * eps) + sigma_b * eps_b) * r with random
    signs s of each row and input channel and r of each row and output channel. eps is that of the
    bbb functions; the signs are bits of streams ``rng[1] + 2`` and ``+ 3`` (docs/noise.md), never
    stored. A row alone is distributed as under bbb, and two rows are uncorrelated. Wen, Vicol, Ba,
    Tran and Grosse, "Flipout: efficient pseudo-independent weight perturbations on mini-batches",
    ICLR 2018, eq. 4.

    Args:
        input: [N, in_channels, D, H, W], or without N, of any memory format.
        W_mu, W_rho: [out_channels, in_channels / groups, kD, kH, kW], of input's dtype, or float32
            under a narrower input.
        bias_mu, bias_rho: [out_channels], or both None.
        rng: int64 [2], seed and stream. [S, 2] names S draws, each of an equal part of the input's
            first dimension; [S, 1, 2] S draws of the whole input each, whose outputs follow each other
            in the output's first dimension, S times as long.
        stride, padding, dilation, groups: as in ``torch.nn.functional.conv3d``.
        prior_mu, prior_sigma: the prior N(prior_mu, prior_sigma^2) of the KL.
        with_kl: also return KL(q || p), formed in the same pass over the parameters, its gradient with
            the output's in one pass too.
        recompute_weight: keep nothing but ``rng`` for backward, which draws sigma_W * eps again; else sigma_W
            * eps is kept.

    Returns [N, out_channels, ...] in input's dtype, or that and the scalar KL. product: conv3d"""

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
    """A transposed 1-d convolution with one draw of the weights' deviations, whose signs each row draws anew.

    y = product(x, W_mu) + b_mu + (product(x * s, sigma_W * eps) + sigma_b * eps_b) * r with random
    signs s of each row and input channel and r of each row and output channel. eps is that of the
    bbb functions; the signs are bits of streams ``rng[1] + 2`` and ``+ 3`` (docs/noise.md), never
    stored. A row alone is distributed as under bbb, and two rows are uncorrelated. Wen, Vicol, Ba,
    Tran and Grosse, "Flipout: efficient pseudo-independent weight perturbations on mini-batches",
    ICLR 2018, eq. 4.

    Args:
        input: [N, in_channels, L], or without N, of any memory format.
        W_mu, W_rho: [in_channels, out_channels / groups, K], of input's dtype, or float32
            under a narrower input.
        bias_mu, bias_rho: [out_channels], or both None.
        rng: int64 [2], seed and stream. [S, 2] names S draws, each of an equal part of the input's
            first dimension; [S, 1, 2] S draws of the whole input each, whose outputs follow each other
            in the output's first dimension, S times as long.
        stride, padding, output_padding, groups, dilation: as in
            ``torch.nn.functional.conv_transpose1d``.
        prior_mu, prior_sigma: the prior N(prior_mu, prior_sigma^2) of the KL.
        with_kl: also return KL(q || p), formed in the same pass over the parameters, its gradient with
            the output's in one pass too.
        recompute_weight: keep nothing but ``rng`` for backward, which draws sigma_W * eps again; else sigma_W
            * eps is kept.

    Returns [N, out_channels, ...] in input's dtype, or that and the scalar KL. product: conv_transpose1d"""

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
    """A transposed 2-d convolution with one draw of the weights' deviations, whose signs each row draws anew.

    y = product(x, W_mu) + b_mu + (product(x * s, sigma_W * eps) + sigma_b * eps_b) * r with random
    signs s of each row and input channel and r of each row and output channel. eps is that of the
    bbb functions; the signs are bits of streams ``rng[1] + 2`` and ``+ 3`` (docs/noise.md), never
    stored. A row alone is distributed as under bbb, and two rows are uncorrelated. Wen, Vicol, Ba,
    Tran and Grosse, "Flipout: efficient pseudo-independent weight perturbations on mini-batches",
    ICLR 2018, eq. 4.

    Args:
        input: [N, in_channels, H, W], or without N, of any memory format.
        W_mu, W_rho: [in_channels, out_channels / groups, kH, kW], of input's dtype, or float32
            under a narrower input.
        bias_mu, bias_rho: [out_channels], or both None.
        rng: int64 [2], seed and stream. [S, 2] names S draws, each of an equal part of the input's
            first dimension; [S, 1, 2] S draws of the whole input each, whose outputs follow each other
            in the output's first dimension, S times as long.
        stride, padding, output_padding, groups, dilation: as in
            ``torch.nn.functional.conv_transpose2d``.
        prior_mu, prior_sigma: the prior N(prior_mu, prior_sigma^2) of the KL.
        with_kl: also return KL(q || p), formed in the same pass over the parameters, its gradient with
            the output's in one pass too.
        recompute_weight: keep nothing but ``rng`` for backward, which draws sigma_W * eps again; else sigma_W
            * eps is kept.

    Returns [N, out_channels, ...] in input's dtype, or that and the scalar KL. product: conv_transpose2d"""

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
    """A transposed 3-d convolution with one draw of the weights' deviations, whose signs each row draws anew.

    y = product(x, W_mu) + b_mu + (product(x * s, sigma_W * eps) + sigma_b * eps_b) * r with random
    signs s of each row and input channel and r of each row and output channel. eps is that of the
    bbb functions; the signs are bits of streams ``rng[1] + 2`` and ``+ 3`` (docs/noise.md), never
    stored. A row alone is distributed as under bbb, and two rows are uncorrelated. Wen, Vicol, Ba,
    Tran and Grosse, "Flipout: efficient pseudo-independent weight perturbations on mini-batches",
    ICLR 2018, eq. 4.

    Args:
        input: [N, in_channels, D, H, W], or without N, of any memory format.
        W_mu, W_rho: [in_channels, out_channels / groups, kD, kH, kW], of input's dtype, or float32
            under a narrower input.
        bias_mu, bias_rho: [out_channels], or both None.
        rng: int64 [2], seed and stream. [S, 2] names S draws, each of an equal part of the input's
            first dimension; [S, 1, 2] S draws of the whole input each, whose outputs follow each other
            in the output's first dimension, S times as long.
        stride, padding, output_padding, groups, dilation: as in
            ``torch.nn.functional.conv_transpose3d``.
        prior_mu, prior_sigma: the prior N(prior_mu, prior_sigma^2) of the KL.
        with_kl: also return KL(q || p), formed in the same pass over the parameters, its gradient with
            the output's in one pass too.
        recompute_weight: keep nothing but ``rng`` for backward, which draws sigma_W * eps again; else sigma_W
            * eps is kept.

    Returns [N, out_channels, ...] in input's dtype, or that and the scalar KL. product: conv_transpose3d"""

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
    """A linear layer with one draw of the weights' deviations, whose signs each row draws anew.

    y = product(x, W_mu) + b_mu + (product(x * s, sigma_W * eps) + sigma_b * eps_b) * r with random
    signs s of each row and input channel and r of each row and output channel. eps is that of the
    bbb functions; the signs are bits of streams ``rng[1] + 2`` and ``+ 3`` (docs/noise.md), never
    stored. A row alone is distributed as under bbb, and two rows are uncorrelated. Wen, Vicol, Ba,
    Tran and Grosse, "Flipout: efficient pseudo-independent weight perturbations on mini-batches",
    ICLR 2018, eq. 4.

    Args:
        input: [..., in_features]; any number of batch dimensions, possibly empty.
        W_mu, W_rho: [out_features, in_features], of input's dtype, or float32 under a narrower input.
        bias_mu, bias_rho: [out_features], or both None.
        rng: int64 [2], seed and stream. [S, 2] names S draws, each of an equal part of the input's
            first dimension; [S, 1, 2] S draws of the whole input each, whose outputs follow each other
            in the output's first dimension, S times as long.
        prior_mu, prior_sigma: the prior N(prior_mu, prior_sigma^2) of the KL.
        with_kl: also return KL(q || p), formed in the same pass over the parameters, its gradient with
            the output's in one pass too.
        recompute_weight: keep nothing but ``rng`` for backward, which draws sigma_W * eps again; else sigma_W
            * eps is kept.

    Returns [..., out_features] in input's dtype, or that and the scalar KL; product(x, W) is x W^T."""

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

    Returns a scalar, float32 (float64 for float64), differentiable in mu and rho."""

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
    """A 1-d convolution under the local reparameterization trick, one draw an output element.

    m = product(x, W_mu) + b_mu, v = product(x^2, sigma_W^2) + sigma_b^2, y = m + sqrt(v) * eps, eps
    numbered in the order in which the output lies in memory. Where v = 0 the noise and its gradient
    are 0. Kingma, Salimans and Welling, "Variational dropout and the local reparameterization trick",
    NeurIPS 2015, eq. 6.

    Args:
        input: [N, in_channels, L], or without N, of any memory format.
        W_mu, W_rho: [out_channels, in_channels / groups, K], of input's dtype, or float32
            under a narrower input.
        bias_mu, bias_rho: [out_channels], or both None.
        rng: int64 [2], seed and stream. [S, 2] names S draws, each of an equal part of the input's
            first dimension; [S, 1, 2] S draws of the whole input each, whose outputs follow each other
            in the output's first dimension, S times as long.
        stride, padding, dilation, groups: as in ``torch.nn.functional.conv1d``.
        prior_mu, prior_sigma: the prior N(prior_mu, prior_sigma^2) of the KL.
        with_kl: also return KL(q || p), formed in the same pass over the parameters, its gradient with
            the output's in one pass too.
        variance_dtype: type of the variance product's operands and result; default input's (float32 for
            float16). "auto": bfloat16 where that is faster (:mod:`bbb_fast.routes`), else the default. A CPU
            without bfloat16 instructions multiplies numbers rounded to bfloat16 in float32: no faster than
            float32 then, and the same numbers.

    Returns [N, out_channels, ...] in input's dtype, or that and the scalar KL. product: conv1d"""

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
    """A 2-d convolution under the local reparameterization trick, one draw an output element.

    m = product(x, W_mu) + b_mu, v = product(x^2, sigma_W^2) + sigma_b^2, y = m + sqrt(v) * eps, eps
    numbered in the order in which the output lies in memory. Where v = 0 the noise and its gradient
    are 0. Kingma, Salimans and Welling, "Variational dropout and the local reparameterization trick",
    NeurIPS 2015, eq. 6.

    Args:
        input: [N, in_channels, H, W], or without N, of any memory format.
        W_mu, W_rho: [out_channels, in_channels / groups, kH, kW], of input's dtype, or float32
            under a narrower input.
        bias_mu, bias_rho: [out_channels], or both None.
        rng: int64 [2], seed and stream. [S, 2] names S draws, each of an equal part of the input's
            first dimension; [S, 1, 2] S draws of the whole input each, whose outputs follow each other
            in the output's first dimension, S times as long.
        stride, padding, dilation, groups: as in ``torch.nn.functional.conv2d``.
        prior_mu, prior_sigma: the prior N(prior_mu, prior_sigma^2) of the KL.
        with_kl: also return KL(q || p), formed in the same pass over the parameters, its gradient with
            the output's in one pass too.
        variance_dtype: type of the variance product's operands and result; default input's (float32 for
            float16). "auto": bfloat16 where that is faster (:mod:`bbb_fast.routes`), else the default. A CPU
            without bfloat16 instructions multiplies numbers rounded to bfloat16 in float32: no faster than
            float32 then, and the same numbers.

    Returns [N, out_channels, ...] in input's dtype, or that and the scalar KL. product: conv2d"""

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
    """A 3-d convolution under the local reparameterization trick, one draw an output element.

    m = product(x, W_mu) + b_mu, v = product(x^2, sigma_W^2) + sigma_b^2, y = m + sqrt(v) * eps, eps
    numbered in the order in which the output lies in memory. Where v = 0 the noise and its gradient
    are 0. Kingma, Salimans and Welling, "Variational dropout and the local reparameterization trick",
    NeurIPS 2015, eq. 6.

    Args:
        input: [N, in_channels, D, H, W], or without N, of any memory format.
        W_mu, W_rho: [out_channels, in_channels / groups, kD, kH, kW], of input's dtype, or float32
            under a narrower input.
        bias_mu, bias_rho: [out_channels], or both None.
        rng: int64 [2], seed and stream. [S, 2] names S draws, each of an equal part of the input's
            first dimension; [S, 1, 2] S draws of the whole input each, whose outputs follow each other
            in the output's first dimension, S times as long.
        stride, padding, dilation, groups: as in ``torch.nn.functional.conv3d``.
        prior_mu, prior_sigma: the prior N(prior_mu, prior_sigma^2) of the KL.
        with_kl: also return KL(q || p), formed in the same pass over the parameters, its gradient with
            the output's in one pass too.
        variance_dtype: type of the variance product's operands and result; default input's (float32 for
            float16). "auto": bfloat16 where that is faster (:mod:`bbb_fast.routes`), else the default. A CPU
            without bfloat16 instructions multiplies numbers rounded to bfloat16 in float32: no faster than
            float32 then, and the same numbers.

    Returns [N, out_channels, ...] in input's dtype, or that and the scalar KL. product: conv3d"""

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
    """A transposed 1-d convolution under the local reparameterization trick, one draw an output element.

    m = product(x, W_mu) + b_mu, v = product(x^2, sigma_W^2) + sigma_b^2, y = m + sqrt(v) * eps, eps
    numbered in the order in which the output lies in memory. Where v = 0 the noise and its gradient
    are 0. Kingma, Salimans and Welling, "Variational dropout and the local reparameterization trick",
    NeurIPS 2015, eq. 6.

    Args:
        input: [N, in_channels, L], or without N, of any memory format.
        W_mu, W_rho: [in_channels, out_channels / groups, K], of input's dtype, or float32
            under a narrower input.
        bias_mu, bias_rho: [out_channels], or both None.
        rng: int64 [2], seed and stream. [S, 2] names S draws, each of an equal part of the input's
            first dimension; [S, 1, 2] S draws of the whole input each, whose outputs follow each other
            in the output's first dimension, S times as long.
        stride, padding, output_padding, groups, dilation: as in
            ``torch.nn.functional.conv_transpose1d``.
        prior_mu, prior_sigma: the prior N(prior_mu, prior_sigma^2) of the KL.
        with_kl: also return KL(q || p), formed in the same pass over the parameters, its gradient with
            the output's in one pass too.
        variance_dtype: type of the variance product's operands and result; default input's (float32 for
            float16). "auto": bfloat16 where that is faster (:mod:`bbb_fast.routes`), else the default. A CPU
            without bfloat16 instructions multiplies numbers rounded to bfloat16 in float32: no faster than
            float32 then, and the same numbers.

    Returns [N, out_channels, ...] in input's dtype, or that and the scalar KL. product: conv_transpose1d"""

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
    """A transposed 2-d convolution under the local reparameterization trick, one draw an output element.

    m = product(x, W_mu) + b_mu, v = product(x^2, sigma_W^2) + sigma_b^2, y = m + sqrt(v) * eps, eps
    numbered in the order in which the output lies in memory. Where v = 0 the noise and its gradient
    are 0. Kingma, Salimans and Welling, "Variational dropout and the local reparameterization trick",
    NeurIPS 2015, eq. 6.

    Args:
        input: [N, in_channels, H, W], or without N, of any memory format.
        W_mu, W_rho: [in_channels, out_channels / groups, kH, kW], of input's dtype, or float32
            under a narrower input.
        bias_mu, bias_rho: [out_channels], or both None.
        rng: int64 [2], seed and stream. [S, 2] names S draws, each of an equal part of the input's
            first dimension; [S, 1, 2] S draws of the whole input each, whose outputs follow each other
            in the output's first dimension, S times as long.
        stride, padding, output_padding, groups, dilation: as in
            ``torch.nn.functional.conv_transpose2d``.
        prior_mu, prior_sigma: the prior N(prior_mu, prior_sigma^2) of the KL.
        with_kl: also return KL(q || p), formed in the same pass over the parameters, its gradient with
            the output's in one pass too.
        variance_dtype: type of the variance product's operands and result; default input's (float32 for
            float16). "auto": bfloat16 where that is faster (:mod:`bbb_fast.routes`), else the default. A CPU
            without bfloat16 instructions multiplies numbers rounded to bfloat16 in float32: no faster than
            float32 then, and the same numbers.

    Returns [N, out_channels, ...] in input's dtype, or that and the scalar KL. product: conv_transpose2d"""

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
    """A transposed 3-d convolution under the local reparameterization trick, one draw an output element.

    m = product(x, W_mu) + b_mu, v = product(x^2, sigma_W^2) + sigma_b^2, y = m + sqrt(v) * eps, eps
    numbered in the order in which the output lies in memory. Where v = 0 the noise and its gradient
    are 0. Kingma, Salimans and Welling, "Variational dropout and the local reparameterization trick",
    NeurIPS 2015, eq. 6.

    Args:
        input: [N, in_channels, D, H, W], or without N, of any memory format.
        W_mu, W_rho: [in_channels, out_channels / groups, kD, kH, kW], of input's dtype, or float32
            under a narrower input.
        bias_mu, bias_rho: [out_channels], or both None.
        rng: int64 [2], seed and stream. [S, 2] names S draws, each of an equal part of the input's
            first dimension; [S, 1, 2] S draws of the whole input each, whose outputs follow each other
            in the output's first dimension, S times as long.
        stride, padding, output_padding, groups, dilation: as in
            ``torch.nn.functional.conv_transpose3d``.
        prior_mu, prior_sigma: the prior N(prior_mu, prior_sigma^2) of the KL.
        with_kl: also return KL(q || p), formed in the same pass over the parameters, its gradient with
            the output's in one pass too.
        variance_dtype: type of the variance product's operands and result; default input's (float32 for
            float16). "auto": bfloat16 where that is faster (:mod:`bbb_fast.routes`), else the default. A CPU
            without bfloat16 instructions multiplies numbers rounded to bfloat16 in float32: no faster than
            float32 then, and the same numbers.

    Returns [N, out_channels, ...] in input's dtype, or that and the scalar KL. product: conv_transpose3d"""

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
    """A linear layer under the local reparameterization trick, one draw an output element.

    m = product(x, W_mu) + b_mu, v = product(x^2, sigma_W^2) + sigma_b^2, y = m + sqrt(v) * eps, eps
    numbered in the order in which the output lies in memory. Where v = 0 the noise and its gradient
    are 0. Kingma, Salimans and Welling, "Variational dropout and the local reparameterization trick",
    NeurIPS 2015, eq. 6.

    Args:
        input: [..., in_features]; any number of batch dimensions, possibly empty.
        W_mu, W_rho: [out_features, in_features], of input's dtype, or float32 under a narrower input.
        bias_mu, bias_rho: [out_features], or both None.
        rng: int64 [2], seed and stream. [S, 2] names S draws, each of an equal part of the input's
            first dimension; [S, 1, 2] S draws of the whole input each, whose outputs follow each other
            in the output's first dimension, S times as long.
        prior_mu, prior_sigma: the prior N(prior_mu, prior_sigma^2) of the KL.
        with_kl: also return KL(q || p), formed in the same pass over the parameters, its gradient with
            the output's in one pass too.
        variance_dtype: type of the variance product's operands and result; default input's (float32 for
            float16). "auto": bfloat16 where that is faster (:mod:`bbb_fast.routes`), else the default. A CPU
            without bfloat16 instructions multiplies numbers rounded to bfloat16 in float32: no faster than
            float32 then, and the same numbers.

    Returns [..., out_features] in input's dtype, or that and the scalar KL; product(x, W) is x W^T."""

def normal(size: Sequence[int] | int, rng: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal noise of shape ``size`` on ``rng``'s device: the noise every op here uses.

    Philox4x32-10 (Salmon et al. 2011) keyed by the seed, counting (index // 4, stream), and Box-Muller
    in float32, then cast to ``dtype``. ``rng`` is int64 [2]: seed, stream. Not differentiable."""

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
    results."""

def uniform(size: Sequence[int] | int, rng: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform noise of shape ``size`` on ``rng``'s device, in the open interval (0, 1).

    u = (k + 1/2) / 2^b, k the upper b bits of the element's 32-bit word of Philox4x32-10, numbered as
    :func:`normal` numbers them; b is 23 in float32 and float64, 10 in float16, 7 in bfloat16. So u and 1 - u
    are exact in the type, never 0 or 1, and the same bits on every device. ``rng`` is int64 [2]; ``dtype`` is
    the result's. Not differentiable."""
