"""Experiments as tasks that are done once, and the documents they end in."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bbb_fast.experiments.document import Column, Document, Figure, Table, mean_and_error, read
from bbb_fast.experiments.options import OptionError
from bbb_fast.experiments.tasks import Task, experiment

SETTINGS = {"seed": 3, "epochs": 2}


def draw(folder: Path, seed: int) -> dict[str, Any]:
    """A task: what it draws hangs on its seed alone."""
    unseeded = float(torch.rand(()))
    torch.manual_seed(seed)
    (folder / "log").open("a").write("x")
    return {"unseeded": unseeded, "number": float(torch.rand(())), "threads": torch.get_num_threads()}


def fails(folder: Path, seed: int) -> dict[str, Any]:
    raise ValueError(f"no task for seed {seed}")


def not_finite(folder: Path) -> dict[str, Any]:
    return {"loss": float("nan")}


def draws(count: int) -> list[Task]:
    return [Task(f"draw-{k}", draw, {"seed": k}) for k in range(count)]


def times_done(out: Path, name: str) -> int:
    return len((out / "tasks" / name / "log").read_text())


def run(out: Path, tasks: list[Task], **options: Any) -> dict[str, dict[str, Any]]:
    with experiment(out, "test", SETTINGS, progress=False, **options) as running:
        return running.run(tasks)


def test_results_in_order_and_the_random_state_is_the_callers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.rand(7)
    before = torch.get_rng_state()
    results = run(tmp_path, draws(3))
    assert list(results) == ["draw-0", "draw-1", "draw-2"]
    assert torch.equal(torch.get_rng_state(), before)
    # What a task draws without a seed of its own does not hang on what ran before.
    assert len({result["unseeded"] for result in results.values()}) == 1
    assert len({result["number"] for result in results.values()}) == 3


def test_side_by_side_gives_the_same(tmp_path: Path) -> None:
    pytest.importorskip("joblib")
    torch.set_num_threads(1)
    one, two = run(tmp_path / "1", draws(3)), run(tmp_path / "2", draws(3), jobs=2)
    assert list(one) == list(two) and one == two


def test_resume_does_what_is_left(tmp_path: Path) -> None:
    tasks = draws(3)
    with pytest.raises(ValueError, match="no task for seed 9"):
        run(tmp_path, [tasks[0], Task("bad", fails, {"seed": 9}), *tasks[1:]])
    with pytest.raises(FileExistsError, match="already holds a run: continue it with --resume"):
        run(tmp_path, tasks)
    results = run(tmp_path, tasks, resume=True)
    assert [times_done(tmp_path, task.name) for task in tasks] == [1, 1, 1]
    assert results == run(tmp_path / "other", tasks)
    run(tmp_path, tasks, overwrite=True)
    assert times_done(tmp_path, "draw-0") == 1  # the old log went with the old run


@pytest.mark.parametrize("jobs", [1, 2])
def test_killed_and_resumed(tmp_path: Path, jobs: int) -> None:
    """SIGKILL leaves whole results only, nobody who still works, and a folder that can be had."""
    if jobs > 1:
        pytest.importorskip("joblib")
    program = (
        "import sys, time; sys.path.insert(0, sys.argv[2]); from test_tasks import *\n"
        "def slow(folder, seed): time.sleep(0.3 * (seed > 1)); return draw(folder, seed)\n"
        "import test_tasks; test_tasks.slow = slow; slow.__module__ = '__main__'\n"
        "with experiment(sys.argv[1], 'test', SETTINGS, progress=False, jobs=int(sys.argv[3])) as running:\n"
        "    running.run([Task(f'draw-{k}', slow, {'seed': k}) for k in range(30)])\n"
    )
    out = tmp_path / "run"
    command = [sys.executable, "-W", "ignore", "-c", program, str(out), str(Path(__file__).parent), str(jobs)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (out / "tasks" / "draw-1" / "result.json").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(2.5 if jobs > 1 else 0)  # its workers see that it is gone
    done = len(list(out.glob("tasks/*/result.json")))
    assert 2 <= done < 30
    time.sleep(0.7)
    assert len(list(out.glob("tasks/*/result.json"))) == done
    tasks = draws(30)
    assert (
        run(out, tasks, resume=True, threads=torch.get_num_threads())["draw-29"]["number"]
        == run(tmp_path / "whole", tasks[29:])["draw-29"]["number"]
    )


def test_what_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to resume"):
        run(tmp_path, draws(1), resume=True)
    with pytest.raises(ValueError, match="contradict"):
        run(tmp_path, draws(1), resume=True, overwrite=True)
    run(tmp_path, draws(1))
    with (
        pytest.raises(ValueError, match="its epochs was 2, now it is 5; give the same options"),
        experiment(tmp_path, "test", {**SETTINGS, "epochs": 5}, resume=True),
    ):
        pass
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(ValueError, match=r"settings\.json is damaged"):
        run(tmp_path, draws(1), resume=True)


def test_a_folder_of_something_else_stays(tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "mine").write_text("precious")
    with pytest.raises(FileExistsError, match="of something else"):
        run(tmp_path, draws(1), overwrite=True)
    assert (tmp_path / "tasks" / "mine").read_text() == "precious"


def test_one_run_at_a_time(tmp_path: Path) -> None:
    with (
        experiment(tmp_path, "test", SETTINGS),
        pytest.raises(OSError, match="is writing to it"),
        experiment(tmp_path, "test", SETTINGS, resume=True),
    ):
        pass


@pytest.mark.parametrize("wrong", [{"jobs": 0}, {"threads": 0}, {"jobs": True}])
def test_wrong_options(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="must be an int >= 1"):
        run(tmp_path / "run", draws(1), **wrong)
    assert not (tmp_path / "run").exists()


def test_wrong_tasks(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must have different names"):
        run(tmp_path / "1", draws(1) * 2)
    with pytest.raises(ValueError, match=r"JSON|finite"):
        run(tmp_path / "2", [Task("nan", not_finite, {})])
    assert not list((tmp_path / "2").glob("tasks/*/result.json"))


def test_threads_are_the_callers_again(tmp_path: Path, threads: None) -> None:
    torch.set_num_threads(2)
    assert run(tmp_path, draws(1), threads=1)["draw-0"]["threads"] == 1
    assert torch.get_num_threads() == 2


def test_progress_says_what_was_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with experiment(tmp_path, "test", SETTINGS) as running:
        running.run(draws(1))
    with experiment(tmp_path, "test", SETTINGS, resume=True) as running:
        running.run(draws(2), "more")
    out = capsys.readouterr().out
    assert "test: 1/1 draw-0 (" in out and "more: 1 of 2 tasks are done already" in out
    assert "more: 2/2 draw-1 (" in out


def table() -> Table:
    columns = [Column("method"), Column("accuracy", ".1%", "high"), Column("NLL", ".3f", "low")]
    return Table("Scores", columns, [["plain", 0.9, 0.25], ["ours", 0.975, None]], "Two methods.")


def test_a_table_as_text() -> None:
    assert table().text() == (
        "Scores\nmethod  accuracy    NLL\nplain      90.0%  0.250\nours       97.5%      -\nTwo methods."
    )
    with pytest.raises(ValueError, match="a row of 'T' has 1 cells for 2 columns"):
        Table("T", [Column("a"), Column("b")], [["x"]])


def document(**changed: Any) -> Document:
    figure = Figure("curve.png", "Curve", "It rises.", b"pixels")
    given = {
        "command": "test",
        "title": "A test",
        "settings": SETTINGS,
        "tables": [table()],
        "figures": [figure],
    }
    return Document(**{**given, **changed})


def test_a_document_is_read_as_it_was_written(tmp_path: Path) -> None:
    with experiment(tmp_path, "test", SETTINGS) as running:
        written = running.finish(document(results={"a": [1.5, None]}, notes=["n"], seconds=2.0))
    assert sorted(path.name for path in written) == ["curve.png", "test.json"]
    found = read(tmp_path / "test.json")
    assert found.figures[0].png == b"pixels" and found.tables[0].text() == table().text()
    assert (found.settings, found.results, found.notes) == (SETTINGS, {"a": [1.5, None]}, ["n"])
    assert found.build == json.loads(document().to_json())["build"]
    (tmp_path / "curve.png").unlink()
    assert read(tmp_path / "test.json").figures[0].png == b""


def test_a_figure_leads_to_no_other_folder(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    inner = tmp_path / "run"
    inner.mkdir()
    (inner / "test.json").write_text(document(figures=[Figure("../secret", "t", "t")]).to_json())
    assert read(inner / "test.json").figures[0].png == b""


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"format": "other"}, "not what an experiment"),
        ({"version": 9}, "version 9: this bbb_fast reads 1"),
        ({"tables": [{"title": "t"}]}, "incomplete or malformed"),
        ({"tables": None}, "incomplete or malformed"),
        ({"unknown": 1}, "incomplete or malformed"),
    ],
)
def test_what_is_no_document(tmp_path: Path, change: dict[str, Any], why: str) -> None:
    path = tmp_path / "test.json"
    path.write_text(json.dumps({**json.loads(document().to_json()), **change}))
    with pytest.raises(ValueError, match=rf"test\.json cannot be shown: .*{why}"):
        read(path)
    path.write_text("[1")
    with pytest.raises(ValueError, match="cannot be shown"):
        read(path)


def test_numbers_that_json_has_not() -> None:
    with pytest.raises(ValueError, match="JSON|finite"):
        document(results={"a": float("inf")}).to_json()


def test_mean_and_error() -> None:
    values = [1.0, 2.0, 4.0, 9.0]
    tensor = torch.tensor(values, dtype=torch.float64)
    assert mean_and_error(values) == pytest.approx((float(tensor.mean()), float(tensor.std()) / 2))
    assert mean_and_error([5.0]) == (5.0, None)
