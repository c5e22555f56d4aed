"""Active learning: which images of a pool to have labelled next.

A model is trained on a few labelled images, says of others how unsure it is, and those of which it is most so
are labelled next, again and again. Houlsby et al. 2011 (arXiv:1112.5745) score by the mutual information of
label and weights (BALD); Gal, Islam and Ghahramani, "Deep Bayesian active learning with image data", ICML
2017 (arXiv:1703.02910) do so on images, from 20 labels, 10 more a round.

A round goes on with the weights of the one before it, or starts anew. Its random numbers are its own, those
weights and the labels are kept in a file, and so a task that is interrupted ends as if it had not been.
"""

from __future__ import annotations

import io
import math
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._files import atomic_write
from .._noise import posterior_means
from ..methods.ensemble import Ensemble
from ..methods.mc_dropout import mc_dropout
from ..models import BBBLeNet, LeNet
from ..models.build import LAYER_TYPES
from ..predictive import CategoricalPredictive, predictive
from .data import ImageSet, batches, channel_stats, load, normalize, split_validation
from .document import Column, Document, Figure, Table, mean_and_error, with_error
from .options import OptionError, check_int
from .tasks import Experiment, Task

__all__ = ["ACQUISITIONS", "JUDGED_ON", "METHODS", "RANDOM", "acquire", "check", "learn", "run"]

# What is most unsure has the highest score.
SCORES: dict[str, Callable[[CategoricalPredictive], Tensor]] = {
    "mutual-information": lambda said: said.mutual_information,
    "entropy": lambda said: said.entropy,
    "variation-ratio": lambda said: 1 - said.probs.max(-1).values,
}
RANDOM = "random"
ACQUISITIONS = (*SCORES, RANDOM)
METHODS = (*LAYER_TYPES, "mc-dropout", "ensemble")
# Narrower than the layers' own: a few hundred images move a deviation little from where it starts.
_PRIORS = {"posterior_rho_initial": (-4.0, 0.1)}
JUDGED_ON = ("test", "validation")

# A task's labels, scores and weights so far.
ROUNDS = "rounds.pt"
FIGURE = "active.png"
# Images that a network sees at a time.
_ROWS = 500
# Settings that no task has to know.
_OF_ALL = ("command", "acquisitions", "seeds", "accuracies", "seed")


def check(settings: Mapping[str, Any]) -> None:
    """Raises OptionError for the first option that is wrong; those of the data are checked with the data."""
    for name in (
        "seeds",
        "start",
        "step",
        "labels",
        "pool",
        "draws",
        "members",
        "steps",
        "first_steps",
        "batch_size",
    ):
        check_int(name, settings[name])
    if settings["labels"] < settings["start"]:
        raise OptionError(
            "labels", f"must be at least --start, {settings['start']}, got {settings['labels']}"
        )
    if settings["pool"] < settings["step"]:
        raise OptionError("pool", f"must be at least --step, {settings['step']}, got {settings['pool']}")
    if settings["method"] == "ensemble" and settings["members"] < 2:
        raise OptionError("members", f"must be at least 2, got {settings['members']}: one has no doubt")
    numbers: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
        ("lr", lambda value: 0 < value < math.inf, "a finite number > 0"),
        ("kl_weight", lambda value: 0 <= value < math.inf, "a finite number >= 0"),
        ("dropout", lambda value: 0 < value < 1, "in (0, 1)"),
        ("power", lambda value: value is None or 0 < value < math.inf, "a finite number > 0, or highest"),
    )
    for name, fits, allowed in numbers:
        if not fits(settings[name]):
            raise OptionError(name, f"must be {allowed}, got {settings[name]!r}")
    for name in ("acquisitions", "accuracies"):
        values = settings[name]
        if len(set(values)) < len(values):
            raise OptionError(name, f"must differ, got {', '.join(map(str, values))}")
    for value in settings["accuracies"]:
        if not 0 < value < 1:
            raise OptionError("accuracies", f"must be in (0, 1), got {value!r}")


def run(experiment: Experiment, data_dir: str | None, download: bool) -> Document:
    """All acquisitions and seeds, one task each, and what they show."""
    settings = experiment.settings
    # Before any task: what is wrong with the data, or with how many images are asked of it, shows now.
    pool, judged = images(settings, data_dir, download)
    if settings["labels"] > len(pool):
        raise OptionError(
            "labels", f"must be at most the images of the pool, {len(pool)}, got {settings['labels']}"
        )
    own = {name: value for name, value in settings.items() if name not in _OF_ALL} | {"data_dir": data_dir}
    tasks = [
        Task(f"{acquisition}-{seed}", learn, {"acquisition": acquisition, "seed": seed, **own})
        for seed in range(settings["seed"], settings["seed"] + settings["seeds"])
        for acquisition in settings["acquisitions"]
    ]
    results = experiment.run(tasks)
    curves: dict[str, list[Mapping[str, Any]]] = {name: [] for name in settings["acquisitions"]}
    for task in tasks:
        curves[task.arguments["acquisition"]].append(results[task.name])
    return document(settings, curves, len(pool), len(judged), experiment.seconds)


def images(
    settings: Mapping[str, Any], data_dir: str | None, download: bool = False
) -> tuple[ImageSet, ImageSet]:
    """The pool, which are the training images that are not held out, and the images to judge on.

    Raises DataError (a ValueError) for what is wrong with the data.
    """
    whole = load(settings["dataset"], "train", data_dir, download=download)
    held_out = settings["valid_size"]
    # The same split for every seed: an option that is chosen on these images has not seen others.
    pool, valid = split_validation(whole, len(whole) // 10 if held_out is None else held_out, seed=0)
    if settings["judge"] == "validation":
        return pool, valid
    return pool, load(settings["dataset"], "test", data_dir, download=download)


def learn(
    folder: Path, *, acquisition: str, seed: int, data_dir: str | None, **settings: Any
) -> dict[str, list[float]]:
    """One task: rounds of training, judging and acquiring, from the first labels to the last.

    Returns ``labels`` and ``accuracy``, a number a round. After every round, ``folder`` holds what the next
    ones need.
    """
    pool, judged = images(settings, data_dir)
    classes, channels = len(pool.classes), pool.images.shape[1]
    mean, std = channel_stats(pool.images)
    sizes = [*range(settings["start"], settings["labels"], settings["step"]), settings["labels"]]
    torch.manual_seed(_seed(seed, "weights"))
    model = build(classes, channels, settings)
    labelled, accuracy = _continue(folder / ROUNDS, model, sizes, len(pool)) or (
        first_labels(pool.labels, classes, settings["start"], _generator(seed, "start")).tolist(), [],
    )  # fmt: skip
    for k in range(len(accuracy), len(sizes)):
        own = pool.subset(labelled)
        torch.manual_seed(_seed(seed, k))
        if k and settings["from_scratch"]:
            model = build(classes, channels, settings)
        steps = settings["first_steps" if k == 0 or settings["from_scratch"] else "steps"]
        train(model, normalize(own.images, mean, std), own.labels, steps, settings)
        accuracy.append(accuracy_of_means(model, normalize(judged.images, mean, std), judged.labels))
        if k + 1 < len(sizes):

            def score(index: Tensor, model: nn.Module = model, k: int = k) -> Tensor:
                said = ask(model, normalize(pool.images[index], mean, std), settings, _seed(seed, k, "ask"))
                return SCORES[acquisition](said)

            labelled += acquire(
                None if acquisition == RANDOM else score, len(pool), labelled, sizes[k + 1] - sizes[k],
                settings["pool"], _generator(seed, k, "pool"), settings["power"],
            )  # fmt: skip
        kept = {"labelled": labelled, "accuracy": accuracy, "weights": model.state_dict()}
        content = io.BytesIO()
        torch.save(kept, content)
        atomic_write(folder / ROUNDS, content.getbuffer())
    return {"labels": sizes, "accuracy": accuracy}


def _continue(
    path: Path, model: nn.Module, sizes: Sequence[int], pool: int
) -> tuple[list[int], list[float]] | None:
    """What an interrupted task has kept, with ``model`` as it was; None: it has not done a round.

    Raises ValueError for a damaged file.
    """
    if not path.exists():
        return None
    try:
        kept = torch.load(path, map_location="cpu", weights_only=True)
        labelled, accuracy = list(kept["labelled"]), list(kept["accuracy"])
        fits = len(labelled) == sizes[min(len(accuracy), len(sizes) - 1)]
        if not fits or len(set(labelled)) < len(labelled) or not all(0 <= i < pool for i in labelled):
            raise ValueError("its labels are not those of such a run")
        model.load_state_dict(kept["weights"])
    except Exception as error:  # of a damaged file torch.load may raise nearly anything
        why = " ".join(str(error).split())
        raise ValueError(f"{path} cannot be continued ({why}): replace the run with --overwrite") from error
    return labelled, accuracy


def _seed(*what: int | str) -> int:
    """A seed of its own for each use. random's seeding by a string is the same in every release of Python."""
    return random.Random("/".join(map(str, what))).getrandbits(62)


def _generator(*what: int | str) -> torch.Generator:
    return torch.Generator().manual_seed(_seed(*what))


def first_labels(labels: Tensor, classes: int, count: int, generator: torch.Generator) -> Tensor:
    """Indices of ``count`` images, of every class as many as of the others, or one more: int64 [count].

    Classes that have too few give all they have; others then give more.
    """
    order = torch.randperm(len(labels), generator=generator)
    # How many of its class come before each image.
    ranks = torch.empty_like(order)
    of_order = labels[order]
    for c in range(classes):
        where = (of_order == c).nonzero().flatten()
        ranks[where] = torch.arange(len(where))
    return order[ranks.argsort(stable=True)][:count]


def acquire(
    score: Callable[[Tensor], Tensor] | None,
    pool: int,
    labelled: Sequence[int],
    count: int,
    candidates: int,
    generator: torch.Generator,
    power: float | None = None,
) -> list[int]:
    """Which images to label next.

    The highest scores of a batch are often of images that are alike. Kirsch et al. 2023 (arXiv:2106.12059,
    "PowerBALD") therefore draw the batch, without putting back, with probabilities that go with score^power.

    Args:
        score: of images, int64 [M] of their indices to [M]; the highest are taken. None takes any.
        pool: how many images there are; labelled: those that have a label already.
        count: how many are wanted; fewer where no more are left.
        candidates: how many, drawn by ``generator``, are looked at.
        power: > 0; None takes the highest scores.

    Returns ``count`` indices, the highest score first.
    """
    free = torch.ones(pool, dtype=torch.bool)
    free[torch.as_tensor(labelled, dtype=torch.int64)] = False
    left = free.nonzero().flatten()
    chosen = left[torch.randperm(len(left), generator=generator)[:candidates]]
    if score is not None:
        keys = score(chosen).double()
        if power is not None:
            # The largest of keys with Gumbel noise are such a draw (Vieira 2014; Kool et al. 2019).
            uniform = torch.rand(len(keys), generator=generator, dtype=torch.float64)
            keys = power * keys.log() - (-uniform.log()).log()
        chosen = chosen[keys.argsort(descending=True, stable=True)]
    return chosen[:count].tolist()


def build(classes: int, channels: int, settings: Mapping[str, Any]) -> nn.Module:
    """A LeNet, untrained, of ``settings["method"]``."""
    method = settings["method"]
    if method in LAYER_TYPES:
        return BBBLeNet(classes, channels, _PRIORS, method, "relu")
    if method == "ensemble":
        return Ensemble([LeNet(classes, channels, "relu") for _ in range(settings["members"])])
    parts: dict[str, nn.Module] = {}
    for name, layer in LeNet(classes, channels, "relu").named_children():
        if isinstance(layer, nn.Linear):
            parts[f"{name}_dropout"] = nn.Dropout(settings["dropout"])
        parts[name] = layer
    return nn.Sequential(OrderedDict(parts))


def train(model: nn.Module, x: Tensor, y: Tensor, steps: int, settings: Mapping[str, Any]) -> None:
    """Steps of a new Adam, its learning rate falling to 0 along a cosine; of an ensemble each member's.

    The loss is mean NLL + kl_weight * KL / N. Args: x float32 [N, C, 32, 32], y int64 [N].
    """
    if isinstance(model, Ensemble):
        for member in model.members:
            train(member, x, y, steps, settings)
        return
    weight = settings["kl_weight"] / len(y)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings["lr"], fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2
    )
    model.train()
    for index in islice(_endless(len(y), settings["batch_size"]), steps):
        output, kl = output_and_kl(model(x[index]))
        loss = F.cross_entropy(output, y[index]) + weight * kl
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def _endless(n: int, batch_size: int) -> Iterator[Tensor]:
    """Batches of one epoch after the other."""
    while True:
        yield from batches(n, batch_size, torch.default_generator)


def output_and_kl(result: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | float]:
    """Of a Bayesian model both; of others, a KL of 0."""
    return result if isinstance(result, tuple) else (result, 0.0)


@torch.no_grad()
def ask(model: nn.Module, x: Tensor, settings: Mapping[str, Any], seed: int) -> CategoricalPredictive:
    """What the draws of a model say of each row; an ensemble's members are asked once each."""
    if isinstance(model, Ensemble):
        return predictive(model, x, len(model), seed=seed)
    if isinstance(model, nn.Sequential):
        # What comes before the first dropout is the same in every draw.
        first = next(k for k, layer in enumerate(model) if isinstance(layer, nn.Dropout))
        x = torch.cat([model[:first](part) for part in x.split(_ROWS)])
        model = mc_dropout(model[first:])
    return predictive(model, x, settings["draws"], seed=seed)


@torch.no_grad()
def accuracy_of_means(model: nn.Module, x: Tensor, labels: Tensor) -> float:
    """Of the posterior's means, of the network without dropout, or of the members' mean logits: one pass."""
    model.eval()
    with posterior_means():
        outputs = [model(part) for part in x.split(_ROWS)]
    logits = torch.cat([output_and_kl(output)[0] for output in outputs])
    return float((logits.argmax(-1) == labels).double().mean())


def document(
    settings: Mapping[str, Any],
    curves: Mapping[str, Sequence[Mapping[str, Sequence[float]]]],
    pool: int,
    judged: int,
    seconds: float,
) -> Document:
    """The curves of every acquisition: a result of :func:`learn` for each seed."""
    sizes = [int(size) for size in next(iter(curves.values()))[0]["labels"]]
    # By acquisition, of each round: the seeds' accuracies in percent.
    rounds = {
        name: [
            [100 * value for value in values]
            for values in zip(*(one["accuracy"] for one in seeds), strict=True)
        ]
        for name, seeds in curves.items()
    }
    on = f"the {judged} {settings['judge']} images, mean of {settings['seeds']} seeds"
    notes = [
        f"Each round {_how(settings)} on all labels so far, and looks at {settings['pool']} of the pool's "
        f"{pool} images, drawn anew, for the next ones to label.",
        "The first labels of a seed are the same for every acquisition, as many of each class.",
        "A network is judged by its means: without dropout, or by the means of its weights.",
    ]
    figures = []
    try:
        from .active_plots import curves as draw
    except ImportError as error:
        notes.append(f"No figure: matplotlib is missing ({error}); pip install matplotlib.")
    else:
        title = f"{settings['dataset']}, LeNet, {settings['method']}: mean of {settings['seeds']} seeds"
        png = draw(sizes, rounds, title, f"accuracy, {settings['judge']} images (%)")
        text = (
            f"Accuracy on {on}, against the number of labels, from {sizes[0]} to {sizes[-1]}, one line for "
            f"each of {', '.join(curves)}; the bands are a standard error to either side."
        )
        figures.append(Figure(FIGURE, "Accuracy against labels", text, png))
    return Document(
        command="active",
        title=f"Active learning on {settings['dataset']} with {settings['method']}",
        settings=settings,
        tables=[_needed(sizes, rounds, settings["accuracies"], on), _reached(sizes, rounds, on)],
        figures=figures,
        results={"labels": sizes, "curves": {name: list(seeds) for name, seeds in curves.items()}},
        notes=notes,
        seconds=seconds,
    )


def _how(settings: Mapping[str, Any]) -> str:
    if settings["from_scratch"]:
        return f"trains a new network with {settings['first_steps']} steps"
    return f"trains on with {settings['steps']} steps"


def labels_needed(sizes: Sequence[int], accuracies: Sequence[float], wanted: float) -> int | None:
    """The fewest labels with which a curve is at ``wanted`` or above; None: it is not, anywhere."""
    return next((size for size, value in zip(sizes, accuracies, strict=True) if value >= wanted), None)


def _needed(
    sizes: Sequence[int], rounds: Mapping[str, Sequence[Sequence[float]]], wanted: Sequence[float], on: str
) -> Table:
    columns = [Column("acquisition"), *(Column(f"{100 * value:g} %", "d", "low") for value in wanted)]
    rows = []
    for name, curve in rounds.items():
        means = [mean_and_error(values)[0] for values in curve]
        rows.append([name, *(labels_needed(sizes, means, 100 * value) for value in wanted)])
    note = f"Of {on}; - where {sizes[-1]} are not enough."
    return Table("Labels needed for an accuracy", columns, rows, note)


def _reached(sizes: Sequence[int], rounds: Mapping[str, Sequence[Sequence[float]]], on: str) -> Table:
    # The first round, the last, and three between them.
    shown = sorted({round(k * (len(sizes) - 1) / 4) for k in range(5)})
    columns = [Column("acquisition"), *(Column(f"{sizes[k]} labels", ".2f", "high") for k in shown)]
    rows = [[name, *(with_error(curve[k], ".2f") for k in shown)] for name, curve in rounds.items()]
    return Table("Accuracy in percent", columns, rows, f"On {on}, and its standard error.")
