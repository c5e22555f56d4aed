"""Tables of numbers: what is read, and what is refused with which words."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bbb_fast.experiments.data import DataError
from bbb_fast.experiments.options import MAX_SEED
from bbb_fast.experiments.tabular import bundled, found_sets, load_set, load_table, random_splits

pytestmark = pytest.mark.cpu_only("tables are in the CPU's memory")

ROWS = [(1, 2.5, 30), (2, -1, 1e3), (3, 0.5, 7), (4, 4, 5)]


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def table(mark: str, header: str = "", end: str = "") -> str:
    return header + "".join(mark.join(map(str, row)) + end + "\n" for row in ROWS)


class TestLoadTable:
    @pytest.mark.parametrize("mark", [",", ";", "\t", " ", "   ", ", ", " \t "])
    def test_marks(self, tmp_path: Path, mark: str) -> None:
        read = load_table(write(tmp_path / "t.txt", table(mark)), "3")
        assert read.inputs.tolist() == [[1, 2.5], [2, -1], [3, 0.5], [4, 4]]
        assert read.targets.tolist() == [30, 1000, 7, 5]
        assert (read.features, read.target, read.name) == (("1", "2"), "3", "t")
        assert read.inputs.dtype == read.targets.dtype == torch.float64

    @pytest.mark.parametrize(
        ("target", "name"), [("size", "size"), ("2", "size"), ("-2", "size"), ("-1", "y")]
    )
    def test_names_and_numbers_of_columns(self, tmp_path: Path, target: str, name: str) -> None:
        read = load_table(write(tmp_path / "t.csv", table(",", '"the x",size,y\n')), target)
        assert read.target == name
        assert read.features == tuple(c for c in ("the x", "size", "y") if c != name)

    def test_a_name_goes_before_a_number(self, tmp_path: Path) -> None:
        assert load_table(write(tmp_path / "t.csv", table(",", "b,c,1\n")), "1").targets.tolist()[0] == 30

    def test_comments_empty_lines_and_the_mark_of_utf_8(self, tmp_path: Path) -> None:
        text = "\ufeff# made by hand\n\n" + table(",", "x,z,y\n") + "\n# end\n"
        assert load_table(write(tmp_path / "t.csv", text), "y").features == ("x", "z")

    def test_drop_leaves_out_what_is_no_number(self, tmp_path: Path) -> None:
        text = "name,x,y\nann,1,2\nbob,2,3\neve,3,5\nzoe,4,4\n"
        read = load_table(write(tmp_path / "t.csv", text), "y", ["name"])
        assert read.features == ("x",)
        assert read.inputs[:, 0].tolist() == [1, 2, 3, 4]

    @pytest.mark.parametrize(
        ("text", "target", "drop", "message"),
        [
            ("", "1", (), "holds no rows"),
            ("# only this\n", "1", (), "holds no rows"),
            ("x,y\n1,2\n2,3\n3,4\n", "y", (), "3 rows are too few: at least 4"),
            ("x,y\n", "y", (), "0 rows are too few"),
            (table(","), "4", (), "no column '4' for --target: its columns are 1, 2, 3"),
            (table(","), "0", (), "no column '0'"),
            (table(",", "a,b,c\n"), "d", (), "no column 'd' for --target: its columns are a, b, c"),
            (table(",", "a,b,c\n"), "c", ("d",), "no column 'd' for --drop"),
            (table(",", "a,b,c\n"), "c", ("3",), "column c is the target and cannot be left out"),
            (table(",", "a,b,a\n"), "a", (), "2 columns are called a: tell --target by its number"),
            (table(",") + "5,6\n", "1", (), "line 5 has 2 cells, but line 1 has 3"),
            (table(",") + "5,red,6\n", "1", (), "line 5 has 'red' in column 2, which is no finite number"),
            (table(",") + "5,inf,6\n", "1", (), "line 5 has 'inf' in column 2, which is no finite"),
            (table(",") + "5,,6\n", "1", (), "line 5 has no value in column 2"),
            (table(",") + "5,?,6\n", "1", (), "line 5 has no value in column 2"),
            (table(",") + "5,NaN,6\n", "2", (), "line 5 has no value in column 2"),
            ("NA,1,2\n" + table(","), "2", (), "line 1 has no value in column 1"),
            (table(",", end=",3"), "1", (), "column 4 is 3 in every row: leave it out with --drop"),
            (table(",", end=",3"), "4", (), "column 4 is 3 in every row: choose another target"),
            ("1\n2\n3\n4\n", "1", (), "no column besides the target"),
        ],
    )  # fmt: skip
    def test_what_is_refused(
        self, tmp_path: Path, text: str, target: str, drop: tuple[str, ...], message: str
    ) -> None:
        with pytest.raises(DataError, match=message):
            load_table(write(tmp_path / "t.csv", text), target, drop)

    def test_files_that_cannot_be_read(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"none\.csv cannot be read: No such file"):
            load_table(tmp_path / "none.csv", "1")
        (tmp_path / "t.csv").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(DataError, match="is no UTF-8 text"):
            load_table(tmp_path / "t.csv", "1")


def make_set(folder: Path, **files: str) -> None:
    """A set of 5 rows, 2 inputs and 2 splits."""
    texts = {
        "data": "1 2 3\n2 1 4\n3 5 5\n4 4 7\n5 3 8\n",
        "index_features": "0\n1\n",
        "index_target": "2\n",
        "n_splits": "2\n",
        "index_train_0": "0\n1\n2\n3\n",
        "index_test_0": "4\n",
        "index_train_1": "1.000000000000000000e+00\n2\n3\n4\n",
        "index_test_1": "0\n",
        **files,
    }
    for name, text in texts.items():
        if text:
            write(folder / f"{name}.txt", text)


class TestLoadSet:
    @pytest.mark.parametrize("below", ["", "data"])
    def test_what_is_read(self, tmp_path: Path, below: str) -> None:
        make_set(tmp_path / "a" / below)
        make_set(tmp_path / "b")
        (tmp_path / "other").mkdir()
        assert found_sets(tmp_path) == ["a", "b"]
        read = load_set(tmp_path, "a")
        assert read.inputs.tolist() == [[1, 2], [2, 1], [3, 5], [4, 4], [5, 3]]
        assert read.targets.tolist() == [3, 4, 5, 7, 8]
        assert [(s.train.tolist(), s.test.tolist()) for s in read.splits] == [
            ([0, 1, 2, 3], [4]),
            ([1, 2, 3, 4], [0]),
        ]

    @pytest.mark.parametrize(
        ("files", "message"),
        [
            ({"index_test_1": ""}, "index_test_1.txt cannot be read"),
            ({"index_test_1": "1\n"}, "row 1 is for training and for testing in split 1"),
            ({"index_test_1": "5\n"}, "line 1 has '5': allowed are whole numbers from 0 to 4"),
            ({"index_test_1": "0.5\n"}, "line 1 has '0.5': allowed are whole numbers"),
            ({"index_test_1": "0\n0\n"}, "names an index twice"),
            ({"index_target": "1\n"}, "must hold one column that is none of index_features.txt"),
            ({"n_splits": "none\n"}, "must hold the number of splits"),
            ({"data": "1 2 3\n2 1 x\n3 5 5\n4 4 7\n5 3 8\n"}, "line 2 has 'x' in column 2"),
            ({"data": "1 2 3\n2 2 4\n3 2 5\n4 2 7\n5 2 8\n"}, "column column 1 is 2 in every row"),
        ],
    )
    def test_what_is_refused(self, tmp_path: Path, files: dict[str, str], message: str) -> None:
        make_set(tmp_path / "a", **files)
        with pytest.raises(DataError, match=message):
            load_set(tmp_path, "a")

    def test_a_set_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="holds no regression set"):
            found_sets(tmp_path / "none")
        make_set(tmp_path / "a")
        with pytest.raises(DataError, match="no set b in .*: there are a"):
            load_set(tmp_path, "b")


def test_the_bundled_set() -> None:
    pytest.importorskip("sklearn")
    read = bundled()
    assert (read.inputs.shape, read.targets.shape) == ((442, 10), (442,))
    assert read.features[0] == "age"


class TestRandomSplits:
    def test_each_row_is_in_one_part(self) -> None:
        for split in random_splits(57, 3, seed=4):
            assert sorted([*split.train.tolist(), *split.test.tolist()]) == list(range(57))
            assert len(split.test) == 6

    def test_they_go_by_the_seed_alone(self) -> None:
        few, many, other = (random_splits(50, n, seed) for n, seed in ((2, 0), (4, 0), (2, 1)))
        assert [s.test.tolist() for s in few] == [s.test.tolist() for s in many[:2]]
        assert len({tuple(s.test.tolist()) for s in (*many, *other)}) == 6

    def test_the_largest_seed_has_splits_too(self) -> None:
        assert len(random_splits(50, 2, MAX_SEED)) == 2

    def test_the_smallest_set_has_a_test_row(self) -> None:
        assert len(random_splits(4, 1, 0)[0].test) == 1
