"""Other ways than weight posteriors to a model that knows how sure it is, under the same ``fixed_noise``."""

from .ensemble import Ensemble, fgsm, train_members
from .mc_dropout import mc_dropout, model_precision

__all__ = ["Ensemble", "fgsm", "mc_dropout", "model_precision", "train_members"]
