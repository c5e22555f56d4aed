"""Documents as one HTML page that needs nothing else: no network, no other file, no library.

What a document holds is text here: everything is escaped, and the page's own policy lets nothing run but the
script below.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from .._version import __version__
from .document import Cell, Column, Document, Figure, Table

__all__ = ["GENERATOR", "Section", "page"]

# By which a page is known to be one of ours.
GENERATOR = "bbb_fast report"
_PNG = b"\x89PNG\r\n\x1a\n"
# A number in words: "0.031", "-1.2e-05", "2.63 ± 0.05", "92 %".
_LEADING_NUMBER = re.compile(
    r"\s*([-+\N{MINUS SIGN}]?\d+(?:\.\d+)?(?:e[-+]?\d+)?)\s*(?:±.*|%)?\s*", re.IGNORECASE
)


@dataclass(frozen=True)
class Section:
    """A document and where it was found, as the page shows it."""

    where: str
    document: Document


def page(sections: Sequence[Section], title: str) -> str:
    """The page; the same documents give the same text.

    Raises ValueError that names the run for a document that cannot be shown: a column's format that does not
    fit its cells, a figure that is no PNG.
    """
    style, script = (_asset(f"page.{kind}") for kind in ("css", "js"))
    shown = []
    for k, section in enumerate(sections, 1):
        try:
            shown.append(_section(section, f"run-{k}"))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{section.where} cannot be shown: {error}") from error
    commands = sorted({section.document.command for section in sections})
    count = f"{len(sections)} run{'s' if len(sections) != 1 else ''}"
    return Template(_asset("page.html")).substitute(
        title=escape(title),
        summary=escape(f"{count} of {', '.join(commands)}."),
        generator=escape(f"{GENERATOR} {__version__}"),
        contents="\n".join(_entry(section, f"run-{k}") for k, section in enumerate(sections, 1)),
        sections="\n".join(shown),
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
    )


def _asset(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """As a Content-Security-Policy names an inline style or script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _entry(section: Section, name: str) -> str:
    title, where = escape(section.document.title), escape(section.where)
    return f'<li><a href="#{name}">{title}</a> <span>{where}</span></li>'


def _section(section: Section, name: str) -> str:
    document = section.document
    facts = [document.command, section.where]
    if document.seconds:
        facts.append(_duration(document.seconds))
    parts = [
        f'<section id="{name}" aria-labelledby="{name}-title">',
        f'<h2 id="{name}-title">{escape(document.title)}</h2>',
        f'<p class="where">{escape(" · ".join(facts))}</p>',
        *(_table(table, f"{name}-table-{k}") for k, table in enumerate(document.tables, 1)),
        *map(_figure, document.figures),
    ]
    if document.notes:
        notes = "".join(f"<li>{escape(note)}</li>" for note in document.notes)
        parts.append(f'<ul class="notes">{notes}</ul>')
    about = [
        _pairs(title, values)
        for title, values in (("Settings", document.settings), ("Versions", document.build))
        if values
    ]
    if about:
        parts += [
            '<details>\n<summary>Settings and versions</summary>\n<div class="pair">',
            *about,
            "</div>\n</details>",
        ]
    return "\n".join([*parts, "</section>"])


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def _number(cell: Cell) -> float | None:
    """What a cell is sorted by; None: it is text, or there is none."""
    if isinstance(cell, str):
        match = _LEADING_NUMBER.fullmatch(cell)
        return float(match[1].replace("\N{MINUS SIGN}", "-")) if match else None
    if cell is None or not math.isfinite(cell):
        return None
    return float(cell)


@dataclass(frozen=True)
class _Cells:
    """A column with its cells: texts as printed, numbers to sort by, and which are the best."""

    column: Column
    texts: Sequence[str]
    numbers: Sequence[float | None]
    missing: Sequence[bool]

    @classmethod
    def of(cls, column: Column, cells: Sequence[Cell]) -> _Cells:
        return cls(
            column, [column.text(c) for c in cells], [_number(c) for c in cells], [c is None for c in cells]
        )

    @property
    def numeric(self) -> bool:
        """Whether it has numbers, and nothing else but gaps."""
        there = [n is not None for n, gap in zip(self.numbers, self.missing, strict=True) if not gap]
        return bool(there) and all(there)

    def best(self) -> set[str]:
        """The texts of the best numbers: what is printed alike is alike. Empty where there is no choice."""
        there = {text: n for text, n in zip(self.texts, self.numbers, strict=True) if n is not None}
        if self.column.better is None or not self.numeric or len(there) < 2:
            return set()
        best = (max if self.column.better == "high" else min)(there.values())
        return {text for text, n in there.items() if n == best}


def _table(table: Table, name: str) -> str:
    columns = [_Cells.of(column, [row[k] for row in table.rows]) for k, column in enumerate(table.columns)]
    heads = "".join(_heading(cells) for cells in columns)
    best = [cells.best() for cells in columns]
    rows = []
    for i in range(len(table.rows)):
        cells = [_cell(column, i, k == 0, best[k]) for k, column in enumerate(columns)]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    note = f'\n<p class="note">{escape(table.note)}</p>' if table.note else ""
    # A region that scrolls must be reachable by keyboard, and then needs a name.
    return (
        f'<h3 id="{name}">{escape(table.title)}</h3>\n'
        f'<div class="scroll" role="region" tabindex="0" aria-labelledby="{name}">\n'
        f'<table aria-labelledby="{name}">\n'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n"
        + "\n".join(rows)
        + f"\n</tbody>\n</table>\n</div>{note}"
    )


def _heading(cells: _Cells) -> str:
    better = cells.column.better
    first = "descending" if better == "high" else "ascending"
    numbers = ' class="number" data-numbers' if cells.numeric else ""
    hint = f' title="{better}er is better"' if better else ""
    return (
        f'<th scope="col" aria-sort="none" data-first="{first}"{numbers}>'
        f'<button type="button"{hint}>{escape(cells.column.name)}</button></th>'
    )


def _cell(cells: _Cells, row: int, heads: bool, best: set[str]) -> str:
    text, number = cells.texts[row], cells.numbers[row]
    chosen = number is not None and text in best
    classes = [name for name, on in (("number", cells.numeric), ("best", chosen)) if on]
    attributes = f' class="{" ".join(classes)}"' if classes else ""
    if cells.numeric and number is not None:
        attributes += f' data-value="{number!r}"'
    if cells.missing[row]:
        attributes += " data-missing"
    said = '<span class="unseen"> (best)</span>' if chosen else ""
    tag = 'th scope="row"' if heads else "td"
    return f"<{tag}{attributes}>{escape(text)}{said}</{tag.split()[0]}>"


def _figure(figure: Figure) -> str:
    caption = f"<strong>{escape(figure.title)}.</strong> {escape(figure.text)}"
    if not figure.png:
        missing = escape(f" (The file {figure.file} is missing.)")
        return f"<figure><figcaption>{caption}{missing}</figcaption></figure>"
    if figure.png[:8] != _PNG or len(figure.png) < 24:
        raise ValueError(f"{figure.file} is no PNG")
    # Known before the picture is decoded, so that the text below does not jump.
    width, height = struct.unpack(">II", figure.png[16:24])
    data = base64.b64encode(figure.png).decode()
    return (
        f'<figure>\n<div class="picture"><img src="data:image/png;base64,{data}" width="{width}" '
        f'height="{height}" alt="{escape(figure.text)}"></div>\n<figcaption>{caption} '
        '<button type="button" aria-pressed="false" hidden>Full size</button></figcaption>\n</figure>'
    )


def _pairs(title: str, values: Mapping[str, Any]) -> str:
    rows = "\n".join(
        f'<tr><th scope="row">{escape(key)}</th><td>{escape(value)}</td></tr>' for key, value in _flat(values)
    )
    return f"<div><h3>{title}</h3>\n<table>\n{rows}\n</table></div>"


def _flat(values: Mapping[str, Any], before: str = "") -> list[tuple[str, str]]:
    """Nested settings as lines: ``config.lr``."""
    lines = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            lines += _flat(value, f"{before}{key}.")
        else:
            lines.append((f"{before}{key}", _plain(value)))
    return lines


def _plain(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value))
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)
