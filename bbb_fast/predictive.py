"""What many draws of a model say together: probabilities or moments, and where their uncertainty comes
from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from ._checks import initialised, integer
from ._eval_mode import in_eval_mode
from ._noise import _INT64_MAX, fixed_noise
from .inference import _leaves, _map, _output, _part, _rows, _tensors_for
from .metrics.decomposition import softplus_normalized

__all__ = ["CategoricalPredictive", "GaussianPredictive", "Likelihood", "Predictive", "predictive"]

Likelihood: TypeAlias = Literal["categorical", "gaussian", "heteroscedastic"]

# Rows that the model sees at a time. Always so many: libraries round a row's numbers differently in products
# of other sizes, and results shall not depend on how the data come.
_BLOCK = 128
# Draws whose outputs are held at a time.
_DRAWS = 8
# Rows of a tensor that go to the model's device at a time, without a batch_size.
_BATCH = 4096


@dataclass(frozen=True, eq=False)
class Predictive:
    """What ``samples`` draws of a model say of N rows; all tensors are float64, on the CPU.

    Attributes:
        samples: T, how many draws.
        seed: theirs: draw k is ``fixed_noise(seed, sample=k)``.
        targets: the targets that came with the data, [N, ...], or None.
        log_likelihood: with targets, [N]: ln 1/T sum_t p(y_n | x_n, draw t), the predictive density of the
            mixture of all draws (Gal and Ghahramani 2016, arXiv:1506.02142, eq. 8); else None.
    """

    samples: int
    seed: int
    targets: Tensor | None
    log_likelihood: Tensor | None

    def __len__(self) -> int:
        raise NotImplementedError

    def __repr__(self) -> str:
        shapes = (
            f"{field.name}={list(value.shape)}"
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        )
        return f"{type(self).__name__}(samples={self.samples}, seed={self.seed}, {', '.join(shapes)})"


@dataclass(frozen=True, eq=False, repr=False)
class CategoricalPredictive(Predictive):
    """Class probabilities.

    Attributes:
        probs: [N, C], the mean of the draws' softmax.
        entropy: [N], of ``probs``, in nats: all uncertainty.
        expected_entropy: [N], the mean of the draws' entropies: the aleatoric part of it.
        mutual_information: [N], the rest: the epistemic part (Houlsby et al. 2011, arXiv:1112.5745, eq. 2).
        epistemic, aleatoric: [N], the two parts of the variance of the one-hot label, summed over the classes
            (Kwon et al. 2018; :func:`bbb_fast.metrics.decompose`).
        epistemic_normalized, aleatoric_normalized: [N], the same with softplus outputs divided by their sum
            in place of the softmax (Shridhar et al. 2018, arXiv:1806.05978).
    """

    probs: Tensor
    entropy: Tensor
    expected_entropy: Tensor
    mutual_information: Tensor
    epistemic: Tensor
    aleatoric: Tensor
    epistemic_normalized: Tensor
    aleatoric_normalized: Tensor

    def __len__(self) -> int:
        return len(self.probs)

    @property
    def prediction(self) -> Tensor:
        """int64 [N]: the most probable class."""
        return self.probs.argmax(-1)


@dataclass(frozen=True, eq=False, repr=False)
class GaussianPredictive(Predictive):
    """Moments of a regression's target, of the targets' shape: [N] or [N, ...].

    Attributes:
        mean: of the draws' means.
        epistemic: the variance of the draws' means: it is what more data would remove.
        aleatoric: the mean of the draws' noise variances (Kendall and Gal 2017, arXiv:1703.04977, eq. 9).
        variance: their sum.
    """

    mean: Tensor
    epistemic: Tensor
    aleatoric: Tensor

    def __len__(self) -> int:
        return len(self.mean)

    @property
    def variance(self) -> Tensor:
        """The variance of a target: epistemic + aleatoric."""
        return self.epistemic + self.aleatoric

    def log_density(self, y: Tensor) -> Tensor:
        """ln N(y; mean, variance), [N], summed over all dimensions but the first.

        That of one Gaussian with the moments of the mixture of all draws; :attr:`log_likelihood` is the
        mixture's own. Raises ValueError for a y of another shape than ``mean`` and where a variance is 0.
        """
        if not bool((self.variance > 0).all()):
            raise ValueError(
                "log_density: a target's variance is 0: a Gaussian model needs noise_std > 0, and a variance "
                "must not underflow"
            )
        return _log_density(_like_mean("log_density", y, self.mean), self.mean, self.variance)

    def quantile(self, q: float | Sequence[float] | Tensor) -> Tensor:
        """Quantiles of N(mean, variance): of ``mean``'s shape for a number, [Q, *mean.shape] for Q numbers.

        Raises ValueError for q outside (0, 1).
        """
        levels = torch.as_tensor(q, dtype=torch.float64)
        if levels.dim() > 1 or not bool(((levels > 0) & (levels < 1)).all()):
            raise ValueError(f"quantile: q must be in (0, 1), a number or a list of numbers, got {q!r}")
        z = torch.special.ndtri(levels).reshape(levels.shape + (1,) * self.mean.dim())
        return self.mean + z * self.variance.sqrt()


def _like_mean(what: str, y: Any, mean: Tensor) -> Tensor:
    """Targets in float64 and of the mean's shape: broadcasting [N] against [N, 1] would be silently wrong."""
    if not isinstance(y, Tensor):
        y = torch.as_tensor(np.asarray(y))
    if y.is_complex() or y.dtype == torch.bool:
        raise TypeError(f"{what}: targets must be real numbers, got {y.dtype}")
    y = y.to(mean.device, torch.float64)
    if y.numel() == mean.numel() and {y.shape, mean.shape} == {y.shape[:1], (*y.shape[:1], 1)}:
        return y.reshape(mean.shape)
    if y.shape != mean.shape:
        raise ValueError(f"{what}: targets must have shape {list(mean.shape)}, got {list(y.shape)}")
    return y


def _log_density(y: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Of N(mean, variance), summed over all dimensions but the first of y."""
    squares = (y - mean) ** 2 / variance
    density = -0.5 * (math.log(2 * math.pi) + variance.log() + squares)
    return density.flatten(density.dim() - y.dim() + 1).sum(-1) if y.dim() > 1 else density


class _Mean:
    """A running mean, and variance if asked for, of what comes a few draws at a time.

    Sums are of differences to the first value: exactly the first, and 0, where all are equal.
    """

    first: Tensor

    def __init__(self, variance: bool = False) -> None:
        self._count, self._with_variance = 0, variance

    def add(self, values: Tensor) -> None:
        """``values``: [K, ...]."""
        if self._count == 0:
            self.first = values[0]
            self._sum, self._squares = torch.zeros_like(self.first), torch.zeros_like(self.first)
        self._count += len(values)
        differences = values - self.first
        self._sum += differences.sum(0)
        if self._with_variance:
            self._squares += (differences**2).sum(0)

    @property
    def mean(self) -> Tensor:
        return self.first + self._sum / self._count

    @property
    def variance(self) -> Tensor:
        """Divided by the number of values."""
        return ((self._squares - self._sum**2 / self._count) / self._count).clamp(min=0.0)


class _Mixture:
    """ln of the mean density, of what comes a few draws at a time."""

    _log_sum: Tensor | None = None

    def __init__(self) -> None:
        self._count = 0

    def add(self, log_densities: Tensor) -> None:
        """``log_densities``: [K, N]."""
        own = log_densities.logsumexp(0)
        self._log_sum = own if self._log_sum is None else torch.logaddexp(self._log_sum, own)
        self._count += len(log_densities)

    @property
    def log_density(self) -> Tensor | None:
        return None if self._log_sum is None else self._log_sum - math.log(self._count)


class _Classes:
    """Of one block of rows under a categorical likelihood."""

    result = CategoricalPredictive

    def __init__(self, targets: Tensor | None, noise_std: Any) -> None:
        self._targets, self._mixture = targets, _Mixture()
        self._probs, self._noise, self._entropy = _Mean(True), _Mean(), _Mean()
        self._shares, self._noise_of_shares = _Mean(True), _Mean()

    def add(self, outputs: Tensor) -> None:
        if outputs.dim() < 3 or outputs.shape[-1] < 1:
            raise ValueError(
                f"predictive: a categorical model must return one number a class, [N, C], got "
                f"{list(outputs.shape[1:])}"
            )
        logs = outputs.log_softmax(-1)
        probs = logs.exp()
        self._probs.add(probs)
        self._noise.add(probs * (1 - probs))
        self._entropy.add(torch.special.entr(probs).sum(-1))
        shares = softplus_normalized(outputs)
        self._shares.add(shares)
        self._noise_of_shares.add(shares * (1 - shares))
        if self._targets is not None:
            index = self._labels(logs).expand(len(logs), *self._targets.shape).unsqueeze(-1)
            found = logs.gather(-1, index).squeeze(-1)
            self._mixture.add(found.flatten(2).sum(-1) if found.dim() > 2 else found)

    def _labels(self, logs: Tensor) -> Tensor:
        labels = self._targets
        assert labels is not None
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(
                f"predictive: targets of a categorical model must be integers, got {labels.dtype}"
            )
        if labels.shape != logs.shape[1:-1]:
            raise ValueError(
                f"predictive: targets must have shape {list(logs.shape[1:-1])}, got {list(labels.shape)}"
            )
        classes = logs.shape[-1]
        if bool(((labels < 0) | (labels >= classes)).any()):
            raise ValueError(f"predictive: targets must be classes 0 ... {classes - 1}")
        return labels.long()

    def fields(self) -> dict[str, Tensor | None]:
        probs = self._probs.mean
        entropy, expected = torch.special.entr(probs).sum(-1), self._entropy.mean
        return {
            "log_likelihood": self._mixture.log_density,
            "probs": probs,
            "entropy": entropy,
            "expected_entropy": expected,
            "mutual_information": (entropy - expected).clamp(min=0.0),
            "epistemic": self._probs.variance.sum(-1),
            "aleatoric": self._noise.mean.sum(-1),
            "epistemic_normalized": self._shares.variance.sum(-1),
            "aleatoric_normalized": self._noise_of_shares.mean.sum(-1),
        }


class _Moments:
    """Of one block of rows under a Gaussian likelihood of one noise."""

    result = GaussianPredictive

    def __init__(self, targets: Tensor | None, noise_std: Tensor) -> None:
        self._targets, self._noise_std, self._mixture = targets, noise_std, _Mixture()
        self._mean, self._noise = _Mean(True), _Mean()

    def _parts(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """The draws' means and noise variances, [K, N, ...]."""
        noise = self._noise_std.to(outputs.device)
        try:
            return outputs, (noise**2).expand_as(outputs)
        except RuntimeError:
            raise ValueError(
                f"predictive: noise_std must be a number or of the shape of a row's output, "
                f"{list(outputs.shape[2:])}, got {list(noise.shape)}"
            ) from None

    def add(self, outputs: Tensor) -> None:
        mean, variance = self._parts(outputs)
        self._mean.add(mean)
        self._noise.add(variance)
        if self._targets is not None:
            targets = _like_mean("predictive", self._targets, mean[0])
            self._mixture.add(_log_density(targets, mean, variance))

    def fields(self) -> dict[str, Tensor | None]:
        return {
            "log_likelihood": self._mixture.log_density,
            "mean": self._mean.mean,
            "epistemic": self._mean.variance,
            "aleatoric": self._noise.mean,
        }


class _OwnNoise(_Moments):
    """Of a model that returns mean and log variance."""

    def _parts(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        if outputs.dim() < 3 or outputs.shape[-1] != 2:
            raise ValueError(
                "predictive: a heteroscedastic model must return mean and log variance in a last "
                "dimension of "
                f"2, got {list(outputs.shape[1:])}"
            )
        return outputs[..., 0], outputs[..., 1].exp()


_LIKELIHOODS = {"categorical": _Classes, "gaussian": _Moments, "heteroscedastic": _OwnNoise}


@torch.no_grad()
def predictive(
    model: nn.Module,
    data: Any,
    samples: int = 100,
    *,
    likelihood: Likelihood = "categorical",
    noise_std: float | Tensor | None = None,
    targets: Tensor | np.ndarray | None = None,
    seed: int | None = None,
    batch_size: int | None = None,
    progress: bool = False,
    call: Callable[[nn.Module, Any], Any] | None = None,
) -> Predictive:
    """What ``samples`` draws of a model say of ``data``, of whatever in it answers at random.

    Bayesian layers, ``MCDropout``, ``ConcreteDropout``, ``Ensemble`` and any mixture of them: draw k is
    ``fixed_noise(seed, sample=k, model=model)``, one function for all rows. A few draws of a block of rows
    are held at a time, so that memory grows neither with ``samples`` nor, but for the results, with the
    number of rows. The model sees blocks of 128 rows by their place in the data, so that the results are the
    same bits however the data come: one tensor, any ``batch_size``, a DataLoader of any batch size (batches
    whose rows differ in shape start a block anew).

    The model runs in eval mode, as in :func:`bbb_fast.predict`, which returns the draws' outputs themselves.

    Args:
        data: the model's input, a tensor or NumPy array [N, ...] or dicts of such; or batches: a DataLoader,
            a map-style Dataset, or any iterable of inputs or of pairs (input, target). A tuple or list of
            tensors is a list of batches.
        samples: T, how many draws.
        likelihood: "categorical": the model returns one number a class before the softmax, [N, C].
            "gaussian": it returns the mean, [N, ...], and ``noise_std`` is the standard deviation of a target
            around it.
            "heteroscedastic": mean and log variance in a last dimension of 2, [N, ..., 2].
        noise_std: of "gaussian" alone, >= 0: a number, or a tensor of the shape of a row's output; None: 0.
            For MC dropout it is tau^(-1/2) (:func:`bbb_fast.methods.model_precision`).
        targets: [N, ...], where the data have none: for ``log_likelihood``.
        seed: of the draws; None: from PyTorch's default generator.
        batch_size: rows of a tensor that go to the model's device at a time (default 4096), or a Dataset's
            batches.
        progress: show tqdm's bar, if that is installed.
        call: ``call(model, x)`` says how the model is called and what of its result is the output, if not
            ``model(x)``.

    Returns:
        :class:`CategoricalPredictive` or :class:`GaussianPredictive`.

    Raises:
        TypeError: a model, data or targets of a wrong type.
        ValueError: an option out of range, no rows, outputs that do not fit the likelihood or the rows, that
            are not finite, or targets that do not fit the outputs.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"predictive: model must be a torch.nn.Module, got {type(model).__name__}")
    count = integer(samples)
    if count is None or count < 1:
        raise ValueError(f"predictive: samples must be an int >= 1, got {samples!r}")
    size = _BATCH if batch_size is None else integer(batch_size)
    if size is None or size < 1:
        raise ValueError(f"predictive: batch_size must be an int >= 1, got {batch_size!r}")
    if not isinstance(likelihood, str) or likelihood not in _LIKELIHOODS:
        names = ", ".join(map(repr, _LIKELIHOODS))
        raise ValueError(f"predictive: likelihood must be one of {names}, got {likelihood!r}")
    noise = _checked_noise(noise_std, likelihood)
    initialised("predictive", model)
    if seed is None:
        seed = int(torch.randint(0, _INT64_MAX, ()).item())
    batches, total = _batches(model, data, targets, size)
    parts: list[dict[str, Tensor | None]] = []
    with in_eval_mode(model) as running, _bar(progress, total) as advance:
        pinned = fixed_noise(seed, model=running)
        for x, y, rows in _blocks(batches, model):
            found = _LIKELIHOODS[likelihood](y, noise)
            held: list[Tensor] = []
            for k, draw in enumerate(pinned.samples(count), 1):
                with draw:
                    result = running(x) if call is None else call(running, x)
                held.append(_of_rows(_output(result, "predictive"), rows))
                if len(held) == _DRAWS or k == count:
                    found.add(_stacked(held))
                    held.clear()
            parts.append(_checked(found.fields(), y))
            advance(rows)
    if not parts:
        raise ValueError("predictive: the data have no rows")
    if len({part["targets"] is None for part in parts}) > 1:
        raise ValueError("predictive: some batches have targets and others have none")
    whole = {
        name: None if value is None else torch.cat([part[name] for part in parts])  # type: ignore[misc]
        for name, value in parts[0].items()
    }
    return _LIKELIHOODS[likelihood].result(samples=count, seed=int(seed), **whole)  # type: ignore[arg-type]


def _checked_noise(noise_std: Any, likelihood: str) -> Tensor:
    if noise_std is not None and likelihood != "gaussian":
        raise ValueError(
            f"predictive: noise_std is for likelihood 'gaussian', and this one is {likelihood!r}"
        )
    try:
        noise = torch.as_tensor(0.0 if noise_std is None else noise_std).detach().double()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"predictive: noise_std must be a number or a tensor, got {noise_std!r}") from None
    if not bool((noise.isfinite() & (noise >= 0)).all()):
        raise ValueError(f"predictive: noise_std must be finite and >= 0, got {noise_std!r}")
    return noise


def _of_rows(output: Tensor, rows: int) -> Tensor:
    if output.dim() == 0 or output.shape[0] != rows:
        raise ValueError(
            f"predictive: the first dimension of the output must be that of the rows, got output "
            f"{list(output.shape)} for {rows} rows"
        )
    if not (output.is_floating_point()):
        raise TypeError(f"predictive: the model's output must be floating numbers, got {output.dtype}")
    return output


def _stacked(outputs: Sequence[Tensor]) -> Tensor:
    if len({output.shape for output in outputs}) > 1:
        shapes = sorted({str(list(output.shape)) for output in outputs})
        raise ValueError(f"predictive: the output must keep its shape from draw to draw, got {shapes}")
    stack = torch.stack(list(outputs))
    # MPS has no float64.
    return (stack.cpu() if stack.device.type == "mps" else stack).double()


def _checked(found: dict[str, Tensor | None], targets: Tensor | None) -> dict[str, Tensor | None]:
    """A block's results, on the CPU."""
    for name, value in found.items():
        if value is not None and name != "log_likelihood" and not bool(value.isfinite().all()):
            raise ValueError(f"predictive: the model's outputs are not finite: {name} is not")
    found = {"targets": targets, **found}
    return {name: None if value is None else value.cpu() for name, value in found.items()}


_Batch: TypeAlias = "tuple[Any, Any]"


def _batches(model: nn.Module, data: Any, targets: Any, size: int) -> tuple[Iterator[_Batch], int | None]:
    """Pairs (input, target or None), and the number of all rows where it is known."""
    if isinstance(data, (Tensor, np.ndarray)) or hasattr(data, "keys"):
        inputs = _tensors_for(model, data, "predictive", to_device=False)
        rows = _rows(inputs, "predictive")
        if targets is not None:
            targets = torch.as_tensor(targets)
            if targets.dim() == 0 or len(targets) != rows:
                raise ValueError(f"predictive: targets must have {rows} rows, got {list(targets.shape)}")
        starts = range(0, rows, size)
        return (
            (_part(inputs, k, k + size), None if targets is None else targets[k : k + size]) for k in starts
        ), rows
    if targets is not None:
        raise ValueError("predictive: with batches, targets come in them: give batches (input, target)")
    if isinstance(data, torch.utils.data.Dataset) and not isinstance(data, torch.utils.data.IterableDataset):
        data = torch.utils.data.DataLoader(data, batch_size=min(size, _BLOCK))
    if not isinstance(data, Iterable):
        raise TypeError(
            "predictive: data must be a tensor, a DataLoader, a Dataset or an iterable of batches, got "
            f"{type(data).__name__}"
        )
    dataset = getattr(data, "dataset", None)
    total = len(dataset) if isinstance(dataset, Sized) else None
    return map(_pair, data), total


def _pair(batch: Any) -> _Batch:
    if isinstance(batch, (tuple, list)) and not hasattr(batch, "_fields"):
        if len(batch) not in (1, 2):
            raise TypeError(
                f"predictive: a batch must be an input or a pair (input, target), got {len(batch)} things"
            )
        return batch[0], batch[1] if len(batch) == 2 else None
    return batch, None


def _blocks(batches: Iterator[_Batch], model: nn.Module) -> Iterator[tuple[Any, Tensor | None, int]]:
    """The batches' rows in blocks of equal size, on the model's device: input, target, number of rows."""
    device = next((t.device for t in (*model.parameters(), *model.buffers())), None)

    def moved(t: Any) -> Any:
        return t.to(device) if isinstance(t, Tensor) and device is not None else t

    held: list[tuple[Any, Any, int]] = []
    waiting = 0

    def joined() -> tuple[Any, Tensor | None, int]:
        rows = sum(size for _, _, size in held)
        x, y = _joined([x for x, _, _ in held]), _joined([y for _, y, _ in held])
        held.clear()
        return x, y, rows

    for x, y in batches:
        x = _map(moved, _tensors_for(model, x, "predictive"))
        y = None if y is None else moved(torch.as_tensor(y))
        rows = _rows(x, "predictive")
        if y is not None and (y.dim() == 0 or len(y) != rows):
            raise ValueError(f"predictive: a batch has {rows} rows and targets {list(y.shape)}")
        if held and not _alike((held[0][0], held[0][1]), (x, y)):
            yield joined()
            waiting = 0
        start = 0
        while start < rows:
            stop = min(rows, start + _BLOCK - waiting)
            held.append((_part(x, start, stop), None if y is None else y[start:stop], stop - start))
            waiting += stop - start
            start = stop
            if waiting == _BLOCK:
                yield joined()
                waiting = 0
    if held:
        yield joined()


def _alike(one: Any, other: Any) -> bool:
    """Whether rows of the two can stand in one tensor."""
    ones, others = _leaves(one), _leaves(other)
    return len(ones) == len(others) and all(
        isinstance(a, Tensor) == isinstance(b, Tensor)
        and (not isinstance(a, Tensor) or (a.shape[1:] == b.shape[1:] and a.dtype == b.dtype))
        for a, b in zip(ones, others, strict=True)
    )


def _joined(parts: Sequence[Any]) -> Any:
    if len(parts) == 1 or parts[0] is None:
        return parts[0]
    leaves = [iter(_leaves(part)) for part in parts]

    def next_of_all(_: Any) -> Any:
        own = [next(iterator) for iterator in leaves]
        return torch.cat(own) if isinstance(own[0], Tensor) and own[0].dim() > 0 else own[0]

    return _map(next_of_all, parts[0])


@contextmanager
def _bar(progress: bool, total: int | None) -> Iterator[Callable[[int], Any]]:
    """What is told of each block's rows."""
    if progress:
        try:
            from tqdm import tqdm
        except ImportError:
            pass
        else:
            with tqdm(total=total, desc="predictive", unit=" rows") as bar:
                yield bar.update
            return
    yield lambda rows: None
