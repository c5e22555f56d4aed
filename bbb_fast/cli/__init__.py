"""The command line: ``bbb-fast <command>``, or ``python -m bbb_fast <command>``.

Each command is a module with ``add_parser(subparsers)`` and ``run(args) -> exit code``.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from typing import Any

from .._version import __version__
from ..experiments.options import OptionError
from . import active, compare, info, ood, regress, report, shift, toy, train, tune, uncertainty, vae
from .launch import Launch
from .memory import keep_freed_memory

__all__ = ["main"]

_COMMANDS = {
    "train": train,
    "uncertainty": uncertainty,
    "compare": compare,
    "ood": ood,
    "shift": shift,
    "active": active,
    "regress": regress,
    "toy": toy,
    "vae": vae,
    "report": report,
    "tune": tune,
    "info": info,
}
# Those whose output is all they do.
_PRINTING = ("info",)
# Those that several processes can do together.
_PARALLEL = ("train",)
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
    if isinstance(error, OptionError):
        text = f"--{error.option.replace('_', '-')} {error.problem}"
    elif isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    elif isinstance(error, MemoryError):
        text = "out of memory"
    elif isinstance(error, _EXPECTED):
        text = str(error) or type(error).__name__
    else:
        text = f"internal error ({type(error).__name__}: {error}); --debug shows where"
    return " ".join(text.split())


class _Output:
    """Standard output for work that must not be lost because nobody can read about it.

    Once a write has failed (a full disk, a reader that has left) the rest is dropped. Characters that the
    stream cannot encode become escapes.
    """

    def __init__(self, stream: Any) -> None:
        # None: the shell has closed it.
        self._stream = open(os.devnull, "w") if stream is None else stream  # noqa: SIM115
        self._errors = getattr(self._stream, "errors", None)
        self._error: OSError | None = None
        if hasattr(self._stream, "reconfigure"):
            self._stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _attempt(self, call: Callable[..., Any], *args: Any) -> None:
        if self._error is None:
            try:
                call(*args)
            except OSError as error:
                self._error = error

    def write(self, text: str) -> int:
        self._attempt(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def lost(self) -> bool:
        """Whether anything could not be written; tells the user so. To be asked once, at the end."""
        self.flush()
        if self._error is None:
            if self._errors is not None and hasattr(self._stream, "reconfigure"):
                self._stream.reconfigure(errors=self._errors)
            return False
        why = self._error.strerror or self._error
        print(f"bbb-fast: warning: standard output could not be written ({why})", file=sys.stderr)
        # Python would try again, and complain once more, when it flushes at exit.
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
        return True


@contextmanager
def _streams(launch: Launch) -> Iterator[_Output]:
    """An output that may fail, warnings in one line; both put back afterwards.

    Of several processes only the first has an output, and a warning is printed once.
    """
    before = sys.stdout, sys.stderr
    output = _Output(sys.stdout if launch.rank == 0 else None)
    sys.stdout = output
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        line = f"bbb-fast: warning: {message}"
        if launch.is_first_to_say(line):
            print(line, file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        try:
            yield output
        finally:
            sys.stdout, sys.stderr = before


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code.

    0: done. 1: an error, told in one line on stderr. 130: interrupted. A usage error leaves with 2
    (SystemExit), as argparse does. With ``--debug`` errors propagate.

    Where standard output cannot be written, the work goes on and its files are written; a line on stderr
    says so. A command that only prints (``info``, ``--help``) then returns 1.
    """
    launch = Launch.here()
    if argv is None:  # a process of our own
        keep_freed_memory()
    with _streams(launch) as output:
        try:
            args = _parse(argv, launch)
        except SystemExit as leaving:
            if output.lost() and not leaving.code:
                raise SystemExit(1) from None
            raise
        code = _execute(args, launch)
        if output.lost() and args.command in _PRINTING:
            code = code or 1
    if argv is None and launch.size > 1:
        launch.exit(code)
    launch.leave()
    return code


def _parse(argv: Sequence[str] | None, launch: Launch) -> argparse.Namespace:
    usage = io.StringIO()
    try:
        with redirect_stderr(usage if launch.size > 1 else sys.stderr):
            return _parser().parse_args(argv)
    finally:
        if usage.getvalue():
            launch.report(usage.getvalue().rstrip())


def _execute(args: argparse.Namespace, launch: Launch) -> int:
    args.launch = launch
    try:
        if launch.size > 1 and args.command not in _PARALLEL:
            raise ValueError(
                f"{args.command} runs in one process, but torchrun started {launch.size}: start it without "
                "torchrun"
            )
        code: int = _COMMANDS[args.command].run(args)
        return code
    except KeyboardInterrupt as interrupt:
        # What a command has to say of it goes below the terminal's ^C.
        launch.report(f"\nbbb-fast: {interrupt}" if interrupt.args else "bbb-fast: interrupted")
        return 130
    except Exception as error:
        if args.debug:
            raise
        launch.report(f"bbb-fast: error: {_describe(error)}")
        return 1
