"""``bbb-fast regress``: methods side by side on tables of numbers, over train/test splits."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import metrics
from .document import Column, Document, Figure, Table, mean_and_error
from .drawing import COLORS, png
from .options import OptionError, check_int
from .regression import Training, check_method, fit, judge
from .tabular import Tabular, bundled, found_sets, load_set, load_table, random_splits, seed_of
from .tasks import Experiment, Task

__all__ = ["SCORES", "load", "regress", "sources"]

# By key: heading, format, and which values are better.
SCORES: dict[str, Column] = {
    "rmse": Column("RMSE", ".3f", "low"),
    "log_likelihood": Column("log lik.", ".3f", "high"),
    "crps": Column("CRPS", ".3f", "low"),
    "coverage": Column("in 95 %", ".3f"),
    "width": Column("width", ".3g"),
    "calibration_error": Column("calib. err.", ".4f", "low"),
}
# Those whose standard errors the table shows.
_WITH_ERROR = ("rmse", "log_likelihood", "crps")


def sources(
    data: str | None, target: str | None, drop: Sequence[str], data_dir: str | None, sets: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Where each set comes from, by name, as plain values for :func:`load`.

    ``data`` and ``target``: a table; ``data_dir`` and ``sets``: a folder and which of its sets, all if none
    is named; neither: the bundled set. Raises OptionError where they contradict each other, DataError for
    a folder without sets.
    """
    if data is not None and data_dir is not None:
        raise OptionError("data", "and --data-dir exclude each other: give one of them")
    if data_dir is None and sets:
        raise OptionError("sets", "needs --data-dir FOLDER, which holds them")
    if data is None and (target is not None or drop):
        raise OptionError("target" if target is not None else "drop", "needs --data FILE")
    if data is not None:
        if target is None:
            raise OptionError("target", "is needed with --data: the name or number of the target column")
        return {Path(data).stem: {"file": data, "target": target, "drop": list(drop)}}
    if data_dir is not None:
        return {
            name: {"folder": data_dir, "set": name} for name in dict.fromkeys(sets or found_sets(data_dir))
        }
    return {"diabetes": {}}


def load(source: Mapping[str, Any]) -> Tabular:
    """The set that an entry of :func:`sources` tells. Raises DataError."""
    if "file" in source:
        return load_table(source["file"], source["target"], source["drop"])
    return load_set(source["folder"], source["set"]) if "folder" in source else bundled()


def _fingerprint(table: Tabular) -> str:
    """Of all numbers of a set: a run that is resumed must have the same."""
    digest = hashlib.sha256()
    for t in (table.inputs, table.targets, *(t for split in table.splits for t in (split.train, split.test))):
        digest.update(t.numpy().tobytes())
    return digest.hexdigest()[:16]


def settings(
    where: Mapping[str, Mapping[str, Any]],
    methods: Sequence[str],
    splits: int | None,
    samples: int,
    seed: int,
    training: Training,
) -> dict[str, Any]:
    """All that the results depend on, with the number of splits of each set.

    Raises DataError for sets that cannot be read, OptionError for wrong options.
    """
    check_int("samples", samples)
    if splits is not None:
        check_int("splits", splits)
    for method in methods:
        check_method(method)
    sets = {}
    for name, source in where.items():
        table = load(source)
        own = len(table.splits)
        if own and splits is not None and splits > own:
            raise OptionError("splits", f"must be at most {own}, as many as {name} has, got {splits}")
        sets[name] = {
            "source": dict(source),
            "rows": len(table.targets),
            "inputs": len(table.features),
            "target": table.target,
            "splits": splits or own or _RANDOM_SPLITS,
            "own_splits": bool(own),
            "numbers": _fingerprint(table),
        }
    return {
        "sets": sets,
        "methods": list(dict.fromkeys(methods)),
        "samples": samples,
        "seed": seed,
        "training": asdict(training),
    }


_RANDOM_SPLITS = 5


def _one_split(
    folder: Path, source: Mapping[str, Any], method: str, split: int, seed: int, samples: int,
    training: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """The task: trains a method on the training rows of one split, and scores it on its test rows."""
    table = load(source)
    # Of the random splits, the k-th does not depend on how many there are.
    rows = (table.splits or random_splits(len(table.targets), split + 1, seed))[split]
    x, y = table.inputs[rows.train], table.targets[rows.train]
    start = time.perf_counter()
    model = fit(method, x, y, Training.of(training), seed_of(seed, split))
    trained = time.perf_counter()
    targets = table.targets[rows.test]
    said, scores = judge(model, table.inputs[rows.test], targets, samples, seed)
    predicted = time.perf_counter()
    curve = metrics.regression_calibration(said.mean, said.variance, targets)
    result = {
        **scores,
        "train_seconds": trained - start,
        "predict_seconds": predicted - trained,
        "rows": len(rows.test),
        "observed": curve.observed.tolist(),
    }
    if split == 0:
        result["predictions"] = {
            "target": targets.tolist(),
            "mean": said.mean.tolist(),
            "epistemic_std": said.epistemic.sqrt().tolist(),
            "std": said.variance.sqrt().tolist(),
        }
    return result


def regress(running: Experiment) -> Document:
    """Does what is left of the tasks that the experiment's settings tell, and makes the document of all."""
    options = running.settings
    tasks = {
        (name, method, split): Task(
            f"{name}-{method}-{split}",
            _one_split,
            {
                "source": of_set["source"],
                "method": method,
                "split": split,
                "seed": options["seed"],
                "samples": options["samples"],
                "training": options["training"],
            },
        )
        for name, of_set in options["sets"].items()
        # All methods of a split before the next one, so that a run that is killed can be compared.
        for split in range(of_set["splits"])
        for method in options["methods"]
    }
    done = running.run(list(tasks.values()))
    results: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for (name, method, _), task in tasks.items():
        results.setdefault(name, {}).setdefault(method, []).append(done[task.name])
    figures, notes = _figures(results)
    return Document(
        command=running.command,
        title=f"Regression on {', '.join(results)}",
        settings=options,
        tables=[_table(name, options["sets"][name], of_set) for name, of_set in results.items()],
        figures=figures,
        results=results,
        notes=notes,
        seconds=running.seconds,
    )


def _table(name: str, about: Mapping[str, Any], results: Mapping[str, Sequence[Mapping[str, Any]]]) -> Table:
    columns = [Column("method")]
    for key, column in SCORES.items():
        columns += [column] + ([Column("±", column.format)] if key in _WITH_ERROR else [])
    columns += [Column("train s", ".1f", "low"), Column("predict s", ".2f", "low")]
    rows = []
    for method, splits in results.items():
        row: list[Any] = [method]
        for key in SCORES:
            mean, error = mean_and_error([split[key] for split in splits])
            row += [mean] + ([error] if key in _WITH_ERROR else [])
        for key in ("train_seconds", "predict_seconds"):
            row.append(mean_and_error([split[key] for split in splits])[0])
        rows.append(row)
    count = about["splits"]
    whose = "its own splits" if about["own_splits"] else "random splits, a tenth for testing"
    return Table(
        f"{name}: {about['rows']} rows, {about['inputs']} inputs, {count} of {whose}",
        columns,
        rows,
        "Mean over the splits, ± its standard error, in the target's own units. In 95 %: the share of test "
        "targets in the central 95 % interval; calib. err.: mean squared distance of the calibration curve "
        "from the diagonal.",
    )


def _figures(
    results: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]],
) -> tuple[list[Figure], list[str]]:
    try:
        pixels = _calibration_figure(results)
    except ImportError as error:
        return [], [f"no figures: matplotlib is missing ({error}): pip install matplotlib"]
    figures = [
        Figure(
            "calibration.png",
            "Calibration",
            "For each probability, the share of test targets below the quantile that the method predicts for "
            "it; a calibrated method is on the diagonal.",
            pixels,
        )
    ]
    for name, of_set in results.items():
        figures.append(
            Figure(
                f"predictions-{name}.png",
                f"Predictions for {name}, first split",
                "Predicted against true targets, with bars of two standard deviations: thick the epistemic "
                "part, thin all. On the diagonal they are right.",
                _predictions_figure(of_set),
            )
        )
    return figures, []


def _calibration_figure(results: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> bytes:
    """A panel a set: observed against expected shares, all splits together."""
    from matplotlib.figure import Figure as Canvas

    columns = min(3, len(results))
    lines = -(-len(results) // columns)
    canvas = Canvas(figsize=(4.6 * columns + 2.2, 4.4 * lines), layout="constrained", dpi=110)
    panels = canvas.subplots(lines, columns, squeeze=False).flat
    for (name, of_set), panel in zip(results.items(), panels, strict=False):
        panel.plot([0, 1], [0, 1], color="0.75", linewidth=1, zorder=0)
        for k, (method, splits) in enumerate(of_set.items()):
            total = sum(split["rows"] for split in splits)
            levels = len(splits[0]["observed"])
            observed = [
                sum(split["observed"][j] * split["rows"] for split in splits) / total for j in range(levels)
            ]
            expected = [(j + 1) / (levels + 1) for j in range(levels)]
            panel.plot(
                expected, observed, color=COLORS[k % len(COLORS)], label=method, linewidth=1.6,
                linestyle=("-", "--", ":")[k // len(COLORS) % 3],
            )  # fmt: skip
        panel.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", title=name)
        panel.set(xlabel="predicted probability", ylabel="share of test targets below")
    for panel in panels:
        panel.set_axis_off()
    handles, labels = canvas.axes[0].get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside right upper", fontsize=9)
    return png(canvas)


def _predictions_figure(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> bytes:
    """A panel a method: predictions of the first split against its targets."""
    from matplotlib.figure import Figure as Canvas

    columns = min(4, len(results))
    lines = -(-len(results) // columns)
    canvas = Canvas(figsize=(3.6 * columns, 3.7 * lines), layout="constrained", dpi=110)
    panels = canvas.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).flat
    for k, ((method, splits), panel) in enumerate(zip(results.items(), panels, strict=False)):
        told, color = splits[0]["predictions"], COLORS[k % len(COLORS)]
        low, high = min(told["target"]), max(told["target"])
        panel.plot([low, high], [low, high], color="0.7", linewidth=1, zorder=0)
        for key, width, alpha in (("std", 0.8, 0.6), ("epistemic_std", 2.6, 0.8)):
            bars = [2 * value for value in told[key]]
            panel.errorbar(
                told["target"], told["mean"], yerr=bars,
                fmt="none", ecolor=color, elinewidth=width, alpha=alpha,
            )  # fmt: skip
        panel.plot(told["target"], told["mean"], "o", color="black", markersize=2.5)
        panel.set_title(f"{method}: RMSE {splits[0]['rmse']:.3g}", fontsize=10)
        if k + columns >= len(results):
            panel.tick_params(labelbottom=True)
    for panel in panels:
        panel.set_axis_off()
    canvas.supxlabel("target", fontsize=10)
    canvas.supylabel("prediction ± 2 standard deviations", fontsize=10)
    return png(canvas)
