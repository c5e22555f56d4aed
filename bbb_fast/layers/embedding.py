"""Embeddings in weight space: only the rows that are looked up are drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from .._checks import integer
from .._noise import draw_rng
from ..priors import empirical_sigma
from .base import BayesianLayer, Term

__all__ = ["BBBEmbedding", "BBBEmbeddingBag"]


class _Rows(BayesianLayer):
    """A table of num_embeddings rows, of which a forward looks some up."""

    estimator = "bbb"

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        priors: Mapping[str, Any] | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        name = type(self).__name__
        sizes = {"num_embeddings": num_embeddings, "embedding_dim": embedding_dim}
        for label, value in sizes.items():
            size = integer(value)
            if size is None or size < 1:
                raise ValueError(f"{name}: {label} must be an int >= 1, got {value!r}")
            sizes[label] = size
        rows, width = sizes.values()
        if padding_idx is not None:
            given, padding_idx = padding_idx, integer(padding_idx)
            if padding_idx is None or not -rows <= padding_idx < rows:
                raise ValueError(f"{name}: padding_idx must be within num_embeddings = {rows}, got {given!r}")
            padding_idx %= rows
        self.padding_idx = padding_idx
        super().__init__((rows, width), None, priors, device, dtype, False, None)
        self.num_embeddings = rows
        self.embedding_dim = width
        self.scale_grad_by_freq = scale_grad_by_freq
        self.sparse = sparse

    def reset_parameters(self) -> None:
        """As in the other layers; the mean of the padding's row is 0."""
        super().reset_parameters()
        if self.padding_idx is not None:
            with torch.no_grad():
                self.W_mu[self.padding_idx] = 0.0

    def _prior_numbers(self) -> tuple[float, float] | None:
        return None if self.padding_idx is not None else super()._prior_numbers()

    def terms(self) -> list[Term]:
        """Those of all rows but the padding's, which is no random number."""
        (term,) = super().terms()
        if self.padding_idx is None:
            return [term]

        parts = (slice(None, self.padding_idx), slice(self.padding_idx + 1, None))

        def of_rows(t: Any, rows: slice) -> Any:
            return t[rows] if isinstance(t, Tensor) and t.dim() == 2 else t

        if isinstance(term.prior_sigma, str):
            # One of all these rows.
            drawn = ([of_rows(t, rows) for rows in parts] for t in term[:3])
            mu, rho, prior_mu = (
                torch.cat(t) if isinstance(t[0], Tensor) and t[0].dim() else t[0] for t in drawn
            )
            term = term._replace(prior_sigma=empirical_sigma(mu, rho, prior_mu))
        return [Term(*(of_rows(t, rows) for t in term)) for rows in parts if self.W_mu[rows].numel() > 0]

    def _drawn(self, index: Tensor, rng: Tensor) -> Tensor:
        """Rows ``index`` of the draw that ``rng`` names: the same wherever, and however often, they are."""
        options = (self.padding_idx, None, 2.0, self.scale_grad_by_freq, self.sparse)
        mu, rho = (F.embedding(index, t, *options) for t in (self.W_mu, self.W_rho))
        wide = reference.accumulate_dtype(mu)
        eps = reference.normal_rows(index, self.embedding_dim, rng).to(wide)
        if self.padding_idx is not None:
            eps = eps * (index != self.padding_idx).unsqueeze(-1)
        return (mu.to(wide) + reference.softplus(rho.to(wide)) * eps).to(mu.dtype)

    def _rngs(self, sample: bool) -> Tensor | None:
        """A row for each draw that a forward takes, of equal parts of its input; None for the means."""
        draw = self.wanted_draw() if sample else None
        if draw is None or draw.means:
            return None
        device = self.W_mu.device
        if draw.pinned is not None and draw.pinned.at_once:
            return draw.pinned.rngs(self, device)
        rng = draw_rng(device) if draw.pinned is None else draw.pinned.rng_and_streams(self, device)[0]
        return rng.unsqueeze(0)

    def _shape_repr(self) -> str:
        text = f"{self.num_embeddings}, {self.embedding_dim}"
        return text + ("" if self.padding_idx is None else f", padding_idx={self.padding_idx}")


class BBBEmbedding(_Rows):
    """``torch.nn.Embedding`` with a posterior over its rows; each forward draws those it looks up.

    Noise is a function of the place in the table, so that a row is the same wherever a batch has it, and the
    same that a draw of the whole table would have (Blundell et al., ICML 2015). input: integers [...];
    returns [..., embedding_dim] in the parameters' dtype. There is no ``max_norm``, which would scale the
    means alone.

    Args:
        num_embeddings, embedding_dim: the table's rows and their width, at least 1.
        padding_idx: a row that is not drawn, has no gradient, and no part in the KL.
        scale_grad_by_freq: as in torch.nn.
        sparse: whether the gradients of W_mu and W_rho are.
        priors: see :func:`bbb_fast.priors.resolve_priors`.
        device, dtype: of the parameters; float32, float64, bfloat16 or float16.

    Raises ValueError for sizes, a padding_idx or priors out of range, TypeError for another dtype or device;
    in a forward what torch.nn raises.
    """

    def forward(self, input: Tensor, sample: bool = True) -> Tensor:
        """The rows ``input`` of one draw, in eval mode too; of the means where ``sample`` is False."""
        rngs = self._rngs(sample)
        if rngs is None:
            options = (self.padding_idx, None, 2.0, self.scale_grad_by_freq, self.sparse)
            return F.embedding(input, self.W_mu, *options)
        if len(rngs) == 1:
            return self._drawn(input, rngs[0])
        parts = zip(input.tensor_split(len(rngs)), rngs.unbind(), strict=True)
        return torch.cat([self._drawn(*part) for part in parts])


class BBBEmbeddingBag(_Rows):
    """``torch.nn.EmbeddingBag`` with a posterior over its rows: as :class:`BBBEmbedding`.

    ``layer(input, offsets, per_sample_weights)`` as in torch.nn: input integers [N, L], or [L] with offsets
    [N]; returns [N, embedding_dim] (Blundell et al., ICML 2015).

    Args:
        num_embeddings, embedding_dim, scale_grad_by_freq, sparse, padding_idx, priors, device, dtype: as of
            :class:`BBBEmbedding`.
        mode: "mean", "sum" or "max".
        include_last_offset: as in torch.nn.

    Raises what :class:`BBBEmbedding` raises, and ValueError for another mode.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        scale_grad_by_freq: bool = False,
        mode: str = "mean",
        sparse: bool = False,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        priors: Mapping[str, Any] | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if mode not in ("mean", "sum", "max"):
            raise ValueError(f"{type(self).__name__}: mode must be 'mean', 'sum' or 'max', got {mode!r}")
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx,
            scale_grad_by_freq,
            sparse,
            priors,
            device=device,
            dtype=dtype,
        )
        self.mode = mode
        self.include_last_offset = include_last_offset

    def forward(  # type: ignore[override]  # in torch.nn's order, where offsets is the second
        self,
        input: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
        sample: bool = True,
    ) -> Tensor:
        """The bags of ``input``'s rows of one draw; of the means where ``sample`` is False."""
        rngs = self._rngs(sample)
        options: dict[str, Any] = {
            "mode": self.mode,
            "per_sample_weights": per_sample_weights,
            "include_last_offset": self.include_last_offset,
            "padding_idx": self.padding_idx,
        }
        if rngs is None:
            return F.embedding_bag(
                input,
                self.W_mu,
                offsets,
                scale_grad_by_freq=self.scale_grad_by_freq,
                sparse=self.sparse,
                **options,
            )
        # Every place has a row of its own.
        rows = self._drawn(input.reshape(-1), rngs[0])
        at = torch.arange(len(rows), device=input.device).view(input.shape)
        if self.padding_idx is not None:
            at = torch.where(input == self.padding_idx, len(rows), at)
            rows = F.pad(rows, (0, 0, 0, 1))
            options["padding_idx"] = len(rows) - 1
        return F.embedding_bag(at, rows, None if offsets is None else offsets.to(at.dtype), **options)
