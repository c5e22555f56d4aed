"""What became of a case, in a form that goes through a pipe."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any


class Status(str, Enum):
    STARTED = "started"
    OK = "ok"
    REFUSED = "refused"  # by both implementations, in order
    FAULT = "fault"


@dataclass
class Outcome:
    """``what`` names the kind of fault, ``detail`` the numbers; ``drawn`` the choices that were not plain."""

    status: Status
    op: str
    what: str = ""
    detail: str = ""
    drawn: dict[str, str] = field(default_factory=dict)
    margin: float = 0.0  # the largest difference over its bound

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(record: dict[str, Any]) -> Outcome:
        return Outcome(**{**record, "status": Status(record["status"])})

    def group(self) -> str:
        """Faults that are likely to be the same one: numbers aside."""
        return f"{self.op}: {re.sub(r'-?[0-9][0-9.e+-]*', '#', self.what)}"


def shown(drawn: dict[str, Any]) -> dict[str, str]:
    return {name: str(value).removeprefix("torch.") for name, value in drawn.items()}


def one_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"
