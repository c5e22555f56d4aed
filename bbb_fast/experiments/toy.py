"""``bbb-fast toy``: a regression of one input with a gap in the data: which uncertainty is which."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..predictive import predictive
from .document import Column, Document, Figure, Table
from .drawing import COLORS, png
from .options import check_int
from .regression import Training, check_method, fit
from .tasks import Experiment, Task

__all__ = ["REGIONS", "grid", "make_data", "noise_std", "settings", "toy", "true_mean"]

# Intervals of x. The data lie in two; the gap and the two ends are what is well between and beside them.
_LEFT, _RIGHT, _EDGE = (-3.0, -1.0), (1.0, 3.0), 6.0
REGIONS: dict[str, tuple[tuple[float, float], ...]] = {
    "on data": (_LEFT, _RIGHT),
    "gap": ((-0.5, 0.5),),
    "outside": ((-_EDGE, -4.0), (4.0, _EDGE)),
}


def grid() -> Tensor:
    """Where the models are asked, float64 ``[241]``."""
    return torch.linspace(-_EDGE, _EDGE, 241, dtype=torch.float64)


def true_mean(x: Tensor) -> Tensor:
    """The function behind the data."""
    return torch.sin(1.8 * x) + 0.3 * x


def noise_std(x: Tensor, noise: str) -> Tensor:
    """The noise's standard deviation: the same everywhere, or small on the left and large on the right."""
    return torch.full_like(x, 0.15) if noise == "constant" else torch.where(x < 0, 0.05, 0.3).to(x.dtype)


def make_data(points: int, noise: str, seed: int) -> tuple[Tensor, Tensor]:
    """``points`` inputs, float64 ``[N, 1]``, half of them on each side of the gap, and targets ``[N]``."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(points, generator=generator, dtype=torch.float64)
    low, high = (
        torch.tensor([left, right], dtype=torch.float64) for left, right in zip(_LEFT, _RIGHT, strict=True)
    )
    side = torch.arange(points) % 2
    x = low[side] + u * (high - low)[side]
    y = true_mean(x) + noise_std(x, noise) * torch.randn(points, generator=generator, dtype=torch.float64)
    return x[:, None], y


def settings(
    methods: Sequence[str], points: int, noise: str, samples: int, seed: int, training: Training
) -> dict[str, Any]:
    """All that the results depend on. Raises OptionError for wrong options."""
    check_int("points", points, 10)
    check_int("samples", samples, 2)
    for method in methods:
        check_method(method)
    return {
        "methods": list(dict.fromkeys(methods)),
        "points": points,
        "noise": noise,
        "samples": samples,
        "seed": seed,
        "training": asdict(training),
    }


def _one_method(
    folder: Path, method: str, points: int, noise: str, samples: int, seed: int, training: Mapping[str, Any]
) -> dict[str, Any]:
    """The task: trains a method on the data, and asks it on a grid."""
    x, y = make_data(points, noise, seed)
    start = time.perf_counter()
    model = fit(method, x, y, Training.of(training), seed)
    seconds = time.perf_counter() - start
    said = predictive(model, grid()[:, None], samples, likelihood="heteroscedastic", seed=seed)
    return {
        "mean": said.mean.tolist(),
        "epistemic_std": said.epistemic.sqrt().tolist(),
        "aleatoric_std": said.aleatoric.sqrt().tolist(),
        "seconds": seconds,
    }


def toy(running: Experiment) -> Document:
    """Does what is left of the tasks that the experiment's settings tell, and makes the document of all."""
    options = running.settings
    shared = {key: options[key] for key in ("points", "noise", "samples", "seed", "training")}
    tasks = [Task(method, _one_method, {"method": method, **shared}) for method in options["methods"]]
    results = running.run(tasks)
    x, y = make_data(options["points"], options["noise"], options["seed"])
    data = {"x": x[:, 0].tolist(), "y": y.tolist()}
    figures, notes = [], []
    try:
        pixels = _figure(results, data, options["noise"])
    except ImportError as error:
        notes = [f"no figure: matplotlib is missing ({error}): pip install matplotlib"]
    else:
        text = (
            "For each method the data, the mean, and bands of two standard deviations: dark the epistemic "
            "part, light all. The dark band widens where there are no data; the rest of the light one does "
            "not."
        )
        figures = [Figure("toy.png", "Which uncertainty is which", text, pixels)]
    return Document(
        command=running.command,
        title=f"One input, {options['points']} points with a gap",
        settings=options,
        tables=[_table(results, options["noise"])],
        figures=figures,
        results={"data": data, "methods": results},
        notes=notes,
        seconds=running.seconds,
    )


def _within(intervals: Sequence[tuple[float, float]], x: Tensor) -> Tensor:
    """Which of ``x`` are in one of the intervals."""
    return torch.stack([(x >= low) & (x <= high) for low, high in intervals]).any(0)


def _table(results: Mapping[str, Mapping[str, Any]], noise: str) -> Table:
    x = grid()
    truth, on_data = true_mean(x), _within(REGIONS["on data"], x)
    kinds = ("epistemic", "aleatoric")
    rows: list[list[Any]] = []
    for method, said in results.items():
        error = (torch.tensor(said["mean"], dtype=torch.float64) - truth)[on_data].square().mean().sqrt()
        row = [method, float(error)]
        for kind in kinds:
            std = torch.tensor(said[f"{kind}_std"], dtype=torch.float64)
            row += [float(std[_within(intervals, x)].mean()) for intervals in REGIONS.values()]
        rows.append([*row, said["seconds"]])
    true = [float(noise_std(x, noise)[_within(intervals, x)].mean()) for intervals in REGIONS.values()]
    rows.append(["(true noise)", None, None, None, None, true[0], None, None, None])
    return Table(
        "Mean standard deviations on the data, in the gap, and outside",
        [
            Column("method"),
            Column("error", ".3f", "low"),
            *(Column(f"{kind} {region}", ".3f") for kind in kinds for region in REGIONS),
            Column("train s", ".1f", "low"),
        ],
        rows,
        "Error: of the mean from the true function, where there are data. Epistemic: what more data would "
        "remove.",
    )


def _figure(results: Mapping[str, Mapping[str, Any]], data: Mapping[str, Any], noise: str) -> bytes:
    """A panel a method."""
    from matplotlib.figure import Figure as Canvas

    x = grid()
    truth = true_mean(x)
    columns = min(4, len(results))
    lines = math.ceil(len(results) / columns)
    canvas = Canvas(figsize=(3.9 * columns, 3.2 * lines + 0.5), layout="constrained", dpi=110)
    panels = canvas.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).flat
    for k, ((method, said), panel) in enumerate(zip(results.items(), panels, strict=False)):
        mean, epistemic, aleatoric = (
            torch.tensor(said[key], dtype=torch.float64) for key in ("mean", "epistemic_std", "aleatoric_std")
        )
        total = (epistemic.square() + aleatoric.square()).sqrt()
        for low, high in REGIONS["on data"]:
            panel.axvspan(low, high, color="0.93", zorder=0, linewidth=0)
        for std, color, alpha, label in (
            (total, COLORS[5], 0.35, "all: ± 2 standard deviations"),
            (epistemic, COLORS[0], 0.55, "epistemic part"),
        ):
            panel.fill_between(
                x, mean - 2 * std, mean + 2 * std, color=color, alpha=alpha, linewidth=0, label=label
            )
        panel.plot(x, truth, color="0.35", linestyle="--", linewidth=1, label="true function")
        panel.plot(x, mean, color=COLORS[1], linewidth=1.6, label="mean")
        panel.plot(data["x"], data["y"], ".", color="black", markersize=3, label="data")
        panel.set(title=method, xlim=(-_EDGE, _EDGE), ylim=(-4, 4))
        if k % columns == 0:
            panel.set_ylabel("y")
        if k + columns >= len(results):
            panel.set_xlabel("x")
            panel.tick_params(labelbottom=True)
    for panel in panels:
        panel.set_axis_off()
    handles, labels = canvas.axes[0].get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside lower center", ncols=len(handles), fontsize=9)
    return png(canvas)
