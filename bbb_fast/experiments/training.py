"""Training a classifier: the loop, its options, and runs that can be stopped and continued.

The loss of a minibatch is ``mean NLL + kl_weight * KL / N`` with N training images: at a KL weight of 1
the negative ELBO per image. It is on the scale of a point estimate's loss: learning rates carry over.

Several processes (``torch.distributed``) share a minibatch. Each draws noise of its own for its part, and
all take the step of the average of their gradients, so they hold the same weights all along. The average is
the gradient of the loss above: a part counts by its rows, and the KL, which every process has whole, once.
"""

from __future__ import annotations

import importlib
import io
import json
import math
import os
import platform
import secrets
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import routes
from .._backend import backend, build_info
from ..inference import multi_sample, predict
from ..layers import ModuleWrapper
from ..losses import SCHEDULES, kl_loss, kl_weight
from ..methods.ensemble import fgsm
from ..metrics import classification_report
from ..models.build import ACTIVATIONS, choose
from ..priors import DEFAULT_PRIORS, resolve_priors
from ..routes import Routes
from . import checkpoint, plots
from .data import ImageSet, batches, channel_stats, normalize
from .folder import OwnedFolder
from .options import MAX_COUNT, MAX_SEED, MAX_THREADS, OptionError, check_int
from .processes import Processes
from .uncertainty import is_bayesian

__all__ = [
    "LR_SCHEDULES",
    "TrainConfig",
    "TrainingError",
    "fit",
    "image_bar",
    "parse_device",
    "predict_probs",
]

LR_SCHEDULES = ("constant", "cosine", "plateau")

# The files of a run's folder.
FILES = LAST, BEST, METRICS, CURVES = "last.pt", "best.pt", "metrics.json", "curves.png"

_EVAL_BATCH = 1000
# Looking at a loss makes the CPU wait for a GPU, so it is not done at every step.
_CHECK_EVERY = 50
# Options that runs of earlier releases did not have: those were what they are by default.
_ADDED = ("variance_dtype", "dropout", "adversarial")
# Resuming with another value of these does not change the training; epochs has rules of its own.
_FREE_ON_RESUME = ("epochs", "test_samples")
_PLATEAU: dict[str, Any] = {"mode": "min", "factor": 0.5, "patience": 5}


class TrainingError(RuntimeError):
    """Training cannot go on: the loss or the model's outputs are not finite."""


@dataclass(frozen=True)
class TrainConfig:
    """Every option of a run; :meth:`validate` checks them.

    Attributes:
        dataset: a name for messages and records; :func:`fit` takes it from the training set.
        model, layer_type: see :data:`bbb_fast.checkpoint.MODELS` and ``MODEL_LAYER_TYPES``.
        activation: "softplus" or "relu".
        variance_dtype: "float32", or "bfloat16" for the variance products of layer_type "lrt": faster where
            the machine multiplies bfloat16 faster (docs/mnist.md has its effect on the results).
        dropout: the rate under layer_type "dropout", and what the learned rates of "concrete" start from.
        prior_mu ... posterior_rho_initial: the ``priors`` of the Bayesian layers; prior_sigma also of
            "concrete".
        epochs, batch_size: at least 1; the last batch of an epoch may be short. Several processes share a
            batch, so that their number changes neither the steps nor the images of each.
        train_samples, valid_samples, test_samples: draws a minibatch, whose memory grows with them
            (:func:`bbb_fast.multi_sample`), and draws of the weights a prediction.
        valid_size: images held out for validation; None: a tenth. train_size: images to train on; None:
            all the others. Both are for :func:`bbb_fast.data.split_validation`, not for :func:`fit`.
        beta: the KL weight: a number >= 0 (1: the exact ELBO) or one of ``losses.SCHEDULES``.
        lr, weight_decay: of Adam; weight_decay is for models without a KL (layer_type "none" and "dropout").
        lr_schedule: "constant", "cosine" (to 0, at every step) or "plateau" (halved when the validation
            NLL has not improved for 6 epochs).
        adversarial: of adversarial training, the size of the step against each pixel in units of the range
            of pixels (Lakshminarayanan et al. 2017, arXiv:1612.01474, algorithm 1, take 0.01); 0: none.
        seed: of initialisation, noise, order and draws; 0 ... 2^63 - 1.
        device: "cpu", "cuda" or "cuda:<index>". For several processes "cpu" or "cuda", which is then the GPU
            of each process's number on its machine.
        threads: of the CPU, in each process; None leaves PyTorch's number.
    """

    dataset: str = "digits"
    model: str = "lenet"
    layer_type: str = "lrt"
    activation: str = "softplus"
    variance_dtype: str = "float32"
    dropout: float = checkpoint.DEFAULT_DROPOUT
    prior_mu: float = DEFAULT_PRIORS["prior_mu"]
    prior_sigma: float = DEFAULT_PRIORS["prior_sigma"]
    posterior_mu_initial: tuple[float, float] = DEFAULT_PRIORS["posterior_mu_initial"]
    posterior_rho_initial: tuple[float, float] = DEFAULT_PRIORS["posterior_rho_initial"]
    epochs: int = 30
    batch_size: int = 128
    train_samples: int = 1
    valid_samples: int = 10
    test_samples: int = 100
    valid_size: int | None = None
    train_size: int | None = None
    beta: float | str = 0.1
    lr: float = 2e-3
    lr_schedule: str = "constant"
    weight_decay: float = 0.0
    adversarial: float = 0.0
    seed: int = 0
    device: str = "cpu"
    threads: int | None = None

    @property
    def has_kl(self) -> bool:
        """Whether the loss has a KL."""
        return self.layer_type not in checkpoint.WITHOUT_KL

    @property
    def priors(self) -> dict[str, Any]:
        """The four numbers and pairs as the layers take them."""
        return {key: getattr(self, key) for key in DEFAULT_PRIORS}

    def validate(self, processes: int = 1) -> None:
        """Raises ValueError for the first option that is wrong, for a run of so many processes.

        The message says what is allowed.
        """
        for name, allowed in (
            ("model", checkpoint.MODELS),
            ("layer_type", checkpoint.MODEL_LAYER_TYPES),
            ("activation", ACTIVATIONS),
            ("variance_dtype", checkpoint.VARIANCE_DTYPES),
            ("lr_schedule", LR_SCHEDULES),
        ):
            choose(name, getattr(self, name), dict.fromkeys(allowed))
        for key, value in self.priors.items():
            try:
                resolve_priors({key: value})
            except ValueError as error:
                raise OptionError(key, str(error).removeprefix(f"priors[{key!r}] ")) from None
        for name in ("epochs", "batch_size", "train_samples", "valid_samples", "test_samples"):
            check_int(name, getattr(self, name))
        for name, most in (("valid_size", MAX_COUNT), ("train_size", MAX_COUNT), ("threads", MAX_THREADS)):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), most=most)
        check_int("seed", self.seed, 0, MAX_SEED)
        if not (isinstance(self.beta, str) and self.beta in SCHEDULES) and not _is_number(self.beta):
            names = ", ".join(SCHEDULES)
            raise OptionError("beta", f"must be a finite number >= 0 or one of {names}, got {self.beta!r}")
        if not _is_number(self.lr) or self.lr == 0:
            raise OptionError("lr", f"must be a finite number > 0, got {self.lr!r}")
        for name in ("weight_decay", "adversarial"):
            if not _is_number(getattr(self, name)):
                raise OptionError(name, f"must be a finite number >= 0, got {getattr(self, name)!r}")
        if not _is_number(self.dropout) or not 0 < self.dropout < 1:
            raise OptionError("dropout", f"must be a number above 0 and below 1, got {self.dropout!r}")
        if self.weight_decay and self.has_kl:
            raise OptionError(
                "weight_decay",
                f"must be 0 with layers of type {self.layer_type}, got {self.weight_decay}: the KL takes its "
                "place in a Bayesian model",
            )
        if self.adversarial and self.train_samples > 1:
            raise OptionError(
                "adversarial",
                f"must be 0 with {self.train_samples} draws in a training step, got {self.adversarial}: it "
                "takes one",
            )
        if self.variance_dtype != "float32" and self.layer_type != "lrt":
            raise OptionError(
                "variance_dtype",
                f"must be float32 with layers of type {self.layer_type}, got {self.variance_dtype}: only lrt "
                "has variance products",
            )
        parse_device(self.device)
        if processes > 1 and self.device not in ("cpu", "cuda"):
            raise OptionError(
                "device",
                f"must be cpu or cuda with {processes} processes, each of which takes a GPU of its own, got "
                f"{self.device}",
            )
        if self.batch_size < processes:
            raise OptionError(
                "batch_size", f"must be at least the number of processes, {processes}, got {self.batch_size}"
            )

    def to_dict(self) -> dict[str, Any]:
        """The options as plain values, pairs as lists: what checkpoints and JSON hold."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


def _is_number(value: Any) -> bool:
    """Whether it is a finite number >= 0."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value >= 0


def parse_device(name: str) -> torch.device:
    """The device of an option; raises OptionError for another name and for a GPU that is not there."""
    try:
        device = torch.device(name) if isinstance(name, str) else None
    except (RuntimeError, OverflowError):
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise OptionError("device", f"must be cpu, cuda, cuda:0, cuda:1, ..., got {name!r}")
    if device.type == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = device.index or 0
    if index >= count:
        found = "no CUDA device" if count == 0 else f"only {count} CUDA device(s)"
        raise OptionError("device", f"{name} is not there: PyTorch finds {found} here; use cpu")
    return torch.device("cuda", index)


@torch.no_grad()
def predict_probs(
    model: nn.Module,
    images: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    samples: int,
    seed: int,
) -> Tensor:
    """The mean of the softmax over ``samples`` draws of the weights; a point model needs only one.

    The draws depend on ``seed`` alone, and no generator's state changes.

    Args: images uint8 [N, C, 32, 32] with N >= 1, on any device; mean and std of each channel, as
    ``data.normalize`` takes them. Returns float64 [N, classes] on the CPU.
    """
    device = next(model.parameters()).device
    parts = []
    # Not by predict's batch_size: that returns [samples, N, classes], gigabytes for 100 classes.
    for part in images.split(_EVAL_BATCH):
        outputs = predict(model, normalize(part.to(device), mean, std), samples, seed=seed)
        parts.append(outputs.double().softmax(-1).mean(0).cpu())
    return torch.cat(parts)


def fit(
    config: TrainConfig,
    train: ImageSet,
    valid: ImageSet,
    test: ImageSet | None,
    out: str | os.PathLike[str],
    resume: bool = False,
    progress: bool = True,
    *,
    overwrite: bool = False,
    name: str | None = None,
) -> dict[str, Any]:
    """Trains a model, keeps the best epoch's weights, and judges those once on the test set.

    The folder ``out`` (made if needed) receives ``last.pt`` after every epoch, ``best.pt`` after every
    epoch with the highest validation accuracy so far (ties: lower NLL), and at the end ``metrics.json``
    and, with matplotlib, ``curves.png``; each is written in one step. While it lasts, the folder is locked
    (``.training.lock``) and no other run, in this process or another, can have it. The caller's random state
    and number of threads come back as they were.

    Where ``torch.distributed`` is initialised, all processes of its default group call this, with the same
    options and images, and train one model together. Process 0 alone has the folder, writes and prints. All
    hold the same weights, bit for bit. What process 0 raises about the folder all raise; a process that fails
    alone leaves the others waiting for it until it exits.

    Args:
        config: the options; checked first.
        train, valid, test: images with the same channels and classes; without ``test`` no test scores.
        out: the folder of this run.
        resume: continue from ``out/last.pt``, bit for bit as if the run had never stopped. The options
            and images must be the same, except ``test_samples``, and ``epochs`` where nothing in the
            run depends on their number. A finished run is only judged again. Another number of processes may
            continue, also with another number of threads: it takes the same steps, under other noise.
        progress: print a line an epoch, and show a bar on a terminal if tqdm is installed.
        overwrite: replace a run that ``out`` already holds. A run that has not completed an epoch is
            replaced without it.
        name: of a new run; None: a random one. If ``out`` holds a run of this name, that is continued,
            without ``resume`` and in spite of ``overwrite``: so a job that is started again goes on where it
            was. Two jobs must not have the same one.

    Returns:
        What ``metrics.json`` holds: the run's name, which its checkpoints have too, the options, seeds,
        versions, sizes, history, timing, the best validation scores, the last epoch's mean KL weight, and
        ``test`` (accuracy, nll, brier, ece, samples; None without a test set). Of several processes also
        their number, ``processes``; the measured times are each one's own.

    Raises:
        ValueError: a wrong option or data set, a resume that does not fit (also CheckpointError), or
            processes that were given different ones.
        FileExistsError: ``out`` holds one of these files, without ``resume`` or ``overwrite``.
        OSError: ``out`` cannot be written (what it held is unchanged), or another run is writing to it.
        TrainingError: the loss or the outputs are not finite, or the processes' weights are not the same.
        RuntimeError: another process is gone.
    """
    processes = Processes()
    config = replace(config, dataset=train.name)
    config.validate(processes.size)
    if name is not None and (not isinstance(name, str) or not name):
        raise ValueError(f"name must be a str that is not empty, or None, got {name!r}")
    _check_data(train, valid, test)
    _check_alike(processes, config, {"training": train, "validation": valid, "test": test})
    folder = Path(out).expanduser()
    if resume and overwrite:
        raise ValueError("resume and overwrite contradict each other: give one of them")
    if processes.rank != 0:
        progress = False
    owned = OwnedFolder(folder, "training", FILES, None if name is None else f"run {name}")
    with ExitStack() as stack:

        def enter() -> dict[str, Any] | None:
            if resume and not (folder / LAST).exists():
                raise ValueError(f"nothing to resume: {folder / LAST} does not exist; start without --resume")
            stack.enter_context(owned)
            epoch = _epoch_of(folder, name)
            if resume or epoch:
                return _load_previous(folder, config, train, valid, processes.size)
            # Of a run of this name that has not completed an epoch the same is done again.
            if epoch is None and not overwrite:
                _check_free(folder)
            return None

        previous = processes.first(enter)
        return _train(config, train, valid, test, owned, previous, progress, name)


def _epoch_of(folder: Path, name: str | None) -> int | None:
    """The epochs that the run of this name in the folder has completed; None: there is none."""
    if name is not None:
        with suppress(checkpoint.CheckpointError):
            last = checkpoint.load(folder / LAST)
            if last.get("run") == name:
                epoch: int = last["epoch"]
                return epoch
    return None


def _train(
    config: TrainConfig,
    train: ImageSet,
    valid: ImageSet,
    test: ImageSet | None,
    owned: OwnedFolder,
    previous: dict[str, Any] | None,
    progress: bool,
    name: str | None,
) -> dict[str, Any]:
    processes = Processes()
    folder, threads = owned.path, config.threads
    if threads is None and previous is not None and _processes_of(previous) == processes.size:
        threads = previous["config"].get("threads")
    config = replace(config, threads=threads or processes.first(torch.get_num_threads))
    config.validate(processes.size)  # once more: the number may be a file's
    # Flushed: a log should show an epoch when it ends.
    say: Callable[[str], None] = partial(print, flush=True) if progress else lambda line: None
    with _surroundings(config):
        run = _Run(config, train, valid, name)
        if previous is None:
            previous = processes.first(partial(_begin, run, owned))
        if previous is not None:
            run.restore(previous, folder / LAST)
        say(_headline(run, test))
        while run.epoch < config.epochs:
            improved = run.advance(progress)
            processes.first(partial(_keep, run, owned, improved))
            say(_epoch_line(run.history[-1], config.epochs, improved))
        metrics = _judge(run, folder, test)
    processes.first(partial(_finish, owned, metrics, say))
    return metrics


def _begin(run: _Run, owned: OwnedFolder) -> dict[str, Any] | None:
    """Writes the first checkpoint of a new run; returns it where other processes have to take it over."""
    # At epoch 0: a folder that cannot be written shows now, and every interruption can resume.
    owned.write(LAST, checkpoint.pack(run.state()))
    for name in FILES[1:]:
        (owned.path / name).unlink(missing_ok=True)  # of the run that is overwritten
    return checkpoint.load(owned.path / LAST) if run.processes.size > 1 else None


def _keep(run: _Run, owned: OwnedFolder, improved: bool) -> None:
    """Writes the checkpoints of an epoch."""
    state = checkpoint.pack(run.state())
    # best.pt first: if last.pt is never written, resuming repeats this epoch and best.pt.
    if improved:
        owned.write(BEST, state)
    owned.write(LAST, state)


def _finish(owned: OwnedFolder, metrics: dict[str, Any], say: Callable[[str], None]) -> None:
    """Writes what a finished run has besides its checkpoints."""
    owned.write(METRICS, (json.dumps(metrics, indent=2, allow_nan=False) + "\n").encode())
    try:
        figure = plots.training_curves(metrics["history"])
    except ImportError as error:
        say(f"no {CURVES}: matplotlib is missing ({error}); pip install matplotlib")
        return
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    owned.write(CURVES, image.getbuffer())


def _check_data(train: ImageSet, valid: ImageSet, test: ImageSet | None) -> None:
    for role, images in (("training", train), ("validation", valid), ("test", test)):
        if images is None:
            continue
        if len(images) == 0:
            raise ValueError(f"the {role} set is empty; at least one image is needed")
        for what, size, needed in (
            ("channels", images.images.shape[1], train.images.shape[1]),
            ("classes", len(images.classes), len(train.classes)),
        ):
            if size != needed:
                raise ValueError(f"the {role} set has {size} {what}, the training set {needed}")


def _check_alike(processes: Processes, config: TrainConfig, sets: dict[str, ImageSet | None]) -> None:
    """Raises ValueError unless all processes were given the same options and images."""
    if processes.size == 1:
        return
    given = {f"--{key.replace('_', '-')}": value for key, value in config.to_dict().items()}
    for role, images in sets.items():
        given[f"{role} images (number, checksum)"] = None if images is None else _describe(images)
    first, *others = processes.gather(given)
    for rank, other in enumerate(others, 1):
        for what, value in other.items():
            if value != first[what]:
                raise ValueError(
                    f"process {rank} was given {what} {value}, process 0 {first[what]}: all need the same"
                )


def _check_free(folder: Path) -> None:
    """Raises FileExistsError where the folder holds a run's files, unless there is no work in them."""
    found = [name for name in FILES if (folder / name).exists()]
    if found == [LAST]:
        with suppress(checkpoint.CheckpointError):
            if checkpoint.load(folder / LAST)["epoch"] == 0:
                return
    if found:
        raise FileExistsError(
            f"{folder} already holds a run ({', '.join(found)}): continue it with --resume, replace it "
            "with --overwrite, or choose another folder with --out"
        )


def _load_previous(
    folder: Path, config: TrainConfig, train: ImageSet, valid: ImageSet, processes: int
) -> dict[str, Any]:
    """The checkpoint to resume; checks that it fits, and that all files there are of its run."""
    last = checkpoint.load(folder / LAST)
    _check_resume(config, last, train, valid, folder / LAST, processes)
    others: dict[str, Any] = {}
    # A lost best.pt should show now, not after the training.
    if last["epoch"] or (folder / BEST).exists():
        best = others[BEST] = checkpoint.load(folder / BEST)
        # That of the next epoch, where the run was stopped before it had written last.pt.
        if best["epoch"] not in (last["best"].get("epoch"), last["epoch"] + 1):
            what = f"is of epoch {best['epoch']}, which {LAST} does not know as its best"
            raise _foreign(folder / BEST, what)
    if (folder / METRICS).exists():
        try:
            others[METRICS] = json.loads((folder / METRICS).read_text())
            others[METRICS]["history"][:0]
        except (ValueError, TypeError, LookupError):
            raise _foreign(folder / METRICS, "is not what a run writes") from None
    for name, other in others.items():
        if not checkpoint.same_run(last, other):
            raise _foreign(folder / name, f"belongs to another run than {LAST}")
    return last


def _foreign(path: Path, what: str) -> checkpoint.CheckpointError:
    return checkpoint.CheckpointError(
        f"cannot resume {path.parent}: {path.name} {what}; put the run's own file back, or replace "
        "everything with --overwrite"
    )


def _check_resume(
    config: TrainConfig,
    previous: dict[str, Any],
    train: ImageSet,
    valid: ImageSet,
    last: Path,
    processes: int,
) -> None:
    was = previous["config"]
    for key, value in config.to_dict().items():
        old = was.get(key, getattr(TrainConfig, key) if key in _ADDED else None)
        if key in _FREE_ON_RESUME:
            continue
        # Several processes share the machine's threads.
        if key == "threads" and (value is None or _processes_of(previous) != processes):
            continue
        if key == "device" and value.startswith("cuda") and str(old).startswith("cuda"):
            continue  # another GPU of the machine will do
        if value != old:
            option = f"--{key.replace('_', '-')}"
            raise ValueError(
                f"cannot resume {last}: {option} is {value} now, but the run was started with {old}"
            )
    if previous["data"] != _describe_data(train, valid):
        raise ValueError(
            f"cannot resume {last}: the training or validation images are not those it was started with"
        )
    done, epochs = previous["epoch"], config.epochs
    if epochs == was.get("epochs"):
        return
    change = f"cannot resume {last}: --epochs is {epochs} now, but was {was.get('epochs')} at the start"
    if epochs < done:
        raise ValueError(f"{change} and has completed {done}")
    if config.lr_schedule == "cosine":
        raise ValueError(f"{change}, and its cosine schedule of the learning rate spans all epochs")
    if config.beta == "Soenderby" and config.has_kl:
        raise ValueError(f"{change}, and its KL warm-up (beta Soenderby) spans a quarter of all epochs")


def _processes_of(state: dict[str, Any]) -> int:
    """By how many processes a checkpoint was written."""
    processes: int = state.get("processes", 1)
    return processes


def _checksum(tensors: Iterable[Tensor]) -> int:
    checksum = 0
    for tensor in tensors:
        checksum = zlib.crc32(tensor.detach().cpu().contiguous().numpy().data, checksum)
    return checksum


def _describe(part: ImageSet) -> list[int]:
    """Number and checksum of the images and labels, to tell whether they are the same."""
    return [len(part), _checksum((part.images, part.labels))]


def _describe_data(train: ImageSet, valid: ImageSet) -> dict[str, list[int]]:
    return {"train": _describe(train), "valid": _describe(valid)}


def _own_device(config: TrainConfig) -> torch.device:
    """This process's."""
    processes = Processes()
    several_gpus = processes.size > 1 and config.device == "cuda"
    return parse_device(f"cuda:{processes.local_rank}" if several_gpus else config.device)


@contextmanager
def _surroundings(config: TrainConfig) -> Iterator[None]:
    """Threads, routes, cuDNN's choice of algorithms and the random state, put back afterwards."""
    device = _own_device(config)
    threads, deterministic = torch.get_num_threads(), torch.backends.cudnn.deterministic
    taken = routes.current()
    assert config.threads is not None
    torch.set_num_threads(config.threads)
    torch.backends.cudnn.deterministic = True
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        torch.set_num_threads(threads)
        torch.backends.cudnn.deterministic = deterministic
        routes.use(taken)


class _Run:
    """The state of a training run: what a checkpoint holds, and how to go one epoch further."""

    def __init__(
        self, config: TrainConfig, train: ImageSet, valid: ImageSet, name: str | None = None
    ) -> None:
        self.config = config
        self.processes = Processes()
        self.device = _own_device(config)
        self.classes = list(train.classes)
        self.mean, self.std = channel_stats(train.images)
        self.data = _describe_data(train, valid)
        self.images, self.labels = train.images.to(self.device), train.labels.to(self.device)
        self.valid = valid
        self.steps = math.ceil(len(train) / config.batch_size)

        torch.manual_seed(config.seed)  # the initial weights, then the noise of every training step
        # The order of the images comes from a generator of its own, seeded apart from the noise's.
        self.shuffle = torch.Generator().manual_seed(config.seed ^ 0x5EED)
        # The draws of the weights that judge the model: pinned, so judging costs the streams nothing.
        self.valid_seed, self.test_seed = config.seed, ~config.seed
        self.model = checkpoint.build_model(self.model_config()).to(self.device)
        # Whether it answers at random; its loss may have a KL or none (config.has_kl).
        self.random = is_bayesian(self.model)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.optimizer = torch.optim.Adam(
            self.model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True
        )
        self.scheduler = self._make_scheduler()
        self.name: str | None = name or secrets.token_hex(8)
        self.epoch = 0
        self.best: dict[str, Any] = {}
        self.history: list[dict[str, Any]] = []

    def _make_scheduler(self) -> Any:
        if self.config.lr_schedule == "cosine":
            total = self.steps * self.config.epochs
            return torch.optim.lr_scheduler.LambdaLR(
                self.optimizer, lambda step: (1 + math.cos(math.pi * step / total)) / 2
            )
        if self.config.lr_schedule == "plateau":
            return torch.optim.lr_scheduler.ReduceLROnPlateau(self.optimizer, **_PLATEAU)
        return None

    def model_config(self) -> dict[str, Any]:
        sizes = {"inputs": len(self.mean), "outputs": len(self.classes)}
        return {**self.config.to_dict(), **sizes}

    def state(self) -> dict[str, Any]:
        """What :func:`bbb_fast.checkpoint.save` takes."""
        cuda = [torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else []
        rng = {"torch": torch.get_rng_state(), "shuffle": self.shuffle.get_state(), "cuda": cuda}
        return {
            "run": self.name,
            "config": self.model_config(),
            "model": dict(self.model.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "rng": rng,
            "epoch": self.epoch,
            "best": self.best,
            "history": self.history,
            "data": self.data,
            "mean": self.mean,
            "std": self.std,
            "classes": self.classes,
            "routes": routes.current().to_dict(),
            **self.number_of_processes(),
        }

    def number_of_processes(self) -> dict[str, int]:
        """The entry of a run's files that says so; those of one process have none."""
        return {"processes": self.processes.size} if self.processes.size > 1 else {}

    def restore(self, state: dict[str, Any], path: Path) -> None:
        """Takes over the state of a checkpoint; CheckpointError if it does not fit."""
        checkpoint.restore_model(self.model, state["model"], path)
        try:
            self.optimizer.load_state_dict(state["optimizer"])
            self._check_optimizer(state["epoch"])
            if self.scheduler is not None:
                self.scheduler.load_state_dict(state["scheduler"])
            torch.set_rng_state(state["rng"]["torch"])
            self.shuffle.set_state(state["rng"]["shuffle"])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(state["rng"]["cuda"][0], self.device)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise checkpoint.CheckpointError(
                f"{path} cannot be resumed: its optimizer, schedule or generators do not fit ({error})"
            ) from error
        if "routes" in state:  # runs of earlier releases took the rules'
            try:
                routes.use(Routes.from_dict(state["routes"]))
            except ValueError as error:
                raise checkpoint.CheckpointError(f"{path} cannot be resumed: {error}") from error
        # Runs of earlier releases have no name and get none.
        self.name = state.get("run")
        self.epoch, self.best, self.history = state["epoch"], state["best"], state["history"]

    def _check_optimizer(self, epoch: int) -> None:
        """The optimizer itself would start anew where a state is missing, and not look at shapes."""
        for parameter in self.model.parameters() if epoch else ():
            for key in ("exp_avg", "exp_avg_sq"):
                found = self.optimizer.state[parameter][key]
                if found.shape != parameter.shape:
                    shapes = f"{list(found.shape)} for a parameter of shape {list(parameter.shape)}"
                    raise ValueError(f"{key} has shape {shapes}")

    def advance(self, progress: bool) -> bool:
        """Trains one epoch and validates; returns whether these are the best weights so far."""
        entry: dict[str, Any] = {"epoch": self.epoch + 1, "lr": self.optimizer.param_groups[0]["lr"]}
        start = time.perf_counter()
        entry.update(self._train_epoch(progress))
        seconds = time.perf_counter() - start
        self._check_alike()
        probs = self.probs(self.model, self.valid.images, self.config.valid_samples, self.valid_seed)
        if not bool(probs.isfinite().all()):
            raise TrainingError(
                f"epoch {self.epoch + 1}: the model's outputs are not finite; {self._after_divergence()}"
            )
        # One process's judgement: what hangs on it must not hang on how another machine rounds.
        scores = self.processes.first(partial(classification_report, probs, self.valid.labels))
        entry.update({f"valid_{key}": scores[key] for key in ("accuracy", "nll", "ece")})
        entry.update({"seconds": seconds, "images_per_second": len(self.labels) / seconds})
        if self.config.lr_schedule == "plateau":
            self.scheduler.step(scores["nll"])
        self.epoch += 1
        self.history.append(entry)
        best = self.best
        if best and (scores["accuracy"], -scores["nll"]) <= (best["accuracy"], -best["nll"]):
            return False
        self.best = {"epoch": self.epoch, **{key: scores[key] for key in ("accuracy", "nll", "ece")}}
        return True

    def probs(self, model: nn.Module, images: Tensor, samples: int, seed: int) -> Tensor:
        """As :func:`predict_probs`; every process predicts for a part of the images, and gets all."""
        part = self.processes.part(len(images))
        probs = torch.zeros(len(images), len(self.classes), dtype=torch.float64, device=self.device)
        if len(images[part]):
            samples = samples if self.random else 1
            probs[part] = predict_probs(model, images[part], self.mean, self.std, samples, seed)
        self.processes.add(probs)
        return probs.cpu()

    def _check_alike(self) -> None:
        """Raises TrainingError unless all processes have the same weights."""
        if self.processes.size == 1:
            return
        first, *others = self.processes.gather(_checksum(self.model.state_dict().values()))
        for rank, other in enumerate(others, 1):
            if other != first:
                raise TrainingError(
                    f"epoch {self.epoch + 1}: the weights of process {rank} are no longer those of process "
                    "0; run all processes on machines of one kind"
                )

    def _train_epoch(self, progress: bool) -> dict[str, float]:
        config, total = self.config, len(self.labels)
        self.model.train()
        stats = torch.zeros(self.steps, 4, dtype=torch.float64, device=self.device)
        sizes = torch.zeros(self.steps, 1, dtype=torch.float64)
        weights = [
            kl_weight(step, self.steps, config.beta, self.epoch, config.epochs) if config.has_kl else 0.0
            for step in range(self.steps)
        ]
        checked = 0
        with image_bar(progress, total, f"epoch {self.epoch + 1}/{config.epochs}") as bar:
            for step, batch in enumerate(batches(total, config.batch_size, self.shuffle)):
                part = batch[self.processes.part(len(batch))]
                share = len(part) * self.processes.size / len(batch)
                # A short last batch may leave nothing for a process: it takes a row that does not count.
                index = (part if len(part) else batch[:1]).to(self.device)
                x = normalize(self.images[index], self.mean, self.std)
                stats[step] = self._step(x, self.labels[index], weights[step], share)
                sizes[step] = len(batch)
                if (step + 1) % _CHECK_EVERY == 0 or step + 1 == self.steps:
                    self.processes.average([stats[checked : step + 1]])
                    checked = step + 1
                    self._check_finite(stats[:checked])
                    if bar is not None:
                        loss, _, kl, accuracy = _averages(stats[:checked], sizes[:checked])
                        text = f"loss {loss:.4f} acc {accuracy:.3f}"
                        bar.set_postfix_str(f"{text} KL {kl:.4g}" if config.has_kl else text, False)
                if bar is not None:
                    bar.update(len(batch))
        loss, nll, kl, accuracy = _averages(stats, sizes)
        entry = {"loss": loss, "nll": nll, "accuracy": accuracy}
        if config.has_kl:
            entry.update({"kl": kl, "kl_weight": sum(weights) / len(weights)})
        return entry

    def _step(self, x: Tensor, y: Tensor, weight: float, share: float = 1.0) -> Tensor:
        """One step of the optimizer, on this process's part of a minibatch.

        ``share`` is the part's number of rows over the mean number of all parts. Returns [4], whose averages
        over the processes are those of the minibatch: loss, NLL, KL, fraction classified correctly.
        """
        self.optimizer.zero_grad()
        nll, kl, outputs, y = self._forward(x, y, share)
        loss = nll + weight / len(self.labels) * kl if self.config.has_kl else nll
        loss.backward()
        correct = (outputs.argmax(-1) == y).double().mean() * share
        self.processes.average([p.grad for p in self.model.parameters() if p.grad is not None])
        self.optimizer.step()
        if self.config.lr_schedule == "cosine":
            self.scheduler.step()
        return torch.stack([v.detach().double() for v in (loss, nll, kl, correct)])

    def _forward(self, x: Tensor, y: Tensor, share: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """NLL and KL, and the outputs with the labels that go with them."""
        config = self.config
        samples = config.train_samples if self.random else 1
        if samples > 1:
            # The layers alone, and one KL for all draws.
            outputs = multi_sample(self.model, x, samples, call=_layers_alone).flatten(0, 1)
            y = y.repeat(samples)
            return F.cross_entropy(outputs, y) * share, kl_loss(self.model), outputs, y
        result = self.model(x)
        outputs = _outputs(result)
        kl = result[1] if isinstance(self.model, ModuleWrapper) else kl_loss(self.model)
        nll = F.cross_entropy(outputs, y) * share
        if config.adversarial:
            # The pixels' range, 1, is 1 / std after normalization.
            step = config.adversarial / torch.tensor(self.std, device=x.device).view(-1, 1, 1)
            against = fgsm(self.model, x, lambda result: F.cross_entropy(_outputs(result), y), step)
            nll = (nll + F.cross_entropy(_layers_alone(self.model, against), y) * share) / 2
        return nll, kl, outputs, y

    def _check_finite(self, stats: Tensor) -> None:
        """``stats`` as :meth:`_step` returns them, a row a step."""
        bad = (~stats[:, 0].isfinite()).nonzero()
        if len(bad):
            step = int(bad[0])
            where = f"epoch {self.epoch + 1}, step {step + 1} of {self.steps}"
            loss, nll, kl, _ = stats[step].tolist()
            if self.epoch or step:
                raise TrainingError(f"{where}: the loss is {loss}; {self._after_divergence()}")
            if not math.isfinite(kl):
                part, value, causes = "KL", kl, tuple(DEFAULT_PRIORS)
            elif not math.isfinite(nll):
                part, value = "NLL", nll
                causes = ("posterior_mu_initial", "posterior_rho_initial") if self.config.has_kl else ()
            else:
                part, value, causes = "loss", loss, ("beta",)
            options = [f"--{key.replace('_', '-')} (it is {getattr(self.config, key)})" for key in causes]
            raise TrainingError(
                f"{where}: the {part} is {value} before anything was trained; look at "
                f"{', '.join(options) or 'the images'}"
            )

    def _after_divergence(self) -> str:
        advice = f"try a lower --lr (it is {self.config.lr})"
        if self.epoch:
            advice += f", with --overwrite or in another folder: this one holds {self.epoch} epoch(s)"
        return advice


def _layers_alone(model: nn.Module, x: Tensor) -> Tensor:
    """The model's output, without the KL that wrappers form with it."""
    output: Tensor = model._run(x) if isinstance(model, ModuleWrapper) else model(x)
    return output


def _outputs(result: Any) -> Tensor:
    """The output in what a model returns: wrappers return the KL too."""
    output: Tensor = result[0] if isinstance(result, tuple) else result
    return output


def _averages(stats: Tensor, sizes: Tensor) -> list[float]:
    """Means over images: the last batch of an epoch may be short."""
    return ((stats.cpu() * sizes).sum(0) / sizes.sum()).tolist()


@contextmanager
def image_bar(progress: bool, total: int, title: str) -> Iterator[Any]:
    """tqdm's bar, or None: bars are for terminals, a log gets a line an epoch."""
    bars: Any = None
    if progress and sys.stderr.isatty():
        with suppress(ImportError):
            bars = importlib.import_module("tqdm")
    if bars is None:
        yield None
    else:
        with bars.tqdm(total=total, desc=title, unit=" images", leave=False) as bar:
            yield bar


def _load_best(run: _Run, folder: Path) -> checkpoint.LoadedModel:
    """The run's best weights; CheckpointError if others are there in the meantime."""
    best = checkpoint.load_model(folder / BEST)
    if (best.run, best.epoch) != (run.name, run.best["epoch"]):
        raise checkpoint.CheckpointError(
            f"{folder / BEST} is of epoch {best.epoch} of run {best.run}, but this is run {run.name} and its "
            f"best epoch is {run.best['epoch']}"
        )
    return best


def _judge(run: _Run, folder: Path, test: ImageSet | None) -> dict[str, Any]:
    config, history = run.config, run.history
    best = run.processes.first(partial(_load_best, run, folder))
    seconds = sum(entry["seconds"] for entry in history)
    timing = {
        "train_seconds": seconds,
        "images_per_second": len(history) * len(run.labels) / seconds,
    }
    scores = None
    if test is not None:
        start = time.perf_counter()
        probs = run.probs(best.model.to(run.device), test.images, config.test_samples, run.test_seed)
        timing["test_seconds"] = time.perf_counter() - start
        samples = config.test_samples if run.random else 1
        scores = {**classification_report(probs, test.labels), "samples": samples}
    return {
        "run": run.name,
        "config": run.model_config(),
        **run.number_of_processes(),
        "kl_weight": history[-1].get("kl_weight"),
        "seeds": {"train": config.seed, "valid": run.valid_seed, "test": run.test_seed},
        "versions": {"python": platform.python_version(), **build_info()},
        "parameters": run.parameters,
        "images": {
            "train": len(run.labels),
            "valid": len(run.valid),
            "test": 0 if test is None else len(test),
        },
        "best": run.best,
        "test": scores,
        "timing": timing,
        "history": history,
    }


def _headline(run: _Run, test: ImageSet | None) -> str:
    config = run.config
    sizes = f"{len(run.labels)} training, {len(run.valid)} validation, {len(test or ())} test images"
    start = f", resuming after epoch {run.epoch}" if run.epoch else ""
    processes = f", {run.processes.size} processes" if run.processes.size > 1 else ""
    return (
        f"{config.model}, layers {config.layer_type}, {run.parameters} parameters, on "
        f"{config.dataset}: {sizes}; {backend()} backend, {config.device}{processes}{start}"
    )


def _epoch_line(entry: dict[str, Any], epochs: int, improved: bool) -> str:
    kl = f"  KL {entry['kl']:9.4g}" if "kl" in entry else ""
    return (
        f"epoch {entry['epoch']:3d}/{epochs}  loss {entry['loss']:.4f}  acc {entry['accuracy']:.4f}{kl}"
        f"  | valid acc {entry['valid_accuracy']:.4f}  NLL {entry['valid_nll']:.4f}"
        f"  ECE {entry['valid_ece']:.4f}  | {entry['images_per_second']:.0f} images/s"
        f"{'  *' if improved else ''}"
    )
