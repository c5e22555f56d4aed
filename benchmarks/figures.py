"""The figures of docs/benchmarks.md and docs/performance.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rivals import CONTENDERS, label
from tables import plural

from bbb_fast.experiments.drawing import BLACK, BLUE, ORANGE, PINK, RED, SKY, png

FAMILIES = {"ours": BLUE, "formulas": ORANGE, "torch.compile": RED, "libraries": PINK}
# Ours and the formulas, told apart by colour and by marker.
LINES = {
    "nn": (BLACK, "o"),
    "bbb": (BLUE, "s"),
    "lrt": (SKY, "^"),
    "eager_bbb": (RED, "D"),
    "eager_lrt": (ORANGE, "v"),
}


def layers(result: Mapping[str, Any]) -> bytes:
    """One panel a case: every contender's step over torch.nn's, a bar for each number of threads."""
    from matplotlib.figure import Figure

    runs = result["runs"]
    cases = list(dict.fromkeys(table["case"] for run in runs for table in run["layers"]))
    bf16 = result["provenance"]["bf16_instructions"]
    names = [n for n, c in CONTENDERS.items() if n in result["contenders"] and c.family in FAMILIES]
    names = [n for n in names if not CONTENDERS[n].for_overhead and (bf16 or n != "lrt_bf16")]
    columns = min(4, len(cases))
    lines = -(-len(cases) // columns)
    figure = Figure(figsize=(4.2 * columns + 1.5, 4.6 * lines), layout="constrained")
    panels = dict(zip(cases, figure.subplots(lines, columns, squeeze=False).flat, strict=False))
    height = 0.8 / len(runs)
    for k, run in enumerate(runs):
        for table in run["layers"]:
            panel = panels[table["case"]]
            for i, name in enumerate(names):
                over = table["contenders"].get(name, {}).get("over_base")
                if over is None:
                    continue
                y = i + (k - (len(runs) - 1) / 2) * height
                spread = [[max(0, over["ratio"] - over["low"])], [max(0, over["high"] - over["ratio"])]]
                panel.barh(
                    y, over["ratio"], height, color=FAMILIES[CONTENDERS[name].family],
                    alpha=1.0 if k == 0 else 0.55, xerr=spread, error_kw={"linewidth": 0.8},
                )  # fmt: skip
                panel.text(over["high"], y, f" {over['ratio']:.2f}", va="center", fontsize=7)
    for case, panel in panels.items():
        panel.axvline(1, color=BLACK, linewidth=0.8)
        panel.set_title(case, fontsize=10)
        panel.set_yticks(range(len(names)), [label(name) for name in names], fontsize=8)
        panel.invert_yaxis()
        panel.margins(x=0.12)
        panel.set_xlabel("step time / torch.nn's (1 = free)", fontsize=8)
    for panel in figure.axes[len(cases) :]:
        panel.set_axis_off()
    counts = " (dark), ".join(plural(run["threads"]) for run in runs) + (" (light)" if len(runs) > 1 else "")
    figure.suptitle(f"Training step of one layer: {result['provenance']['machine']}; {counts}", fontsize=11)
    return png(figure, 130)


def scaling(result: Mapping[str, Any]) -> bytes:
    """Time against batch, width and draws, a line style for each number of threads."""
    from matplotlib.figure import Figure

    axes = {
        "batch": ("batch size", "training step, ms"),
        "width": ("width (inputs = outputs)", "training step, ms"),
        "draws": ("draws of the weights", "all outputs, ms"),
    }
    figure = Figure(figsize=(15, 5), layout="constrained")
    for panel, (sweep, (across, up)) in zip(figure.subplots(1, 3), axes.items(), strict=True):
        for run, style in zip(result["runs"], ("-", "--", ":", "-."), strict=False):
            for name, (colour, marker) in LINES.items():
                rows = [t for t in run[sweep] if "step" in t["contenders"].get(name, {})]
                ms = [t["contenders"][name]["step"]["median_us"] / 1e3 for t in rows]
                panel.plot(
                    [t[sweep] for t in rows], ms, style, color=colour, marker=marker, markersize=4,
                    label=f"{label(name)}, {plural(run['threads'])}",
                )  # fmt: skip
        first = result["runs"][0][sweep]
        ticks = [table[sweep] for table in first]
        panel.set(xscale="log", yscale="log", xlabel=across, ylabel=up)
        panel.set_xticks(ticks, [str(n) for n in ticks])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.set_title(", ".join(f"{w} {first[0][w]}" for w in ("width", "batch") if w != sweep))
    figure.axes[0].legend(fontsize=7, ncols=len(result["runs"]))
    figure.suptitle(f"A linear layer: {result['provenance']['machine']}", fontsize=12)
    return png(figure, 130)
