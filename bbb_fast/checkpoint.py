"""Checkpoints: one file of tensors and plain values, which a crash or a full disk cannot cost you.

A checkpoint is a dict: ``format`` and ``version``; ``config`` (what :func:`build_model` needs, and
every option of the run); ``model``, ``optimizer``, ``scheduler`` (state dicts; scheduler None without
one); ``rng`` (generator states: ``torch``, ``shuffle``, ``cuda``); ``epoch`` (epochs completed);
``best`` and ``history`` (plain values); ``data`` (what the run was trained on); ``mean``, ``std`` (of
each input channel, in [0, 1] units); ``classes`` (names, by label).
"""

from __future__ import annotations

import io
import os
import pickle
import re
import secrets
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .layers.base import DEFAULT_PRIORS
from .models import AlexNet, BBB3Conv3FC, BBBAlexNet, BBBLeNet, LeNet, ThreeConvThreeFC
from .models.build import LAYER_TYPES, choose

__all__ = [
    "MODELS", "MODEL_LAYER_TYPES", "VARIANCE_DTYPES", "CheckpointError", "LoadedModel",
    "atomic_write", "build_model", "load", "load_model", "restore_model", "save",
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

# By name: the Bayesian model and its point-estimate twin.
MODELS: dict[str, tuple[type[nn.Module], type[nn.Module]]] = {
    "lenet": (BBBLeNet, LeNet),
    "alexnet": (BBBAlexNet, AlexNet),
    "3conv3fc": (BBB3Conv3FC, ThreeConvThreeFC),
}
# What a model may be made of: the estimators of the Bayesian layers, or "none", the twin.
MODEL_LAYER_TYPES: tuple[str, ...] = (*LAYER_TYPES, "none")
# The type of the variance product of LRT layers; float32 is the type of their input.
VARIANCE_DTYPES: dict[str, torch.dtype | None] = {"float32": None, "bfloat16": torch.bfloat16}


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, of another kind, or that does not fit its model."""


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
    """

    model: nn.Module
    config: dict[str, Any]
    mean: list[float]
    std: list[float]
    classes: tuple[str, ...]
    dataset: str
    epoch: int


def atomic_write(path: str | os.PathLike[str], data: bytes | memoryview) -> None:
    """Writes a file in one step: whoever reads ``path`` sees the old content or all of the new.

    Raises OSError that names ``path``; then what was there is unchanged and nothing is left beside it.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                # Else a power cut could leave the new name with none of the new content.
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        why = f"cannot be written ({error.strerror or error}); what was there before is unchanged"
        raise OSError(error.errno, why, str(path)) from error


def save(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Writes a checkpoint in one step; ``format`` and ``version`` are added. Raises OSError."""
    buffer = io.BytesIO()
    torch.save({"format": _FORMAT, "version": _VERSION, **state}, buffer)
    atomic_write(path, buffer.getbuffer())


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU, and never runs code that a file brings along.

    Raises CheckpointError for a file that is missing, damaged, not a checkpoint of this package and
    version, or that holds anything besides tensors and plain values.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint {path}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    foreign = f"{path} is not a bbb_fast checkpoint: allowed are the .pt files that `train` writes"
    if not content.startswith(b"PK"):
        raise CheckpointError(foreign)
    damaged = f"{path} is damaged or cut short: use another checkpoint of the run"
    try:
        # torch.load does not compare the checksums that torch.save writes.
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            intact = archive.testzip() is None
    except Exception as error:  # a damaged zip file can raise nearly anything
        raise CheckpointError(damaged) from error
    if not intact:
        raise CheckpointError(damaged)
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"the pickled object {name[1]}" if name else "pickled objects"
        raise CheckpointError(
            f"{path} was refused because it holds {what}: allowed are tensors and plain values"
        ) from error
    except Exception as error:
        raise CheckpointError(damaged) from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise CheckpointError(foreign)
    if state.get("version") != _VERSION:
        raise CheckpointError(
            f"{path} has checkpoint version {state.get('version')!r}: this bbb_fast reads {_VERSION}"
        )
    for key, kind in _FIELDS.items():
        if not isinstance(state.get(key, ...), kind):
            raise CheckpointError(f"{path} is incomplete: its entry {key!r} is missing or malformed")
    return state


def build_model(config: Mapping[str, Any]) -> nn.Module:
    """A freshly initialised model, in train mode, on the CPU.

    Args: ``config`` with ``model`` (a key of :data:`MODELS`), ``layer_type`` (one of
    :data:`MODEL_LAYER_TYPES`), ``activation``, ``inputs`` (channels), ``outputs`` (classes) and any of
    the four keys of ``priors`` and of ``variance_dtype`` (a key of :data:`VARIANCE_DTYPES`); other keys are
    ignored. Raises ValueError for a missing or wrong value.
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
    if layer_type == "none":
        return twin(*sizes, activation_type=config["activation"])
    priors = {key: config[key] for key in DEFAULT_PRIORS if key in config}
    model = bayesian(*sizes, priors, layer_type, config["activation"])
    variance_dtype = config.get("variance_dtype", "float32")
    model.set_flag("variance_dtype", choose("variance_dtype", variance_dtype, VARIANCE_DTYPES))
    return model


def load_model(path: str | os.PathLike[str]) -> LoadedModel:
    """The model of a checkpoint, in eval mode, on the CPU; no generator's state changes.

    Raises CheckpointError as :func:`load` does, and for a config that names no model of this package or
    weights that do not fit it exactly (the message names the first key that does not).
    """
    state = load(path)
    config, mean, std, classes = (state[key] for key in ("config", "mean", "std", "classes"))
    # Checked before the model is built: a wrong size would cost memory first and an error after.
    if (
        not all(isinstance(value, float) for value in (*mean, *std))
        or not len(mean) == len(std) == config.get("inputs")
        or len(classes) != config.get("outputs")
    ):
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
    for key in state:
        if key not in expected:
            raise CheckpointError(f"{path} does not fit {name}: {key} is not one of its parameters")
    model.load_state_dict(state)
