"""What an experiment reports: tables, figures and settings, for a terminal, a JSON file and a page."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from .._backend import build_info

__all__ = ["FORMAT", "Column", "Document", "Figure", "Table", "mean_and_error", "read", "with_error"]

FORMAT = "bbb_fast-experiment"
_VERSION = 1

Cell = str | float | int | None
# Which of a column's numbers are the better ones.
Better = Literal["high", "low"]


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        name: its heading.
        format: of its numbers, as :func:`format` takes it.
        better: which of its numbers are, if either.
    """

    name: str
    format: str = ""
    better: Better | None = None

    def text(self, cell: Cell) -> str:
        """A cell as it is printed; "-" where there is none."""
        if cell is None:
            return "-"
        if isinstance(cell, str):
            return cell
        return format(cell, self.format)


@dataclass(frozen=True)
class Table:
    """A table with a title; ``note`` says what a reader of its numbers must know."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    note: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(
                    f"a row of {self.title!r} has {len(row)} cells for {len(self.columns)} columns"
                )

    def text(self) -> str:
        """The table as lines of text; the first column is left-aligned, the others right-aligned."""
        lines = [[column.name for column in self.columns]]
        lines += [[c.text(cell) for c, cell in zip(self.columns, row, strict=True)] for row in self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = [
            "  ".join(
                cell.ljust(width) if k == 0 else cell.rjust(width)
                for k, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        return "\n".join([self.title, *text, *([self.note] if self.note else [])])


@dataclass(frozen=True)
class Figure:
    """A PNG beside the document; ``text`` says in words what it shows."""

    file: str
    title: str
    text: str
    png: bytes = field(repr=False, compare=False, default=b"")


@dataclass(frozen=True)
class Document:
    """A finished experiment.

    Attributes:
        command: which command ran it.
        title: one line of what it was about.
        settings: every option of the run, plain values.
        tables, figures: what it shows.
        results: every number behind them, plain values.
        notes: what a reader must know, one sentence each.
        seconds: how long its tasks took, all together.
        build: versions and machine.
    """

    command: str
    title: str
    settings: Mapping[str, Any]
    tables: Sequence[Table]
    figures: Sequence[Figure] = ()
    results: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
    seconds: float = 0.0
    build: Mapping[str, Any] = field(default_factory=build_info)

    def to_json(self) -> str:
        """The document without its figures' pixels. Raises ValueError for numbers that are not finite."""
        fields = asdict(self)
        for figure in fields["figures"]:
            del figure["png"]
        return json.dumps({"format": FORMAT, "version": _VERSION, **fields}, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Document:
        """Of what :meth:`to_json` holds. Raises ValueError for anything else."""
        if not isinstance(fields, Mapping) or fields.get("format") != FORMAT:
            raise ValueError("it is not what an experiment of bbb_fast writes")
        if fields.get("version") != _VERSION:
            raise ValueError(f"it has version {fields.get('version')!r}: this bbb_fast reads {_VERSION}")
        own = {key: value for key, value in fields.items() if key not in ("format", "version")}
        try:
            own["tables"] = [
                Table(**{**table, "columns": [Column(**column) for column in table["columns"]]})
                for table in own["tables"]
            ]
            own["figures"] = [Figure(**figure) for figure in own["figures"]]
            return cls(**own)
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"it is incomplete or malformed: {error}") from error


def read(path: str | os.PathLike[str]) -> Document:
    """The document of a JSON file, its figures' pixels read from beside it.

    Raises ValueError that names the file where it is none, OSError where it cannot be read. A figure that is
    missing has no pixels.
    """
    path = Path(path)
    try:
        document = Document.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{path} cannot be shown: {error}") from error
    figures = []
    for figure in document.figures:
        # A name, not a way out of the folder.
        file = path.parent / Path(figure.file).name
        png = file.read_bytes() if file.is_file() else b""
        figures.append(Figure(figure.file, figure.title, figure.text, png))
    return Document(**{**vars(document), "figures": figures})


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and its standard error (None for a single value)."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def with_error(values: Sequence[float], form: str) -> Cell:
    """The mean as a cell; of several values in words, with its standard error, both formatted as ``form``."""
    mean, error = mean_and_error(values)
    return mean if error is None else f"{mean:{form}} ± {error:{form}}"
