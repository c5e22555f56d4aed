"""Checkpoints: one file of tensors and plain values, which a crash or a full disk cannot cost you.

A checkpoint is a dict: ``format`` and ``version``; ``config`` (what :func:`build_model` needs, and
every option of the run); ``model``, ``optimizer``, ``scheduler`` (state dicts; scheduler None without
one); ``rng`` (generator states: ``torch``, ``shuffle``, ``cuda``); ``epoch`` (epochs completed);
``best`` (of the best epoch so far, {} before the first) and ``history`` (of each epoch); ``data`` (what
the run was trained on); ``mean``, ``std`` (of each input channel, in [0, 1] units); ``classes`` (names, by
label); ``run`` (a name that all files of one run share; files of earlier releases have none);
``processes`` (by how many it was written, if not by one).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._files import atomic_write
from ..conversion import convert
from ..layers import ConcreteDropout
from ..methods import mc_dropout
from ..models import (
    AlexNet,
    BBB3Conv3FC,
    BBBAlexNet,
    BBBCaffeLeNet,
    BBBLeNet,
    BBBSmallCNN,
    CaffeLeNet,
    LeNet,
    SmallCNN,
    ThreeConvThreeFC,
)  # fmt: skip
from ..models.build import LAYER_TYPES, BayesianModel, PointModel, choose
from ..priors import DEFAULT_PRIORS
from ..routes import VarianceDtype
from . import archive
from .archive import CheckpointError

__all__ = [
    "DEFAULT_DROPOUT", "MODELS", "MODEL_LAYER_TYPES", "VARIANCE_DTYPES", "WITHOUT_KL", "CheckpointError",
    "LoadedModel",    "build_model", "load", "load_model", "pack", "restore_model",
    "same_run", "save",
]  # fmt: skip

_FORMAT = "bbb_fast-checkpoint"
_VERSION = 1
_FIELDS: dict[str, type | tuple[type, ...]] = {
    "config": dict,
    "model": dict,
    "optimizer": dict,
    "scheduler": (dict, type(None)),
    "rng": dict,
    "epoch": int,
    "best": dict,
    "history": list,
    "data": dict,
    "mean": list,
    "std": list,
    "classes": list,
}

# The scores of a validation; a history entry has them as valid_accuracy and so on.
_SCORES = ("accuracy", "nll", "ece")
_ENTRY = ("lr", "loss", "nll", "accuracy", *(f"valid_{key}" for key in _SCORES), "images_per_second")

# By name: the Bayesian model and its point-estimate twin.
MODELS: dict[str, tuple[type[BayesianModel], type[PointModel]]] = {
    "lenet": (BBBLeNet, LeNet),
    "alexnet": (BBBAlexNet, AlexNet),
    "3conv3fc": (BBB3Conv3FC, ThreeConvThreeFC),
    "caffe-lenet": (BBBCaffeLeNet, CaffeLeNet),
    "smallcnn": (BBBSmallCNN, SmallCNN),
}
# What a model may be made of: the estimators of the Bayesian layers; or the twin, with its last layer
# Bayesian (by local reparameterization), under dropout of a given or a learned rate, or as it is.
MODEL_LAYER_TYPES: tuple[str, ...] = (*LAYER_TYPES, "last", "dropout", "concrete", "none")
# Those that are trained by the likelihood alone.
WITHOUT_KL = ("dropout", "none")
# The rate of dropout, or what a learned one starts from.
DEFAULT_DROPOUT = 0.1
# The type of the variance product of LRT layers; float32 is the type of their input.
VARIANCE_DTYPES: dict[str, VarianceDtype] = {
    "float32": None,
    "bfloat16": torch.bfloat16,
    "auto": "auto",
}


@dataclass(frozen=True)
class LoadedModel:
    """A trained model and what it takes to use it.

    Attributes:
        model: in eval mode, on the CPU.
        config: every option of the run that trained it.
        mean, std: of each input channel, in [0, 1] units, for :func:`bbb_fast.data.normalize`.
        classes: the class names, by label.
        dataset: the name of the data set it was trained on.
        epoch: epochs of training behind these weights.
        run: the name of the run; None in checkpoints of earlier releases.
    """

    model: nn.Module
    config: dict[str, Any]
    mean: list[float]
    std: list[float]
    classes: tuple[str, ...]
    dataset: str
    epoch: int
    run: str | None = None


def pack(state: Mapping[str, Any]) -> memoryview:
    """The content of a checkpoint; ``format`` and ``version`` are added."""
    return archive.pack(_FORMAT, _VERSION, state)


def save(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Writes a checkpoint in one step (see :func:`pack`). Raises OSError."""
    atomic_write(path, pack(state))


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU, and never runs code that a file brings along.

    Raises CheckpointError for a file that is missing, damaged, not a checkpoint of this package and
    version, that holds anything besides tensors and plain values, or whose parts contradict each other.
    """
    state = archive.read(
        path, _FORMAT, _VERSION,
        allowed="the .pt files that `train` writes", instead="use another checkpoint of the run",
    )  # fmt: skip
    for key, kind in _FIELDS.items():
        if not isinstance(state.get(key, ...), kind):
            raise CheckpointError(f"{path} is incomplete: its entry {key!r} is missing or malformed")
    wrong = _contradiction(state)
    if wrong is not None:
        raise CheckpointError(f"{path} is inconsistent: {wrong}")
    return state


def _is_finite(*values: Any) -> bool:
    return all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values)


def _contradiction(state: Mapping[str, Any]) -> str | None:
    """What no run can have written, or None. The types of the fields are right already."""
    epoch, best, history = state["epoch"], state["best"], state["history"]
    if isinstance(epoch, bool) or epoch < 0:
        return f"its epoch is {epoch}"
    for key in ("config", "best", "history", "data", "classes"):
        try:
            json.dumps(state[key], allow_nan=False)
        except (TypeError, ValueError):
            return f"its {key} holds something besides finite numbers, names and lists of them"
    if len(history) != epoch:
        return f"its history is of {len(history)} epochs, but it completed {epoch}"
    for number, entry in enumerate(history, 1):
        if (
            not isinstance(entry, dict)
            or entry.get("epoch") != number
            or not _is_finite(*(entry.get(key) for key in (*_ENTRY, "seconds")))
            or entry["seconds"] <= 0
            or not _is_finite(entry.get("kl", 0), entry.get("kl_weight", 0))
            or ("kl" in entry) != ("kl" in history[0])
        ):
            return f"its history says nothing sensible of epoch {number}"
    if epoch == 0 and best:
        return "it has a best epoch before the first"
    if epoch and (type(best.get("epoch")) is not int or not 1 <= best["epoch"] <= epoch):
        return f"its best epoch is {best.get('epoch')!r} of {epoch}"
    if epoch and any(best.get(key) != history[best["epoch"] - 1][f"valid_{key}"] for key in _SCORES):
        return "its best scores are not those of its history"
    mean, std, classes = (state[key] for key in ("mean", "std", "classes"))
    if not _is_finite(*mean, *std) or len(mean) != len(std) or any(s <= 0 for s in std):
        return f"its mean and std are {mean} and {std}"
    if not all(isinstance(name, str) for name in classes):
        return "its classes are not names"
    if not isinstance(state.get("run"), str | None):
        return "its run has no name"
    return None


def same_run(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two checkpoints, or a checkpoint and what ``metrics.json`` holds, are of one run.

    They must share the run's name and the epochs that both have seen: the measured times in the history
    tell runs apart that have no name, and two continuations of one.
    """
    epochs = min(len(one["history"]), len(other["history"]))
    return one.get("run") == other.get("run") and one["history"][:epochs] == other["history"][:epochs]


def build_model(config: Mapping[str, Any]) -> nn.Module:
    """A freshly initialised model, in train mode, on the CPU.

    Args: ``config`` with ``model`` (a key of :data:`MODELS`), ``layer_type`` (one of
    :data:`MODEL_LAYER_TYPES`), ``activation``, ``inputs`` (channels), ``outputs`` (classes) and any of
    the four keys of ``priors``, of ``variance_dtype`` (a key of :data:`VARIANCE_DTYPES`) and of ``dropout``
    (a rate); other keys are ignored. Raises ValueError for a missing or wrong value.
    """
    missing = [k for k in ("model", "layer_type", "activation", "inputs", "outputs") if k not in config]
    if missing:
        raise ValueError(f"the config of a model lacks {', '.join(missing)}")
    bayesian, twin = choose("model", config["model"], MODELS)
    layer_type = choose("layer_type", config["layer_type"], {t: t for t in MODEL_LAYER_TYPES})
    for key in ("inputs", "outputs"):
        value = config[key]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{key} must be an int >= 1, got {value!r}")
    sizes = (config["outputs"], config["inputs"])
    priors = {key: config[key] for key in DEFAULT_PRIORS if key in config}
    if layer_type in LAYER_TYPES:
        whole = bayesian(*sizes, priors, layer_type, config["activation"])
        variance_dtype = config.get("variance_dtype", "float32")
        whole.set_flag("variance_dtype", choose("variance_dtype", variance_dtype, VARIANCE_DTYPES))
        return whole
    model = twin(*sizes, activation_type=config["activation"])
    rate = config.get("dropout", DEFAULT_DROPOUT)
    if layer_type == "last":
        *_, last = _weight_layers(model)
        return convert(model, "lrt", priors=priors, include=last)
    if layer_type == "dropout":
        return mc_dropout(model, rate)
    if layer_type == "concrete":
        # N(0, prior_sigma^2) over each weight, as of Bayesian layers.
        length_scale = 1 / config.get("prior_sigma", DEFAULT_PRIORS["prior_sigma"])
        # Not of the image itself: without its only channel nothing is left of it.
        for name in _weight_layers(model)[1:]:
            setattr(model, name, ConcreteDropout(getattr(model, name), rate, length_scale=length_scale))
    return model


def _weight_layers(model: nn.Module) -> list[str]:
    """The names of a twin's layers that have weights, in order."""
    return [name for name, layer in model.named_children() if isinstance(layer, nn.Linear | nn.Conv2d)]


def load_model(path: str | os.PathLike[str]) -> LoadedModel:
    """The model of a checkpoint, in eval mode, on the CPU; no generator's state changes.

    Raises CheckpointError as :func:`load` does, and for a config that names no model of this package or
    weights that do not fit it exactly (the message names the first key that does not).
    """
    state = load(path)
    config, mean, std, classes = (state[key] for key in ("config", "mean", "std", "classes"))
    # Checked before the model is built: a wrong size would cost memory first and an error after.
    if len(mean) != config.get("inputs") or len(classes) != config.get("outputs"):
        raise CheckpointError(f"{path} is inconsistent: mean, std and classes do not fit its config")
    try:
        with torch.random.fork_rng(devices=[]):
            model = build_model(config)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} describes no model of this bbb_fast: {error}") from error
    restore_model(model, state["model"], path)
    return LoadedModel(
        model=model.eval(),
        config=config,
        mean=mean,
        std=std,
        classes=tuple(classes),
        dataset=str(config.get("dataset")),
        epoch=state["epoch"],
        run=state.get("run"),
    )


def restore_model(model: nn.Module, state: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Loads weights that must fit exactly; CheckpointError names the first key that does not."""
    name, expected = type(model).__name__, model.state_dict()
    for key, tensor in expected.items():
        if key not in state:
            raise CheckpointError(f"{path} does not fit {name}: it lacks {key}")
        found = state[key]
        if not isinstance(found, Tensor) or found.shape != tensor.shape:
            shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise CheckpointError(
                f"{path} does not fit {name}: {key} has shape {shape}, needed is {list(tensor.shape)}"
            )
        if found.dtype != tensor.dtype or found.layout != tensor.layout:
            raise CheckpointError(
                f"{path} does not fit {name}: {key} is {found.dtype}, {found.layout}, needed is "
                f"{tensor.dtype}, {tensor.layout}"
            )
    for key in state:
        if key not in expected:
            raise CheckpointError(f"{path} does not fit {name}: {key} is not one of its parameters")
    model.load_state_dict(state)
