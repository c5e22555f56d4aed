"""Tables of results, for a terminal and as Markdown, and where their numbers come from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rivals import label

from bbb_fast.experiments.document import Cell, Column, Table


class Number(NamedTuple):
    """A column: what to take of a contender's row ("step.median_us"), in which unit, and how to print it."""

    name: str
    path: str
    unit: float = 1.0
    form: str = ".2f"

    def of(self, row: Mapping[str, Any] | None) -> float | None:
        """None where the row has no such number."""
        for key in self.path.split("."):
            row = row.get(key) if isinstance(row, Mapping) else None
        return row / self.unit if isinstance(row, int | float) else None

    @property
    def column(self) -> Column:
        return Column(self.name, self.form)


def ratio_of(row: Mapping[str, Any], mine: str, theirs: str, path: str = "step.median_us") -> float | None:
    """A number of one contender over that of another; None if either was not measured."""
    a, b = (Number("", path).of(row.get("contenders", {}).get(name)) for name in (mine, theirs))
    return a / b if a and b else None


def contenders(rows: Iterable[tuple[str, Mapping[str, Any]]], numbers: Sequence[Number], title: str) -> Table:
    """A line for each contender of each (case, measured row): its numbers, or why it did not run.

    A row without contenders is a line of its own.
    """
    lines: list[Sequence[Cell]] = []
    for case, row in rows:
        for name, found in row.get("contenders", {"": row}).items():
            error = found.get("error", "")[:90]
            lines.append((case, label(name), *(number.of(found) for number in numbers), error))
    kept = [k for k in range(len(numbers) + 3) if k < 1 or any(line[k] not in ("", None) for line in lines)]
    columns = [Column("case"), Column(""), *(number.column for number in numbers), Column("error")]
    return Table(title, [columns[k] for k in kept], [[line[k] for k in kept] for line in lines])


def pivot(rows: Sequence[tuple[str, Mapping[str, Any]]], number: Number) -> Table:
    """A line for each case, a column for each contender that has the number."""
    names = dict.fromkeys(
        n for _, row in rows for n, c in row["contenders"].items() if number.of(c) is not None
    )
    cells = [[case, *(number.of(row["contenders"].get(name)) for name in names)] for case, row in rows]
    return Table(number.name, [Column("case"), *(Column(label(n), number.form) for n in names)], cells)


def markdown(table: Table) -> str:
    """The table without its title."""
    lines = [
        " | ".join(column.name for column in table.columns),
        "|".join(["---"] * len(table.columns)),
        *(" | ".join(c.text(x) for c, x in zip(table.columns, row, strict=True)) for row in table.rows),
    ]
    return "\n".join(f"| {line} |" if i != 1 else f"|{line}|" for i, line in enumerate(lines))


def verdict(value: float | None, limit: float | None) -> Cell:
    """A number beside what it may be at most, and whether it is; the number alone where nothing is said."""
    if value is None or limit is None:
        return value
    return f"{value:.2f} (≤ {limit:g}: {'met' if value <= limit else '**missed**'})"


def provenance_line(where: Mapping[str, Any]) -> str:
    """One sentence on where numbers come from."""
    kernels = f"{where['instruction_set']} kernels" if where["instruction_set"] else "reference path"
    changes = " with uncommitted changes" if where["uncommitted_changes"] else ""
    libraries = "".join(f", {name} {version}" for name, version in where.get("libraries", {}).items())
    return (
        f"{where['cpu']} ({where['machine']}), {kernels}, torch {where['torch']}, Python {where['python']}, "
        f"bbb_fast {where['bbb_fast']} at commit {where['commit']}{changes}, {where['date']}{libraries}."
    )


def plural(count: int) -> str:
    return f"{count} thread" + ("" if count == 1 else "s")
