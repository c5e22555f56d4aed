"""Tables of numbers with a target column: files, folders with their splits, and a set of scikit-learn.

Everything a file can get wrong raises :class:`bbb_fast.experiments.data.DataError` with one sentence that
names the file, the place in it, and what is allowed. Nothing is guessed: a missing value is never filled in.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .data import DataError
from .options import MAX_SEED

__all__ = ["Split", "Tabular", "bundled", "found_sets", "load_set", "load_table", "random_splits", "seed_of"]

_MISSING = {"", "?", "na", "n/a", "nan", "null", "none", "-"}


@dataclass(frozen=True, eq=False)
class Split:
    """Rows to train on and rows to test on: int64 tensors, without a row in common."""

    train: Tensor
    test: Tensor


@dataclass(frozen=True, eq=False)
class Tabular:
    """A regression set in memory.

    Attributes:
        inputs: float64 ``[N, D]``.
        targets: float64 ``[N]``.
        features: what the columns of ``inputs`` are called.
        target: what the target is called.
        name: what to call the set in messages and results.
        splits: those that come with the set; none if it has no own.

    Raises:
        DataError: fewer than 4 rows, no input, a number that is not finite, or a column of one value.
    """

    inputs: Tensor
    targets: Tensor
    features: tuple[str, ...]
    target: str
    name: str
    splits: tuple[Split, ...] = ()

    def __post_init__(self) -> None:
        count, columns = self.inputs.shape
        if count < 4:
            raise DataError(f"{self.name}: {count} rows are too few: at least 4 are needed")
        if columns == 0:
            raise DataError(f"{self.name}: there is no column besides the target {self.target}")
        for name, column in zip(
            (*self.features, self.target), (*self.inputs.unbind(1), self.targets), strict=True
        ):
            bad = (~column.isfinite()).nonzero()
            if len(bad):
                raise DataError(
                    f"{self.name}: column {name} is {column[bad[0, 0]]} in row {int(bad[0, 0]) + 1}"
                )
            if bool((column == column[0]).all()):
                cure = "choose another target" if name == self.target else "leave it out with --drop"
                raise DataError(f"{self.name}: column {name} is {column[0]:g} in every row: {cure}")


def load_table(path: str | os.PathLike[str], target: str, drop: Sequence[str] = ()) -> Tabular:
    """A text table: one row a line, cells separated by commas, semicolons, tabs or blanks.

    The first line may name the columns: it does where one of its cells is no number. Empty lines and lines
    that start with ``#`` are skipped.

    Args:
        path: the file, UTF-8.
        target: the target column: its name, or its number from 1 on; from the right with -1, -2, ...
        drop: columns to leave out, told likewise.

    Raises:
        DataError: a column that is not there or named twice, lines of different length, a cell that is
            missing or no number, and what :class:`Tabular` refuses.
    """
    path = Path(path)
    names, values = _read(path)
    wanted = _column(path, names, target, "target")
    dropped = [_column(path, names, text, "drop") for text in drop]
    if wanted in dropped:
        raise DataError(f"{path}: column {names[wanted]} is the target and cannot be left out with --drop")
    rest = [k for k in range(len(names)) if k != wanted and k not in dropped]
    for k in [wanted, *rest]:
        for line, cells in values:
            _check_cell(path, names[k], line, cells[k])
    order = [*rest, wanted]
    numbers = torch.tensor([[float(cells[k]) for k in order] for _, cells in values], dtype=torch.float64)
    numbers = numbers.reshape(-1, len(order))
    return Tabular(numbers[:, :-1], numbers[:, -1], tuple(names[k] for k in rest), names[wanted], path.stem)


def _read(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The columns' names, and the numbered lines below them, as cells of text."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no UTF-8 text: {error}") from error
    lines = [
        (number, line)
        for number, line in enumerate(text.splitlines(), 1)
        if line.strip() and not line.lstrip().startswith("#")
    ]
    if not lines:
        raise DataError(f"{path} holds no rows")
    mark = next((mark for mark in ",;\t" if mark in lines[0][1]), None)
    rows = [(number, _cells(line, mark)) for number, line in lines]
    width = len(rows[0][1])
    for number, cells in rows:
        if len(cells) != width:
            raise DataError(
                f"{path}: line {number} has {len(cells)} cells, but line {rows[0][0]} has {width}"
            )
    first = rows[0][1]
    if any(_number(cell) is None and cell.lower() not in _MISSING for cell in first):
        return first, rows[1:]
    return [str(k + 1) for k in range(width)], rows


def _cells(line: str, mark: str | None) -> list[str]:
    if mark is None:
        return line.split()
    return [
        cell.strip() for cell in next(csv.reader([line.strip() if mark != "\t" else line], delimiter=mark))
    ]


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


def _check_cell(path: Path, name: str, line: int, cell: str) -> None:
    if cell.lower() in _MISSING:
        raise DataError(
            f"{path}: line {line} has no value in column {name} ({cell!r}): remove such lines, or fill them "
            "in"
        )
    number = _number(cell)
    if number is None or not math.isfinite(number):
        raise DataError(
            f"{path}: line {line} has {cell!r} in column {name}, which is no finite number: encode it as "
            "numbers, or leave the column out with --drop"
        )


def _column(path: Path, names: Sequence[str], wanted: str, option: str) -> int:
    """The place of a column that is told by its name or its number."""
    places = [k for k, name in enumerate(names) if name == wanted]
    if len(places) > 1:
        raise DataError(
            f"{path}: {len(places)} columns are called {wanted}: tell --{option} by its number, from 1 on"
        )
    if places:
        return places[0]
    try:
        number = int(wanted)
    except ValueError:
        number = 0
    if not 1 <= abs(number) <= len(names):
        raise DataError(
            f"{path} has no column {wanted!r} for --{option}: its columns are {', '.join(names)}; their "
            f"numbers go from 1 to {len(names)}, or from -1 back"
        )
    return number - 1 if number > 0 else len(names) + number


def bundled() -> Tabular:
    """The diabetes set of scikit-learn: 442 patients, 10 measurements, how far the disease got in a year.

    Raises DataError where scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_diabetes
    except ImportError as error:
        raise DataError(f"diabetes needs scikit-learn ({error}): pip install scikit-learn") from error
    data = load_diabetes(scaled=False)
    return Tabular(
        torch.from_numpy(np.asarray(data.data, np.float64)),
        torch.from_numpy(np.asarray(data.target, np.float64)),
        tuple(data.feature_names),
        "progression",
        "diabetes",
    )


def seed_of(seed: int, split: int) -> int:
    """A split's own seed, which no other split of a run with another small seed has."""
    return (seed * 1_000_003 + split) % (MAX_SEED + 1)


def random_splits(count: int, splits: int, seed: int, test_share: float = 0.1) -> tuple[Split, ...]:
    """Splits of ``count`` rows by the seed alone; split k is the same however many there are.

    A share of the rows, at least one, is for testing.
    """
    held_out = max(1, round(test_share * count))
    made = []
    for k in range(splits):
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed_of(seed, k)))
        made.append(Split(order[held_out:].sort().values, order[:held_out].sort().values))
    return tuple(made)


_DATA, _FEATURES, _TARGET, _COUNT = "data.txt", "index_features.txt", "index_target.txt", "n_splits.txt"


def found_sets(folder: str | os.PathLike[str]) -> list[str]:
    """The sets in a folder: its subfolders with a ``data.txt``, by name. Raises DataError for none."""
    folder = Path(folder)
    names = (
        sorted(path.name for path in folder.iterdir() if _place(path) is not None) if folder.is_dir() else []
    )
    if not names:
        raise DataError(
            f"{folder} holds no regression set: expected folders with {_DATA}, {_FEATURES}, {_TARGET}, "
            f"{_COUNT} and index_train_0.txt, index_test_0.txt, ..."
        )
    return names


def _place(folder: Path) -> Path | None:
    """Where the files of a set are: in its folder, or in ``data/`` below it."""
    return next((place for place in (folder, folder / "data") if (place / _DATA).is_file()), None)


def load_set(folder: str | os.PathLike[str], name: str) -> Tabular:
    """A set of a folder in the layout of the UCI sets that the literature on Bayesian networks shares.

    ``FOLDER/name/`` (or ``data/`` below it) holds ``data.txt`` (numbers between blanks), the columns of
    inputs and target (``index_features.txt``, ``index_target.txt``), and the rows of each split
    (``n_splits.txt``, ``index_train_K.txt``, ``index_test_K.txt``), all counted from 0.

    Raises:
        DataError: files that are missing or damaged, indices out of range, a row that is both for training
            and for testing, and what :class:`Tabular` refuses.
    """
    place = _place(Path(folder) / name)
    if place is None:
        raise DataError(f"no set {name} in {folder}: there are {', '.join(found_sets(folder))}")
    _, rows = _read(place / _DATA)
    for line, cells in rows:
        for k, cell in enumerate(cells):
            _check_cell(place / _DATA, str(k), line, cell)
    values = torch.tensor([[float(cell) for cell in cells] for _, cells in rows], dtype=torch.float64)
    count, width = values.shape
    features = _indices(place / _FEATURES, width)
    target = _indices(place / _TARGET, width)
    if len(target) != 1 or int(target[0]) in features.tolist():
        raise DataError(f"{place / _TARGET} must hold one column that is none of {_FEATURES}")
    splits = []
    for k in range(_split_count(place / _COUNT)):
        split = Split(*(_indices(place / f"index_{part}_{k}.txt", count) for part in ("train", "test")))
        both = set(split.train.tolist()) & set(split.test.tolist())
        if both:
            raise DataError(f"{place}: row {min(both)} is for training and for testing in split {k}")
        splits.append(split)
    names = tuple(f"column {k}" for k in features.tolist())
    column = int(target[0])
    return Tabular(values[:, features], values[:, column], names, f"column {column}", name, tuple(splits))


def _indices(path: Path, size: int) -> Tensor:
    _, rows = _read(path)
    found = []
    for line, cells in rows:
        for cell in cells:
            number = _number(cell)
            # They are written as floats, some as 1.000000000000000000e+00.
            if number is None or not number.is_integer() or not 0 <= number < size:
                raise DataError(
                    f"{path}: line {line} has {cell!r}: allowed are whole numbers from 0 to {size - 1}"
                )
            found.append(int(number))
    if len(set(found)) != len(found):
        raise DataError(f"{path} names an index twice")
    return torch.tensor(found, dtype=torch.int64)


def _split_count(path: Path) -> int:
    _, rows = _read(path)
    number = _number(rows[0][1][0]) if rows else None
    if number is None or not number.is_integer() or number < 1:
        raise DataError(f"{path} must hold the number of splits, at least 1")
    return int(number)
