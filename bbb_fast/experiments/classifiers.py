"""Ways to a classifier that knows how sure it is, trained under one budget: what several commands judge.

A study trains networks, each a task of its own (a kind of network, a seed, a member), and judges entries:
what a method makes of them. Entries share networks: the deterministic one of a seed is the first member of
the ensembles of that seed, and the members of a small ensemble are the first of a large one.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler

from ..inference import predict
from ..methods.ensemble import Ensemble
from ..methods.laplace import last_layer_laplace
from ..methods.temperature import TemperatureScaling
from . import checkpoint, data
from .data import ImageSet
from .document import Figure
from .judged import Judged
from .options import MAX_SEED, OptionError, check_int
from .tasks import RESULT, SETTINGS, TASKS, Experiment, Task
from .training import BEST, TrainConfig, fit
from .uncertainty import DERIVED, is_bayesian, judge, pick, unseen

__all__ = [
    "DEFAULTS", "LEFT_OUT", "METHODS", "NETWORKS", "SHARED", "USUAL", "Entry", "Judging", "Network", "Opened",
    "Results", "Sets", "Study", "ask", "check_names", "draw", "judge_entries", "leave_out", "load_sets",
    "notes", "open_entry", "open_task", "read_study", "train", "train_network",
]  # fmt: skip

# Kinds of network, as changes of the options that all share.
NETWORKS: dict[str, dict[str, Any]] = {
    "deterministic": {"layer_type": "none"},
    "mc-dropout": {"layer_type": "dropout"},
    "concrete-dropout": {"layer_type": "concrete"},
    "last-layer": {"layer_type": "last"},
    "bbb": {"layer_type": "bbb"},
    "lrt": {"layer_type": "lrt"},
    "flipout": {"layer_type": "flipout"},
}


class Method(NamedTuple):
    """``label``: its printed name. ``network``: the kind of network it is made of. ``package``: what else it
    needs, if anything."""

    label: str
    network: str
    package: str | None = None


METHODS: dict[str, Method] = {
    "deterministic": Method("deterministic", "deterministic"),
    "temperature": Method("temperature scaling", "deterministic"),
    "ensemble": Method("ensemble", "deterministic"),
    "mc-dropout": Method("MC dropout", "mc-dropout"),
    "concrete-dropout": Method("concrete dropout", "concrete-dropout"),
    "last-layer": Method("last layer Bayesian", "last-layer"),
    "bbb": Method("BBB", "bbb"),
    "lrt": Method("LRT", "lrt"),
    "flipout": Method("Flipout", "flipout"),
    "laplace": Method("last-layer Laplace", "deterministic", "laplace-torch"),
}
# Where none are named: those that need no further package.
USUAL = tuple(name for name, method in METHODS.items() if method.package is None)
# Of all networks, where nothing else is asked for: of the recipe in docs/mnist.md, but for the batch, which
# suits the few images of digits.
DEFAULTS: dict[str, Any] = {
    "model": "lenet",
    "activation": "relu",
    "epochs": 15,
    "batch_size": 32,
    "lr": 2e-3,
    "lr_schedule": "cosine",
    "beta": 0.1,
    "prior_sigma": 0.1,
    "posterior_rho_initial": (-5.0, 0.1),
    "train_samples": 1,
    "valid_samples": 10,
}
# Options of a training that the networks of a study cannot differ in.
SHARED = ("dataset", "seed", "device", "threads", "valid_size", "train_size", "test_samples", "layer_type")
# The set of the classes that were left out of the training.
LEFT_OUT = "left-out"

# Between the seeds of an ensemble's members: 2^63 over the golden ratio, far from those of other members.
_MEMBER_STEP = 0x4F1BBCDCBFA53E0B
_RUN = "run"
# Images at a time.
_BATCH = 1000


class Network(NamedTuple):
    """One training."""

    kind: str
    seed: int
    member: int = 0

    @property
    def task(self) -> str:
        """The name of its task."""
        return f"{self.kind}-seed{self.seed}" + (f"-member{self.member}" if self.member else "")


class Entry(NamedTuple):
    """What is judged: ``members`` networks of a kind, and what a method makes of them.

    ``scaled``: under temperature scaling.
    """

    name: str
    label: str
    method: str
    members: int = 1
    scaled: bool = False

    @property
    def kind(self) -> str:
        """That of its networks."""
        return METHODS[self.method].network

    def networks(self, seed: int) -> list[Network]:
        """Those that it is made of."""
        return [Network(self.kind, seed, member) for member in range(self.members)]


@dataclass(frozen=True)
class Study:
    """What is trained, and on what; :meth:`validate` checks it.

    Attributes:
        dataset: one of ``data.DATASETS``.
        methods: some of :data:`METHODS`.
        ensemble_sizes: members of the ensembles; each size is an entry.
        scaled: whether every entry is judged under temperature scaling too.
        seed, seeds: the first seed, and how many there are: each has its own networks and validation set.
        valid_size, train_size: as in :class:`TrainConfig`.
        leave_out: labels of classes that are not trained on, and never seen therefore.
        options: of every network, in place of :data:`DEFAULTS`.
        overrides: further options of the networks of a kind.
    """

    dataset: str = "digits"
    methods: tuple[str, ...] = USUAL
    ensemble_sizes: tuple[int, ...] = (5,)
    scaled: bool = False
    seed: int = 0
    seeds: int = 1
    valid_size: int | None = None
    train_size: int | None = None
    leave_out: tuple[int, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON keeps them."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Study:
        """Of what :meth:`to_dict` returns."""
        own: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**own)

    def validate(self) -> None:
        """Raises ValueError for the first thing that is wrong; says what is allowed."""
        check_names("methods", self.methods, METHODS)
        if "laplace" in self.methods and find_spec("laplace") is None:
            package = METHODS["laplace"].package
            raise OptionError("methods", f"laplace needs {package}, which is missing: pip install {package}")
        check_int("seed", self.seed, 0, MAX_SEED)
        check_int("seeds", self.seeds)
        if self.seed + self.seeds - 1 > MAX_SEED:
            raise OptionError("seeds", f"must leave the last seed at most {MAX_SEED}, got {self.seeds}")
        if "ensemble" in self.methods:
            if not self.ensemble_sizes or len(set(self.ensemble_sizes)) != len(self.ensemble_sizes):
                raise OptionError(
                    "ensemble_sizes", f"must be different numbers, got {list(self.ensemble_sizes)}"
                )
            for size in self.ensemble_sizes:
                check_int("ensemble_sizes", size, least=2)
        _check_options("options", self.options)
        kinds = list(dict.fromkeys(METHODS[method].network for method in self.methods))
        for kind, changes in self.overrides.items():
            if kind not in kinds:
                raise OptionError("set", f"can change the networks of {', '.join(kinds)} here, got {kind!r}")
            _check_options("set", changes)
        for network in self.networks():
            self.config(network).validate()

    def entries(self) -> list[Entry]:
        """What is judged, for each seed."""
        found = []
        for name in self.methods:
            label = METHODS[name].label
            if name == "ensemble":
                sizes = self.ensemble_sizes
                found += [Entry(f"ensemble-{size}", f"{label} of {size}", name, size) for size in sizes]
            else:
                found.append(Entry(name, label, name, scaled=name == "temperature"))
        if self.scaled:
            # The deterministic network under it is an entry of its own.
            found += [
                entry._replace(name=f"{entry.name}-scaled", label=f"{entry.label}, scaled", scaled=True)
                for entry in found
                if not entry.scaled and (entry.method != "deterministic" or "temperature" not in self.methods)
            ]
        return found

    def all_seeds(self) -> range:
        """Every seed."""
        return range(self.seed, self.seed + self.seeds)

    def networks(self) -> list[Network]:
        """Every training that the entries need, once."""
        needed = [n for seed in self.all_seeds() for entry in self.entries() for n in entry.networks(seed)]
        return list(dict.fromkeys(needed))

    def config(self, network: Network, device: str = "cpu") -> TrainConfig:
        """The options of a training."""
        changes = {**DEFAULTS, **self.options, **NETWORKS[network.kind]}
        changes |= self.overrides.get(network.kind, {})
        pairs = {key: tuple(value) for key, value in changes.items() if isinstance(value, list)}
        own_seed = (network.seed + network.member * _MEMBER_STEP) % (MAX_SEED + 1)
        sizes: dict[str, Any] = {"valid_size": self.valid_size, "train_size": self.train_size}
        return TrainConfig(
            **{**changes, **pairs}, **sizes, dataset=self.dataset, seed=own_seed, device=device
        )

    def tasks(self, data_dir: str | None = None, device: str = "cpu") -> list[Task]:
        """A task for each training."""
        return [
            Task(
                network.task, train_network,
                {"study": self.to_dict(), "network": list(network), "data_dir": data_dir, "device": device},
            )
            for network in self.networks()
        ]  # fmt: skip


def check_names(option: str, names: Sequence[str], allowed: Mapping[str, Any]) -> None:
    """Raises OptionError unless the names are one or more of those allowed, each once."""
    for name in names:
        if name not in allowed:
            raise OptionError(option, f"must be some of {', '.join(allowed)}, got {name!r}")
    if not names or len(set(names)) != len(names):
        raise OptionError(option, f"must be one or more, each once, got {list(names)}")


def _check_options(option: str, changes: Mapping[str, Any]) -> None:
    allowed = [f.name for f in fields(TrainConfig) if f.name not in SHARED]
    for name in changes:
        if name not in allowed:
            raise OptionError(option, f"can change {', '.join(allowed)}, got {name!r}")


class Sets(NamedTuple):
    """What a seed's networks are trained on and judged by.

    ``test``: of known classes; ``numbers``, int64 [N], their places among all of them. ``outside``: what the
    networks have never seen, if that is asked for.
    """

    train: ImageSet
    valid: ImageSet
    test: ImageSet
    numbers: Tensor
    outside: ImageSet | None


@lru_cache(maxsize=4)
def _load(name: str, split: str, data_dir: str | None) -> ImageSet:
    return data.load(name, split, data_dir)


def leave_out(images: ImageSet, labels: Sequence[int]) -> tuple[ImageSet, ImageSet]:
    """The images of all other classes, which are numbered anew in their order, and those of ``labels``.

    The second set keeps its labels and classes. Raises DataError for labels that are not there, and where
    fewer than two classes would be left.
    """
    count = len(images.classes)
    for label in labels:
        if not 0 <= label < count:
            raise data.DataError(
                f"{images.name}: there is no class {label} to leave out: allowed are 0 to {count - 1}"
            )
    kept = [label for label in range(count) if label not in labels]
    if len(kept) < 2:
        raise data.DataError(f"{images.name}: at least two classes must be left, not {len(kept)} of {count}")
    number = torch.full((count,), -1)
    number[kept] = torch.arange(len(kept))
    new = number[images.labels]
    known = images.subset((new >= 0).nonzero().flatten())
    renumbered = ImageSet(
        known.images, number[known.labels], tuple(images.classes[label] for label in kept), images.name
    )
    return renumbered, images.subset((new < 0).nonzero().flatten())


def load_sets(study: Study, seed: int, judging: Judging) -> Sets:
    """The images of a seed's networks, and those they are judged by.

    Raises DataError for what is wrong with the data.
    """
    outside, limit = judging.outside, judging.limit
    whole, test = (_load(study.dataset, split, judging.data_dir) for split in ("train", "test"))
    left_out = test
    if study.leave_out:
        whole, _ = leave_out(whole, study.leave_out)
        test, left_out = leave_out(test, study.leave_out)
    valid_size = len(whole) // 10 if study.valid_size is None else study.valid_size
    train, valid = data.split_validation(whole, valid_size, seed, study.train_size)
    # Every seed is judged by the same images.
    numbers = pick(test, limit, study.seed)
    test = test.subset(numbers)
    if outside is None:
        return Sets(train, valid, test, numbers, None)
    if outside in DERIVED:
        return Sets(train, valid, test, numbers, unseen(outside, test, study.seed))
    if outside == LEFT_OUT:
        other = replace(left_out, name=f"{left_out.name}, classes left out")
    else:
        other = _load(outside, "test", judging.outside_dir or judging.data_dir)
        channels = test.images.shape[1]
        if other.images.shape[1] != channels:
            raise data.DataError(
                f"{outside} has images of {other.images.shape[1]} channel(s), {study.dataset} of {channels}: "
                "the same networks cannot see both"
            )
    return Sets(train, valid, test, numbers, other.subset(pick(other, limit, study.seed)))


@dataclass(frozen=True)
class Judging:
    """How a study's entries are judged.

    Attributes:
        samples: draws of what answers at random.
        limit: at most so many test images of each set.
        outside: the never-seen images, if any: one of ``data.DATASETS``, of ``uncertainty.DERIVED``, or
            :data:`LEFT_OUT`.
        data_dir, outside_dir: where the data are.
        device: where the models run.
        trained: the folder of the tasks that have trained the networks; None: the experiment's own.
    """

    samples: int = 50
    limit: int | None = None
    outside: str | None = None
    data_dir: str | None = None
    outside_dir: str | None = None
    device: str = "cpu"
    trained: str | None = None

    def settings(self) -> dict[str, Any]:
        """What the results depend on."""
        return {
            "samples": self.samples,
            "limit": self.limit,
            "outside": self.outside,
            "trained": self.trained,
        }


Results = dict[str, list[Any]]


def judge_entries(
    running: Experiment,
    study: Study,
    judging: Judging,
    function: Callable[..., Mapping[str, Any]],
    parts: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Results]:
    """Judges every entry of every seed, each in a task of its own.

    The task is ``function(folder, entry=name, seed=..., study=..., judging=..., **arguments)``, which begins
    by :func:`open_task`. ``parts``: further arguments, by name, where there are several tasks for an entry.

    Returns: for each part (one, "", without ``parts``) and entry the results of all seeds.
    """
    given: Mapping[str, Mapping[str, Any]] = parts or {"": {}}
    how = {"study": study.to_dict(), "judging": asdict(judging)}
    tasks = {
        (part, entry.name, seed): Task(
            f"judge-{entry.name}-seed{seed}" + (f"-{part}" if part else ""),
            function,
            {"entry": entry.name, "seed": seed, **how, **arguments},
        )
        for entry in study.entries()
        for seed in study.all_seeds()
        for part, arguments in given.items()
    }
    found = running.run(list(tasks.values()), "judging")
    results: dict[str, Results] = {part: {} for part in given}
    for (part, name, _), task in tasks.items():
        results[part].setdefault(name, []).append(found[task.name])
    return results


def open_task(
    folder: Path, entry: str, seed: int, study: Mapping[str, Any], judging: Mapping[str, Any]
) -> tuple[Opened, Sets, str]:
    """An entry of a seed, its images, and the device."""
    plan, how = Study.from_dict(study), Judging(**judging)
    own = next(e for e in plan.entries() if e.name == entry)
    sets = load_sets(plan, seed, how)
    trained = folder.parent if how.trained is None else Path(how.trained)
    return open_entry(trained, own, seed, how.samples, sets, how.device), sets, how.device


def train(running: Experiment, study: Study, judging: Judging) -> dict[str, dict[str, Any]]:
    """What the tasks of all networks say, by the tasks' names; trains what no earlier run has trained."""
    if judging.trained is not None:
        folder = Path(judging.trained)
        return {
            n.task: json.loads((folder / n.task / RESULT).read_text())["result"] for n in study.networks()
        }
    return running.run(study.tasks(judging.data_dir, judging.device), "training")


def draw(figures: Callable[[], list[Figure]]) -> tuple[list[Figure], list[str]]:
    """``figures()``, which imports what it draws with; without matplotlib none, and a note that says so."""
    try:
        return figures(), []
    except ImportError as error:
        return [], [f"No figures: matplotlib is missing ({error}); pip install matplotlib."]


def notes(study: Study, judging: Judging) -> list[str]:
    """What a reader of any table of a study must know."""
    found = [
        f"Entries that answer at random are asked {judging.samples} times, an ensemble once for each member, "
        "a deterministic network once."
    ]
    if study.seeds > 1:
        found.append(f"±: the standard error of the mean over {study.seeds} seeds.")
    return found


def train_network(
    folder: Path, study: Mapping[str, Any], network: Sequence[Any], data_dir: str | None, device: str
) -> dict[str, Any]:
    """The task of one training: goes on where it was stopped; its checkpoints are in ``folder/run``."""
    own, plan = Network(*network), Study.from_dict(study)
    sets = load_sets(plan, own.seed, Judging(data_dir=data_dir))
    config = plan.config(own, device)
    metrics = fit(config, sets.train, sets.valid, None, folder / _RUN, progress=False, name=own.task)
    return {
        "parameters": metrics["parameters"],
        "images": len(sets.train),
        "best": metrics["best"],
        "train_seconds": metrics["timing"]["train_seconds"],
    }


class _Normalized(Dataset[tuple[Tensor, Tensor]]):
    """Images as networks take them, by lists of numbers: uint8 until then."""

    def __init__(self, images: ImageSet, mean: list[float], std: list[float], device: str) -> None:
        self.images, self.mean, self.std, self.device = images, mean, std, device

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, numbers: list[int]) -> tuple[Tensor, Tensor]:
        images = self.images.images[numbers].to(self.device)
        return data.normalize(images, self.mean, self.std), self.images.labels[numbers].to(self.device)


@dataclass(frozen=True, eq=False)
class Opened:
    """An entry of a seed, ready to be asked.

    Attributes:
        model: in eval mode; answers at random where ``draws`` is above 1.
        mean, std: for :func:`data.normalize`.
        classes: names, by label.
        draws: how often it has to be asked.
        temperature: what was fitted; None without temperature scaling.
    """

    model: nn.Module
    mean: list[float]
    std: list[float]
    classes: tuple[str, ...]
    draws: int
    temperature: float | None


def open_entry(tasks: Path, entry: Entry, seed: int, samples: int, sets: Sets, device: str) -> Opened:
    """Loads an entry's trained networks from a folder of tasks.

    ``samples``: draws of an entry that answers at random; an ensemble is asked once for each member, and a
    deterministic network once. ``sets``: for what is fitted after training.
    """
    loaded = [checkpoint.load_model(tasks / n.task / _RUN / BEST) for n in entry.networks(seed)]
    first, temperature = loaded[0], None
    model = first.model if entry.members == 1 else Ensemble(network.model for network in loaded)
    model = model.to(device).eval()
    if entry.method == "laplace":
        train = _Normalized(sets.train, first.mean, first.std, device)
        in_order = BatchSampler(SequentialSampler(train), _BATCH, drop_last=False)
        model = last_layer_laplace(model, DataLoader(train, sampler=in_order, batch_size=None))
    draws = entry.members if entry.members > 1 else samples if is_bayesian(model) else 1
    if entry.scaled:
        x = data.normalize(sets.valid.images.to(device), first.mean, first.std)
        outputs = predict(model, x, draws, seed=seed, batch_size=_BATCH)
        with warnings.catch_warnings():
            # A validation set without an error does not tell the temperature, which the results have.
            warnings.simplefilter("ignore", UserWarning)
            model = TemperatureScaling(model).fit(outputs, sets.valid.labels.to(device)).eval()
        temperature = float(model.temperature)
    return Opened(model, first.mean, first.std, first.classes, draws, temperature)


def ask(opened: Opened, images: ImageSet, seed: int, device: str) -> Judged:
    """What an entry says of images, by the draws of ``seed``."""
    return judge(
        opened.model, images, opened.mean, opened.std,
        samples=opened.draws, seed=seed, batch_size=_BATCH, device=device,
    )  # fmt: skip


def read_study(folder: Path, **changes: Any) -> tuple[Study, Path]:
    """The study of a run, or with other entries of the same networks; and the folder of its tasks.

    ``changes``: methods, ensemble_sizes and seeds. Raises OptionError where the folder holds no study, or
    lacks trained networks.
    """
    file = folder / SETTINGS
    try:
        study = Study.from_dict(json.loads(file.read_text(encoding="utf-8"))["study"])
        study.validate()
    except FileNotFoundError:
        raise OptionError("from", f"must be the folder of a run: there is no {file}") from None
    except (ValueError, TypeError, KeyError):
        raise OptionError(
            "from", f"must be the folder of a run of compare, ood or shift: {file} is not of one"
        ) from None
    # Methods that are not asked for need no options.
    kinds = {METHODS[method].network for method in changes.get("methods", study.methods)}
    kept = {kind: options for kind, options in study.overrides.items() if kind in kinds}
    study = replace(study, overrides=kept, **changes)
    study.validate()
    for network in study.networks():
        if not (folder / TASKS / network.task / RESULT).exists():
            raise OptionError(
                "from", f"has no trained {network.task}: {folder} is of other networks, or unfinished"
            )
    return study, folder / TASKS
