"""The command line: ``bbb-fast <command>``, or ``python -m bbb_fast <command>``.

Each command is a module with ``add_parser(subparsers)`` and ``run(args) -> exit code``.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from .._version import __version__
from . import info, train, uncertainty

__all__ = ["main"]

_COMMANDS = {"train": train, "uncertainty": uncertainty, "info": info}
_EXPECTED = (ValueError, TypeError, RuntimeError, OSError, ImportError)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bbb-fast",
        description="Train Bayesian image classifiers and judge their uncertainty.",
    )
    parser.add_argument("--version", action="version", version=f"bbb-fast {__version__}")
    parser.add_argument(
        "--debug", action="store_true", help="show the traceback of an error, instead of one line"
    )
    subparsers = parser.add_subparsers(dest="command", metavar="command", required=True)
    for command in _COMMANDS.values():
        command.add_parser(subparsers)
    for subparser in subparsers.choices.values():
        # After the command too, where people type it; SUPPRESS keeps the value given before it.
        subparser.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
    return parser


def _describe(error: Exception) -> str:
    """One line for the user."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, _EXPECTED):
        return text
    return f"internal error ({type(error).__name__}: {text}); --debug shows where"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code.

    0: done. 1: an error, told in one line on stderr. 130: interrupted. A usage error leaves with 2
    (SystemExit), as argparse does. With ``--debug`` errors propagate.
    """
    args = _parser().parse_args(argv)
    try:
        code = _COMMANDS[args.command].run(args)
        sys.stdout.flush()  # a closed pipe should show here, not at exit
        return code
    except KeyboardInterrupt:
        print("bbb-fast: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read the output has left; Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if args.debug:
            raise
        print(f"bbb-fast: error: {_describe(error)}", file=sys.stderr)
        return 1
