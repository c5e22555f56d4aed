"""Fast Bayesian layers for PyTorch: fused sampling, local reparameterization and closed-form KL."""

from . import functional, layers, metrics, models, reference
from ._backend import backend, build_info, set_backend
from ._noise import fixed_noise
from ._version import __version__ as __version__
from .inference import predict
from .losses import ELBO, get_beta, kl_loss

__all__ = [
    "ELBO",
    "backend",
    "build_info",
    "fixed_noise",
    "functional",
    "get_beta",
    "kl_loss",
    "layers",
    "metrics",
    "models",
    "predict",
    "reference",
    "set_backend",
]
