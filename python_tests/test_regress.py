"""The command regress: what it writes, what it resumes, and what it says of wrong input."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_tabular import make_set, write

from bbb_fast.cli import main
from bbb_fast.experiments import regress
from bbb_fast.experiments.document import mean_and_error, read
from bbb_fast.experiments.options import OptionError
from bbb_fast.experiments.regression import Training

pytestmark = pytest.mark.cpu_only("the command runs on the CPU")

SMALL = ["--hidden", "4", "--steps", "20", "--members", "2", "--samples", "8", "--threads", "1", "--quiet"]


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 2, generator=generator)
    y = 3 * x[:, 0] + torch.randn(40, generator=generator)
    lines = [f"{a:.4f},{b:.4f},{c:.4f}" for (a, b), c in zip(x.tolist(), y.tolist(), strict=True)]
    return write(tmp_path / "made.csv", "\n".join(["first,second,y", *lines]) + "\n")


def run(out: Path, *args: str | Path) -> dict[str, Any]:
    assert main(["regress", *SMALL, "--out", str(out), *map(str, args)]) == 0
    return json.loads((out / "regress.json").read_text())


def without_times(document: dict[str, Any]) -> Any:
    """What must not change from run to run."""

    def kept(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: kept(value) for key, value in part.items() if "seconds" not in key}
        return [kept(value) for value in part] if isinstance(part, list) else part

    return kept(document["results"])


def test_a_table_of_methods_over_splits(tmp_path: Path, csv: Path) -> None:
    args = ("--data", csv, "--target", "y", "--methods", "lrt", "ensemble", "--splits", "3")
    document = run(tmp_path / "run", *args)
    results = document["results"]["made"]
    assert list(results) == ["lrt", "ensemble"]
    (table,) = document["tables"]
    assert table["title"] == "made: 40 rows, 2 inputs, 3 of random splits, a tenth for testing"
    names = [column["name"] for column in table["columns"]]
    for row, splits in zip(table["rows"], results.values(), strict=True):
        assert len(splits) == 3
        assert len({split["rmse"] for split in splits}) == 3
        for name, key in (("RMSE", "rmse"), ("log lik.", "log_likelihood"), ("CRPS", "crps")):
            at = names.index(name)
            assert tuple(row[at : at + 2]) == mean_and_error([split[key] for split in splits])
    pytest.importorskip("matplotlib")
    figures = read(tmp_path / "run" / "regress.json").figures
    assert [figure.file for figure in figures] == ["calibration.png", "predictions-made.png"]
    assert all(figure.png.startswith(b"\x89PNG") for figure in figures)


def test_what_is_left_is_done_and_gives_the_same(tmp_path: Path, csv: Path) -> None:
    args = ("--data", csv, "--target", "y", "--methods", "bbb", "mc-dropout", "--splits", "2")
    whole = run(tmp_path / "whole", *args)
    shutil.rmtree(tmp_path / "whole" / "tasks" / "made-bbb-1")
    (tmp_path / "whole" / "regress.json").unlink()
    kept = (tmp_path / "whole" / "tasks" / "made-bbb-0" / "result.json").stat().st_mtime_ns
    again = run(tmp_path / "whole", *args, "--resume")
    assert without_times(again) == without_times(whole)
    assert (tmp_path / "whole" / "tasks" / "made-bbb-0" / "result.json").stat().st_mtime_ns == kept
    # Of the splits, more of them leave the first ones as they are.
    more = run(tmp_path / "more", *args[:-1], "3")
    for method, splits in without_times(whole)["made"].items():
        assert without_times(more)["made"][method][:2] == splits


def test_a_run_is_not_resumed_on_other_numbers(
    tmp_path: Path, csv: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--data", str(csv), "--target", "y", "--methods", "deterministic", "--splits", "1"]
    run(tmp_path / "run", *args)
    csv.write_text(csv.read_text().replace("first,second,y\n", "first,second,y\n9,9,9\n"))
    assert main(["regress", *SMALL, "--out", str(tmp_path / "run"), *args, "--resume"]) == 1
    assert "cannot resume" in capsys.readouterr().err


def test_test_rows_have_no_part_in_training(tmp_path: Path) -> None:
    """Not in the standardization either: another test row changes nothing for the rest."""
    sure = "".join(f"{a} {b} {a + b}\n" for a, b in zip(range(20), [3, 1, 4, 1, 5] * 4, strict=True))
    rows = {
        "index_train_0": "\n".join(map(str, range(17))),
        "index_test_0": "17\n18\n19\n",
        "n_splits": "1\n",
    }
    said = {}
    for name, last in (("plain", ""), ("strange", "1000 -1000 1000\n")):
        lines = sure.splitlines(keepends=True)
        make_set(tmp_path / name / "a", data="".join(lines[:-1]) + (last or lines[-1]), **rows)
        document = run(
            tmp_path / f"run-{name}", "--data-dir", tmp_path / name, "--methods", "mc-dropout", "lrt"
        )
        said[name] = [of["predictions"]["mean"] for (of,) in document["results"]["a"].values()]
    for plain, strange in zip(said["plain"], said["strange"], strict=True):
        assert plain[:2] == strange[:2]
        assert plain[2] != strange[2]


def test_a_folder_of_sets_and_their_own_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "two"):
        make_set(tmp_path / "sets" / name)
    document = run(tmp_path / "run", "--data-dir", tmp_path / "sets", "--methods", "deterministic")
    assert list(document["results"]) == ["one", "two"]
    assert [len(of["deterministic"]) for of in document["results"].values()] == [2, 2]
    assert document["tables"][0]["title"] == "one: 5 rows, 2 inputs, 2 of its own splits"
    folder = ["--data-dir", str(tmp_path / "sets"), "--sets", "two", "--out", str(tmp_path / "other")]
    assert main(["regress", *SMALL, *folder, "--splits", "3"]) == 1
    assert "--splits must be at most 2, as many as two has, got 3" in capsys.readouterr().err


def test_the_bundled_set_is_the_default(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    document = run(tmp_path / "run", "--methods", "lrt", "--splits", "1")
    assert list(document["results"]) == ["diabetes"]


def test_without_matplotlib_a_note(tmp_path: Path, csv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    args = ("--data", csv, "--target", "y", "--methods", "lrt", "--splits", "1")
    document = run(tmp_path / "run", *args)
    assert document["figures"] == []
    assert "matplotlib is missing" in document["notes"][0]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--data", "CSV"], "--target is needed with --data"),
        (["--data", "CSV", "--target", "z"], "no column 'z' for --target: its columns are first, second, y"),
        (["--data", "none.csv", "--target", "y"], "none.csv cannot be read: No such file or directory"),
        (["--data", "CSV", "--target", "y", "--data-dir", "."], "--data and --data-dir exclude each other"),
        (["--sets", "a"], "--sets needs --data-dir FOLDER"),
        (["--target", "y"], "--target needs --data FILE"),
        (["--drop", "y"], "--drop needs --data FILE"),
        (["--data", "CSV", "--target", "y", "--splits", "0"], "--splits must be an int >= 1, got 0"),
        (["--data", "CSV", "--target", "y", "--samples", "0"], "--samples must be an int >= 1, got 0"),
        (["--data", "CSV", "--target", "y", "--steps", "0"], "--steps must be an int >= 1, got 0"),
        (["--data", "CSV", "--target", "y", "--hidden", "0"], "--hidden must be an int >= 1, got 0"),
        (["--data", "CSV", "--target", "y", "--seed", "-1"], "--seed must be an int >= 0, got -1"),
    ],
)
def test_wrong_input_is_one_line(
    tmp_path: Path, csv: Path, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    given = [str(csv) if arg == "CSV" else arg for arg in args]
    assert main(["regress", *SMALL, "--out", str(tmp_path / "run"), *given]) == 1
    error = capsys.readouterr().err
    assert error.startswith("bbb-fast: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run" / "tasks").exists()


def test_an_unknown_method_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["regress", "--methods", "magic"])
    assert "invalid choice: 'magic'" in capsys.readouterr().err
    with pytest.raises(OptionError, match="methods must be among"):
        regress.settings({}, ["magic"], None, 1, 0, Training())
