"""Other ways than weight posteriors to a model that knows how sure it is."""

from .mc_dropout import mc_dropout, model_precision

__all__ = ["mc_dropout", "model_precision"]
