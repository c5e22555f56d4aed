"""Finished runs in folders, as documents for one page.

A run is a document that an experiment wrote, or what ``train`` and ``uncertainty`` write, which are files of
their own kinds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .._files import atomic_write
from .document import FORMAT, Better, Column, Document, Figure, Table, read
from .page import GENERATOR, Section, page
from .tasks import SETTINGS, TASKS
from .training import CURVES, LAST, METRICS
from .uncertainty import FIGURE, SCORES, SUMMARY

__all__ = ["find", "write"]

_SCORES: tuple[tuple[str, str, Better], ...] = (
    ("accuracy", "accuracy", "high"),
    ("NLL", "nll", "low"),
    ("Brier", "brier", "low"),
    ("ECE", "ece", "low"),
)
# Where a document says that it is one: it is the first thing that it holds.
_HEAD = 4096


def find(folders: Sequence[str | os.PathLike[str]]) -> tuple[list[Section], list[Path]]:
    """The finished runs in these folders and those below, and the folders of runs that are not finished.

    Each run once, in the order of the folders, then of their names. Where there is more than one run of
    ``train``, all of them side by side come first. What a run keeps for its own tasks is part of it, no run.

    Raises FileNotFoundError or NotADirectoryError for a folder that is none, OSError for a file that cannot
    be read, ValueError for a file of a run that is damaged and where there is no finished run.
    """
    sections: list[Section] = []
    unfinished: list[Path] = []
    seen: set[Path] = set()
    for given in folders:
        for folder, names in _walk(Path(given).expanduser()):
            if folder.resolve() in seen:
                continue
            seen.add(folder.resolve())
            documents = [document for name in names if (document := _document(folder / name))]
            sections += [Section(str(folder), document) for document in documents]
            if not documents and _is_begun(folder, names):
                unfinished.append(folder)
    if not sections:
        where = ", ".join(str(folder) for folder in folders)
        hint = (
            f"; {unfinished[0]} holds one that is not finished: continue it with --resume"
            if unfinished
            else ""
        )
        raise ValueError(f"{where} holds no finished run{hint}")
    trained = [section for section in sections if section.document.command == "train"]
    if len(trained) > 1:
        sections.insert(0, Section(f"{len(trained)} folders", _side_by_side(trained)))
    return sections, unfinished


def write(path: str | os.PathLike[str], sections: Sequence[Section], title: str) -> int:
    """Writes the page, in one step; returns its size in bytes.

    Raises FileExistsError where ``path`` is there and no page of this kind, OSError where it cannot be
    written, ValueError for a document that cannot be shown.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: choose a file with --out, like {path / 'report.html'}")
    if path.exists():
        with open(path, encoding="utf-8", errors="replace") as file:
            if f'content="{GENERATOR}' not in file.read(_HEAD):
                raise FileExistsError(f"{path} is there and is no report: choose another file with --out")
    content = page(sections, title).encode()
    atomic_write(path, content)
    return len(content)


def _walk(top: Path) -> Iterator[tuple[Path, list[str]]]:
    """A folder and those below, with the names of their files, in the order of the names."""
    if not top.exists():
        raise FileNotFoundError(f"there is no folder {top}")
    if not top.is_dir():
        raise NotADirectoryError(f"{top} is not a folder")

    def refuse(error: OSError) -> None:
        raise error

    for folder, below, names in os.walk(top, onerror=refuse):
        below[:] = sorted(name for name in below if not (name == TASKS and SETTINGS in names))
        yield Path(folder), sorted(names)


def _is_begun(folder: Path, names: Sequence[str]) -> bool:
    """Whether a run has been started here."""
    return LAST in names or (SETTINGS in names and (folder / TASKS).is_dir())


def _document(path: Path) -> Document | None:
    """Of a file of a run; None for any other."""
    if path.suffix != ".json":
        return None
    with open(path, encoding="utf-8", errors="replace") as file:
        is_document = f'"{FORMAT}"' in file.read(_HEAD)
    if is_document:
        return read(path)
    if path.name not in _CONVERTED:
        return None
    keys, convert = _CONVERTED[path.name]
    # Other programs have files of these names too.
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    if not isinstance(found, dict) or not keys <= found.keys():
        return None
    try:
        return convert(path.parent, found)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be shown: it is incomplete or malformed ({error})") from error


def _png(folder: Path, name: str, title: str, text: str) -> list[Figure]:
    """A figure, where there is one: it is not without matplotlib."""
    path = folder / name
    return [Figure(name, title, text, path.read_bytes())] if path.is_file() else []


def _trained(folder: Path, metrics: Mapping[str, Any]) -> Document:
    """What ``train`` has written, as a document."""
    config, test, best, images = metrics["config"], metrics["test"], metrics["best"], metrics["images"]
    # No number here is better than another: they are of different images.
    columns = (Column("set"), Column("images", "d"), *(Column(name, ".4f") for name, _, _ in _SCORES))
    rows = [["validation", images["valid"], *(best.get(key) for _, key, _ in _SCORES)]]
    if test is not None:
        rows.insert(0, ["test", images["test"], *(test[key] for _, key, _ in _SCORES)])
    epochs = len(metrics["history"])
    note = f"The weights of epoch {best['epoch']} of {epochs}, chosen on the validation images."
    return Document(
        command="train",
        title=_model(config),
        settings=config,
        tables=[Table("Scores", columns, rows, note)],
        figures=_png(
            folder, CURVES, "Training",
            f"Negative log-likelihood and accuracy of training and validation images over {epochs} epochs, "
            "and the KL of a Bayesian model.",
        ),
        results=metrics,
        seconds=metrics["timing"]["train_seconds"],
        build=metrics["versions"],
    )  # fmt: skip


def _model(config: Mapping[str, Any]) -> str:
    return f"{config['model']} on {config['dataset']}, layers {config['layer_type']}, seed {config['seed']}"


def _side_by_side(runs: Sequence[Section]) -> Document:
    """Several runs of ``train``, as :func:`_trained` makes them, in one table."""
    columns = (
        Column("run"), Column("data"), Column("model"), Column("layers"), Column("seed", "d"),
        Column("epochs", "d"), *(Column(name, ".4f", better) for name, _, better in _SCORES),
        Column("training (s)", ".1f", "low"),
    )  # fmt: skip
    rows = []
    for run in runs:
        metrics = run.document.results
        config, test = metrics["config"], metrics["test"] or {}
        rows.append([
            run.where, *(config[key] for key in ("dataset", "model", "layer_type", "seed")),
            len(metrics["history"]), *(test.get(key) for _, key, _ in _SCORES),
            metrics["timing"]["train_seconds"],
        ])  # fmt: skip
    note = "Scores of the test images under the weights of the epoch that was best on the validation images."
    return Document("train", "Trained models", {}, [Table("Scores", columns, rows, note)], build={})


def _judged(folder: Path, found: Mapping[str, Any]) -> Document:
    """What ``uncertainty`` has written, as a document."""
    known, other, detection = found["in"], found["out"], found["detection"]
    sets = Table(
        "Images",
        (Column("set"), Column("images", "d"), *(Column(name, ".4f") for name, _, _ in _SCORES),
         Column("probability above 0.9 (%)", ".1f")),
        [
            [part["name"], part["images"], *(part.get(key) for _, key, _ in _SCORES),
             100 * part["share_above_0.9"]]
            for part in (known, other)
        ],
        "A never-seen image has no right class, so its set has no scores.",
    )  # fmt: skip
    telling = Table(
        f"Telling {other['name']} from {known['name']}",
        (Column("score"), Column("median known", ".4f"), Column("median never seen", ".4f"),
         Column("AUROC", ".4f", "high"), Column("AUPR", ".4f", "high"), Column("FPR95", ".4f", "low")),
        [
            [name, *(part["scores"][score]["median"] for part in (known, other)),
             *(detection[score][key] for key in ("auroc", "aupr", "fpr95"))]
            for score, name in SCORES.items()
        ],
    )  # fmt: skip
    config = found["config"]
    return Document(
        command="uncertainty",
        title=f"{_model(config)}: {known['name']} against {other['name']}",
        settings={key: value for key, value in found.items() if key not in _FINDINGS},
        tables=[sets, telling],
        figures=_png(
            folder, FIGURE, "What the model says of both sets",
            f"Images of {known['name']} and of {other['name']} with the model's answer and its uncertainty; "
            "histograms of predictive entropy and mutual information of both sets; ROC curves of all scores.",
        ),
        notes=found["notes"],
        build=found["build"],
    )  # fmt: skip


_FINDINGS = {"in", "out", "detection", "bayesian", "notes", "build"}
# The keys by which these files are known for ours.
_CONVERTED: dict[str, tuple[set[str], Callable[[Path, Mapping[str, Any]], Document]]] = {
    METRICS: ({"run", "config", "history", "test", "versions"}, _trained),
    SUMMARY: (_FINDINGS | {"checkpoint", "run"}, _judged),
}
