"""Files of tensors and plain values, read without ever running code that a file brings along."""

from __future__ import annotations

import io
import os
import pickle
import re
import stat
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = ["CheckpointError", "pack", "read"]


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, of another kind, or that does not fit its model."""


def pack(format: str, version: int, state: Mapping[str, Any]) -> memoryview:
    """The content of a file with this state; ``format`` and ``version`` become entries of it."""
    buffer = io.BytesIO()
    torch.save({"format": format, "version": version, **state}, buffer)
    return buffer.getbuffer()


def read(
    path: str | os.PathLike[str], format: str, version: int, *, allowed: str, instead: str
) -> dict[str, Any]:
    """The state in a file of this format and version, on the CPU.

    ``allowed`` says which files those are, ``instead`` what to do about a damaged one. Raises CheckpointError
    for a file that is missing, damaged, of another format or version, or that holds anything besides tensors
    and plain values.
    """
    path = Path(path)
    try:
        if not path.is_dir() and not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"{path} is not a file")  # reading from a pipe or a device may never end
        content = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint {path}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    foreign = f"{path} is not a bbb_fast checkpoint: allowed are {allowed}"
    if not content.startswith(b"PK"):
        raise CheckpointError(foreign)
    damaged = f"{path} is damaged or cut short: {instead}"
    try:
        # torch.load does not compare the checksums that torch.save writes.
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            names = archive.namelist()
            intact = archive.testzip() is None
    except Exception as error:  # a damaged zip file can raise nearly anything
        raise CheckpointError(damaged) from error
    # Other zip files, and TorchScript's, which torch.load would take for damaged.
    if not any(n.endswith("/data.pkl") for n in names) or any(n.endswith("/constants.pkl") for n in names):
        raise CheckpointError(foreign)
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
    if not isinstance(state, dict) or state.get("format") != format:
        raise CheckpointError(foreign)
    if state.get("version") != version:
        raise CheckpointError(
            f"{path} has checkpoint version {state.get('version')!r}: this bbb_fast reads {version}"
        )
    return state
