"""Fast Bayesian layers for PyTorch: fused sampling, local reparameterization and closed-form KL."""

from . import functional, layers, methods, metrics, models, priors, reference
from ._backend import backend, build_info, set_backend
from ._noise import fixed_noise, posterior_means
from ._version import __version__ as __version__
from .conversion import (
    convert,
    convert_state_dict,
    posterior_to_prior,
    prune,
    sparsity,
    summary,
    to_deterministic,
)
from .frozen import FrozenEnsemble, frozen_ensemble
from .inference import multi_sample, predict
from .losses import ELBO, get_beta, kl_loss
from .methods import Ensemble, mc_dropout
from .predictive import CategoricalPredictive, GaussianPredictive, Predictive, predictive

__all__ = [
    "ELBO",
    "CategoricalPredictive",
    "Ensemble",
    "FrozenEnsemble",
    "GaussianPredictive",
    "Predictive",
    "backend",
    "build_info",
    "convert",
    "convert_state_dict",
    "fixed_noise",
    "frozen_ensemble",
    "functional",
    "get_beta",
    "kl_loss",
    "layers",
    "mc_dropout",
    "methods",
    "metrics",
    "models",
    "multi_sample",
    "posterior_means",
    "posterior_to_prior",
    "predict",
    "predictive",
    "priors",
    "prune",
    "reference",
    "set_backend",
    "sparsity",
    "summary",
    "to_deterministic",
]
