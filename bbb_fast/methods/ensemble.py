"""Deep ensembles (Lakshminarayanan, Pritzel, Blundell 2017, arXiv:1612.01474)."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import integer
from .._files import atomic_write
from .._noise import RandomModule, rank_offset

__all__ = ["Ensemble", "fgsm", "train_members"]


class Ensemble(RandomModule):
    """Several models as one that answers at random: each forward is that of one member.

    Under ``fixed_noise(seed, sample=k)`` it is member k modulo their number, so that M draws of M members are
    each of them once; a member that is random itself (a Bayesian net, one with ``MCDropout``) takes its own
    draw k. Of several ensembles in one model the next one moves on when the one before it has been round, so
    that every combination comes up. Otherwise a member is drawn by PyTorch's generator. Under
    ``posterior_means`` the output is the mean of all members' outputs.

    Args: ``members``, modules of one kind of input and output. Raises TypeError for other things, ValueError
    for none, or for the same module twice.
    """

    def __init__(self, members: Iterable[nn.Module]) -> None:
        super().__init__()
        members = list(members)
        for member in members:
            if not isinstance(member, nn.Module):
                raise TypeError(f"Ensemble: a member must be a torch.nn.Module, got {type(member).__name__}")
        if not members:
            raise ValueError("Ensemble: there must be at least one member")
        if len({id(member) for member in members}) < len(members):
            raise ValueError("Ensemble: the same module is a member twice")
        self.members = nn.ModuleList(members)

    def __len__(self) -> int:
        return len(self.members)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output of one member."""
        draw = self.wanted_draw()
        if draw.means:
            return _mean([member(*args, **kwargs) for member in self.members])
        if draw.pinned is not None:
            others = (m for m in draw.pinned.before(self) if isinstance(m, Ensemble))
            turns = draw.pinned.sample
            for other in others:
                turns //= len(other)
            index = turns % len(self)
        else:
            index = (int(torch.randint(len(self), ())) + rank_offset()) % len(self)
        return self.members[index](*args, **kwargs)


def _mean(outputs: list[Any]) -> Any:
    """The mean of tensors, or of the tensors of tuples, which is what models return."""
    if isinstance(outputs[0], tuple):
        return tuple(_mean(list(parts)) for parts in zip(*outputs, strict=True))
    total = outputs[0]
    for output in outputs[1:]:
        total = total + output
    return total / len(outputs)


def fgsm(
    model: nn.Module,
    x: Tensor,
    loss: Callable[[Any], Tensor],
    epsilon: float | Tensor,
) -> Tensor:
    """Adversarial inputs by the fast gradient sign method: x + epsilon * sign(d loss / d x).

    Goodfellow, Shlens, Szegedy 2015 (arXiv:1412.6572), section 4; training on them beside the data is what
    Lakshminarayanan et al. 2017 propose for the members of an ensemble (with epsilon 1 % of each input's
    range).

    Args: ``x``, floating [N, ...]; ``loss(model(x))``, a scalar; ``epsilon`` >= 0, a number or a tensor that
    broadcasts against x. Returns a tensor like x, without gradient; gradients of the model's parameters are
    left as they were. Raises ValueError for a negative epsilon, TypeError for an x that has no gradients.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"fgsm: x must be a floating tensor, got {kind}")
    if not bool((torch.as_tensor(epsilon) >= 0).all()):
        raise ValueError(f"fgsm: epsilon must be >= 0, got {epsilon}")
    with torch.enable_grad():
        moved = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(model(moved)), moved)
    return (x + epsilon * gradient.sign()).detach()


def train_members(
    make: Callable[[], nn.Module],
    train: Callable[[nn.Module, int], None],
    members: int,
    *,
    seed: int = 0,
    jobs: int = 1,
    folder: str | os.PathLike[str] | None = None,
) -> Ensemble:
    """An ensemble of ``members`` networks that differ in their random numbers alone, trained one by one.

    Member k is ``make()`` and then ``train(model, k)``, both after ``torch.manual_seed(seed + k)``; its
    initialisation and the order of its data are its own, as Lakshminarayanan et al. 2017 have it.

    Args:
        make: returns an untrained model.
        train: trains a model in place; k is the member's number.
        members: how many, >= 1.
        seed: of the first; the caller's random state comes back.
        jobs: members trained side by side, each in a process, through joblib: ``make`` and ``train`` must be
            functions that another process can import, or that joblib can pickle. ``joblib.parallel_config``
            chooses another back end (Ray, Dask) around this call.
        folder: keep each member's weights there as soon as it is trained (``member-k.pt``), and take those
            that are there already: what was killed goes on with the members that are left. The folder belongs
            to one ensemble.

    Returns:
        The :class:`Ensemble`, its members in eval mode.

    Raises:
        ValueError: ``members`` or ``jobs`` < 1; a file of ``folder`` that does not fit the model.
        ImportError: ``jobs`` > 1 without joblib.
    """
    count, side_by_side = integer(members), integer(jobs)
    if count is None or count < 1:
        raise ValueError(f"train_members: members must be an int >= 1, got {members!r}")
    if side_by_side is None or side_by_side < 1:
        raise ValueError(f"train_members: jobs must be an int >= 1, got {jobs!r}")
    files = [None] * count if folder is None else [Path(folder) / f"member-{k}.pt" for k in range(count)]
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
    calls = [(make, train, seed + k, k, files[k]) for k in range(count)]
    if side_by_side == 1:
        return Ensemble([_member(*call) for call in calls])
    from joblib import Parallel, delayed

    threads = max(1, torch.get_num_threads() // side_by_side)
    trained = Parallel(n_jobs=side_by_side)(delayed(_member)(*call, threads) for call in calls)
    return Ensemble(trained)


def _member(
    make: Callable[[], nn.Module],
    train: Callable[[nn.Module, int], None],
    seed: int,
    number: int,
    file: Path | None,
    threads: int | None = None,
) -> nn.Module:
    if threads is not None:
        torch.set_num_threads(threads)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make()
        if file is not None and file.exists():
            try:
                model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
            except Exception as error:  # of a damaged file torch.load may raise nearly anything
                raise ValueError(
                    f"train_members: {file} does not fit the model ({' '.join(str(error).split())}): "
                    "remove it, or "
                    "choose another folder"
                ) from error
            return model.eval()
        train(model, number)
    if file is not None:
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        atomic_write(file, buffer.getbuffer())
    return model.eval()
