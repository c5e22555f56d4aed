"""Runs a benchmark of the CPU.

    python benchmarks/cpu.py layers|models|predict|scaling|multi_sample
        [--threads 1 2] [--case TEXT] [--quick] [--out PATH]
    python benchmarks/cpu.py layers --compare OLD.json [NEW.json]

The module of that name (predict: models) says what is measured and how. Prints a table for each case and
writes PATH.json, PATH.md and, for layers and scaling, PATH.png. With --compare, measures what OLD.json holds
again (or reads NEW.json) and exits with 1 if anything became slower beyond noise, with 2 if the two cannot be
compared; writes files only where --out says. Exits with 1 if predictions differ by more than their noise.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import compare
import figures
import layers
import models
import multi_sample
import scaling
import torch
from cases import CASES
from harness import (
    Job,
    arguments,
    out_path,
    provenance,
    this_machine,
    threads,
    with_suffix,
    write_json,
    write_text,
)
from rivals import CONTENDERS, versions
from tables import Number, contenders, markdown, pivot, plural, provenance_line, verdict

from bbb_fast.experiments.document import Column, Table

QUICK = "**A quick run on tiny sizes: it shows that everything runs. Its numbers mean nothing.**"


@dataclass(frozen=True)
class Benchmark:
    """``about``: the module that says how it measures. ``jobs``: its rows, given whether the run is quick.

    ``facts``: what its file says of the run beside the rows. ``arrange``: gives the file another form.
    """

    title: str
    about: ModuleType
    jobs: Callable[[bool], list[Job]]
    numbers: Sequence[Number]
    facts: Mapping[str, Any] = field(default_factory=dict)
    figure: Callable[[Mapping[str, Any]], bytes] | None = None
    arrange: Callable[[dict[str, Any]], dict[str, Any]] = lambda result: result


def interval(name: str, path: str) -> list[Number]:
    """A ratio, and the middle 95 % of its resampled ones."""
    return [Number(name, f"{path}.ratio"), Number("from", f"{path}.low"), Number("to", f"{path}.high")]


STEP_MS = Number("step, ms", "step.median_us", 1e3, ".4g")
OVER_NN = Number("over torch.nn", "over_base.ratio")
KIB = 1024
BENCHMARKS = {
    "layers": Benchmark(
        "Layers",
        layers,
        layers.all_jobs,
        (
            Number("forward, ms", "forward.median_us", 1e3, ".4g"),
            Number("backward, ms", "backward.median_us", 1e3, ".4g"),
            STEP_MS,
            *interval("over base", "over_base"),
            Number("saved, KiB", "saved_bytes", KIB, ",.1f"),
            Number("peak, KiB", "peak_bytes", KIB, ",.1f"),
        ),
        {"method": layers.METHOD, "contenders": {name: c.note for name, c in CONTENDERS.items()}},
        figures.layers,
    ),
    "models": Benchmark(
        "Training the three models",
        models,
        models.training_jobs,
        (
            Number("minibatch, ms", "step.median_us", 1e3),
            Number("epoch, s", "epoch_s"),
            *interval("over its torch.nn twin", "over_nn"),
            *interval("times as fast as eager", "eager_over_ours"),
        ),
    ),
    "predict": Benchmark(
        "Prediction",
        models,
        models.prediction_jobs,
        (
            Number("s", "total_s"),
            *interval("ours is times as fast", "over_ours"),
            Number("mean difference", "against_ours.mean_abs_difference", form=".4f"),
            Number("largest", "against_ours.max_abs_difference", form=".4f"),
            Number("standard errors, rms", "against_ours.rms_standardised"),
        ),
        {"agreement_limit": models.AGREEMENT},
    ),
    "scaling": Benchmark(
        "How the cost of a linear layer grows",
        scaling,
        scaling.all_jobs,
        (
            STEP_MS,
            OVER_NN,
            Number("GFLOP/s", "gflops", form=".1f"),
            Number("of plain rate", "of_plain_rate"),
            Number("GB/s beside products", "gb_per_s_beside_products", form=".1f"),
        ),
        {"bytes_beside_products": scaling.BYTES},
        figures.scaling,
    ),
    "multi_sample": Benchmark(
        "Several draws in a training step",
        multi_sample,
        multi_sample.all_jobs,
        (
            Number("times as fast as the loop", "times_as_fast_as_loop"),
            Number("as forwards, then backward", "times_as_fast_as_kept"),
            Number("keeps, MB", "bytes_kept.multi_sample", 1e6, ".1f"),
            Number("forwards keep, MB", "bytes_kept.forwards", 1e6, ".1f"),
            Number("one draw, ns", "one"),
            Number("all draws, ns", "sum"),
        ),
        arrange=multi_sample.arrange,
    ),
}


def measure(name: str, counts: Sequence[int], jobs: Sequence[Job], quick: bool) -> dict[str, Any]:
    """The rows for each number of threads; prints each as it comes."""
    benchmark = BENCHMARKS[name]
    where = {**provenance(), "threads": list(counts)} | (
        {"libraries": versions()} if name == "layers" else {}
    )
    result: dict[str, Any] = {"provenance": where, "quick": quick, **benchmark.facts, "runs": []}
    for count in counts:
        run: dict[str, Any] = {"threads": count, **{job.section: [] for job in jobs}}
        result["runs"].append(run)
        with threads(count):
            for job in jobs:
                run[job.section].append(job.run())
                shown = [(job.case, run[job.section][-1])]
                print(f"\n{contenders(shown, benchmark.numbers, plural(count)).text()}", flush=True)
    return result


def page(name: str, result: Mapping[str, Any], jobs: Sequence[Job]) -> str:
    """The result as Markdown."""
    benchmark = BENCHMARKS[name]
    parts = [
        f"# {benchmark.title}",
        provenance_line(result["provenance"]),
        str(benchmark.about.__doc__).strip(),
    ]
    parts[1:1] = [QUICK] if result["quick"] else []
    parts += [f"- {name}: {text}." for name, text in result.get("method", {}).items()]
    for run in result["runs"]:
        parts.append(f"## {plural(run['threads']).capitalize()}")
        for section in dict.fromkeys(job.section for job in jobs):
            titles = (job.case for job in jobs if job.section == section)
            rows = list(zip(titles, run[section], strict=True))
            if section == "layers":
                parts += ["Step over torch.nn's, and the targets:", markdown(targets(rows))]
                parts += ["All contenders:", markdown(pivot(rows, OVER_NN))]
            parts += [f"### {section.capitalize()}", markdown(contenders(rows, benchmark.numbers, section))]
    return "\n\n".join(parts) + "\n"


def targets(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> Table:
    """Ours over torch.nn's step, beside what it may be at most."""
    wanted = {case.name: case.targets for case in CASES}
    names = ("bbb", "lrt", "lrt_bf16")
    cells = [
        [
            case,
            *(verdict(OVER_NN.of(row["contenders"].get(n)), wanted.get(case, {}).get(n)) for n in names),
        ]
        for case, row in rows
    ]
    return Table("targets", [Column("case"), *(Column(CONTENDERS[n].label, ".2f") for n in names)], cells)


def measure_again(
    old: Mapping[str, Any], effort: layers.Effort, select: Callable[[compare.Key], bool] = lambda key: True
) -> dict[str, Any]:
    """Those cases and contenders of a result of the layers that ``select`` takes (and their bases), now."""
    wanted = list(filter(select, compare.ratios(old)))
    names = {key.case for key in wanted}
    jobs = layers.jobs(
        effort,
        [case for case in (*CASES, *(case.smaller() for case in CASES)) if case.name in names],
        [n for n in layers.COUNTS if layers.sampling_name(n) in names],
        [name for name in CONTENDERS if any(key.contender == name for key in wanted)],
    )
    counts = list(dict.fromkeys(key.threads for key in wanted))
    return measure("layers", counts, jobs, effort is layers.QUICK)


def judge(old: Mapping[str, Any], new: Mapping[str, Any], effort: layers.Effort, again: bool) -> int:
    """Prints what became slower; with ``again``, only what is slower in a second measurement too."""
    if reasons := compare.incompatible(old, new):
        print("these results cannot be compared:", *reasons, sep="\n  ")
        return 2
    found = compare.changes(old, new)
    slower = compare.regressions(found)
    if slower and again:
        suspects = {change.key for change in slower}
        print(f"\n{len(suspects)} suspected, measuring them again")
        second = measure_again(old, effort, suspects.__contains__)
        slower = [c for c in compare.regressions(compare.changes(old, second)) if c.key in suspects]
    failed = compare.missing(old, new)
    print(f"\n{len(found)} ratios compared")
    for change in compare.blind(found):
        print(f"too noisy to see a slow-down by 20 %: {change}")
    for key in failed:
        print(f"failed now, ran before: {key}")
    for change in slower:
        print(f"slower: {change}")
    if not slower and not failed:
        print("nothing became slower beyond noise")
    return 1 if slower or failed else 0


def main() -> int:
    parser = arguments(__doc__, sorted({1, torch.get_num_threads()}))
    parser.add_argument("name", choices=BENCHMARKS)
    parser.add_argument("--case", default="", help="only the cases with this in their names")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, no more")
    parser.add_argument(
        "--compare", type=Path, nargs="+", metavar="JSON", help="of layers: OLD.json [NEW.json]"
    )
    args = parser.parse_args()
    if args.compare and (args.name != "layers" or len(args.compare) > 2):
        parser.error("--compare takes one or two files, of layers")
    # The formulas on many shapes: torch.compile has a lot to say that is no result.
    warnings.filterwarnings("ignore", module="torch")
    if args.compare:
        effort = layers.QUICK if args.quick else layers.Effort()
        old, *rest = (json.loads(path.read_text()) for path in args.compare)
        new = rest[0] if rest else measure_again(old, effort)
        if args.out:
            write_json(with_suffix(args.out, ".json"), new)
        return judge(old, new, effort, again=not rest)
    benchmark = BENCHMARKS[args.name]
    jobs = [job for job in benchmark.jobs(args.quick) if args.case in job.case]
    result = measure(args.name, args.threads, jobs, args.quick)
    machine = "quick" if args.quick else this_machine()
    out = out_path(args.out, f"{args.name}-{machine}", args.quick)
    write_text(with_suffix(out, ".md"), page(args.name, result, jobs))
    if benchmark.figure is not None and not args.case:
        with_suffix(out, ".png").write_bytes(benchmark.figure(result))
    agrees = all(row.get("agrees", True) for run in result["runs"] for row in run.get("models", []))
    write_json(with_suffix(out, ".json"), benchmark.arrange(result))
    print(f"\nwrote {out}.json and .md" + (" and .png" if benchmark.figure is not None else ""))
    return int(not agrees)


if __name__ == "__main__":
    sys.exit(main())
