"""From torch.nn models to Bayesian ones and back, and what a model consists of."""

from .bayesian import convert, posterior_to_prior
from .deterministic import to_deterministic
from .summary import Row, Summary, summary

__all__ = ["Row", "Summary", "convert", "posterior_to_prior", "summary", "to_deterministic"]
