"""Priors of Gaussian weights: what the layers' ``priors`` may hold, and its defaults."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor

from .reference import softplus

__all__ = ["BIAS_KEYS", "DEFAULT_PRIORS", "PriorValue", "empirical_sigma", "resolve_priors"]

# A number for all weights, or a tensor with one for each; of sigma also that which makes the KL least.
PriorValue = float | Tensor | Literal["empirical"]

DEFAULT_PRIORS: dict[str, Any] = {
    "prior_mu": 0.0,
    "prior_sigma": 0.1,
    "posterior_mu_initial": (0.0, 0.1),
    "posterior_rho_initial": (-3.0, 0.1),
}
# A bias's own prior; without, it has the weight's numbers, or beside a weight's tensors the default ones.
BIAS_KEYS = ("bias_prior_mu", "bias_prior_sigma")


def _finite(key: str, value: Any) -> float:
    # NumPy's numbers are Real too.
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"priors[{key!r}] must be a finite number, got {value!r}")
    return float(value)


def _prior_value(key: str, value: Any) -> PriorValue:
    sigma = key.endswith("sigma")
    if sigma and isinstance(value, str) and value == "empirical":
        return value
    if isinstance(value, Tensor):
        value = value.detach()
        if not value.is_floating_point():
            raise ValueError(f"priors[{key!r}] must be a floating-point tensor, got {value.dtype}")
        if value.device.type != "meta" and not (value.isfinite() & (value > 0 if sigma else True)).all():
            raise ValueError(f"priors[{key!r}] must be finite{' and > 0' if sigma else ''} everywhere")
        return value
    value = _finite(key, value)
    if sigma and value <= 0:
        raise ValueError(f"priors[{key!r}] must be > 0, got {value!r}")
    return value


def resolve_priors(priors: Mapping[str, Any] | None) -> dict[str, Any]:
    """Fills in the defaults and checks every value.

    ``prior_mu`` and ``prior_sigma`` (> 0) describe p = N(prior_mu, prior_sigma^2): numbers, or tensors of the
    weight's shape; ``prior_sigma="empirical"`` is the sigma at which the KL is least
    (:func:`empirical_sigma`). ``bias_prior_mu`` and ``bias_prior_sigma`` are the bias's own, by default the
    weight's numbers. ``posterior_mu_initial`` and ``posterior_rho_initial`` are (mean, std >= 0) of the
    normal distributions that mu and rho are initialised from. Raises ValueError (a wrong value, or an unknown
    key: the message lists the known ones) or TypeError (not a mapping).
    """
    if priors is not None and not isinstance(priors, Mapping):
        raise TypeError(f"priors must be a dict or None, got {type(priors).__name__}")
    known = [*DEFAULT_PRIORS, *BIAS_KEYS]
    unknown = [key for key in priors or {} if key not in known]
    if unknown:
        raise ValueError(f"unknown prior keys {unknown}; known: {', '.join(known)}")
    resolved = {**DEFAULT_PRIORS, **dict.fromkeys(BIAS_KEYS), **(priors or {})}
    for key in ("prior_mu", "prior_sigma"):
        resolved[key] = _prior_value(key, resolved[key])
    for key in BIAS_KEYS:
        if resolved[key] is not None:
            resolved[key] = _prior_value(key, resolved[key])
    for key in ("posterior_mu_initial", "posterior_rho_initial"):
        pair = resolved[key]
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise ValueError(f"priors[{key!r}] must be a pair (mean, std), got {pair!r}")
        mean, std = (_finite(key, v) for v in pair)
        if std < 0:
            raise ValueError(f"priors[{key!r}] must have std >= 0, got {std!r}")
        resolved[key] = (mean, std)
    return resolved


def empirical_sigma(mu: Tensor, rho: Tensor, prior_mu: float | Tensor) -> Tensor:
    """The prior's sigma at which KL(q || N(prior_mu, sigma^2)) of a tensor is least: a scalar, a constant.

    sigma^2 is the mean of sigma_i^2 + (mu_i - prior_mu)^2. As the KL's derivative by it is 0 there, that of
    mu and rho is right though no gradient goes through it.
    """
    with torch.no_grad():
        m, s = mu.double(), softplus(rho.double())
        return (s.square() + (m - prior_mu).square()).mean().sqrt()
