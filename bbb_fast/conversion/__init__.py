"""From torch.nn models to Bayesian ones and back, and what a model consists of."""

from .bayesian import convert, posterior_to_prior
from .deterministic import to_deterministic
from .libraries import convert_state_dict
from .sparse import Sparsity, prune, sparsity
from .summary import Row, Summary, summary

__all__ = [
    "Row",
    "Sparsity",
    "Summary",
    "convert",
    "convert_state_dict",
    "posterior_to_prior",
    "prune",
    "sparsity",
    "summary",
    "to_deterministic",
]
