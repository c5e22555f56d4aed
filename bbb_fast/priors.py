"""Priors of Gaussian weights: what the layers' ``priors`` may hold, its defaults, and other priors' KLs.

``DEFAULT_PRIORS``: what a missing key of ``priors`` is. ``BIAS_KEYS``: the keys of a bias's own prior.
``PriorValue``: the type of a prior's mean or sigma, a number, a tensor of the weight's shape or, for sigma,
"empirical".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor

from ._noise import draw_rng
from .reference import log_softplus, normal, softplus

__all__ = [
    "BIAS_KEYS",
    "DEFAULT_PRIORS",
    "LogUniform",
    "Prior",
    "PriorValue",
    "ScaleMixture",
    "empirical_sigma",
    "resolve_priors",
]

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


class Prior:
    """A prior that is no Gaussian: it forms the KL of Gaussian posteriors by itself."""

    # What :meth:`kl` gives: "approximation", or an "estimate" that differs from call to call.
    kind: str

    def kl(self, mu: Tensor, rho: Tensor) -> Tensor:
        """KL(q || p) of q = N(mu, softplus(rho)^2), summed: a scalar, differentiable in both."""
        raise NotImplementedError


class LogUniform(Prior):
    """p(|w|) proportional to 1 / |w|: sparse variational dropout.

    The KL depends on alpha = sigma^2 / mu^2 alone, is known up to a constant, and is approximated within
    0.009: Molchanov, Ashukha and Vetrov, "Variational dropout sparsifies deep neural networks", ICML 2017,
    eq. 14; the constant makes it 0 for alpha -> infinity. Weights whose alpha grows are noise:
    :func:`bbb_fast.sparsity` counts them and :func:`bbb_fast.prune` sets them to 0.
    """

    kind = "approximation"
    # k1, k2, k3 of eq. 14; and what keeps ln(mu^2) finite at 0.
    _K1, _K2, _K3, _LEAST = 0.63576, 1.87320, 1.48695, 1e-8

    def log_alpha(self, mu: Tensor, rho: Tensor) -> Tensor:
        """ln(sigma^2 / mu^2) of each weight, float32 (float64 for float64), shaped like mu and rho."""
        wide = torch.promote_types(mu.dtype, torch.float32)
        m, r = mu.to(wide), rho.to(wide)
        return 2.0 * log_softplus(r) - torch.log(m.square() + self._LEAST)

    def kl(self, mu: Tensor, rho: Tensor) -> Tensor:
        log_alpha = self.log_alpha(mu, rho)
        rises = self._K1 * torch.sigmoid(self._K2 + self._K3 * log_alpha)
        # ln(1 + 1 / alpha), without overflow.
        return (self._K1 - rises + 0.5 * torch.nn.functional.softplus(-log_alpha)).sum()

    def __repr__(self) -> str:
        return "LogUniform()"


class ScaleMixture(Prior):
    """p(w) = pi N(0, sigma1^2) + (1 - pi) N(0, sigma2^2): a wide and a narrow Gaussian.

    Blundell et al., "Weight uncertainty in neural networks", ICML 2015, section 3.3. The KL has no closed
    form: each call estimates it from one draw of the weights, ln q(w) - ln p(w), unbiased and of either sign.

    Args: ``pi`` in (0, 1); ``sigma1`` and ``sigma2`` > 0. Raises ValueError otherwise.
    """

    kind = "estimate"

    def __init__(self, pi: float = 0.5, sigma1: float = 1.0, sigma2: float = math.exp(-6)) -> None:
        for name, value, most in (
            ("pi", pi, 1.0),
            ("sigma1", sigma1, math.inf),
            ("sigma2", sigma2, math.inf),
        ):
            if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value < most:
                raise ValueError(f"ScaleMixture: {name} must be in (0, {most:g}), got {value!r}")
        self.pi, self.sigma1, self.sigma2 = float(pi), float(sigma1), float(sigma2)

    def log_density(self, w: Tensor) -> Tensor:
        """ln p(w) of each weight, shaped like w."""
        parts = [
            math.log(share) - math.log(sigma) - 0.5 * (w / sigma).square()
            for share, sigma in ((self.pi, self.sigma1), (1 - self.pi, self.sigma2))
        ]
        return torch.logaddexp(*parts) - 0.5 * math.log(2 * math.pi)

    def kl(self, mu: Tensor, rho: Tensor) -> Tensor:
        wide = torch.promote_types(mu.dtype, torch.float32)
        m, r = mu.to(wide), rho.to(wide)
        eps = normal(m.shape, draw_rng(m.device), dtype=wide)
        w = m + softplus(r) * eps
        # ln q(w): mu has no part in it but through w.
        log_q = -log_softplus(r) - 0.5 * eps.square() - 0.5 * math.log(2 * math.pi)
        return (log_q - self.log_density(w)).sum()

    def __repr__(self) -> str:
        return f"ScaleMixture(pi={self.pi:g}, sigma1={self.sigma1:g}, sigma2={self.sigma2:g})"


def _finite(key: str, value: Any) -> float:
    # NumPy's numbers are Real too.
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"priors[{key!r}] must be a finite number, got {value!r}")
    return float(value)


def _prior_value(key: str, value: Any) -> PriorValue:
    sigma = key.endswith("sigma")
    if sigma and isinstance(value, str) and value == "empirical":
        return "empirical"
    if isinstance(value, Tensor):
        tensor: Tensor = value.detach()
        if not tensor.is_floating_point():
            raise ValueError(f"priors[{key!r}] must be a floating-point tensor, got {tensor.dtype}")
        if tensor.device.type != "meta" and not (tensor.isfinite() & (tensor > 0 if sigma else True)).all():
            raise ValueError(f"priors[{key!r}] must be finite{' and > 0' if sigma else ''} everywhere")
        return tensor
    number = _finite(key, value)
    if sigma and number <= 0:
        raise ValueError(f"priors[{key!r}] must be > 0, got {number!r}")
    return number


def resolve_priors(priors: Mapping[str, Any] | None) -> dict[str, Any]:
    """Fills in the defaults of ``priors``, a mapping or None, and checks every value.

    ``prior_mu`` and ``prior_sigma`` (> 0) describe p = N(prior_mu, prior_sigma^2): numbers, or tensors of the
    weight's shape; ``prior_sigma="empirical"`` is the sigma at which the KL is least
    (:func:`empirical_sigma`). ``bias_prior_mu`` and ``bias_prior_sigma`` are the bias's own, by default the
    weight's numbers. ``posterior_mu_initial`` and ``posterior_rho_initial`` are (mean, std >= 0) of the
    normal distributions that mu and rho are initialised from. ``prior`` is a :class:`Prior` of another
    kind, for weight and bias, in the place of the numbers. Raises ValueError (a wrong value, or an unknown
    key: the message lists the known ones) or TypeError (not a mapping).
    """
    if priors is not None and not isinstance(priors, Mapping):
        raise TypeError(f"priors must be a dict or None, got {type(priors).__name__}")
    known = [*DEFAULT_PRIORS, *BIAS_KEYS, "prior"]
    unknown = [key for key in priors or {} if key not in known]
    if unknown:
        raise ValueError(f"unknown prior keys {unknown}; known: {', '.join(known)}")
    resolved = {**DEFAULT_PRIORS, **dict.fromkeys(BIAS_KEYS), "prior": None, **(priors or {})}
    if resolved["prior"] is not None:
        if not isinstance(resolved["prior"], Prior):
            raise ValueError(
                f"priors['prior'] must be a bbb_fast.priors.Prior or None, got {resolved['prior']!r}"
            )
        beside = [key for key in ("prior_mu", "prior_sigma", *BIAS_KEYS) if key in (priors or {})]
        if beside:
            raise ValueError(f"priors['prior'] takes the place of {', '.join(beside)}: give one or the other")
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
