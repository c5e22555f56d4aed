"""docs/evidence.md names tests and files that exist."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest
from helpers import repository_root

ROOT = repository_root()
PAGE = ROOT / "docs" / "evidence.md"
ROWS = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
PROMISES = [row.strip("| ").split(" | ") for row in ROWS if not row.startswith("| promise")]


@cache
def names_of(file: Path) -> frozenset[str]:
    """The names of a file's tests: ``test``, or ``Class::test``."""
    found = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ClassDef):
            inner = (n.name for n in node.body if isinstance(n, ast.FunctionDef))
            found |= {f"{node.name}::{name}" for name in inner if name.startswith("test")}
        elif isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
            found.add(node.name)
    return frozenset(found)


def missing(named: str) -> bool:
    """Whether there is no such test (``file.py`` or ``file.py::name``) or file of the repository."""
    file, _, test = named.partition("::")
    if not file.startswith("test_"):
        return not (ROOT / file).is_file()
    path = ROOT / "python_tests" / file
    return not path.is_file() or bool(test and test not in names_of(path))


def named_in(cell: str) -> list[str]:
    return re.findall(r"`([\w./-]+\.(?:py|json)(?:::[\w:]+)?)`", cell)


@pytest.mark.parametrize("row", PROMISES, ids=lambda row: row[0][:60])
def test_what_is_named_exists(row: list[str]) -> None:
    assert len(row) == 3 and all(row), "a promise, what holds it, what was last run"
    names = named_in(row[1])
    assert names, "a promise that nothing holds"
    assert [name for name in names if missing(name)] == []


def test_the_page_has_promises() -> None:
    assert len(PROMISES) > 30


@pytest.mark.parametrize(
    ("named", "gone"),
    [
        ("test_evidence.py::test_the_page_has_promises", False),
        ("test_evidence.py::test_of_nothing", True),
        ("test_layers.py::TestKl::test_any_time", False),
        ("test_layers.py::test_any_time", True),
        ("test_nothing.py", True),
        ("docs/evidence.md", False),
        ("benchmarks/results/nothing.json", True),
    ],
)
def test_what_is_missing_is_found(named: str, gone: bool) -> None:
    assert missing(named) is gone
