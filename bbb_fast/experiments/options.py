"""Checks of options that the library and the command line share, in words that fit both."""

from __future__ import annotations

from typing import Any

__all__ = ["MAX_COUNT", "MAX_SEED", "MAX_THREADS", "OptionError", "check_int"]

MAX_COUNT = (1 << 31) - 1
MAX_SEED = (1 << 63) - 1
# Far more than help; an OpenMP that cannot start the threads it was promised ends the process.
MAX_THREADS = 1024


class OptionError(ValueError):
    """A wrong option. The message starts with its name, which the command line spells its own way."""

    def __init__(self, option: str, problem: str) -> None:
        super().__init__(option, problem)  # what it is pickled by
        self.option, self.problem = option, problem

    def __str__(self) -> str:
        return f"{self.option} {self.problem}"


def check_int(option: str, value: Any, least: int = 1, most: int = MAX_COUNT) -> None:
    """Raises OptionError unless ``value`` is an int in ``least`` ... ``most``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise OptionError(option, f"must be an int >= {least}, got {value!r}")
    if value > most:
        raise OptionError(option, f"must be an int <= {most}, got {value}")
