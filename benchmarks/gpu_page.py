"""What a result of gpu.py says, on one page: its numbers, what failed, and which targets are met."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cases import PRECISIONS
from tables import Number, pivot

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


def _over(row: Mapping[str, Any], mine: str, theirs: str, path: str = "median_us") -> float | None:
    """The time of one contender over that of another; None if either was not measured."""
    number = Number("", path)
    a, b = (number.of(row.get("contenders", {}).get(name)) for name in (mine, theirs))
    return a / b if a and b else None


def _against_compiled(result: Mapping[str, Any]) -> Iterator[tuple[float | None, str]]:
    """(ours over torch.compile's, what) for everything."""
    for row in result["kernels"]:
        yield _over(row, "ours", "compiled"), row["case"]
    for row in result["models"]:
        yield _over(row, "lrt", "compiled_lrt"), row["case"]
    for row in result["layers"]:
        for estimator in ("lrt", "bbb"):
            for part, path in PARTS.items():
                for rival in ("compiled", "autotuned"):
                    over = _over(row, estimator, f"{rival}_{estimator}", path)
                    yield over, f"{row['case']}: {estimator} {part}"


def _memory_excess(row: Mapping[str, Any]) -> float | None:
    """Bytes of an LRT step's peak above what it may take; both peaks are above the resident tensors.

    The target, with the resident parameters counted: torch.nn's peak + the Bayesian parameters (mu and rho) +
    an output for each LRT layer. The Bayesian model holds one set of parameters more to begin with, which
    leaves one set for the step.
    """
    mine, plain = (row.get("contenders", {}).get(name, {}).get("peak_bytes") for name in ("lrt", "nn"))
    if mine is None or plain is None:
        return None
    return mine - (plain + row["parameter_bytes"] + row["output_bytes"])


def targets(result: Mapping[str, Any], smoke: bool) -> list[dict[str, Any]]:
    """Each numeric target: what was wanted, what was measured, and whether it is met."""
    found: list[dict[str, Any]] = []

    def add(target: str, misses: list[str] | None, measured: str) -> None:
        """``misses``: those of the cases that miss it; None where there are no cases."""
        verdict = "not measured" if misses is None else "missed" if misses else "met"
        if misses:
            measured += f", missed in {len(misses)}: " + "; ".join(misses[:4])
        found.append({"target": target, "verdict": verdict, "measured": measured})

    count = max((row["elements"] for row in result["kernels"] if "elements" in row), default=0)
    shares = sorted(
        (share, row["kernel"])
        for row in result["kernels"]
        if row.get("elements") == count
        and (share := row["contenders"]["ours"].get("of_copy_bandwidth")) is not None
    )
    low = [f"{name} {100 * share:.0f} %" for share, name in shares if share < 0.8]
    size = f", {count:,} elements" if count else ""
    target = f"every parameter kernel >= 80 % of copy bandwidth{size}"
    add(target, low if shares else None, f"{len(shares)} kernels")

    name = "linear 32x32" if smoke else "linear 4096x4096, batch 4096"
    square = [
        row for row in result["layers"] if row["case"].startswith(name) and "autotune" not in row["case"]
    ]
    square = [row for row in square if row.get("precision", "float32") != "float32"]
    for part, limit, products in (("forward", 1.15, "two"), ("step", 1.25, "six")):
        overs = [(_over(row, "lrt", "bare_lrt", PARTS[part]), PRECISIONS[row["precision"]]) for row in square]
        known = {text: f"{over:.2f} ({text})" for over, text in overs if over is not None}
        missed = [known[text] for over, text in overs if over is not None and over > limit]
        target = f"LRT linear 4096^3 bf16, {part} <= {limit} x its {products} bare products"
        add(target, missed if known else None, ", ".join(known.values()))

    rivals = sorted(((r, case) for r, case in _against_compiled(result) if r is not None), reverse=True)
    slower = [f"{case} {r:.2f}" for r, case in rivals if r >= 1]
    target = "faster than torch.compile of the formulas in every case"
    add(target, slower if rivals else None, f"{len(rivals)} comparisons")

    rows = [(_memory_excess(row), row["case"]) for row in (*result["layers"], *result["models"])]
    excess = sorted(((over, case) for over, case in rows if over is not None), reverse=True)
    above = [f"{case} by {over / 2**20:.1f} MiB" for over, case in excess if over > 0]
    target = "LRT step's peak memory <= torch.nn's + parameters + one output a layer"
    add(target, above if excess else None, f"{len(excess)} cases")
    return found


def _failures(result: Mapping[str, Any]) -> list[str]:
    failed, skipped, left_out = [], 0, 0
    for row in (row for section in SECTIONS for row in result[section]):
        skipped += "skipped" in row
        if "error" in row:
            failed.append(f"{row['case']}: {row['error'][:90]}")
        for name, numbers in row.get("contenders", {}).items():
            parts = (numbers, *(numbers.get(part, {}) for part in PARTS))
            error = next((part["error"] for part in parts if "error" in part), "")
            left_out += error.startswith("skipped")
            if error and not error.startswith("skipped"):
                failed.append(f"{row['case']}, {name}: {error[:90]}")
    counts = f"rows skipped: {skipped}; contenders left out: {left_out}; failures: {len(failed)}"
    return [counts, *(f"  {line}" for line in failed[:10])]


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
    parts.append(
        "\n".join(
            [
                "targets",
                *(f"  {t['verdict']:12} {t['target']}\n{'':17}{t['measured']}" for t in result["targets"]),
            ]
        )
    )
    return "\n\n".join(parts) + "\n"
