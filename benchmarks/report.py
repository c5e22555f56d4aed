"""Tables and figures of the CPU benchmarks: what is printed, the Markdown files and the PNGs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cases import CASES, MODEL_BBB_TARGET, MODEL_TARGETS, PREDICT_TARGET, SAMPLING_TARGETS_MS
from rivals import CONTENDERS, RIVALS

# Okabe and Ito's colours, told apart by colour-blind readers too.
COLOURS = {
    "ours": "#0072B2",
    "formulas": "#E69F00",
    "torch.compile": "#D55E00",
    "libraries": "#CC79A7",
    "torch.nn": "#000000",
}
NO_BF16 = (
    "This CPU has no bfloat16 instructions, so a variance in bfloat16 is converted back and forth and gains "
    "nothing: that column is not meaningful here and its target is not judged."
)
QUICK = "**A quick run on tiny sizes: it shows that everything runs. Its numbers mean nothing.**"
# One output's rng tensor: two 64-bit numbers.
RNG_BYTES = 16


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [" | ".join(head), "|".join(["---"] * len(head)), *(" | ".join(row) for row in rows)]
    return "\n".join(f"| {line} |" if i != 1 else f"|{line}|" for i, line in enumerate(lines))


def verdict(value: float | None, target: float | None, at_most: bool = True, form: str = ".2f") -> str:
    """A number beside its target, and whether it meets it."""
    if value is None:
        return "-"
    if target is None:
        return format(value, form)
    met = value <= target if at_most else value >= target
    return f"{value:{form}} ({'≤' if at_most else '≥'} {target:g}: {'met' if met else '**missed**'})"


def provenance_line(where: Mapping[str, Any]) -> str:
    """One sentence on where numbers come from."""
    kernels = f"{where['instruction_set']} kernels" if where["instruction_set"] else "reference path"
    changes = " with uncommitted changes" if where["uncommitted_changes"] else ""
    return (
        f"{where['cpu']} ({where['machine']}), {kernels}, torch {where['torch']}, Python {where['python']}, "
        f"bbb_fast {where['bbb_fast']} at commit {where['commit']}{changes}, {where['date']}."
    )


def plural(count: int) -> str:
    return f"{count} thread" + ("" if count == 1 else "s")


# ---------------------------------------------------------------- layers


def _label(name: str) -> str:
    if name.startswith("ours_"):
        return f"ours, {name.removeprefix('ours_')}"
    return CONTENDERS[name].label if name in CONTENDERS else name


def _median(row: Mapping[str, Any] | None, part: str = "step") -> float | None:
    return row[part]["median_us"] if row and part in row else None


def _ratio(row: Mapping[str, Any] | None) -> float | None:
    return row["over_base"]["ratio"] if row and "over_base" in row else None


def _cell(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else format(value, form)


def layers_console(table: Mapping[str, Any], count: int) -> str:
    """One case as it is printed during a run."""
    lines = [
        f"\n{table['case']}, {plural(count)}",
        f"  {'':36}{'forward':>12}{'backward':>12}{'step':>12}{'/ ' + table['base']:>9}{'95 %':>14}"
        f"{'saved KiB':>11}{'peak KiB':>11}",
    ]
    for name, row in table["contenders"].items():
        if "error" in row:
            lines.append(f"  {_label(name):36}{row['error'][:90]}")
            continue
        times = [_median(row, part) for part in ("forward", "backward", "step")]
        cells = ["-" if t is None else f"{t:,.1f} us" if t < 1000 else f"{t / 1e3:,.2f} ms" for t in times]
        over = row["over_base"]
        memory = [row.get(k) for k in ("saved_bytes", "peak_bytes")]
        lines.append(
            f"  {_label(name):36}"
            + "".join(f"{cell:>12}" for cell in cells)
            + f"{over['ratio']:9.3f}{over['low']:8.3f}-{over['high']:.3f}"
            + "".join(f"{'' if m is None else format(m / 1024, ',.1f'):>11}" for m in memory)
        )
    return "\n".join(lines)


def _best_rival(rows: Mapping[str, Any], estimator: str) -> str:
    measured = {name: _ratio(rows.get(name)) for name in RIVALS[estimator]}
    known = {name: value for name, value in measured.items() if value is not None}
    if not known:
        return "-"
    name = min(known, key=lambda n: known[n])
    return f"{known[name]:.2f} ({_label(name)})"


def _targets_table(run: Mapping[str, Any], bf16: bool) -> str:
    targets = {case.name: case.targets for case in CASES}
    rows = []
    for table in run["layers"]:
        contenders, want = table["contenders"], targets.get(table["case"]) or {}
        cells = [table["case"]]
        for name in ("bbb", "lrt", "lrt_bf16"):
            judged = want.get(name) if bf16 or name != "lrt_bf16" else None
            text = verdict(_ratio(contenders.get(name)), judged)
            cells.append(f"{text} (not meaningful)" if name == "lrt_bf16" and not bf16 else text)
        rows.append([*cells, *(_best_rival(contenders, estimator) for estimator in RIVALS)])
    return markdown_table(
        ["case", "BBB", "LRT", "LRT, bf16 variance", "best rival of BBB", "best rival of LRT"], rows
    )


def _ratios_table(run: Mapping[str, Any]) -> str:
    tables = run["layers"]
    names = dict.fromkeys(name for table in tables for name in table["contenders"])
    names = [name for name in names if not CONTENDERS[name].for_overhead]
    rows = [
        [_label(name), *(_cell(_ratio(table["contenders"].get(name))) for table in tables)] for name in names
    ]
    rows.append(
        ["torch.nn, ms"]
        + [_cell(None if (m := _median(t["contenders"]["nn"])) is None else m / 1e3, ".3g") for t in tables]
    )
    return markdown_table(["", *(table["case"] for table in tables)], rows)


def memory_limit(table: Mapping[str, Any], name: str) -> int | None:
    """Bytes that one of ours may keep for backward, by the rule of the design."""
    plain = table["contenders"]["nn"].get("saved_bytes")
    more = {
        "bbb": table["weight_bytes"],
        "bbb_recompute": 0,
        "lrt": table["output_bytes"],
        "lrt_bf16": table["output_bytes"],
    }
    return None if plain is None or name not in more else plain + more[name] + RNG_BYTES


def _memory_table(run: Mapping[str, Any]) -> str:
    rows = []
    for table in run["layers"]:
        for name, row in table["contenders"].items():
            if "saved_bytes" not in row:
                continue
            limit = memory_limit(table, name)
            kept = "" if limit is None else "met" if row["saved_bytes"] <= limit else "**missed**"
            rows.append(
                [
                    table["case"],
                    _label(name),
                    f"{row['saved_bytes']:,}",
                    "" if limit is None else f"{limit:,}",
                    kept,
                    f"{row['peak_bytes'] / 2**20:,.2f}",
                ]
            )
    return markdown_table(["case", "", "saved, bytes", "at most", "", "peak of a step, MiB"], rows)


def _sampling_table(run: Mapping[str, Any], quick: bool) -> str:
    rows = []
    for table in run["sampling"]:
        base = _median(table["contenders"]["eager"])
        for name, row in table["contenders"].items():
            mine = _median(row)
            if mine is None or base is None:
                rows.append([table["case"], _label(name), row.get("error", "-"), ""])
                continue
            judged = not quick and run["threads"] == 1 and table["count"] == 1_000_000
            target = SAMPLING_TARGETS_MS.get(name.removeprefix("ours_")) if judged else None
            rows.append(
                [table["case"], _label(name), verdict(mine / 1e3, target, form=".3f"), f"{base / mine:.1f}"]
            )
    return markdown_table(["", "", "ms", "times as fast as eager"], rows)


def _overhead_table(run: Mapping[str, Any]) -> str:
    """Microseconds over torch.nn's step, of the cases where that is what counts."""
    limits = {case.name: case.overhead_us for case in CASES if case.overhead_us is not None}
    rows = []
    for table in run["layers"]:
        if table["case"] not in limits or (base := _median(table["contenders"]["nn"])) is None:
            continue
        for name, row in table["contenders"].items():
            step = _median(row)
            if step is None or name == "nn":
                continue
            limit = limits[table["case"]] if CONTENDERS[name].for_overhead else None
            rows.append([_label(name), f"{step:.1f}", verdict(step - base, limit, form=".1f")])
        rows.insert(0, ["torch.nn", f"{base:.1f}", ""])
    return markdown_table(["", "step, us", "over torch.nn, us"], rows) if rows else ""


def _failures(result: Mapping[str, Any]) -> list[str]:
    found: dict[tuple[str, str], list[str]] = {}
    for run in result["runs"]:
        for table in (*run["sampling"], *run["layers"]):
            for name, row in table["contenders"].items():
                if "error" in row:
                    found.setdefault((name, row["error"]), []).append(table["case"])
    return [
        f"- {_label(name)} did not run ({', '.join(dict.fromkeys(cases))}): {error}"
        for (name, error), cases in found.items()
    ]


def layers_markdown(result: Mapping[str, Any]) -> str:
    """The whole result of benchmarks/layers.py, with its targets."""
    where = result["provenance"]
    bf16 = where["bf16_instructions"]
    libraries = ", ".join(f"{name} {version}" for name, version in where["libraries"].items())
    parts = [
        "# Layers",
        *([QUICK] if result["quick"] else []),
        f"{provenance_line(where)} {libraries}.",
        "Ratios of medians to the torch.nn layer's whole step (forward, backward, KL), all contenders run in "
        "turn in one process, float32.",
        "\n".join(f"- {name}: {text}." for name, text in result["method"].items()),
        "\n".join(f"- {_label(name)}: {note}." for name, note in result["contenders"].items() if note),
    ]
    if not bf16:
        parts.append(NO_BF16)
    for run in result["runs"]:
        parts.append(f"## {plural(run['threads']).capitalize()}")
        if run["layers"]:
            parts += ["Step over torch.nn's, and the targets:", _targets_table(run, bf16)]
            parts += ["All contenders, step over torch.nn's:", _ratios_table(run)]
        if overhead := _overhead_table(run):
            parts += ["The small layer, where overhead is all there is:", overhead]
        if run["sampling"]:
            parts += ["Sampling and KL, forward:", _sampling_table(run, result["quick"])]
    if result["runs"] and result["runs"][0]["layers"]:
        parts += [
            "## Memory",
            f"With {plural(result['runs'][0]['threads'])}. What ours may keep: torch.nn's, plus the sampled "
            "weight (BBB) or one tensor of the output's size (LRT), plus 16 bytes.",
            _memory_table(result["runs"][0]),
        ]
    if failures := _failures(result):
        parts += ["## What did not run", "\n".join(failures)]
    return "\n\n".join(parts) + "\n"


def new_figure(width: float, height: float, rows: int, columns: int) -> tuple[Any, Any]:
    """A matplotlib figure and its axes [rows][columns], without a display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(rows, columns, figsize=(width, height), squeeze=False, layout="constrained")


def save_figure(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    figure.clear()


def layers_figure(result: Mapping[str, Any], path: Path) -> None:
    """One panel a case: every contender's step over torch.nn's, a bar for each number of threads."""
    cases = list(dict.fromkeys(t["case"] for run in result["runs"] for t in run["layers"]))
    if not cases:
        return
    columns = min(4, len(cases))
    lines = -(-len(cases) // columns)
    bf16 = result["provenance"]["bf16_instructions"]
    names = [
        name
        for name, contender in CONTENDERS.items()
        if name in result["contenders"]
        and name != "nn"
        and (bf16 or name != "lrt_bf16")
        and not contender.for_overhead
    ]
    picture, axes = new_figure(4.2 * columns + 1.5, 4.6 * lines, lines, columns)
    panels = [axes[i // columns][i % columns] for i in range(lines * columns)]
    runs = result["runs"]
    height = 0.8 / len(runs)
    for panel, case in zip(panels, cases, strict=False):
        for k, run in enumerate(runs):
            table = next((t for t in run["layers"] if t["case"] == case), None)
            for i, name in enumerate(names):
                row = table["contenders"].get(name) if table else None
                value = _ratio(row)
                if row is None or value is None:
                    continue
                over = row["over_base"]
                y = i + (k - (len(runs) - 1) / 2) * height
                panel.barh(
                    y, value, height,
                    color=COLOURS[CONTENDERS[name].family], alpha=1.0 if k == 0 else 0.55,
                    xerr=[[max(0, value - over["low"])], [max(0, over["high"] - value)]],
                    error_kw={"linewidth": 0.8},
                )  # fmt: skip
                panel.text(over["high"], y, f" {value:.2f}", va="center", fontsize=7)
        panel.axvline(1, color="black", linewidth=0.8)
        panel.set_title(case, fontsize=10)
        panel.set_yticks(range(len(names)), [_label(n) for n in names], fontsize=8)
        panel.invert_yaxis()
        panel.margins(x=0.12)
        if panel is not panels[0] and panels.index(panel) % columns:
            panel.set_yticklabels([])
        panel.set_xlabel("step time / torch.nn's (1 = free)", fontsize=8)
    for panel in panels[len(cases) :]:
        panel.set_axis_off()
    counts = " (dark), ".join(plural(run["threads"]) for run in runs) + (" (light)" if len(runs) > 1 else "")
    picture.suptitle(f"Training step of one layer: {result['provenance']['machine']}; {counts}", fontsize=11)
    save_figure(picture, path)


# ---------------------------------------------------------------- models


def models_console(table: Mapping[str, Any], count: int) -> str:
    """One model as it is printed during a run."""
    lines = [
        f"\n{table['model']}, {table['images']:,} images in minibatches of {table['batch']}, {plural(count)}",
        f"  {'':24}{'minibatch':>12}{'epoch':>10}{'/ torch.nn':>12}{'eager / ours':>14}",
    ]
    for name, row in table["contenders"].items():
        faster = row.get("eager_over_ours")
        lines.append(
            f"  {_label(name):24}{row['step']['median_us'] / 1e3:9.2f} ms{row['epoch_s']:8.2f} s"
            f"{row['over_nn']['ratio']:12.2f}{'' if faster is None else format(faster['ratio'], '.2f'):>14}"
        )
    return "\n".join(lines)


def models_markdown(result: Mapping[str, Any]) -> str:
    """The result of benchmarks/models.py, with its targets."""
    where = result["provenance"]
    bf16 = where["bf16_instructions"]
    parts = ["# Training the three models"]
    if result["quick"]:
        parts.append(QUICK)
    parts.append(provenance_line(where))
    first = result["runs"][0]["models"][0]
    parts.append(
        f"One epoch of {first['images']:,} random images of 1 x 32 x 32 in minibatches of {first['batch']}: "
        "forward, cross-entropy and KL, backward, Adam step. All contenders take each minibatch in turn in "
        "one process; speed-ups and ratios are those of the medians of a minibatch, with the middle 95 % of "
        "resampled ones."
    )
    if not bf16:
        parts.append(NO_BF16)
    for run in result["runs"]:
        rows = []
        for table in run["models"]:
            for name, row in table["contenders"].items():
                rows.append(
                    [
                        table["model"],
                        _label(name),
                        f"{row['step']['median_us'] / 1e3:.2f}",
                        f"{row['epoch_s']:.1f}",
                        _with_interval(row["over_nn"], MODEL_BBB_TARGET if name == "bbb" else None),
                        _model_speedup(where.get("rules", "intel-avx512"), table["model"], name, row, bf16),
                    ]
                )
        head = ["model", "", "minibatch, ms", "epoch, s", "over its torch.nn twin", "times as fast as eager"]
        parts += [f"## {plural(run['threads']).capitalize()}", markdown_table(head, rows)]
    return "\n\n".join(parts) + "\n"


def _with_interval(over: Mapping[str, float], target: float | None = None, at_most: bool = True) -> str:
    return f"{verdict(over['ratio'], target, at_most)} [{over['low']:.2f}, {over['high']:.2f}]"


def _model_speedup(rules: str, model: str, name: str, row: Mapping[str, Any], bf16: bool) -> str:
    if "eager_over_ours" not in row:
        return ""
    judged = bf16 or name not in ("lrt_bf16", "lrt_auto")
    of_this_cpu = MODEL_TARGETS.get(rules, MODEL_TARGETS["other"])
    target = of_this_cpu[model].get(name) if judged else None
    return _with_interval(row["eager_over_ours"], target, False) + ("" if judged else " (not meaningful)")


# ---------------------------------------------------------------- prediction


def predict_console(table: Mapping[str, Any], count: int) -> str:
    """One model as it is printed during a run."""
    lines = [
        f"\n{table['model']}, {table['samples']} draws for {table['images']:,} images, {plural(count)}",
    ]
    for name, row in table["contenders"].items():
        text = f"  {_label(name):12}{row['total_s']:9.2f} s"
        if "over_ours" in row:
            against = row["against_ours"]
            text += (
                f"{row['over_ours']['ratio']:8.2f} times ours; means differ by "
                f"{against['mean_abs_difference']:.4f} on average, "
                f"{against['rms_standardised']:.2f} standard errors (root mean square)"
            )
        lines.append(text)
    return "\n".join(lines)


def predict_markdown(result: Mapping[str, Any]) -> str:
    """The result of benchmarks/predict.py, with its target."""
    parts = ["# Prediction"]
    if result["quick"]:
        parts.append(QUICK)
    parts += [
        provenance_line(result["provenance"]),
        "`bbb_fast.predict` against a Python loop of forwards in eager mode, the same posterior, all "
        "contenders in turn on each minibatch. Speed-ups are ratios of the medians of a minibatch. "
        "Differences are between predictive means; against the loop over weight draws their root mean "
        f"square must be at most {result['agreement_limit']:g} standard errors. LRT forwards give every "
        "place of a feature map noise of its own, so their means may differ by more.",
    ]
    for run in result["runs"]:
        rows = []
        for table in run["models"]:
            what = f"{table['model']}, {table['samples']} draws, {table['images']:,} images"
            for name, row in table["contenders"].items():
                if name == "ours":
                    rows.append([what, "ours", f"{row['total_s']:.1f}", "", "", "", ""])
                    continue
                target = PREDICT_TARGET if name == "eager_lrt" else None
                against = row["against_ours"]
                judged = result["agreement_limit"] if name == "eager_bbb" else None
                rows.append(
                    [
                        what,
                        f"loop of {_label(name)}",
                        f"{row['total_s']:.1f}",
                        _with_interval(row["over_ours"], target, False),
                        f"{against['mean_abs_difference']:.4f}",
                        f"{against['max_abs_difference']:.4f}",
                        verdict(against["rms_standardised"], judged),
                    ]
                )
        head = ["", "", "s", "ours is times as fast", "mean difference", "largest", "standard errors, rms"]
        parts += [f"## {plural(run['threads']).capitalize()}", markdown_table(head, rows)]
    return "\n\n".join(parts) + "\n"


# ---------------------------------------------------------------- scaling


def scaling_console(table: Mapping[str, Any], count: int) -> str:
    """One size as it is printed during a run."""
    lines = [
        f"\n{table['case']}, {plural(count)}",
        f"  {'':12}{'ms':>11}{'/ torch.nn':>12}{'GFLOP/s':>10}{'of plain rate':>15}"
        f"{'GB/s beside products':>22}",
    ]
    for name, row in table["contenders"].items():
        if "error" in row:
            lines.append(f"  {_label(name):12}{row['error'][:90]}")
            continue
        lines.append(
            f"  {_label(name):12}{row['step']['median_us'] / 1e3:11.4f}{row['over_base']['ratio']:12.3f}"
            f"{row['gflops']:10.1f}{_cell(row.get('of_plain_rate')):>15}"
            f"{_cell(row.get('gb_per_s_beside_products'), '.1f'):>22}"
        )
    return "\n".join(lines)


def scaling_markdown(result: Mapping[str, Any]) -> str:
    """The result of benchmarks/scaling.py."""
    parts = ["# How the cost of a linear layer grows"]
    if result["quick"]:
        parts.append(QUICK)
    parts += [
        provenance_line(result["provenance"]),
        "Training steps as in the layer benchmark; draws: outputs of `predict`, against loops of eager "
        "forwards and against torch.nn's one function run as often. GFLOP/s: operations of the products "
        "(three in a step, six under LRT; one and two in a draw) over the whole time. Of plain rate: that "
        "over torch.nn's. GB/s beside the products: the bytes that the other passes have to move, over the "
        "time beyond torch.nn's (twice torch.nn's under LRT), where that is at least 5 % of the whole.",
    ]
    head = ["", "", "ms", "over torch.nn", "GFLOP/s", "of plain rate", "GB/s beside products"]
    for run in result["runs"]:
        parts.append(f"## {plural(run['threads']).capitalize()}")
        for sweep in ("batch", "width", "draws"):
            rows = [
                [
                    table["case"],
                    _label(name),
                    f"{row['step']['median_us'] / 1e3:.4g}",
                    _cell(_ratio(row)),
                    f"{row['gflops']:.1f}",
                    _cell(row.get("of_plain_rate")),
                    _cell(row.get("gb_per_s_beside_products"), ".1f"),
                ]
                for table in run[sweep]
                for name, row in table["contenders"].items()
                if "error" not in row
            ]
            parts += [f"### By {sweep}", markdown_table(head, rows)]
    return "\n\n".join(parts) + "\n"


# Ours and the formulas, told apart by colour and by marker.
_LINES = {
    "nn": ("#000000", "o"),
    "bbb": ("#0072B2", "s"),
    "lrt": ("#56B4E9", "^"),
    "eager_bbb": ("#D55E00", "D"),
    "eager_lrt": ("#E69F00", "v"),
}


def scaling_figure(result: Mapping[str, Any], path: Path) -> None:
    """Time against batch, width and draws, and what more threads bring."""
    picture, axes = new_figure(13, 9.5, 2, 2)
    panels = dict(zip(("batch", "width", "draws", "threads"), axes.flat, strict=True))
    labels = {
        "batch": ("batch size", "training step, ms"),
        "width": ("width (inputs = outputs)", "training step, ms"),
        "draws": ("draws of the weights", "all outputs, ms"),
    }
    runs = result["runs"]
    for sweep, (across, up) in labels.items():
        panel = panels[sweep]
        for run, style in zip(runs, ("-", "--", ":", "-."), strict=False):
            for name, (colour, marker) in _LINES.items():
                points = [
                    (table[sweep], _median(table["contenders"][name]))
                    for table in run[sweep]
                    if _median(table["contenders"].get(name)) is not None
                ]
                if not points:
                    continue
                at, us = zip(*points, strict=True)
                panel.plot(
                    at, [t / 1e3 for t in us], style, color=colour, marker=marker, markersize=4,
                    label=f"{_label(name)}, {plural(run['threads'])}",
                )  # fmt: skip
        panel.set(xscale="log", yscale="log", xlabel=across, ylabel=up)
        panel.set_xticks(at, [str(n) for n in at])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        first = runs[0][sweep][0]
        panel.set_title(", ".join(f"{what} {first[what]}" for what in ("width", "batch") if what != sweep))
    panels["batch"].legend(fontsize=7, ncols=max(1, len(runs)))
    _threads_panel(panels["threads"], runs)
    picture.suptitle(f"A linear layer: {result['provenance']['machine']}", fontsize=12)
    save_figure(picture, path)


def _threads_panel(panel: Any, runs: Sequence[Mapping[str, Any]]) -> None:
    """How many times faster the last number of threads is than the first, at the largest batch and width."""
    first, last = runs[0], runs[-1]
    groups = [("largest batch", "batch"), ("largest width", "width"), ("most draws", "draws")]
    width = 0.8 / len(_LINES)
    for g, (_, sweep) in enumerate(groups):
        for i, (name, (colour, _)) in enumerate(_LINES.items()):
            times = [_median(run[sweep][-1]["contenders"].get(name)) for run in (first, last)]
            if None in times:
                continue
            at = g + (i - (len(_LINES) - 1) / 2) * width
            panel.bar(at, times[0] / times[1], width, color=colour, label=_label(name) if g == 0 else None)
    panel.axhline(1, color="black", linewidth=0.8)
    panel.set_xticks(range(len(groups)), [title for title, _ in groups])
    panel.set_ylabel(f"times as fast on {plural(last['threads'])} as on {plural(first['threads'])}")
    panel.set_title("threads")
    panel.legend(fontsize=7)
