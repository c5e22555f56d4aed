"""Other ways to an uncertain answer than Bayesian layers, under the same ``fixed_noise`` and
``predictive``."""

from .ensemble import Ensemble, fgsm, train_members

__all__ = ["Ensemble", "fgsm", "train_members"]
