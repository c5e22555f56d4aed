"""Methods that answer with uncertainty, around any model of ``torch.nn`` or of Bayesian layers."""

from .heteroscedastic import (
    GaussianNoise,
    HeteroscedasticHead,
    SampledSoftmax,
    gaussian_nll,
    sampled_logits_nll,
)
from .temperature import TemperatureScaling

__all__ = [
    "GaussianNoise",
    "HeteroscedasticHead",
    "SampledSoftmax",
    "TemperatureScaling",
    "gaussian_nll",
    "sampled_logits_nll",
]
