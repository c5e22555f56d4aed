"""Fills the numbers of README.md and docs/ from the files in benchmarks/results.

    python benchmarks/readme.py [MACHINE ...] [--check]

Speeds: everything between the markers "numbers of" and "end of the numbers" is replaced by what the files of
the machines (default: those that a document names) say, the worse number where they differ: all of it in
docs/benchmarks.md, one table in README.md. Experiments: what is between "table 2 of FILE.json, columns 1 3 4"
and "end of the table" is replaced by that table of that file (all columns where none are named). With
--check, changes nothing and exits with 1 if a document says anything else.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import RESULTS
from report import markdown_table, plural
from rivals import CONTENDERS

from bbb_fast.experiments.document import Column

ROOT = Path(__file__).parent.parent
BEGIN = "<!-- numbers of {machines}, by benchmarks/readme.py -->"
END = "<!-- end of the numbers -->"
MARKED = re.compile(
    re.escape(BEGIN).replace(r"\{machines\}", "(?P<machines>.+?)") + r"\n(?P<text>.*?)" + re.escape(END),
    re.DOTALL,
)
# A table of an experiment; see experiments.py and uci.py.
TABLE = re.compile(
    r"(?P<begin><!-- table (?P<number>\d+) of (?P<file>[\w.-]+\.json)"
    r"(?:, columns (?P<columns>\d+(?: \d+)*))?, by benchmarks/readme\.py -->\n)"
    r"(?P<text>.*?)(?P<end><!-- end of the table -->)",
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


# A table's cells by machine, joined: ours the worse, a rival's the better.
Runs = Sequence[Mapping[str, Any]]


def _worst(values: Iterable[float | None], ours: bool, small_is_good: bool = True) -> float | None:
    known = [value for value in values if value is not None]
    return (max if ours == small_is_good else min)(known, default=None)


def _number(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else format(value, form)


def _ratio(row: Mapping[str, Any] | None) -> float | None:
    return row["over_base"]["ratio"] if row and "over_base" in row else None


def _step_us(row: Mapping[str, Any] | None) -> float | None:
    return row["step"]["median_us"] if row and "step" in row else None


def _is_ours(name: str) -> bool:
    return name.startswith(("bbb", "lrt", "ours"))


def _layers(runs: Runs) -> str:
    rows = []
    for tables in zip(*(run["layers"] for run in runs), strict=True):
        contenders = [table["contenders"] for table in tables]
        if "bbb_output" in contenders[0]:  # the small layer, told apart below
            continue
        cells = [_worst((_ratio(c.get(name)) for c in contenders), _is_ours(name)) for name in COLUMNS]
        cells.append(_worst((_ratio(c.get(name)) for c in contenders for name in LIBRARIES), False))
        rows.append([tables[0]["case"], *map(_number, cells)])
    return markdown_table(["case", *COLUMNS.values(), "best library (BBB)"], rows)


def _sampling(results: Runs) -> str:
    """How many times as fast ours are, each machine's beside its own rivals."""
    rows = []
    for runs in zip(*(result["runs"] for result in results), strict=True):
        for tables in zip(*(run["sampling"] for run in runs), strict=True):
            times = [{n: _step_us(table["contenders"].get(n)) for n in SAMPLERS} for table in tables]
            cells = [f"{tables[0]['count']:,} weights, {plural(runs[0]['threads'])}"]
            for ours in ("ours_avx512", "ours_avx2"):
                for rival in ("eager", "compiled"):
                    gains = (t[rival] / t[ours] for t in times if t[rival] and t[ours])
                    cells.append(_number(_worst(gains, True, small_is_good=False), ".1f"))
            rows.append(cells)
    names = [f"{rival} over {isa}" for isa in ("AVX-512", "AVX2") for rival in ("eager", "compiled")]
    return markdown_table(["", *names], rows)


def _small(runs: Runs) -> str:
    for tables in zip(*(run["layers"] for run in runs), strict=True):
        contenders = [table["contenders"] for table in tables]
        if "bbb_output" not in contenders[0]:
            continue
        rows = [
            [
                CONTENDERS[name].label,
                _number(_worst((_ratio(c.get(name)) for c in contenders), _is_ours(name))),
            ]
            for name in ("bbb_output", "lrt_output", *COLUMNS)
        ]
        return (
            f"A small layer ({tables[0]['case']}), where starting the work is most of the time. With the "
            "output alone, backward starts from one result, as torch.nn's does; with the KL, from two.\n\n"
            + markdown_table(["", "over torch.nn"], rows)
        )
    raise SystemExit("no small layer in the results")


def _models(results: Runs) -> str:
    runs = [result["runs"][0] for result in results]
    rows = []
    for tables in zip(*(run["models"] for run in runs), strict=True):
        contenders = [table["contenders"] for table in tables]
        over = [_worst((c[n]["over_nn"]["ratio"] for c in contenders), True) for n in ("bbb", "lrt")]
        gains = []
        for name in ("bbb", "lrt", "lrt_auto"):
            ratios = (c[name]["eager_over_ours"]["ratio"] for c in contenders if name in c)
            gains.append(_worst(ratios, True, small_is_good=False))
        rows.append([tables[0]["model"], *map(_number, (*over, *gains))])
    head = [
        "model", "BBB over torch.nn", "LRT over torch.nn", "eager BBB over BBB", "eager LRT over LRT",
        'eager LRT over LRT with variance_dtype="auto"',
    ]  # fmt: skip
    return (
        f"A training step of a whole model (batch {runs[0]['models'][0]['batch']}, one channel, Adam), "
        f"{plural(runs[0]['threads'])}:\n\n" + markdown_table(head, rows)
    )


def _predict(results: Runs) -> str:
    runs = [result["runs"][-1] for result in results]
    tables = [run["models"][0] for run in runs]

    def gain(rival: str) -> str:
        seconds = [{name: row["total_s"] for name, row in t["contenders"].items()} for t in tables]
        return _number(_worst((s[rival] / s["ours"] for s in seconds), True, small_is_good=False), ".1f")

    first, count = tables[0], plural(runs[0]["threads"])
    return (
        f"`predict`, {first['samples']} draws for {first['images']:,} images with {first['model']}, {count}: "
        f"{gain('eager_lrt')} times as fast as the usual loop of eager LRT forwards, {gain('eager_bbb')} "
        "times as one of eager BBB forwards."
    )


def _where(machine: str, result: Mapping[str, Any]) -> str:
    where = result["provenance"]
    bf16 = "with" if where["bf16_instructions"] else "without"
    return f"{machine} ({bf16} bfloat16 instructions; torch {where['torch']}, commit {where['commit']})"


def numbers(machines: Sequence[str]) -> str:
    """What stands between the markers."""
    layers = [load("layers", machine) for machine in machines]
    each = ", ".join(map(_where, machines, layers))
    parts = [
        f"Measured on {each}: AVX-512 kernels, float32, medians, all interleaved in one process on a shared "
        "machine. Where machines differ, the worse number stands here: the larger of ours, the smaller of a "
        "rival's."
    ]
    for runs in zip(*(result["runs"] for result in layers), strict=True):
        parts += [f"**{plural(runs[0]['threads']).capitalize()}**:", _layers(runs)]
    parts += [
        *(f"![Step over torch.nn](../benchmarks/results/layers-{machine}.png)" for machine in machines),
        "Sampling and KL in one pass: the time of the formulas in eager mode and under `torch.compile` over "
        "ours:",
        _sampling(layers),
        _small([result["runs"][0] for result in layers]),
        _models([load("models", machine) for machine in machines]),
        _predict([load("predict", machine) for machine in machines]),
    ]
    return "\n\n".join(parts) + "\n"


def headline(machines: Sequence[str]) -> str:
    """What stands between the markers of the README: the layers with all threads."""
    layers = [load("layers", machine) for machine in machines]
    runs = [result["runs"][-1] for result in layers]
    return (
        f"Float32, {plural(runs[0]['threads'])}, medians, all interleaved in one process, on {len(machines)} "
        "kinds of CPU with AVX-512; the worse number where they differ (the larger of ours, the smaller of a "
        "rival's):\n\n"
        f"{_layers(runs)}\n"
    )


def experiment_table(marker: re.Match[str]) -> str:
    """What stands between the markers of an experiment's table."""
    found = json.loads((RESULTS / marker["file"]).read_text())["tables"][int(marker["number"]) - 1]
    columns = [Column(**column) for column in found["columns"]]
    chosen = [int(n) - 1 for n in marker["columns"].split()] if marker["columns"] else range(len(columns))
    rows = [[columns[k].text(row[k]) for k in chosen] for row in found["rows"]]
    return markdown_table([columns[k].name for k in chosen], rows) + "\n"


def documents() -> list[Path]:
    """What may have numbers."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def filled(document: Path, machines: Sequence[str] = ()) -> str:
    """The text of a document with the numbers of the results. Raises SystemExit where it lacks markers."""
    text = document.read_text()
    if document in DOCUMENTS:
        found = MARKED.search(text)
        if found is None:
            raise SystemExit(f"{document.name} lacks the markers {BEGIN} and {END}")
        machines = machines or found["machines"].split(" and ")
        new = f"{BEGIN.format(machines=' and '.join(machines))}\n{DOCUMENTS[document](machines)}{END}"
        text = text[: found.start()] + new + text[found.end() :]
    return TABLE.sub(lambda marker: marker["begin"] + experiment_table(marker) + marker["end"], text)


# By document, what fills its speeds.
DOCUMENTS = {ROOT / "README.md": headline, ROOT / "docs" / "benchmarks.md": numbers}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("machines", nargs="*", metavar="MACHINE", help="as in layers-MACHINE.json")
    parser.add_argument("--check", action="store_true", help="only say whether the documents are up to date")
    args = parser.parse_args()
    status = 0
    for document in documents():
        new = filled(document, args.machines)
        if args.check:
            same = new == document.read_text()
            print(f"{document.name} {'is up to date' if same else 'differs from the results'}")
            status |= int(not same)
        else:
            document.write_text(new)
    return status


if __name__ == "__main__":
    sys.exit(main())
