"""By how much two implementations of one formula may differ: a few roundings of what it adds up.

The size of a rounding is the dtype's. What it is relative to is not the result, which may have cancelled, but
the sum of the magnitudes of its terms, and that is the same formula with every term made positive: positive
inputs, means, noise and incoming gradients give, forward and backward, an output and gradients whose every
summand is positive. So the reference runs once more in float64 in such a world; each element of each result
gets a bound of its own, and neither a sum that cancels nor a value of 1e18 needs a case of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bbb_fast import reference

# The noise is float32 in every dtype, and its error that of a sine or cosine times a radius of a few.
NOISE = 2.0**-23
# A result's own roundings, and those of its operands.
ROUNDINGS = 8.0


def _positive_kl(
    mu: Sequence[Tensor],
    rho: Sequence[Tensor],
    prior_mu: float | Sequence[float],
    prior_sigma: float | Sequence[float],
) -> Tensor:
    """The sum of the magnitudes of the KL's terms, and as its gradient that of its gradient's terms."""
    each = zip(*reference.as_lists(mu, rho, prior_mu, prior_sigma), strict=True)
    value: Tensor | float = 0.0
    slope: Tensor | float = 0.0
    for numbers in each:
        m, r, m_p, s_p = (torch.as_tensor(n).double() for n in numbers)
        squares = 0.5 * ((reference.softplus(r) / s_p) ** 2 + ((m + m_p.abs()) / s_p) ** 2)
        log_sigma = reference.log_softplus(r)
        value = value + (squares + (log_sigma - s_p.log()).abs() + 0.5).sum().detach()
        slope = slope + (squares + log_sigma).sum()
    return value + (slope - slope.detach()) if isinstance(slope, Tensor) else torch.zeros(())


@contextmanager
def positive_world(noise: bool = True) -> Iterator[None]:
    """Inside, the reference path adds up magnitudes; without ``noise`` those of the means alone.

    The noise counts as its magnitude and one more, since its error does not get smaller with it.
    """
    draw, draw_signs = reference.normal, reference.signs

    def positive(*args: Any, **options: Any) -> Tensor:
        eps = draw(*args, **options)
        return eps.abs() + 1.0 if noise else torch.zeros_like(eps)

    with (
        mock.patch.object(reference, "normal", positive),
        mock.patch.object(reference, "signs", lambda *args: draw_signs(*args).abs()),
        mock.patch.object(reference, "kl_divergence", _positive_kl),
    ):
        yield


def bound(
    magnitude: Tensor,
    noiseless: Tensor | None,
    dtypes: Sequence[torch.dtype],
    terms: int,
    operand: float,
) -> Tensor:
    """The largest difference of two results whose terms' magnitudes add up to ``magnitude``.

    ``dtypes`` are those that the result's operands were rounded to. ``terms`` is the longest sum in it, whose
    own roundings, float32's at least, grow like a random walk; ``operand`` the largest number met (float16
    rounds small ones to multiples of 2^-24, whatever they are multiplied with). ``noiseless``, in float64, is
    the part that has float64's error.
    """
    sum_dtype = torch.float64 if noiseless is not None else torch.float32
    factor = ROUNDINGS + terms**0.5
    unit = max(torch.finfo(dtype).eps for dtype in dtypes)
    limit = (ROUNDINGS * unit + terms**0.5 * torch.finfo(sum_dtype).eps) * magnitude
    if noiseless is not None:
        limit = limit + factor * NOISE * (magnitude - noiseless).clamp(min=0.0)
    least = max(torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps for dtype in dtypes)
    return limit + factor * least * (1.0 + operand)
