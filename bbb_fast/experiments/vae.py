"""A variational autoencoder trained on images, judged on images it has not seen, and looked at.

Grey values are cut at one half, or a pixel is a coin that shows ink with the probability of its grey value:
training flips it anew at each epoch, and those of validation and test are flipped once (Burda, Grosse and
Salakhutdinov 2016). The noise of step k is draw k of ``fixed_noise(seed)``, and the coins and the order of an
epoch come from a generator of its own; so a run that was killed goes on from its last epoch bit for bit.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._files import atomic_write
from .._noise import fixed_noise
from ..models import VAE
from . import archive, data
from .archive import CheckpointError
from .checkpoint import restore_model
from .document import Column, Document, Figure, Table, mean_and_error
from .options import MAX_SEED, OptionError, check_int
from .tasks import Experiment, Task
from .training import TrainingError, image_bar, parse_device

__all__ = ["DATASETS", "PIXELS", "VaeConfig", "judge", "run", "train"]

# Sets of grey images.
DATASETS = tuple(name for name in data.DATASETS if not name.startswith("cifar"))
PIXELS = ("sample", "threshold")
STATE = "model.pt"

_FORMAT, _VERSION = "bbb_fast-vae", 1
_EVAL_BATCH = 500
# Burda et al. 2016, section 5.2: a number of the code is active if its mean varies more from image to image.
_ACTIVE = 0.01
# 2^64 over the golden ratio: the seeds of the generators lie far apart. They are numbered, epochs from 1 on.
_STEP = 0x9E3779B97F4A7C15
_VALID, _TEST, _TRAIN = 0, -1, -2


@dataclass(frozen=True)
class VaeConfig:
    """Every option of a run but where its files are; :meth:`validate` checks them.

    Attributes:
        dataset: one of :data:`DATASETS`.
        pixels: "sample" flips a coin for each pixel, "threshold" cuts grey values at one half.
        latent, width: of :class:`bbb_fast.models.VAE`.
        beta: weights of the KL in training, a model each; 1 is the bound itself.
        epochs: None: 80 for digits, 20 for the larger sets.
        batch_size, lr: of Adam; its rate goes down to 0 along a cosine.
        samples: draws of the importance-weighted log likelihood.
        valid_size: images held out to choose the epoch; None: a tenth.
        train_size, test_size: so many images; None: all there are.
        seed: of everything random; 0 ... 2^63 - 1.
        device: "cpu", "cuda" or "cuda:<index>".
    """

    dataset: str = "digits"
    pixels: str = "sample"
    latent: int = 16
    width: int = 32
    beta: tuple[float, ...] = (1.0,)
    epochs: int | None = None
    batch_size: int = 64
    lr: float = 1e-3
    samples: int = 100
    valid_size: int | None = None
    train_size: int | None = None
    test_size: int | None = None
    seed: int = 0
    device: str = "cpu"

    @property
    def number_of_epochs(self) -> int:
        """``epochs``, or the set's own."""
        return self.epochs or (80 if self.dataset == "digits" else 20)

    def validate(self) -> None:
        """Raises OptionError for the first option that is wrong."""
        for name, allowed in (("dataset", DATASETS), ("pixels", PIXELS)):
            if getattr(self, name) not in allowed:
                raise OptionError(name, f"must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("latent", "width", "batch_size", "samples"):
            check_int(name, getattr(self, name))
        for name in ("epochs", "valid_size", "train_size", "test_size"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name))
        check_int("seed", self.seed, 0, MAX_SEED)
        if not self.beta:
            raise OptionError("beta", "must be at least one number")
        for value in self.beta:
            if not (math.isfinite(value) and value >= 0):
                raise OptionError("beta", f"must be finite numbers >= 0, got {value!r}")
        if len(set(self.beta)) < len(self.beta):
            raise OptionError("beta", f"must be different numbers, got {' '.join(map(str, self.beta))}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise OptionError("lr", f"must be a finite number > 0, got {self.lr!r}")
        parse_device(self.device)

    def settings(self) -> dict[str, Any]:
        """The options as plain values."""
        return {**asdict(self), "beta": list(self.beta), "epochs": self.number_of_epochs}


def run(
    experiment: Experiment,
    config: VaeConfig,
    data_dir: str | os.PathLike[str] | None = None,
    *,
    progress: bool = False,
) -> Document:
    """Trains and judges a model for each beta; returns what there is to show.

    ``progress`` shows the epochs; for tasks that run one by one. Raises ValueError (DataError,
    CheckpointError) for images or files that are not right, TrainingError where training diverges.
    """
    config.validate()
    images = _Images.load(config.settings(), data_dir)  # what is wrong with them shows before any training
    where = None if data_dir is None else str(data_dir)
    training, judging = [], []
    for beta in config.beta:
        arguments = {"settings": config.settings(), "beta": beta, "data_dir": where}
        name = f"beta-{beta:g}"
        training.append(Task(f"train-{name}", train, {**arguments, "progress": progress}))
        judging.append(Task(f"test-{name}", judge, {**arguments, "trained": f"train-{name}"}))
    trained = list(experiment.run(training, "train").values())
    judged = list(experiment.run(judging, "test").values())
    models = [
        _model(experiment.folder(task.name) / STATE, config.settings(), beta, images)
        for task, beta in zip(training, config.beta, strict=True)
    ]
    return _document(experiment, config, images, models, trained, judged)


@dataclass(frozen=True)
class _Images:
    """The sets of a run: uint8, or 0 and 1 for ``valid`` and ``test``, which are black and white for good."""

    train: Tensor
    valid: Tensor
    test: Tensor
    grey_test: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    # Of what they were made from.
    checksum: int

    @classmethod
    def load(cls, settings: Mapping[str, Any], data_dir: str | os.PathLike[str] | None) -> _Images:
        whole, test = (data.load(settings["dataset"], split, data_dir) for split in ("train", "test"))
        held_out = settings["valid_size"] or len(whole) // 10
        train, valid = data.split_validation(whole, held_out, settings["seed"], settings["train_size"])
        test_size = settings["test_size"] or len(test)
        if test_size > len(test):
            raise OptionError("test_size", f"must be at most {len(test)}, the test images, got {test_size}")
        test = test.subset(range(test_size))
        checksum = 0
        for part in (train, valid, test):
            checksum = zlib.crc32(part.images.numpy().tobytes(), checksum)
        return cls(
            train.images,
            _black_and_white(valid.images, settings, _VALID),
            _black_and_white(test.images, settings, _TEST),
            test.images,
            test.labels,
            test.classes,
            checksum,
        )


def _generator(settings: Mapping[str, Any], number: int) -> torch.Generator:
    """Of the coins of a set of images, or of those and the order of an epoch."""
    return torch.Generator().manual_seed((settings["seed"] + number * _STEP) % (1 << 63))


def _black_and_white(images: Tensor, settings: Mapping[str, Any], coins: int | torch.Generator) -> Tensor:
    """float32 0 and 1 for grey values, uint8; ``coins``, a generator or its number."""
    grey = images.float() / 255
    if settings["pixels"] == "threshold":
        return (grey > 0.5).float()
    if isinstance(coins, int):
        coins = _generator(settings, coins)
    return (torch.rand(grey.shape, generator=coins) < grey).float()


def _fresh(settings: Mapping[str, Any]) -> VAE:
    """Before any training, on the CPU; the caller's random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings["seed"])
        return VAE(1, settings["latent"], settings["width"])


def train(
    folder: Path,
    settings: Mapping[str, Any],
    beta: float,
    data_dir: str | None,
    progress: bool = False,
) -> dict[str, Any]:
    """A task: trains a model, and keeps it in ``model.pt`` after each epoch; returns the history."""
    images = _Images.load(settings, data_dir)
    device = parse_device(settings["device"])
    vae = _fresh(settings).to(device)
    optimizer = torch.optim.Adam(vae.parameters(), lr=settings["lr"])
    of_run = _of_run(settings, beta, images)
    state: dict[str, Any] = {"run": of_run, "epoch": 0, "best": {}, "history": []}
    file = folder / STATE
    if file.exists():
        state = _read(file, of_run)
        restore_model(vae, state["model"], file)
        try:
            optimizer.load_state_dict(state["optimizer"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{file} cannot be resumed: its optimizer does not fit ({error})"
            ) from error
    epochs, total = settings["epochs"], len(images.train)
    with image_bar(progress, epochs * total, f"beta {beta:g}") as bar:
        if bar is not None:
            bar.update(state["epoch"] * total)
        while state["epoch"] < epochs:
            entry = _epoch(vae, optimizer, images, settings, beta, state["epoch"], bar)
            state["epoch"] += 1
            state["history"].append(entry)
            score = entry["valid_reconstruction"] - beta * entry["valid_kl"]
            if not state["best"] or score > state["best"]["score"]:
                weights = {name: t.clone() for name, t in vae.state_dict().items()}
                state["best"] = {"epoch": state["epoch"], "score": score, "model": weights}
            now = {**state, "model": dict(vae.state_dict()), "optimizer": optimizer.state_dict()}
            atomic_write(file, archive.pack(_FORMAT, _VERSION, now))
            line = f"ELBO {entry['elbo']:.2f}, validation {entry['valid_elbo']:.2f}"
            if bar is not None:
                bar.set_postfix_str(line, refresh=False)
            elif progress:
                print(f"epoch {state['epoch']}/{epochs}: {line}", flush=True)
    return {"history": state["history"], "epoch": state["best"]["epoch"]}


def _epoch(
    vae: VAE,
    optimizer: torch.optim.Optimizer,
    images: _Images,
    settings: Mapping[str, Any],
    beta: float,
    epoch: int,
    bar: Any,
) -> dict[str, float]:
    """Trains one epoch and validates; the bounds have the KL once, whatever it was trained with."""
    device = next(vae.parameters()).device
    own = _generator(settings, epoch + 1)
    size, total = settings["batch_size"], len(images.train)
    steps = math.ceil(total / size)
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for batch, index in enumerate(data.batches(total, size, own)):
        step = epoch * steps + batch
        for group in optimizer.param_groups:
            group["lr"] = settings["lr"] * (1 + math.cos(math.pi * step / (settings["epochs"] * steps))) / 2
        x = _black_and_white(images.train[index], settings, own).to(device)
        with fixed_noise(settings["seed"], step, model=vae, draw="activations"):
            bound = vae.elbo(x, beta)
        optimizer.zero_grad()
        (-bound.elbo).backward()
        optimizer.step()
        sums += torch.stack([bound.reconstruction, bound.kl]).detach() * len(x)
        if bar is not None:
            bar.update(len(x))
    reconstruction, kl = (sums / total).tolist()
    valid = _bound(vae, images.valid, settings["seed"])
    entry = {"elbo": reconstruction - kl, "reconstruction": reconstruction, "kl": kl}
    entry.update({f"valid_{name}": value for name, value in valid.items()})
    if not all(map(math.isfinite, entry.values())):
        raise TrainingError(
            f"epoch {epoch + 1}: the bound is no longer finite; try a lower --lr (it is {settings['lr']}), "
            "with --overwrite or in another folder"
        )
    return entry


@torch.no_grad()
def _bound(vae: VAE, x: Tensor, seed: int) -> dict[str, float]:
    """The bound of a set of images by one draw for each, the same at every call."""
    device = next(vae.parameters()).device
    sums = torch.zeros(2, dtype=torch.float64)
    for k, part in enumerate(x.split(_EVAL_BATCH)):
        with fixed_noise(~seed, k, model=vae, draw="activations"):
            _, *parts = vae.elbo(part.to(device))
        sums += torch.stack(parts).cpu() * len(part)
    reconstruction, kl = (sums / len(x)).tolist()
    return {"elbo": reconstruction - kl, "reconstruction": reconstruction, "kl": kl}


def _of_run(settings: Mapping[str, Any], beta: float, images: _Images) -> dict[str, Any]:
    """What a file and the run that goes on with it must share."""
    # The options that training does not see; and it sees one beta.
    free = ("beta", "samples", "test_size")
    used = {key: value for key, value in settings.items() if key not in free}
    return {**used, "beta": beta, "images": images.checksum}


def _read(file: Path, of_run: Mapping[str, Any]) -> dict[str, Any]:
    state = archive.read(
        file, _FORMAT, _VERSION, allowed="those that `vae` writes", instead="remove it to train anew"
    )
    kinds = {"run": dict, "epoch": int, "best": dict, "history": list, "model": dict, "optimizer": dict}
    for key, kind in kinds.items():
        if not isinstance(state.get(key), kind):
            raise CheckpointError(f"{file} is incomplete: its entry {key!r} is missing or malformed")
    for key, value in of_run.items():
        if state["run"].get(key) != value:
            raise CheckpointError(
                f"{file} is of another run: its {key} was {state['run'].get(key)!r}, now it is {value!r}"
            )
    if len(state["history"]) != state["epoch"] or not isinstance(state["best"].get("model"), dict):
        raise CheckpointError(f"{file} is inconsistent: remove it to train anew")
    return state


def _model(file: Path, settings: Mapping[str, Any], beta: float, images: _Images) -> VAE:
    """The weights of the best epoch, on the CPU."""
    vae = _fresh(settings)
    restore_model(vae, _read(file, _of_run(settings, beta, images))["best"]["model"], file)
    return vae.eval()


def judge(
    folder: Path, settings: Mapping[str, Any], beta: float, data_dir: str | None, trained: str
) -> dict[str, Any]:
    """A task: the bounds of the three sets, log p(x) of the test images, and how active each number is.

    ``trained`` names the task beside this one that trained the model.
    """
    images = _Images.load(settings, data_dir)
    device = parse_device(settings["device"])
    vae = _model(folder.parent / trained / STATE, settings, beta, images).to(device)
    sets = {
        "train": _black_and_white(images.train, settings, _TRAIN),
        "valid": images.valid,
        "test": images.test,
    }
    result: dict[str, Any] = {name: _bound(vae, x, settings["seed"]) for name, x in sets.items()}
    test = images.test.to(device)
    of_images = vae.log_likelihood(
        test, settings["samples"], seed=settings["seed"], batch_size=_EVAL_BATCH
    ).tolist()
    mean, error = mean_and_error(of_images)
    result["log_likelihood"] = {"mean": mean, "error": error}
    result["activity"] = _codes(vae, test).var(0, correction=0).tolist()
    return result


@torch.no_grad()
def _codes(vae: VAE, x: Tensor) -> Tensor:
    """The means of q(z|x)."""
    return torch.cat([vae.encode(part)[0] for part in x.split(_EVAL_BATCH)])


_COLUMNS = (
    Column("beta", "g"),
    Column("epoch", "d"),
    Column("train", ".2f", "high"),
    Column("valid", ".2f", "high"),
    Column("test", ".2f", "high"),
    Column("reconstruction", ".2f", "high"),
    Column("KL", ".2f"),
    Column("log p(x)", ".2f", "high"),
    Column("+-", ".2f"),
    Column("active", "d"),
)


def _document(
    experiment: Experiment,
    config: VaeConfig,
    images: _Images,
    models: Sequence[VAE],
    trained: Sequence[Mapping[str, Any]],
    judged: Sequence[Mapping[str, Any]],
) -> Document:
    rows = [
        [
            beta, of_training["epoch"],
            *(of_test[name]["elbo"] for name in ("train", "valid", "test")),
            of_test["test"]["reconstruction"], of_test["test"]["kl"],
            of_test["log_likelihood"]["mean"], of_test["log_likelihood"]["error"],
            sum(value > _ACTIVE for value in of_test["activity"]),
        ]
        for beta, of_training, of_test in zip(config.beta, trained, judged, strict=True)
    ]  # fmt: skip
    table = Table(
        f"variational autoencoder, {config.dataset}: nats per image",
        _COLUMNS,
        rows,
        f"train, valid, test: the ELBO of these images; reconstruction, KL: its parts, of the test images\n"
        f"log p(x): of {len(images.test)} test images by {config.samples} draws, a lower bound too; +-: its "
        "standard error\n"
        f"active: numbers of the code, of {config.latent}, whose mean has a variance above {_ACTIVE}",
    )
    results = {
        f"{beta:g}": {**of_training, **of_test}
        for beta, of_training, of_test in zip(config.beta, trained, judged, strict=True)
    }
    figures, notes = _figures(config, images, models, results)
    return Document(
        command=experiment.command,
        title=f"A variational autoencoder on {config.dataset}",
        settings=experiment.settings,
        tables=[table],
        figures=figures,
        results=results,
        notes=notes,
        seconds=experiment.seconds,
    )


def _figures(
    config: VaeConfig, images: _Images, models: Sequence[VAE], results: Mapping[str, Mapping[str, Any]]
) -> tuple[list[Figure], list[str]]:
    try:
        from . import vae_plots
    except ImportError as error:
        return [], [f"no figures: matplotlib is missing ({error}): pip install matplotlib"]
    figures = []
    for vae, (beta, of_beta) in zip(models, results.items(), strict=True):
        several = len(models) > 1
        figures.append(
            Figure(
                f"vae-beta-{beta}.png" if several else "vae.png",
                f"What the autoencoder makes of {config.dataset}" + (f", beta {beta}" if several else ""),
                "Test images above their reconstructions; samples of the prior; codes between two test "
                "images; and test images with one number of their code changed, the most active ones.",
                vae_plots.pictures(
                    vae,
                    images.grey_test,
                    images.test,
                    images.labels,
                    images.classes,
                    of_beta["activity"],
                    config.seed,
                ),
            )
        )
    figures.append(
        Figure(
            "vae-curves.png",
            "The bound in training",
            "ELBO of the training and validation images after each epoch, in nats per image.",
            vae_plots.curves({beta: of_beta["history"] for beta, of_beta in results.items()}),
        )
    )
    return figures, []
