"""Types of options that the commands share."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

__all__ = ["folder", "number_or_name", "path"]


def path(text: str) -> Path:
    """The name of a file or folder; an empty one would mean the folder one happens to be in."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} names no user of this machine: write ./{text}") from None


def folder(text: str) -> Path:
    """The name of a folder to read from, or to download into."""
    name = path(text)
    if os.path.exists(name) and not name.is_dir():
        raise argparse.ArgumentTypeError(f"{name} is not a folder")
    return name


def number_or_name(text: str) -> float | str:
    """A number, or else the name of something."""
    try:
        return float(text)
    except ValueError:
        return text
