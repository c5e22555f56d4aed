"""Fills the numbers of README.md and docs/ from the files in benchmarks/results.

    python benchmarks/readme.py [MACHINE ...]

Speeds: everything between the markers "numbers of" and "end of the numbers" is replaced by what the files of
the machines (default: those that a document names) say, the worse number where they differ: all of it in
docs/benchmarks.md, one table in README.md. Experiments: what is between "table 2 of FILE.json, columns 1 3 4"
and "end of the table" is replaced by that table of that file (all columns where none are named). A
test compares documents and results.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import RESULTS
from rivals import label
from tables import Number, markdown, plural, ratio_of

from bbb_fast.experiments.document import Cell, Column, Table

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
ESTIMATORS = ("bbb", "lrt", "eager_bbb", "eager_lrt", "compiled_bbb", "compiled_lrt")
LIBRARIES = ("bayesian_torch", "blitz", "torchbnn")

# The same result, or a part of it, of every machine.
Runs = Sequence[Mapping[str, Any]]


def load(name: str, machine: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}-{machine}.json").read_text())


def side_by_side(runs: Runs, section: str) -> Iterator[Runs]:
    """Each row of a section on all machines."""
    return zip(*(run[section] for run in runs), strict=True)


def worst(tables: Runs, *names: str, path: str = "over_base.ratio") -> float | None:
    """The worst that the machines have of these contenders' numbers: of our step over another the largest, of
    a rival's over ours or over torch.nn's the smallest."""
    numbers = (Number("", path).of(t["contenders"].get(name)) for t in tables for name in names)
    largest = names[0].startswith(("bbb", "lrt")) and not path.startswith("eager")
    return (max if largest else min)((n for n in numbers if n is not None), default=None)


def table(head: Sequence[str], rows: Iterable[Sequence[Cell]], form: str = ".2f") -> str:
    return markdown(Table("", [Column(name, form) for name in head], list(rows)))


def is_small(tables: Runs) -> bool:
    return "bbb_output" in tables[0]["contenders"]


def layers_table(runs: Runs) -> str:
    rows = [
        [tables[0]["case"], *(worst(tables, name) for name in ESTIMATORS), worst(tables, *LIBRARIES)]
        for tables in side_by_side(runs, "layers")
        if not is_small(tables)  # told apart below
    ]
    return table(["case", *map(label, ESTIMATORS), "best library (BBB)"], rows)


def sampling_table(results: Runs) -> str:
    """How many times as fast ours are, each machine's beside its own rivals."""
    pairs = [(rival, f"ours_{isa}") for isa in ("avx512", "avx2") for rival in ("eager", "compiled")]
    rows: list[list[Cell]] = []
    for runs in side_by_side(results, "runs"):
        for tables in side_by_side(runs, "sampling"):
            rows.append([f"{tables[0]['count']:,} weights, {plural(runs[0]['threads'])}"])
            for pair in pairs:
                gains = (ratio_of(t, *pair) for t in tables)
                rows[-1].append(min((gain for gain in gains if gain is not None), default=None))
    names = [f"{rival} over {isa}" for isa in ("AVX-512", "AVX2") for rival in ("eager", "compiled")]
    return table(["", *names], rows, ".1f")


def small_table(runs: Runs) -> str:
    (tables,) = filter(is_small, side_by_side(runs, "layers"))
    rows = [[label(name), worst(tables, name)] for name in ("bbb_output", "lrt_output", *ESTIMATORS)]
    return (
        f"A small layer ({tables[0]['case']}), where starting the work is most of the time. With the "
        "output alone, backward starts from one result, as torch.nn's does; with the KL, from two.\n\n"
        + table(["", "over torch.nn"], rows)
    )


def models_table(results: Runs) -> str:
    runs = [result["runs"][0] for result in results]
    columns = {
        "BBB over torch.nn": ("bbb", "over_nn.ratio"),
        "LRT over torch.nn": ("lrt", "over_nn.ratio"),
        "eager BBB over BBB": ("bbb", "eager_over_ours.ratio"),
        "eager LRT over LRT": ("lrt", "eager_over_ours.ratio"),
        'eager LRT over LRT with variance_dtype="auto"': ("lrt_auto", "eager_over_ours.ratio"),
    }
    rows = [
        [tables[0]["model"], *(worst(tables, name, path=path) for name, path in columns.values())]
        for tables in side_by_side(runs, "models")
    ]
    return (
        f"A training step of a whole model (batch {runs[0]['models'][0]['batch']}, one channel, Adam), "
        f"{plural(runs[0]['threads'])}:\n\n" + table(["model", *columns], rows)
    )


def prediction(results: Runs) -> str:
    runs = [result["runs"][-1] for result in results]
    tables = [run["models"][0] for run in runs]
    seconds = [{name: row["total_s"] for name, row in t["contenders"].items()} for t in tables]
    gains = {rival: min(s[rival] / s["ours"] for s in seconds) for rival in ("eager_lrt", "eager_bbb")}
    first, count = tables[0], plural(runs[0]["threads"])
    return (
        f"`predict`, {first['samples']} draws for {first['images']:,} images with {first['model']}, {count}: "
        f"{gains['eager_lrt']:.1f} times as fast as the usual loop of eager LRT forwards, "
        f"{gains['eager_bbb']:.1f} times as one of eager BBB forwards."
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
        parts += [f"**{plural(runs[0]['threads']).capitalize()}**:", layers_table(runs)]
    parts += [
        *(f"![Step over torch.nn](../benchmarks/results/layers-{machine}.png)" for machine in machines),
        "Sampling and KL in one pass: the time of the formulas in eager mode and under `torch.compile` over "
        "ours:",
        sampling_table(layers),
        small_table([result["runs"][0] for result in layers]),
        models_table([load("models", machine) for machine in machines]),
        prediction([load("predict", machine) for machine in machines]),
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
        f"{layers_table(runs)}\n"
    )


def experiment_table(marker: re.Match[str]) -> str:
    """What stands between the markers of an experiment's table."""
    found = json.loads((RESULTS / marker["file"]).read_text())["tables"][int(marker["number"]) - 1]
    columns = [Column(**column) for column in found["columns"]]
    chosen = [int(n) - 1 for n in marker["columns"].split()] if marker["columns"] else range(len(columns))
    rows = [[row[k] for k in chosen] for row in found["rows"]]
    return markdown(Table("", [columns[k] for k in chosen], rows)) + "\n"


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("machines", nargs="*", metavar="MACHINE", help="as in layers-MACHINE.json")
    args = parser.parse_args()
    for document in documents():
        document.write_text(filled(document, args.machines))


if __name__ == "__main__":
    main()
