"""Types of options that the commands share."""

from __future__ import annotations

import argparse
from pathlib import Path

__all__ = ["path"]


def path(text: str) -> Path:
    """The name of a file or folder; an empty one would mean the folder one happens to be in."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} names no user of this machine: write ./{text}") from None
