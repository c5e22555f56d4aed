"""benchmarks/uci.py: the runs go on where they were interrupted, and what stands beside published numbers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from helpers import repository_root
from test_tabular import make_set

sys.path.insert(0, str(repository_root() / "benchmarks"))

import uci

pytestmark = pytest.mark.cpu_only("the command runs on the CPU")


def test_runs_are_gathered_and_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in uci.SETS:
        make_set(tmp_path / "sets" / name)
    monkeypatch.setattr(uci, "OPTIONS", ("--steps", "2", "--samples", "4", "--quiet"))
    out = tmp_path / "uci.json"
    args = ["--data-dir", tmp_path / "sets", "--runs", tmp_path / "runs", "--out", out, "--methods", "lrt"]
    monkeypatch.setattr(sys, "argv", ["uci.py", *map(str, args)])
    assert uci.main() == 0
    first = json.loads(out.read_text())
    # Interrupted: one split is to do.
    (tmp_path / "runs" / "lrt" / "tasks" / "energy-lrt-1" / "result.json").unlink()
    capsys.readouterr()
    assert uci.main() == 0
    found = json.loads(out.read_text())["methods"]["lrt"]
    assert found["compared"] == first["methods"]["lrt"]["compared"]
    assert list(found["splits"]) == list(uci.SETS)
    (rmse,) = [row for row in found["compared"] if row["set"] == "concrete" and row["score"] == "rmse"]
    values = [split["rmse"] for split in found["splits"]["concrete"]]
    assert rmse["mean"] == pytest.approx(sum(values) / 2)
    assert rmse["published"] == 5.67
    assert str(tmp_path) not in out.read_text()
    (table,) = json.loads(out.read_text())["tables"]
    cell = f"{rmse['mean']:.2f} ± {rmse['error']:.2f}"
    (row,) = [row for row in table["rows"] if row[0] == "concrete"]
    assert row[1:3] == [cell, "5.67"]
    assert cell in capsys.readouterr().out


def test_worse_is_counted_in_standard_errors() -> None:
    low = uci.judged("yacht", "rmse", "low", [1.0, 1.2, 1.4], 1.0)
    error = 0.2 / 3**0.5
    assert low["mean"] == pytest.approx(1.2)
    assert low["error"] == pytest.approx(error)
    assert low["worse_by_errors"] == pytest.approx(0.2 / error)
    high = uci.judged("yacht", "log_likelihood", "high", [1.0, 1.2, 1.4], 1.0)
    assert high["worse_by_errors"] == pytest.approx(-0.2 / error)
