"""What a result of gpu.py says, on one page: its numbers, what failed, and which targets are met."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cases import PRECISIONS
from tables import Number, pivot, ratio_of

SECTIONS = {
    "kernels": (
        Number("parameter kernels, us", "median_us", 1, ".1f"),
        Number("parameter kernels, % of copy bandwidth", "of_copy_bandwidth", 0.01, ".0f"),
    ),
    "layers": (
        Number("layers, forward, us", "forward.median_us", 1, ".1f"),
        Number("layers, step, us", "step.median_us", 1, ".1f"),
        Number("layers, peak of a step, MiB", "peak_bytes", 2**20, ".1f"),
    ),
    "models": (
        Number("models, training step, wall clock, us", "median_us", 1, ".1f"),
        Number("models, peak of a step, MiB", "peak_bytes", 2**20, ".1f"),
    ),
    "predict": (Number("predict, us", "median_us", 1, ".0f"),),
}
PARTS = {"forward": "forward.median_us", "step": "step.median_us"}
# (By how much, what): the cases that a target is about.
Judged = list[tuple[float, str]]


def _against_compiled(result: Mapping[str, Any]) -> Iterator[tuple[float | None, str]]:
    """Ours over torch.compile's, for everything."""
    for row in result["kernels"]:
        yield ratio_of(row, "ours", "compiled", "median_us"), row["case"]
    for row in result["models"]:
        yield ratio_of(row, "lrt", "compiled_lrt", "median_us"), row["case"]
    for row in result["layers"]:
        for estimator in ("lrt", "bbb"):
            for part, path in PARTS.items():
                for rival in ("compiled", "autotuned"):
                    over = ratio_of(row, estimator, f"{rival}_{estimator}", path)
                    yield over, f"{row['case']}: {estimator} {part}"


def _memory_excess(row: Mapping[str, Any]) -> float | None:
    """MiB of an LRT step's peak above what it may take; both peaks are above the resident tensors.

    The target, with the resident parameters counted: torch.nn's peak + the Bayesian parameters (mu and rho) +
    an output for each LRT layer. The Bayesian model holds one set of parameters more to begin with, which
    leaves one set for the step.
    """
    mine, plain = (row.get("contenders", {}).get(name, {}).get("peak_bytes") for name in ("lrt", "nn"))
    if mine is None or plain is None:
        return None
    return (mine - (plain + row["parameter_bytes"] + row["output_bytes"])) / 2**20


def targets(result: Mapping[str, Any], smoke: bool) -> list[dict[str, Any]]:
    """Each numeric target: what was wanted, what was measured, and whether it is met."""
    found: list[dict[str, Any]] = []

    def add(target: str, judged: Judged, missed: Judged, shown: str, measured: str) -> None:
        verdict = ("missed" if missed else "met") if judged else "not measured"
        if missed:
            texts = [shown.format(number, case) for number, case in missed[:4]]
            measured += f", missed in {len(missed)}: {'; '.join(texts)}"
        found.append({"target": target, "verdict": verdict, "measured": measured})

    def known(pairs: Iterator[tuple[float | None, str]]) -> Judged:
        return [(number, case) for number, case in pairs if number is not None]

    count = max((row["elements"] for row in result["kernels"] if "elements" in row), default=0)
    largest = [row for row in result["kernels"] if row.get("elements") == count]
    share = Number("", "of_copy_bandwidth", 0.01)
    shares = sorted(known((share.of(row["contenders"]["ours"]), row["kernel"]) for row in largest))
    target = "every parameter kernel >= 80 % of copy bandwidth" + (f", {count:,} elements" if count else "")
    add(target, shares, [s for s in shares if s[0] < 80], "{1} {0:.0f} %", f"{len(shares)} kernels")

    name = "linear 32x32" if smoke else "linear 4096x4096, batch 4096"
    square = [
        row
        for row in result["layers"]
        if row["case"].startswith(name)
        and "autotune" not in row["case"]
        and row.get("precision", "float32") != "float32"
    ]
    for part, limit, products in (("forward", 1.15, "two"), ("step", 1.25, "six")):
        over = known(
            (ratio_of(r, "lrt", "bare_lrt", PARTS[part]), PRECISIONS[r["precision"]]) for r in square
        )
        target = f"LRT linear 4096^3 bf16, {part} <= {limit} x its {products} bare products"
        measured = ", ".join(f"{number:.2f} ({case})" for number, case in over)
        add(target, over, [o for o in over if o[0] > limit], "{:.2f} ({})", measured)

    rivals = sorted(known(_against_compiled(result)), reverse=True)
    target = "faster than torch.compile of the formulas in every case"
    add(target, rivals, [r for r in rivals if r[0] >= 1], "{1} {0:.2f}", f"{len(rivals)} comparisons")

    rows = (*result["layers"], *result["models"])
    excess = sorted(known((_memory_excess(row), row["case"]) for row in rows), reverse=True)
    target = "LRT step's peak memory <= torch.nn's + parameters + one output a layer"
    add(target, excess, [e for e in excess if e[0] > 0], "{1} by {0:.1f} MiB", f"{len(excess)} cases")
    return found


def _failures(result: Mapping[str, Any]) -> list[str]:
    rows = [row for section in SECTIONS for row in result[section]]
    errors = {row["case"]: row["error"] for row in rows if "error" in row}
    for row in rows:
        contenders = row.get("contenders", {}).items()
        errors |= {f"{row['case']}, {name}": c["error"] for name, c in contenders if "error" in c}
    failed = {what: error for what, error in errors.items() if not error.startswith("skipped")}
    skipped, left_out = sum("skipped" in row for row in rows), len(errors) - len(failed)
    counts = f"rows skipped: {skipped}; contenders left out: {left_out}; failures: {len(failed)}"
    return [counts, *(f"  {what}: {error[:90]}" for what, error in list(failed.items())[:10])]


def page(result: Mapping[str, Any]) -> str:
    """The result on one page."""
    where, copy, products = result["provenance"], result.get("copy", {}), result.get("products", {})
    rates = {name: products.get(f"{name}_flops", 0) / 1e12 for name in ("bfloat16", "float32")}
    name = where.get("gpu", {}).get("name", where["cpu"])
    parts = [
        f"{name}, torch {where['torch']}, commit {where['commit']}\n"
        f"copy {copy.get('bytes_per_second', 0) / 1e12:.2f} TB/s; {products.get('size', 0)}^3 products: bf16 "
        f"{rates['bfloat16']:.0f} TFLOP/s, float32 ({result['float32_matmul_precision']}) "
        f"{rates['float32']:.0f} TFLOP/s"
    ]
    if result["smoke"]:
        parts.append("smoke run: the numbers mean nothing")
    if not result["native"]:
        parts.append("no native kernels for this device: the ops run on the reference path")
    for section, numbers in SECTIONS.items():
        rows = [(row["case"], row) for row in result[section] if "contenders" in row]
        tables = [pivot(rows, number) for number in numbers]
        parts += [table.text() for table in tables if len(table.columns) > 1]
    parts.append("\n".join(_failures(result)))
    lines = (f"  {t['verdict']:12} {t['target']}\n{'':17}{t['measured']}" for t in result["targets"])
    return "\n\n".join([*parts, "\n".join(["targets", *lines])]) + "\n"
