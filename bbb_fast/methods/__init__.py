"""Other ways than weight posteriors to a model that knows how sure it is, under the same ``fixed_noise``."""

from .ensemble import Ensemble, fgsm, train_members
from .heteroscedastic import (
    GaussianNoise,
    HeteroscedasticHead,
    SampledSoftmax,
    gaussian_nll,
    sampled_logits_nll,
)
from .laplace import LaplaceLinear, last_layer_laplace
from .mc_dropout import mc_dropout, model_precision
from .temperature import TemperatureScaling

__all__ = [
    "Ensemble",
    "GaussianNoise",
    "HeteroscedasticHead",
    "LaplaceLinear",
    "SampledSoftmax",
    "TemperatureScaling",
    "fgsm",
    "gaussian_nll",
    "last_layer_laplace",
    "mc_dropout",
    "model_precision",
    "sampled_logits_nll",
    "train_members",
]
