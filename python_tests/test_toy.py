"""The command toy: the data, the regions of its table, and its figure."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bbb_fast.cli import main
from bbb_fast.experiments import toy
from bbb_fast.experiments.document import read

pytestmark = pytest.mark.cpu_only("the command runs on the CPU")

SMALL = ["--hidden", "8", "--steps", "30", "--members", "2", "--samples", "8", "--threads", "1", "--quiet"]


def run(out: Path, *args: str) -> dict[str, Any]:
    assert main(["toy", *SMALL, "--out", str(out), *args]) == 0
    return json.loads((out / "toy.json").read_text())


@pytest.mark.parametrize("noise", ["constant", "heteroscedastic"])
def test_data_lie_beside_the_gap_and_have_the_noise_that_is_told(noise: str) -> None:
    x, y = toy.make_data(4_000, noise, seed=0)
    assert x.shape == (4_000, 1)
    inside = toy._within(toy.REGIONS["on data"], x[:, 0])
    assert bool(inside.all())
    residual = y - toy.true_mean(x[:, 0])
    for side in (x[:, 0] < 0, x[:, 0] > 0):
        assert int(side.sum()) == 2_000
        expected = toy.noise_std(x[side, 0], noise)
        assert len(expected.unique()) == 1
        assert float(residual[side].std()) == pytest.approx(float(expected[0]), rel=0.1)
    assert not torch.equal(x, toy.make_data(4_000, noise, seed=1)[0])


def test_regions_are_on_the_data_and_well_off_them() -> None:
    grid = toy.grid()
    on, gap, outside = (toy._within(intervals, grid) for intervals in toy.REGIONS.values())
    assert not bool((on & gap).any() or (on & outside).any() or (gap & outside).any())
    assert all(int(region.sum()) > 10 for region in (on, gap, outside))


def test_table_and_figure(tmp_path: Path) -> None:
    document = run(tmp_path, "--methods", "lrt", "ensemble")
    (table,) = document["tables"]
    names = [column["name"] for column in table["columns"]]
    assert [row[0] for row in table["rows"]] == ["lrt", "ensemble", "(true noise)"]
    grid = toy.grid()
    for row in table["rows"][:2]:
        said = document["results"]["methods"][row[0]]
        for kind in ("epistemic", "aleatoric"):
            std = torch.tensor(said[f"{kind}_std"], dtype=torch.float64)
            outside = std[(grid.abs() >= 4 - 1e-9)].mean()
            assert row[names.index(f"{kind} outside")] == pytest.approx(float(outside))
    assert table["rows"][2][names.index("aleatoric on data")] == pytest.approx(0.15)
    pytest.importorskip("matplotlib")
    (figure,) = read(tmp_path / "toy.json").figures
    assert figure.png.startswith(b"\x89PNG")


def test_what_is_left_is_done_and_gives_the_same(tmp_path: Path) -> None:
    args = ("--methods", "flipout", "deterministic", "--noise", "heteroscedastic")
    whole = run(tmp_path, *args)
    shutil.rmtree(tmp_path / "tasks" / "flipout")
    again = run(tmp_path, *args, "--resume")
    for method, said in whole["results"]["methods"].items():
        for key in ("mean", "epistemic_std", "aleatoric_std"):
            assert again["results"]["methods"][method][key] == said[key]


def test_without_matplotlib_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    document = run(tmp_path, "--methods", "deterministic")
    assert document["figures"] == []
    assert "matplotlib is missing" in document["notes"][0]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--points", "9"], "--points must be an int >= 10, got 9"),
        (["--samples", "1"], "--samples must be an int >= 2, got 1"),
        (["--members", "0"], "--members must be an int >= 1, got 0"),
        (["--seed", "-1"], "--seed must be an int >= 0, got -1"),
    ],
)
def test_wrong_input_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    assert main(["toy", *SMALL, "--out", str(tmp_path / "run"), *args]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_the_picture_that_every_lecture_shows(tmp_path: Path) -> None:
    """With the command's own settings: epistemic uncertainty widens off the data, aleatoric does not."""
    assert main(["toy", "--threads", "1", "--quiet", "--out", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "toy.json").read_text())
    (table,) = document["tables"]
    names = [column["name"] for column in table["columns"]]
    for row in table["rows"][:-1]:
        cell = dict(zip(names, row, strict=True))
        assert cell["error"] < 0.15
        assert cell["aleatoric outside"] == pytest.approx(cell["aleatoric on data"], rel=0.25)
        assert cell["aleatoric on data"] == pytest.approx(0.15, rel=0.6)
        if cell["method"] != "deterministic":
            assert cell["epistemic outside"] > 2 * cell["epistemic on data"]
            assert cell["epistemic gap"] > 1.2 * cell["epistemic on data"]
