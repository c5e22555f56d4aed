"""summary: what of a model is Bayesian, what is not, and what each part has learned."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import is_lazy
from ..layers import ConcreteDropout
from ..layers.base import BayesianModule, Term, kl_of_terms
from ..reference import softplus


@dataclass(frozen=True)
class Row:
    """A module with parameters of its own.

    Attributes:
        name: in the model.
        kind: its class.
        parameters: weights and biases, each counted once.
        shape: of its tensors.
        estimator, prior: in words; None of a module that is not Bayesian.
        kl: a number; likewise.
        sigma, signal_to_noise: the means of sigma and of |mu| / sigma; likewise, and None of dropout.
    """

    name: str
    kind: str
    parameters: int
    shape: str
    estimator: str | None = None
    prior: str | None = None
    kl: float | None = None
    sigma: float | None = None
    signal_to_noise: float | None = None


@dataclass(frozen=True)
class Summary:
    """The rows of a model, in its order, and their sums; ``print`` shows a table.

    Attributes:
        rows: a :class:`Row` for each module that has parameters.
        kl: of all rows.
        bayesian_parameters, other_parameters: how many weights have a posterior, and how many have none.
    """

    rows: tuple[Row, ...]
    kl: float
    bayesian_parameters: int
    other_parameters: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON takes them."""
        return asdict(self)

    def __str__(self) -> str:
        head = ("layer", "kind", "estimator", "shape", "prior", "KL", "mean sigma", "|mu| / sigma")
        lines: list[tuple[str, ...]] = [head]
        for row in self.rows:
            numbers = (row.kl, row.sigma, row.signal_to_noise)
            shown = ["" if n is None else f"{n:.4g}" for n in numbers]
            estimator = "not Bayesian" if row.estimator is None else row.estimator
            lines.append((row.name or "(model)", row.kind, estimator, row.shape, row.prior or "", *shown))
        widths = [max(len(line[k]) for line in lines) for k in range(len(head))]
        numbers_from = head.index("KL")

        def cells(line: tuple[str, ...]) -> str:
            padded = (
                cell.rjust(width) if k >= numbers_from else cell.ljust(width)
                for k, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            return "  ".join(padded)

        text = [cells(line) for line in lines]
        text.insert(1, "  ".join("-" * w for w in widths))
        text.append(
            f"KL {self.kl:.6g} over {self.bayesian_parameters:,} weights; "
            f"{self.other_parameters:,} parameters are not Bayesian"
        )
        return "\n".join(line.rstrip() for line in text)


@torch.no_grad()
def summary(model: nn.Module) -> Summary:
    """A row for each module of ``model`` that has parameters; what several share counts in the first.

    Raises TypeError for what is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"summary: model must be a torch.nn.Module, got {type(model).__name__}")
    rows: list[Row] = []
    # By id; kept, as a parametrized layer forms its means when it is asked.
    counted: dict[int, Tensor] = {}
    inside: set[nn.Module] = set()
    weights = others = 0
    for name, module in model.named_modules():
        if module in inside:
            continue
        if isinstance(module, BayesianModule) and not is_lazy(module):
            inside.update(module.modules())
            row = _bayesian_row(name, module, counted)
            weights += row.parameters
        elif isinstance(module, ConcreteDropout):
            inside.update(module.modules())
            row = _row_of_dropout(name, module, counted)
            weights += row.parameters
        else:
            own = [p for p in module.parameters(recurse=False) if id(p) not in counted]
            counted.update((id(p), p) for p in own)
            if not own:
                continue
            lazy = nn.parameter.UninitializedParameter
            shape = ", ".join("not initialised" if isinstance(p, lazy) else str(list(p.shape)) for p in own)
            size = sum(0 if isinstance(p, lazy) else p.numel() for p in own)
            estimator = module.estimator if isinstance(module, BayesianModule) else None
            row = Row(name, type(module).__name__, size, shape, estimator)
            others += row.parameters
        rows.append(row)
    return Summary(tuple(rows), sum(row.kl or 0.0 for row in rows), weights, others)


def _bayesian_row(name: str, module: BayesianModule, counted: dict[int, Tensor]) -> Row:
    pairs, terms = module.posterior(), module.terms()
    fresh = [pair for pair in pairs if id(pair[0]) not in counted]
    owners = {id(mu) for mu, _ in fresh}
    of_fresh = [t for t in terms if id(t.mu if t.mu._base is None else t.mu._base) in owners]
    counted.update((id(mu), mu) for mu, _ in pairs)
    sigmas = [softplus(rho.double()) for _, rho in pairs]
    count = sum(s.numel() for s in sigmas)
    ratios = [(mu.double().abs() / s).sum() for (mu, _), s in zip(pairs, sigmas, strict=True)]
    # A model on the meta device has no numbers.
    known = pairs[0][0].device.type != "meta"
    return Row(
        name,
        type(module).__name__,
        sum(mu.numel() for mu, _ in fresh),
        ", ".join(str(list(mu.shape)) for mu, _ in pairs[:2]) + (", ..." if len(pairs) > 2 else ""),
        module.estimator,
        "; ".join(dict.fromkeys(_prior(term) for term in terms)),
        (float(kl_of_terms(of_fresh)) if of_fresh else 0.0) if known else None,
        float(sum(s.sum() for s in sigmas)) / max(count, 1) if known else None,
        float(sum(ratios)) / max(count, 1) if known else None,
    )


def _row_of_dropout(name: str, module: ConcreteDropout, counted: dict[int, Tensor]) -> Row:
    own = [p for p in module.parameters() if id(p) not in counted]
    counted.update((id(p), p) for p in own)
    weight = module.layer.weight
    return Row(
        name,
        type(module).__name__,
        sum(p.numel() for p in own),
        ", ".join(str(list(p.shape)) for p in module.layer.parameters()),
        "dropout",
        f"N(0, {1 / module.length_scale:.4g}^2)",
        float(module.kl_loss()) if weight.device.type != "meta" else None,
    )


def _prior(term: Term) -> str:
    def shown(value: Any) -> str:
        if isinstance(value, Tensor):
            return "a tensor" if value.dim() else f"{float(value):.4g}"
        return value if isinstance(value, str) else f"{value:.4g}"

    if term.prior is not None:
        return str(term.prior)
    return f"N({shown(term.prior_mu)}, {shown(term.prior_sigma)}^2)"
