"""From torch.nn models to Bayesian ones and back, and what a model consists of."""

from .bayesian import convert, posterior_to_prior
from .deterministic import to_deterministic
from .sparse import Sparsity, prune, sparsity
from .summary import Row, Summary, summary

__all__ = [
    "Row",
    "Sparsity",
    "Summary",
    "convert",
    "posterior_to_prior",
    "prune",
    "sparsity",
    "summary",
    "to_deterministic",
]
