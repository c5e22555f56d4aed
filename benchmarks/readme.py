"""Fills README.md's numbers from the files in benchmarks/results.

    python benchmarks/readme.py [MACHINE] [--check]

Everything between the two markers is replaced by what the files of MACHINE (default: the one that README.md
names) say. With --check, changes nothing and exits with 1 if README.md says anything else.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness import RESULTS
from report import markdown_table, plural
from rivals import CONTENDERS

README = Path(__file__).parent.parent / "README.md"
BEGIN = "<!-- numbers of {machine}, by benchmarks/readme.py -->"
END = "<!-- end of the numbers -->"
MARKED = re.compile(
    re.escape(BEGIN).replace(r"\{machine\}", "(?P<machine>.+?)") + r"\n(?P<text>.*?)" + re.escape(END),
    re.DOTALL,
)
COLUMNS = {
    "bbb": "BBB",
    "lrt": "LRT",
    "eager_bbb": "eager BBB",
    "eager_lrt": "eager LRT",
    "compiled_bbb": "compiled BBB",
    "compiled_lrt": "compiled LRT",
}
LIBRARIES = ("bayesian_torch", "blitz", "torchbnn")
SAMPLERS = ("ours_avx512", "ours_avx2", "eager", "compiled")


def load(name: str, machine: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}-{machine}.json").read_text())


def _ratio(row: Mapping[str, Any] | None) -> float | None:
    return row["over_base"]["ratio"] if row and "over_base" in row else None


def _step_us(row: Mapping[str, Any]) -> float:
    return row["step"]["median_us"]


def _layers(run: Mapping[str, Any]) -> str:
    rows = []
    for table in run["layers"]:
        if "bbb_output" in table["contenders"]:  # the small layer, told apart below
            continue
        measured = [_ratio(table["contenders"].get(name)) for name in COLUMNS]
        libraries = [r for name in LIBRARIES if (r := _ratio(table["contenders"].get(name))) is not None]
        measured.append(min(libraries, default=None))
        rows.append([table["case"], *("-" if r is None else f"{r:.2f}" for r in measured)])
    return markdown_table(["case", *COLUMNS.values(), "best library (BBB)"], rows)


def _sampling(runs: list[Mapping[str, Any]]) -> str:
    rows = []
    for run in runs:
        for table in run["sampling"]:
            ms = {name: _step_us(row) / 1e3 for name, row in table["contenders"].items() if "step" in row}
            cells = [f"{ms[name]:.3g} ms" if name in ms else "-" for name in SAMPLERS]
            rows.append([f"{table['count']:,} weights, {plural(run['threads'])}", *cells])
    return markdown_table(["", "ours, AVX-512", "ours, AVX2", "eager", "compiled"], rows)


def _small(runs: list[Mapping[str, Any]]) -> str:
    for table in runs[0]["layers"]:
        rows = table["contenders"]
        if "bbb_output" not in rows:
            continue
        plain = _step_us(rows["nn"])
        over = {
            CONTENDERS[name].label: _step_us(rows[name]) - plain
            for name in ("bbb_output", "lrt_output", *COLUMNS)
            if "step" in rows[name]
        }
        return (
            f"A small layer ({table['case']}), where starting the work is most of the time: microseconds "
            f"over torch.nn's {plain:.0f}. With the output alone, backward starts from one result, as "
            "torch.nn's does; with the KL, from two.\n\n"
            + markdown_table(["", "over torch.nn, us"], [[label, f"{us:.0f}"] for label, us in over.items()])
        )
    raise SystemExit("no small layer in the results")


def _models(result: Mapping[str, Any]) -> str:
    run = result["runs"][0]
    rows = []
    for table in run["models"]:
        c = table["contenders"]
        ms = {name: _step_us(row) / 1e3 for name, row in c.items()}
        gains = [f"{c[n]['eager_over_ours']['ratio']:.2f} times" for n in ("lrt", "bbb")]
        rows.append([table["model"], *(f"{ms[n]:.0f} ms" for n in ("nn", "bbb", "lrt")), *gains])
    head = ["model", "torch.nn", "BBB", "LRT", "LRT over eager LRT", "BBB over eager BBB"]
    return (
        f"A training step of a whole model (batch {run['models'][0]['batch']}, one channel, Adam), "
        f"{plural(run['threads'])}, and what it gains on the eager formulas:\n\n" + markdown_table(head, rows)
    )


def _predict(result: Mapping[str, Any]) -> str:
    run = result["runs"][0]
    table = run["models"][0]
    seconds = {name: row["total_s"] for name, row in table["contenders"].items()}
    return (
        f"`predict`, {table['samples']} draws for {table['images']:,} images with {table['model']}, "
        f"{plural(run['threads'])}: {seconds['ours']:.0f} s, against {seconds['eager_lrt']:.0f} s for the "
        f"usual loop of eager LRT forwards and {seconds['eager_bbb']:.0f} s for one of eager BBB forwards."
    )


def numbers(machine: str) -> str:
    """What stands between the markers."""
    layers = load("layers", machine)
    where = layers["provenance"]
    bf16 = "" if where["bf16_instructions"] else ", no bfloat16 instructions"
    parts = [
        f"{where['cpu']} ({where['cpu_features']}{bf16}), {where['instruction_set']} kernels, "
        f"torch {where['torch']}, float32, medians, all interleaved in one process on a shared machine."
    ]
    for run in layers["runs"]:
        parts += [f"**{plural(run['threads']).capitalize()}**:", _layers(run)]
    parts += [
        f"![Step over torch.nn](benchmarks/results/layers-{machine}.png)",
        "Sampling and KL in one pass, against the formulas in eager mode and under `torch.compile`:",
        _sampling(layers["runs"]),
        _small(layers["runs"]),
        _models(load("models", machine)),
        _predict(load("predict", machine)),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("machine", nargs="?", help="as in layers-MACHINE.json")
    parser.add_argument("--check", action="store_true", help="only say whether README.md is up to date")
    args = parser.parse_args()
    text = README.read_text()
    found = MARKED.search(text)
    if found is None:
        raise SystemExit(f"README.md lacks the markers {BEGIN} and {END}")
    machine = args.machine or found["machine"]
    new = f"{BEGIN.format(machine=machine)}\n{numbers(machine)}{END}"
    if args.check:
        print("README.md is up to date" if found[0] == new else "README.md differs from the results")
        return int(found[0] != new)
    README.write_text(text[: found.start()] + new + text[found.end() :])
    return 0


if __name__ == "__main__":
    sys.exit(main())
