"""Loads the native extension; chooses native or reference; says once why it is the latter if nobody asked."""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from torch.compiler import is_compiling

from ._version import __version__

BackendName = Literal["auto", "native", "reference"]
_BACKENDS = ("auto", "native", "reference")
_PACKAGE = Path(__file__).parent


def _off(value: str | None) -> bool:
    return (value or "").strip().lower() in ("", "0", "false", "no", "off")


def read_build_record() -> dict[str, Any]:
    """What setup.py wrote down about this installation; empty if it never ran."""
    with suppress(OSError, ValueError):
        record = json.loads((_PACKAGE / "_build_info.json").read_text())
        if isinstance(record, dict):
            return record
    return {}


def _release(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


def _what_to_install(record: dict[str, Any]) -> str:
    if tag := record.get("wheel"):
        wanted = re.sub(r"pt\d+", "pt" + _release(torch.__version__).replace(".", ""), str(tag))
        if wanted == tag:
            return "install it again, or from source"
        return f"install bbb_fast-{__version__}+{wanted}, if there is such a wheel, or from source"
    again = "pip install --no-build-isolation --force-reinstall --no-deps ."
    return f"build it again, where its sources are: `{again}`"


def _load() -> tuple[Any, str | None]:
    """Returns the ``_C`` module, or None and the reason."""
    if not _off(os.environ.get("BBB_FAST_NO_EXT")):
        return None, "BBB_FAST_NO_EXT is set"
    record = read_build_record()
    if not record.get("native"):
        # An extension that lies here all the same is an older one: what it was built for is not known.
        return None, str(record.get("reason") or "the extension was not built")
    built_for = _release(str(record.get("torch")))
    what = f"this wheel (+{record['wheel']})" if record.get("wheel") else "the extension"
    # An extension of another torch release may import and then crash; refuse before trying.
    if built_for != _release(torch.__version__):
        reason = f"was built for torch {built_for} and this is torch {torch.__version__}"
    else:
        try:
            return importlib.import_module("bbb_fast._C"), None
        except ImportError as error:
            reason = f"failed to load: {error}"
            if isinstance(error, ModuleNotFoundError) and error.name == "bbb_fast._C":
                reason = f"has no file here for Python {sys.version_info.major}.{sys.version_info.minor}"
    return None, f"{what} {reason}; {_what_to_install(record)}"


_C: Any
_why_not: str | None
_C, _why_not = _load()
_choice: BackendName = "auto"
_device_types: frozenset[str] = (
    frozenset() if _C is None else frozenset(_C.build_info()["devices"].split(","))
)

if _C is not None:
    from . import _ops

    _ops.register()


def _reference_asked_for() -> bool:
    """Whether the extension was left out on request, now or at installation."""
    asked_now = not _off(os.environ.get("BBB_FAST_NO_EXT"))
    return asked_now or bool(read_build_record().get("reference_asked_for"))


_to_be_told = _C is None and not _reference_asked_for()


def _tell() -> None:
    """Warns that the reference path runs: at the first op, so that an import raises under no filter.

    pip hides what a build prints, so this is where most people learn of it.
    """
    global _to_be_told
    _to_be_told = False
    ours = tuple(f"{folder}{os.sep}" for folder in (_PACKAGE, Path(torch.__file__).parent))
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(ours):
        level, frame = level + 1, frame.f_back
    warnings.warn(
        f"bbb_fast runs on its reference path (correct, slower): {_why_not}. Set BBB_FAST_NO_EXT=1 to ask "
        "for that path and not be told.",
        RuntimeWarning,
        stacklevel=level,  # whoever called
    )


def native_available() -> bool:
    """Whether the native extension is loaded."""
    return _C is not None


def why_not_native() -> str | None:
    """Why the native extension is not loaded, or None if it is."""
    return _why_not


def set_backend(name: BackendName) -> None:
    """Chooses which implementation the ops run on, for the whole process.

    ``"auto"``: native where it has a kernel for the tensors' device, else reference. ``"native"``: native
    or an error. ``"reference"``: pure PyTorch. Raises ValueError for another name and RuntimeError for
    ``"native"`` where the extension is not loaded (the message says why).
    """
    global _choice
    if name not in _BACKENDS:
        raise ValueError(f"unknown backend {name!r}; allowed: {', '.join(_BACKENDS)}")
    if name == "native" and _C is None:
        raise RuntimeError(f"the native backend is not available: {_why_not}")
    _choice = name


def backend() -> str:
    """The implementation that CPU tensors run on now: ``"native"`` or ``"reference"``."""
    return "native" if _C is not None and _choice != "reference" else "reference"


def native_module() -> Any:
    """The extension, or None where the reference path was chosen or there is no other."""
    return None if _choice == "reference" else _C


def use_native(device: torch.device) -> bool:
    """Whether an op on ``device`` goes to the native kernels."""
    if _choice == "reference":
        return False
    if _C is None:
        if not is_compiling() and _to_be_told:
            _tell()
        return False
    if device.type in _device_types or device.type == "meta":
        return True
    if _choice == "native":
        raise RuntimeError(
            f"the native backend has no kernels for device type {device.type!r} in this build "
            f"(it has: {', '.join(sorted(_device_types))}); use set_backend('auto')"
        )
    return False


def build_info() -> dict[str, Any]:
    """Versions, what was built, what loaded, the instruction set in use, and the reason if not."""
    info: dict[str, Any] = {
        "bbb_fast": __version__,
        "torch": torch.__version__,
        "backend": backend(),
        "native": _C is not None,
        "reason": _why_not,
        "build": read_build_record(),
        "threads": torch.get_num_threads(),
    }
    if _C is not None:
        info["extension"] = dict(_C.build_info())
    return info
