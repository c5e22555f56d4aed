"""Dropout that draws in train and in eval mode: a posterior over functions, not only a regulariser."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _checks, functional, reference
from .._noise import RandomModule, draw_rng

__all__ = ["ConcreteDropout", "MCDropout", "MCDropout1d", "MCDropout2d", "MCDropout3d"]


class _Mask(RandomModule):
    """A module that drops parts of its input."""

    def _rng_of_mask(self, input: Tensor, sample: bool) -> tuple[Tensor, bool] | None:
        """The ``rng`` of a forward's mask, and whether all rows share it; None where nothing is dropped."""
        if not isinstance(input, Tensor):
            raise TypeError(f"{type(self).__name__}: input must be a tensor, got {type(input).__name__}")
        draw = self.wanted_draw() if sample else None
        if draw is None or draw.means:
            return None
        if draw.pinned is None:
            return draw_rng(input.device), False
        # Only a mask that all rows share is one function.
        return draw.pinned.rng(self, input.device), draw.pinned.draw == "weights"


class MCDropout(_Mask):
    """``torch.nn.Dropout`` that drops in eval mode too: Monte Carlo dropout.

    Gal and Ghahramani, "Dropout as a Bayesian approximation", ICML 2016 (arXiv:1506.02142): a network
    trained with dropout before each of its layers approximates the posterior of a Gaussian process, and each
    mask is a draw of it. Each element of the input is dropped with probability ``p``, others are scaled by
    1 / (1 - p) (:func:`bbb_fast.functional.dropout`).

    input: any shape, dimension 0 being the rows (an input of one dimension is one row); any floating dtype.
    Each forward draws a fresh mask for every row. Under ``fixed_noise`` all rows share one, so that a draw is
    one function of a row; with ``draw="activations"`` each row has its own. Under ``posterior_means()`` and
    with ``sample=False`` the output is the input.

    Raises ValueError for ``p`` outside [0, 1], TypeError for what is no number.
    """

    _whole_channels = False

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.p = _checks.number(type(self).__name__, "p", p)
        _checks.probability(type(self).__name__, "p", self.p)

    def forward(self, input: Tensor, sample: bool = True) -> Tensor:
        """The input with parts of it dropped; as it is where ``sample`` is False."""
        drawn = self._rng_of_mask(input, sample)
        if drawn is None:
            return input
        rng, one_mask = drawn
        return functional.dropout(input, rng, self.p, channels=self._whole_channels, one_mask=one_mask)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class _ChannelDropout(MCDropout):
    """Drops whole channels of [N, C, ...] with so many dimensions behind, or none."""

    _whole_channels = True
    _layout: str
    _dims: tuple[int, ...]

    def forward(self, input: Tensor, sample: bool = True) -> Tensor:
        """The input with some of its channels dropped; as it is where ``sample`` is False."""
        if isinstance(input, Tensor) and input.dim() not in self._dims:
            raise ValueError(
                f"{type(self).__name__}: input must be {self._layout} or [N, C], got {list(input.shape)}"
            )
        return super().forward(input, sample)


class MCDropout1d(_ChannelDropout):
    """:class:`MCDropout` of whole channels of [N, C, L] or [N, C]; ValueError for others.

    (``torch.nn.Dropout1d`` reads two dimensions as [C, L].)
    """

    _layout, _dims = "[N, C, L]", (2, 3)


class MCDropout2d(_ChannelDropout):
    """:class:`MCDropout` of whole channels of [N, C, H, W] or [N, C]; ValueError for others."""

    _layout, _dims = "[N, C, H, W]", (2, 4)


class MCDropout3d(_ChannelDropout):
    """:class:`MCDropout` of whole channels of [N, C, D, H, W] or [N, C]; ValueError for others."""

    _layout, _dims = "[N, C, D, H, W]", (2, 5)


_CONVOLUTIONS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)


class ConcreteDropout(_Mask):
    """A linear layer or a convolution behind dropout whose rate is learned.

    Gal, Hron and Kendall, "Concrete dropout", NeurIPS 2017 (arXiv:1705.07832). The layer's inputs are
    multiplied by (1 - z) / (1 - p), z = sigmoid((ln p - ln(1 - p) + ln u - ln(1 - u)) / t) with u uniform in
    (0, 1): a relaxation of "dropped" (z near 1, with probability p) that p has a gradient through. There is
    one z for each element of a linear layer's input, one for each row and channel of a convolution's.

    ``kl_loss()`` is the KL of the posterior over the weights from N(0, 1 / l^2), but for a constant:
    l^2 / 2 (||W||^2 / (1 - p) + ||b||^2) - K H(p), K the number of input features or channels and H(p) =
    -p ln p - (1 - p) ln(1 - p). (The paper has l^2 (1 - p) / 2 ||M||^2 - K H(p), M being the weights of an
    input that is kept: W / (1 - p), as such inputs are scaled here.) Like every KL here it is that of the
    whole data set, and ``bbb_fast.kl_loss`` adds it to those of Bayesian layers, so that ``ELBO`` trains the
    rate with the weights. It may be negative. Use no weight decay beside it.

    Noise, train and eval mode, ``fixed_noise`` and ``posterior_means`` as in :class:`MCDropout`: under
    ``fixed_noise`` all rows share one z.

    Args:
        layer: a ``nn.Linear``, ``nn.Conv1d/2d/3d`` or ``nn.ConvTranspose1d/2d/3d``; its parameters keep their
            names under ``layer.``.
        p: the rate to start from, in (0, 1). The parameter ``p_logit`` is ln p - ln(1 - p).
        length_scale: l; 1, the default, is the prior N(0, 1) over each weight. (The default prior of the
            Bayesian layers, N(0, 0.1^2), is a length scale of 10.)
        temperature: t; the smaller, the nearer z is to 0 and 1, and the noisier the rate's gradient.

    Raises TypeError for another kind of layer, ValueError for numbers out of range and for inputs of another
    number of dimensions than [N, in_channels, ...] of a convolution.
    """

    layer: nn.Linear | nn.modules.conv._ConvNd

    def __init__(
        self, layer: nn.Module, p: float = 0.1, *, length_scale: float = 1.0, temperature: float = 0.1
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if not isinstance(layer, (nn.Linear, *_CONVOLUTIONS)):
            raise TypeError(
                f"{name}: layer must be a torch.nn linear layer or convolution, got {type(layer).__name__}"
            )
        if _checks.is_lazy(layer):
            raise ValueError(f"{name}: the layer is lazy; run it once first, so that its weight has a shape")
        p = _checks.number(name, "p", p)
        if not 0 < p < 1:
            raise ValueError(f"{name}: p must be in (0, 1), got {p:g}")
        for label, value in (("length_scale", length_scale), ("temperature", temperature)):
            if not 0 < _checks.number(name, label, value) < math.inf:
                raise ValueError(f"{name}: {label} must be finite and > 0, got {value:g}")
        self.layer = layer
        self.length_scale, self.temperature = float(length_scale), float(temperature)
        self.p_logit = nn.Parameter(layer.weight.new_full((), math.log(p) - math.log1p(-p)))

    @property
    def p(self) -> Tensor:
        """The rate as it is now: a scalar without gradient."""
        return torch.sigmoid(self.p_logit.detach())

    def forward(self, input: Tensor, sample: bool = True) -> Tensor:
        """The layer's output for one draw of the mask; of the whole input where ``sample`` is False."""
        drawn = self._rng_of_mask(input, sample)
        output: Tensor = self.layer(input if drawn is None else self._masked(input, *drawn))
        return output

    def _masked(self, input: Tensor, rng: Tensor, one_mask: bool) -> Tensor:
        shape: Sequence[int] = input.shape
        behind: tuple[int, ...] = ()
        if not isinstance(self.layer, nn.Linear):
            dims = self.layer.weight.dim()
            if input.dim() != dims:
                raise ValueError(
                    f"{type(self).__name__}: input must have {dims} dimensions [N, in_channels, ...], got "
                    f"{list(input.shape)}"
                )
            shape, behind = input.shape[:2], (1,) * (dims - 2)
        acc = reference.accumulate_dtype(input, self.p_logit)
        u = functional.uniform(shape[-1:] if one_mask else shape, rng, dtype=acc)
        logit = self.p_logit.to(acc)
        dropped = (logit + u.log() - (-u).log1p()) / self.temperature
        # (1 - z) / (1 - p), formed without a difference.
        factor = torch.sigmoid(-dropped) * (1 + logit.exp())
        return (input.to(acc) * factor.reshape(*factor.shape, *behind)).to(input.dtype)

    def kl_loss(self) -> Tensor:
        """KL(q || p) but for a constant: a differentiable scalar, of the parameters as they are now."""
        weight, bias = self.layer.weight, self.layer.bias
        acc = reference.accumulate_dtype(weight, self.p_logit)
        logit = self.p_logit.to(acc)
        squares = weight.to(acc).square().sum() * (1 + logit.exp())
        if bias is not None:
            squares = squares + bias.to(acc).square().sum()
        p = torch.sigmoid(logit)
        entropy = -(p * F.logsigmoid(logit) + (1 - p) * F.logsigmoid(-logit))
        layer = self.layer
        count = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
        return self.length_scale**2 / 2 * squares - count * entropy

    def extra_repr(self) -> str:
        return f"length_scale={self.length_scale:g}, temperature={self.temperature:g}"
