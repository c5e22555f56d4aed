"""Where a case's choices come from: each has a name, and is drawn on its own."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

T = TypeVar("T")

KINDS = ("valid", "malformed")


@dataclass(frozen=True)
class Case:
    """One call: all about it follows from these. ``plain`` names the choices left at their plainest."""

    seed: int
    index: int
    kind: str = "valid"
    plain: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return f"{self.seed}:{self.index}" + ("" if self.kind == "valid" else f":{self.kind}")

    @staticmethod
    def parse(text: str, plain: str = "") -> Case:
        """The inverse of ``str``; ``plain`` is a list with commas. Raises ValueError."""
        seed, index, *kind = text.split(":")
        names = frozenset(filter(None, plain.split(",")))
        case = Case(int(seed), int(index), ":".join(kind) or KINDS[0], names)
        if case.kind not in KINDS:
            raise ValueError(f"a case is SEED:INDEX or SEED:INDEX:malformed, got {text!r}")
        return case

    def command(self) -> str:
        """What runs this case again."""
        plain = f" --plain {','.join(sorted(self.plain))}" if self.plain else ""
        return f'make fuzz FUZZ_ARGS="--case {self}{plain}"'

    def plainer(self, name: str) -> Case:
        return replace(self, plain=self.plain | {name})


class Choices:
    """The choices of one case.

    Every name has a generator of its own, so that leaving one choice at its plainest moves no other: that is
    how a failing case is made smaller. ``taken`` holds those that were not the plainest.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self.taken: dict[str, Any] = {}

    def random(self, name: str) -> random.Random:
        case = self.case
        return random.Random(f"{case.kind}:{case.seed}:{case.index}:{name}")

    def pick(self, name: str, *options: T, often: float = 0.0) -> T:
        """One of the options, the first of which is the plainest; ``often`` is its least chance."""
        if name in self.case.plain:
            return options[0]
        source = self.random(name)
        if source.random() < often:
            return options[0]
        value = source.choice(options)
        if value is not options[0]:
            self.taken[name] = value
        return value

    def chance(self, name: str, probability: float) -> bool:
        """Whether something out of the plain happens."""
        return self.pick(name, False, True, often=max(0.0, 1.0 - 2.0 * probability))

    def generator(self, name: str) -> torch.Generator:
        """A generator of tensors' values."""
        return torch.Generator().manual_seed(self.random(name).getrandbits(62))
