"""``bbb-fast info``: what is installed, what was built, and what runs."""

from __future__ import annotations

import argparse
import json
import platform
from typing import Any

import torch

from .. import routes
from .._backend import build_info

__all__ = ["add_parser", "run"]


def add_parser(subparsers: Any) -> None:
    """Registers the command and its options."""
    parser = subparsers.add_parser(
        "info",
        help="versions, what was built, what loaded, and why not if not",
        description="Versions, what was built, what loaded, on which instruction set, or why not.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _routes() -> str:
    """By which rules the products of layers go around the library, and what was measured beside them."""
    taken = routes.current()
    measured = len(taken.ways) + len(taken.narrow)
    more = f"{measured} measured choices in {routes.cache_file()}" if measured else "nothing measured"
    return f"rules {taken.rules}; {routes.problem or more}"


def run(args: argparse.Namespace) -> int:
    """Prints :func:`bbb_fast.build_info` and the machine; returns 0."""
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    info = {
        **build_info(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "routes": _routes(),
        "cuda_devices": [torch.cuda.get_device_name(i) for i in range(devices)],
    }
    if args.json:
        print(json.dumps(info, indent=2))
        return 0
    build, extension = info.pop("build"), info.pop("extension", {})
    info["native"] = "loaded" if info["native"] else "not loaded"
    rows = list(info.items())
    for title, part in (("built", build), ("extension", extension)):
        rows += [(f"{title}: {key}", value) for key, value in part.items()]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        if isinstance(value, list | tuple):
            value = ", ".join(map(str, value)) or "none"
        if value is not None:
            print(f"{name:{width}}  {value}")
    return 0
