"""Temperature scaling: one number, fitted after training, that makes a classifier as sure as it is right."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..metrics._inputs import check_finite, check_labels, check_tensor

__all__ = ["TemperatureScaling"]

# Of the temperature. Beyond them the softmax of ordinary logits is one-hot, or uniform.
_LOWEST, _HIGHEST = 0.01, 100.0
# An odd number of steps apart, so that 1 is among those tried first.
_TRIED_FIRST = 25
_GOLDEN = (math.sqrt(5) - 1) / 2
# Of the logarithm of the temperature, where the search ends: a millionth of the temperature.
_CLOSE = 1e-6


class TemperatureScaling(nn.Module):
    """A classifier whose logits are divided by a temperature, fitted to held-out data by :meth:`fit`.

    ``model``: any module that returns logits, or a tuple with the logits first (a ``ModuleWrapper``'s
    ``(output, kl)``), whose other elements pass through. The most probable class of one forward stays the
    same; its probability changes. A model that draws at random still does: ``fixed_noise``, ``predict`` and
    ``multi_sample`` see it inside. ``temperature``, a buffer (in the ``state_dict``, of no optimizer), is 1
    until :meth:`fit`; above 1 it makes predictions less sure.

    Raises TypeError for a model that is no module, and in forward for outputs that are no tensor.

    Guo, Pleiss, Sun, Weinberger 2017, "On calibration of modern neural networks" (arXiv:1706.04599),
    section 4.2, eq. 9.
    """

    temperature: Tensor

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"TemperatureScaling: model must be a torch.nn.Module, got {type(model).__name__}"
            )
        self.model = model
        parameter = next(model.parameters(), None)
        device = None if parameter is None else parameter.device
        self.register_buffer("temperature", torch.ones((), dtype=torch.float32, device=device))

    def forward(self, *args: Any, **options: Any) -> Any:
        """What the model returns, its logits [..., C] divided by the temperature."""
        result = self.model(*args, **options)
        if isinstance(result, Tensor):
            return result / self.temperature
        if isinstance(result, tuple) and result and isinstance(result[0], Tensor):
            scaled = (result[0] / self.temperature, *result[1:])
            return type(result)(*scaled) if hasattr(result, "_fields") else scaled
        raise TypeError(
            "TemperatureScaling: the model must return a tensor of logits, or a tuple whose first element is "
            f"one, got {type(result).__name__}"
        )

    @torch.no_grad()
    def fit(self, logits: Tensor, labels: Tensor) -> TemperatureScaling:
        """Sets the temperature that has the lowest NLL on held-out data, which the model has not trained on.

        ``-1/N sum_n ln(1/T sum_t softmax(logits[t, n] / temperature)[labels[n]])``: of several draws it is
        the NLL of their mean probability, which is what a random model predicts with. The search is in
        float64, over the logarithm of the temperature: 25 values from 0.01 to 100, then golden sections
        around the best. Equal values go to the temperature nearest 1.

        Where no wrong prediction holds it back, the best temperature is 0, and what is left of that is 0.01,
        or the first one tried at which the NLL rounds to 0; where the labels are not what the logits say it
        is infinity, and 100. Such a fit gives a UserWarning: the data do not say how sure to be.

        Args: logits, floating, finite, [N, C], or [T, N, C] for T draws: ``predict(scaled.model, x, T)``,
        that is of the model inside, before any temperature; labels, int64 [N], 0 ... C - 1, on the device
        of the logits. Returns the module itself. Raises TypeError for what is no tensor, ValueError for
        other shapes, dtypes, devices and labels, for empty tensors, NaN and infinity.
        """
        x = check_tensor("logits", logits, "N, C", "T, N, C")
        check_finite("logits", x)
        draws = x if x.ndim == 3 else x.unsqueeze(0)
        labels = check_labels(labels, draws[0], logits.device, "logits")
        nll = _nll_of_log_temperature(draws, labels)
        lowest, highest = math.log(_LOWEST), math.log(_HIGHEST)
        best, at_bound = _minimum(nll, lowest, highest)
        if at_bound:
            warnings.warn(
                f"TemperatureScaling: the NLL is lowest at the end of what is searched, {_LOWEST:g} to "
                f"{_HIGHEST:g}: the data do not tell the temperature (no prediction is wrong, or all labels "
                f"speak against the logits); it is set to {math.exp(best):.4g}",
                stacklevel=3,  # past no_grad's own frame
            )
        self.temperature.fill_(math.exp(best))
        return self

    def extra_repr(self) -> str:
        return f"temperature={self.temperature.item():.6g}"


def _nll_of_log_temperature(draws: Tensor, labels: Tensor) -> Callable[[float], float]:
    """The NLL of the mean over [T, N, C] draws as a function of ln(temperature)."""
    where = labels.expand(len(draws), -1).unsqueeze(-1)
    draws = draws.to(torch.float64)
    # Seen from the label's own logit, so that ln p = -logsumexp: equal logits give ln C at any temperature.
    margins = draws - draws.gather(-1, where)

    def nll(log_temperature: float) -> float:
        inverse = math.exp(-log_temperature)
        # Draw by draw: no further tensor of the size of all of them.
        log_probs = torch.stack([-torch.logsumexp(draw * inverse, -1) for draw in margins])
        return math.log(len(draws)) - float(torch.logsumexp(log_probs, 0).mean())

    return nll


def _minimum(function: Callable[[float], float], low: float, high: float) -> tuple[float, bool]:
    """Where a function of one number is lowest between two others, and whether an end is as low.

    A mean over draws may have several minima, of which the values that are tried first find the lowest; of
    one draw it has one (it is convex in the inverse of the temperature).
    """
    step = (high - low) / (_TRIED_FIRST - 1)
    places = [low + k * step for k in range(_TRIED_FIRST)]
    values = [function(place) for place in places]
    value, _, place = min(zip(values, map(abs, places), places, strict=True))
    a, b = max(low, place - step), min(high, place + step)
    c, d = b - _GOLDEN * (b - a), a + _GOLDEN * (b - a)
    at_c, at_d = function(c), function(d)
    while b - a > _CLOSE:
        if at_c <= at_d:
            b, d, at_d = d, c, at_c
            c = b - _GOLDEN * (b - a)
            at_c = function(c)
        else:
            a, c, at_c = c, d, at_d
            d = a + _GOLDEN * (b - a)
            at_d = function(d)
    found, at = min((at_c, c), (at_d, d))
    if found < value:
        value, place = found, at
    return place, min(values[0], values[-1]) <= value
