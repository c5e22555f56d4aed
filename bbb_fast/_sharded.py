"""Parameters in shards (DTensor), as ``fully_shard`` keeps them outside a forward."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn


def is_sharded(t: Tensor | None) -> bool:
    """Whether ``t`` is a DTensor."""
    if t is None or type(t) is Tensor or type(t) is nn.Parameter:
        return False
    # Whoever has made one has imported it; importing it here would take a second.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def refuse_sharded(op: str, **tensors: Tensor | None) -> None:
    """Raises NotImplementedError for a DTensor: noise is numbered over the whole of a tensor."""
    for name, t in tensors.items():
        if is_sharded(t):
            raise NotImplementedError(
                f"{op}: {name} is a DTensor; only the KL takes shards (fully_shard gathers a layer's "
                "parameters for its forward, tensor parallelism does not)"
            )


def kl_of_shards(
    kl_divergence: Callable[..., Tensor],
    mus: Sequence[Tensor],
    rhos: Sequence[Tensor],
    prior_mus: Sequence[float],
    prior_sigmas: Sequence[float],
) -> Tensor:
    """``kl_divergence`` of the whole tensors, some of which are DTensors: the same number on every rank.

    A collective: every rank of a mesh calls it. Each forms the KL of its shards, and these are summed; the
    gradient stays with the shards. As every rank's loss contains the same KL, that is also what an average
    over the ranks of the gradients of the rest of their losses belongs with.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate

    groups: dict[Any, tuple[list[Any], ...]] = {}
    for mu, rho, prior_mu, prior_sigma in zip(mus, rhos, prior_mus, prior_sigmas, strict=True):
        sharded = [t for t in (mu, rho) if isinstance(t, DTensor)]
        if len(sharded) == 1:
            raise TypeError("kl_divergence: mu and rho must both be DTensors, or neither")
        where = None
        if sharded:
            # A KL is formed of numbers, not of the summands of a partial sum.
            placements = tuple(Replicate() if p.is_partial() else p for p in sharded[0].placements)
            where = sharded[0].device_mesh, placements
            mu, rho = (t.redistribute(placements=placements).to_local() for t in sharded)
        group = groups.setdefault(where, ([], [], [], []))
        for part, value in zip(group, (mu, rho, prior_mu, prior_sigma), strict=True):
            part.append(value)
    kls: list[Tensor] = []
    for where, group in groups.items():
        kl = kl_divergence(*group)
        if where is not None:
            mesh, placements = where
            summed = [Replicate() if p.is_replicate() else Partial() for p in placements]
            kl = DTensor.from_local(kl, mesh, summed, run_check=False).full_tensor()
        kls.append(kl)
    total = kls[0]
    for kl in kls[1:]:
        total = total + kl
    return total
