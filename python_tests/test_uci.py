"""benchmarks/uci.py: the runs go on where they were interrupted, and what stands beside published numbers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from helpers import repository_root
from test_tabular import make_set

sys.path.insert(0, str(repository_root() / "benchmarks"))

import experiments
import uci

pytestmark = pytest.mark.cpu_only("the command runs on the CPU")


def test_runs_are_gathered_and_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in uci.SETS:
        make_set(tmp_path / "sets" / name)
    monkeypatch.setattr(experiments, "RESULTS", tmp_path)
    args = ["uci-regression", "--data-dir", tmp_path / "sets", "--runs", tmp_path / "runs"]
    args += [word for change in ("steps=2", "samples=4", "methods=lrt") for word in ("--set", change)]
    monkeypatch.setattr(sys, "argv", ["experiments.py", *map(str, args)])
    out = tmp_path / "uci-regression.json"
    assert experiments.main() == 0
    first = json.loads(out.read_text())
    # Interrupted: one split is to do.
    (tmp_path / "runs" / "uci-regression" / "tasks" / "energy-lrt-1" / "result.json").unlink()
    assert experiments.main() == 0
    found = json.loads(out.read_text())
    assert found["results"]["compared"] == first["results"]["compared"]
    assert list(found["results"]["splits"]) == list(uci.SETS)
    (rmse,) = [
        row
        for row in found["results"]["compared"]["lrt"]
        if row["set"] == "concrete" and row["score"] == "rmse"
    ]
    values = [split["rmse"] for split in found["results"]["splits"]["concrete"]["lrt"]]
    assert rmse["mean"] == pytest.approx(sum(values) / 2)
    assert rmse["published"] == 5.67
    assert str(tmp_path) not in out.read_text()
    (line,) = [row for row in found["tables"][0]["rows"] if row[0] == "concrete"]
    assert line[1:3] == [f"{rmse['mean']:.2f} ± {rmse['error']:.2f}", "5.67"]


def test_worse_is_counted_in_standard_errors() -> None:
    low = uci.judged("yacht", "rmse", [1.0, 1.2, 1.4], 1.0)
    error = 0.2 / 3**0.5
    assert low["mean"] == pytest.approx(1.2)
    assert low["error"] == pytest.approx(error)
    assert low["worse_by_errors"] == pytest.approx(0.2 / error)
    high = uci.judged("yacht", "log_likelihood", [1.0, 1.2, 1.4], 1.0)
    assert high["worse_by_errors"] == pytest.approx(-0.2 / error)
