"""The report: which runs it finds, and a page that is safe, whole, and works in a browser."""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import re
import struct
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, cast

import browser
import pytest

from bbb_fast.cli import main
from bbb_fast.experiments import page, report
from bbb_fast.experiments.document import Column, Document, Figure, Table
from bbb_fast.experiments.training import METRICS

pytestmark = pytest.mark.cpu_only("a page of text")

EVIL = """</script><script>document.title='broken into'</script><img src=x onerror=alert(1)> "'&"""


def png(width: int, height: int) -> bytes:
    """A PNG of grey."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress((b"\0" + b"\x80" * width) * height)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


TABLE = Table(
    "Methods",
    (
        Column("method"), Column("accuracy", ".2f", "high"), Column("NLL", ".3f", "low"),
        Column("RMSE", "", "low"), Column("epochs", "d"),
    ),
    [
        ["LRT 10", 0.901, 0.25, "0.61 ± 0.02", 5],
        ["LRT 9", 0.904, 0.125, "1.20 ± 0.01", 5],
        ["BBB", 0.8, None, "0.7 ± 0.1", 15],
        ["dropout", 0.7, 0.3, None, 7],
    ],
    "Ten draws.",
)  # fmt: skip


def document(**changes: Any) -> Document:
    settings = {"seed": 0, "limit": None, "quiet": True, "sizes": [1, 2], "inner": {"lr": 0.1}}
    figures = [Figure("curves.png", "Curves", "Two lines rise.", png(1600, 40))]
    plain = Document("compare", "A comparison", settings, [TABLE], figures, {}, ["A note."], 75.0)
    return dataclasses.replace(plain, **changes)


def write(folder: Path, found: Document) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for figure in found.figures:
        (folder / figure.file).write_bytes(figure.png)
    (folder / f"{found.command}.json").write_text(found.to_json())
    return folder


class Elements(HTMLParser):
    """Every element of a page as (tag, attributes, the text directly in it)."""

    _VOID = ("meta", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.all: list[tuple[str, dict[str, str | None], list[str]]] = []
        self._open: list[int] = []
        self.feed(text)
        assert not self._open, "elements that are not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.all.append((tag, dict(attrs), []))
        if tag not in self._VOID:
            self._open.append(len(self.all) - 1)

    def handle_endtag(self, tag: str) -> None:
        assert self.all[self._open.pop()][0] == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if self._open:
            self.all[self._open[-1]][2].append(data)

    def of(self, tag: str) -> list[tuple[dict[str, Any], str]]:
        return [(attrs, "".join(text)) for name, attrs, text in self.all if name == tag]


def elements(*documents: Document, title: str = "Runs") -> Elements:
    sections = [page.Section(f"runs/{k}", found) for k, found in enumerate(documents)]
    return Elements(page.page(sections, title))


class TestPage:
    def test_a_run_is_all_there(self) -> None:
        found = elements(document(), document(title="Another"))
        assert [text for _, text in found.of("h2")] == ["Contents", "A comparison", "Another"]
        targets = {attrs["id"] for attrs, _ in found.of("section")}
        assert {attrs["href"].removeprefix("#") for attrs, _ in found.of("a")} == {"runs", *targets}
        text = " ".join(text for tag in ("p", "li", "figcaption", "h3", "title") for _, text in found.of(tag))
        for part in (
            "compare · runs/1 · 75 s",
            "Ten draws.",
            "A note.",
            "Two lines rise.",
            "Methods",
            "Runs",
        ):
            assert part in text
        assert len(found.of("details")) == 2

    def test_ids_are_unique_and_names_lead_to_them(self) -> None:
        found = elements(document(tables=[TABLE, TABLE]), document())
        ids = [attrs["id"] for _, attrs, _ in found.all if "id" in attrs]
        assert len(ids) == len(set(ids))
        assert {attrs["aria-labelledby"] for _, attrs, _ in found.all if "aria-labelledby" in attrs} < set(
            ids
        )

    def test_nothing_comes_from_elsewhere(self) -> None:
        text = page.page([page.Section("run", document())], "Runs")
        found = Elements(text)
        assert not {"link", "iframe", "object", "base", "form"} & {tag for tag, _, _ in found.all}
        addresses = [str(attrs[key]) for _, attrs, _ in found.all for key in ("src", "href") if key in attrs]
        assert addresses
        assert all(address.startswith(("data:image/png;base64,", "#")) for address in addresses)
        assert not re.search(r"https?:|@import|url\(", text)

    def test_the_policy_allows_its_own_script_and_style_alone(self) -> None:
        text = page.page([page.Section("run", document())], "Runs")
        [policy] = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
        assert policy.startswith("default-src 'none';")
        assert "unsafe" not in policy
        assert " style=" not in text
        assert not re.search(r"\son\w+=", text)
        # That its hashes are right, the browser tells below.
        assert len(re.findall("'sha256-[A-Za-z0-9+/]{43}='", policy)) == 2

    def test_everything_is_escaped(self) -> None:
        hostile = Document(
            EVIL, EVIL, {EVIL: EVIL, "list": [EVIL]},
            [Table(EVIL, (Column(EVIL), Column(EVIL, "", "high")), [[EVIL, EVIL], [EVIL, 1]], EVIL)],
            [Figure(EVIL, EVIL, EVIL, png(1, 1)), Figure(EVIL, EVIL, EVIL)], {}, [EVIL], 1.0, {EVIL: EVIL},
        )  # fmt: skip
        found = Elements(page.page([page.Section(EVIL, hostile)], EVIL))
        assert len(found.of("script")) == 1
        assert "broken into" not in found.of("script")[0][1]
        assert len(found.of("img")) == 1
        assert found.of("img")[0][0]["alt"] == EVIL
        assert not any(key.startswith("on") for _, attrs, _ in found.all for key in attrs)
        assert found.of("h2")[1][1] == EVIL
        assert found.of("button")[0][1] == EVIL

    def test_headings_and_cells_say_how_to_sort(self) -> None:
        found = elements(document())
        heads = [attrs for attrs, _ in found.of("th") if attrs.get("scope") == "col"]
        assert [head["aria-sort"] for head in heads] == ["none"] * 5
        assert [head["data-first"] for head in heads] == [
            "ascending", "descending", "ascending", "ascending", "ascending",
        ]  # fmt: skip
        assert ["data-numbers" in head for head in heads] == [False, True, True, True, True]
        assert [text for _, text in found.of("button")][:5] == [column.name for column in TABLE.columns]
        cells = [(attrs.get("data-value"), "data-missing" in attrs) for attrs, _ in found.of("td")[:16]]
        # Of a number with its error, the number; the full digits, not what is printed.
        assert cells[:4] == [("0.901", False), ("0.25", False), ("0.61", False), ("5.0", False)]
        assert cells[9] == (None, True)
        assert cells[14] == (None, True)

    def test_the_best_of_a_column(self) -> None:
        best = [text for attrs, text in elements(document()).of("td") if "best" in (attrs.get("class") or "")]
        # 0.901 and 0.904 are printed alike; the number of epochs has no better.
        assert best == ["0.90", "0.61 ± 0.02", "0.90", "0.125"]

    def test_several_may_be_best(self) -> None:
        cells = ["0.7 ± 0.1", "0.7 ± 0.2", "0.5 ± 0.1"]
        table = Table("t", (Column("name"), Column("x", "", "high")), [["a", cell] for cell in cells])
        found = elements(document(tables=[table])).of("td")[:3]
        assert ["best" in (attrs.get("class") or "") for attrs, _ in found] == [True, True, False]

    @pytest.mark.parametrize("cells", [[1.0], [2.0, 2.0], [None, 1.0], ["a", 1.0], []])
    def test_no_best_without_a_choice(self, cells: list[Any]) -> None:
        table = Table("t", (Column("name"), Column("x", ".1f", "high")), [["a", cell] for cell in cells])
        assert not [1 for attrs, _ in elements(document(tables=[table])).of("td") if "best" in str(attrs)]

    @pytest.mark.parametrize(
        ("cell", "number"),
        [
            (1, 1.0), (0.5, 0.5), ("2.63 ± 0.05", 2.63), ("-1.2e-05", -1.2e-5), ("92 %", 92.0),
            ("\N{MINUS SIGN}1.6", -1.6), ("> 400", None), ("3conv3fc", None), ("10 members", None),
            ("", None), (None, None), (float("nan"), None),
        ],
    )  # fmt: skip
    def test_what_a_cell_is_sorted_by(self, cell: Any, number: float | None) -> None:
        table = Table("t", (Column("x"), Column("y")), [["a", cell]])
        [(attrs, _)] = elements(document(tables=[table])).of("td")[:1]
        assert attrs.get("data-value") == (None if number is None else repr(number))

    def test_figures_are_data_with_their_text(self) -> None:
        found = elements(document())
        [(attrs, _)] = found.of("img")
        assert base64.b64decode(attrs["src"].removeprefix("data:image/png;base64,")) == png(1600, 40)
        assert (attrs["alt"], attrs["width"], attrs["height"]) == ("Two lines rise.", "1600", "40")

    def test_a_figure_that_is_missing_is_said_to_be(self) -> None:
        found = elements(document(figures=[Figure("gone.png", "Curves", "Two lines.")]))
        assert not found.of("img")
        assert "gone.png is missing" in found.of("figcaption")[0][1]

    def test_settings_are_lines(self) -> None:
        found = elements(document(build={"torch": "2.6"}))
        rows = [text for attrs, text in found.of("th") if attrs.get("scope") == "row"][4:]
        values = [text for _, text in found.of("td")][16:]
        assert dict(zip(rows, values, strict=True)) == {
            "seed": "0", "limit": "-", "quiet": "yes", "sizes": "1, 2", "inner.lr": "0.1", "torch": "2.6",
        }  # fmt: skip

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"figures": [Figure("x.png", "t", "t", b"<svg/>")]}, "x.png is no PNG"),
            ({"tables": [Table("t", (Column("x", ".1f"),), [[cast(Any, [1])]])]}, "cannot be shown"),
            ({"tables": [Table("t", (Column("x", "!"),), [[1.0]])]}, "cannot be shown"),
        ],
    )
    def test_what_cannot_be_shown(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message) as caught:
            elements(document(**changes))
        assert "runs/0" in str(caught.value)

    @pytest.mark.parametrize(
        ("seconds", "text"), [(0.123, "0.123 s"), (75.2, "75.2 s"), (600, "10 min"), (7500, "2 h 05 min")]
    )
    def test_durations(self, seconds: float, text: str) -> None:
        assert elements(document(seconds=seconds)).of("p")[1][1].endswith(f" · {text}")


def trained(folder: Path, epochs: int = 2, seed: int = 0) -> Path:
    """What ``train`` writes, in the shape that it has; `test_a_run_of_train` holds it to that."""
    scores = {"accuracy": 0.9 + seed / 100, "nll": 0.3, "brier": 0.2, "ece": 0.05, "samples": 10}
    metrics = {
        "run": "r", "config": {"dataset": "digits", "model": "lenet", "layer_type": "lrt", "seed": seed},
        "versions": {"torch": "2.6"}, "images": {"train": 10, "valid": 20, "test": 30},
        "best": {"epoch": 1, "accuracy": 0.8, "nll": 0.4, "ece": 0.1}, "test": scores,
        "timing": {"train_seconds": 3.0}, "history": [{}] * epochs,
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / METRICS).write_text(json.dumps(metrics))
    (folder / "curves.png").write_bytes(png(4, 4))
    return folder


def one_line(capsys: pytest.CaptureFixture[str], *command: str | Path) -> str:
    """The error of a command that fails."""
    assert main(["report", *map(str, command)]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err.removeprefix("bbb-fast: error: ")


class TestFind:
    def test_in_folders_and_below_each_once(self, tmp_path: Path) -> None:
        for name in ("b", "a/deep/er", "a"):
            write(tmp_path / name, document(title=name))
        sections, unfinished = report.find([tmp_path / "b", tmp_path, tmp_path / "a"])
        assert [section.document.title for section in sections] == ["b", "a", "a/deep/er"]
        assert [section.where for section in sections] == [
            str(tmp_path / name) for name in ("b", "a", "a/deep/er")
        ]
        assert sections[0].document.figures[0].png == png(1600, 40)
        assert unfinished == []

    def test_other_files_are_left_alone(self, tmp_path: Path) -> None:
        write(tmp_path, document())
        (tmp_path / "other.json").write_text("{")
        (tmp_path / "deep").mkdir()
        # Of other programs.
        (tmp_path / "metrics.json").write_text('{"loss": 1}')
        (tmp_path / "deep" / "metrics.json").write_text('{"step": 1}\n{"step": 2}\n')
        (tmp_path / "deep" / "uncertainty.json").write_text("[1]")
        assert len(report.find([tmp_path])[0]) == 1

    def test_tasks_are_part_of_their_run(self, tmp_path: Path) -> None:
        write(tmp_path, document())
        (tmp_path / "settings.json").write_text("{}")
        trained(tmp_path / "tasks" / "one")
        assert [s.document.command for s in report.find([tmp_path])[0]] == ["compare"]
        # A folder of that name elsewhere is like any other.
        trained(tmp_path / "more" / "tasks")
        assert [s.document.command for s in report.find([tmp_path])[0]] == ["compare", "train"]

    def test_what_is_not_finished_is_named(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        begun = tmp_path / "begun"
        (begun / "tasks").mkdir(parents=True)
        (begun / "settings.json").write_text("{}")
        line = one_line(capsys, tmp_path, "--out", tmp_path / "r.html")
        assert line.startswith(f"{tmp_path} holds no finished run; {begun} holds one that is not finished")
        write(tmp_path / "done", document())
        assert main(["report", str(tmp_path), "--out", str(tmp_path / "r.html")]) == 0
        assert f"note: {begun} holds a run that is not finished" in capsys.readouterr().out

    def test_runs_of_train_stand_side_by_side(self, tmp_path: Path) -> None:
        for seed in (0, 1):
            trained(tmp_path / str(seed), seed=seed)
        both, one, _ = report.find([tmp_path])[0]
        assert both.document.title == "Trained models"
        [table] = both.document.tables
        assert [row[0] for row in table.rows] == [str(tmp_path / "0"), str(tmp_path / "1")]
        assert [row[4:7] for row in table.rows] == [[0, 2, 0.9], [1, 2, 0.91]]
        assert one.document.tables[0].rows == [
            ["test", 30, 0.9, 0.3, 0.2, 0.05], ["validation", 20, 0.8, 0.4, None, 0.1],
        ]  # fmt: skip
        assert one.document.figures[0].png == png(4, 4)

    def test_a_run_of_train_and_its_uncertainty(self, tmp_path: Path) -> None:
        pytest.importorskip("sklearn")
        small = ["--train-size", "100", "--valid-size", "80", "--valid-samples", "2", "--test-samples", "2"]
        out = str(tmp_path)
        assert main(["train", *small, "--epochs", "1", "--threads", "1", "--quiet", "--out", out]) == 0
        judge = ["uncertainty", "--checkpoint", f"{out}/best.pt", "--ood", "noise", "--samples", "2"]
        assert main([*judge, "--limit", "20", "--threads", "1"]) == 0
        run, judged = (section.document for section in report.find([tmp_path])[0])
        metrics = json.loads((tmp_path / METRICS).read_text())
        assert run.tables[0].rows[0][2] == metrics["test"]["accuracy"]
        assert run.settings == metrics["config"]
        found = json.loads((tmp_path / "uncertainty.json").read_text())
        assert judged.tables[1].rows[0][3] == found["detection"]["predictive_entropy"]["auroc"]
        assert judged.tables[0].rows[0][2] == found["in"]["accuracy"]
        assert judged.tables[0].rows[1][2] is None
        assert "digits against noise" in judged.title
        assert page.page([page.Section("x", run), page.Section("x", judged)], "Runs")


class TestErrors:
    def test_folders(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert one_line(capsys, tmp_path) == f"{tmp_path} holds no finished run\n"
        assert one_line(capsys, tmp_path / "gone") == f"there is no folder {tmp_path / 'gone'}\n"
        (tmp_path / "file").touch()
        with pytest.raises(SystemExit):
            main(["report", str(tmp_path / "file")])

    @pytest.mark.parametrize(
        "change",
        [
            lambda fields: fields.update(version=99),
            lambda fields: fields.pop("tables"),
            lambda fields: fields["tables"][0]["rows"][0].pop(),
        ],
    )
    def test_a_damaged_document_is_named(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Any
    ) -> None:
        file = write(tmp_path, document()) / "compare.json"
        fields = json.loads(file.read_text())
        change(fields)
        file.write_text(json.dumps(fields))
        assert one_line(capsys, tmp_path).startswith(f"{file} cannot be shown: ")

    def test_a_damaged_run_of_train_is_named(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = trained(tmp_path / "run") / METRICS
        metrics = json.loads(file.read_text())
        del metrics["config"]["model"]
        file.write_text(json.dumps(metrics))
        assert one_line(capsys, tmp_path).startswith(f"{file} cannot be shown: it is incomplete")

    def test_where_it_is_written(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        run = write(tmp_path / "run", document())
        mine = tmp_path / "mine.html"
        mine.write_text("<p>mine")
        line = one_line(capsys, run, "--out", mine)
        assert line.startswith(f"{mine} is there and is no report")
        assert mine.read_text() == "<p>mine"
        assert one_line(capsys, run, "--out", tmp_path).startswith(f"{tmp_path} is a folder")
        assert f"there is no folder {tmp_path / 'no'}" in one_line(
            capsys, run, "--out", tmp_path / "no" / "r"
        )
        assert sorted(os.listdir(tmp_path)) == ["mine.html", "run"]

    def test_a_report_is_replaced_in_one_step(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run, out = write(tmp_path / "run", document()), tmp_path / "r.html"
        assert main(["report", str(run), "--out", str(out)]) == 0
        first = out.read_bytes()
        assert main(["report", str(run), "--out", str(out)]) == 0
        assert out.read_bytes() == first  # the same runs, the same page
        assert re.search(r"\(1 run, 0.0 MB\)", capsys.readouterr().out)

        def fail(_: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", fail)
        assert "No space left" in one_line(capsys, run, "--out", out, "--title", "New")
        assert out.read_bytes() == first
        assert sorted(os.listdir(tmp_path)) == ["r.html", "run"]


@pytest.mark.slow
class TestBrowser:
    """In a real browser, from a file path, with the network off."""

    @pytest.fixture
    def file(self, tmp_path: Path, opened: browser.Browser) -> Path:
        write(tmp_path / "a", document(title="First"))
        long = "a-name-without-any-space-" * 8
        wide = Table(
            "Wide", [Column(f"column {k}", ".4f", "low") for k in range(20)], [[0.5] * 20, [0.25] * 20]
        )
        write(tmp_path / "b" / long[:150], document(title=long, tables=[TABLE, wide], settings={long: long}))
        trained(tmp_path / "c", seed=0)
        trained(tmp_path / "d", seed=1)
        write(tmp_path / "e", document(title=EVIL, notes=[EVIL]))
        assert main(["report", str(tmp_path), "--out", str(tmp_path / "r.html")]) == 0
        opened.messages.clear()
        opened.requests.clear()
        return tmp_path / "r.html"

    @pytest.mark.parametrize("dark", [False, True])
    def test_no_errors_and_nothing_asked_for(self, file: Path, opened: browser.Browser, dark: bool) -> None:
        opened.open(file, dark=dark)
        assert opened.run("document.title") == "Runs of bbb_fast"
        images = "[...document.images]"
        assert opened.run(f"{images}.length > 0 && {images}.every(i => i.complete && i.naturalWidth > 0)")
        back = opened.run("getComputedStyle(document.body).backgroundColor")
        assert (max(map(int, re.findall(r"\d+", back))) < 128) == dark
        assert opened.messages == []
        outside = [address for address in opened.requests if not address.startswith("data:image/png;base64,")]
        assert outside == [file.resolve().as_uri()]

    def test_the_browser_of_this_test_sees_errors(self, tmp_path: Path, opened: browser.Browser) -> None:
        (tmp_path / "bad.html").write_text(
            "<img src='https://example.invalid/x.png'><script>nothing()</script>"
        )
        opened.messages.clear()
        opened.requests.clear()
        opened.open(tmp_path / "bad.html")
        assert any("nothing is not defined" in message for message in opened.messages)
        assert any("ERR_INTERNET_DISCONNECTED" in message for message in opened.messages)
        assert "https://example.invalid/x.png" in opened.requests

    COLUMN = (
        "[...document.querySelectorAll('#run-2 table')[0].tBodies[0].rows].map(r => r.cells[{}].textContent)"
    )

    @pytest.mark.parametrize(
        ("column", "orders"),
        [
            (0, [["BBB", "dropout", "LRT 9", "LRT 10"], ["LRT 10", "LRT 9", "dropout", "BBB"]]),
            (1, [["LRT 9", "LRT 10", "BBB", "dropout"], ["dropout", "BBB", "LRT 10", "LRT 9"]]),
            # A gap is last either way.
            (2, [["LRT 9", "LRT 10", "dropout", "BBB"], ["dropout", "LRT 10", "LRT 9", "BBB"]]),
            (3, [["LRT 10", "BBB", "LRT 9", "dropout"], ["LRT 9", "BBB", "LRT 10", "dropout"]]),
            # By number, not by letters; what is equal keeps its order.
            (4, [["LRT 10", "LRT 9", "dropout", "BBB"], ["BBB", "dropout", "LRT 10", "LRT 9"]]),
        ],
    )  # fmt: skip
    def test_a_click_sorts(
        self, file: Path, opened: browser.Browser, column: int, orders: list[list[str]]
    ) -> None:
        opened.open(file)
        heads = "document.querySelectorAll('#run-2 thead')[0].rows[0].cells"
        sorting = f"[...{heads}].map(c => c.getAttribute('aria-sort'))"
        first = "descending" if column == 1 else "ascending"
        second = "ascending" if column == 1 else "descending"
        for order, names in zip((first, second, first), [*orders, orders[0]], strict=True):
            opened.run(f"{heads}[{column}].firstChild.click()")
            assert opened.run(self.COLUMN.format(0)) == names
            sorts = ["none"] * 5
            sorts[column] = order
            assert opened.run(sorting) == sorts
            said = opened.run("document.getElementById('said').textContent")
            assert said == f"Methods: sorted by {TABLE.columns[column].name}, {order}"
        other = (column + 1) % 5
        opened.run(f"{heads}[{other}].firstChild.click()")
        assert [k for k, sort in enumerate(opened.run(sorting)) if sort != "none"] == [other]

    def test_the_keyboard_sorts(self, file: Path, opened: browser.Browser) -> None:
        opened.open(file)
        for key, text, names in (
            ("Enter", "\r", ["LRT 9", "LRT 10", "BBB", "dropout"]),
            (" ", " ", ["dropout", "BBB", "LRT 10", "LRT 9"]),
        ):
            opened.run("document.querySelector('#run-2 .scroll').focus()")
            opened.press("Tab")
            opened.press("Tab")
            assert opened.run("document.activeElement.textContent") == "accuracy"
            opened.press(key, text)
            assert opened.run(self.COLUMN.format(0)) == names

    @pytest.mark.parametrize("width", [320, 360, 800, 1200])
    def test_the_page_does_not_scroll_sideways(self, file: Path, opened: browser.Browser, width: int) -> None:
        opened.open(file, width=width)
        assert opened.run("innerWidth") == width
        opened.run("document.querySelectorAll('details').forEach(d => { d.open = true; })")
        opened.run("document.querySelectorAll('figcaption button').forEach(b => b.click())")
        assert opened.run("document.documentElement.scrollWidth") <= width
        # The wide table does, in its own box, with its first column in sight.
        box = "document.querySelectorAll('#run-3 .scroll')[1]"
        assert opened.run(f"{box}.scrollWidth > {box}.clientWidth")
        opened.run(f"{box}.scrollLeft = 500")
        left = opened.run(f"{box}.querySelector('tbody th').getBoundingClientRect().left")
        assert abs(left - opened.run(f"{box}.getBoundingClientRect().left")) < 2

    def test_a_figure_in_full_size(self, file: Path, opened: browser.Browser) -> None:
        opened.open(file, width=360)
        image, button = "document.images[0]", "document.querySelector('figcaption button')"
        assert opened.run(f"{button}.hidden") is False
        assert opened.run(f"{image}.clientWidth") < 360
        opened.run(f"{button}.click()")
        assert opened.run(f"{image}.clientWidth") == 1600
        opened.run(f"{button}.click()")
        assert opened.run(f"{image}.clientWidth") < 360
        small = "document.querySelector('#run-4 figcaption button')"
        assert opened.run(f"{small}.hidden") is True  # 4 pixels wide

    def test_links_lead_to_their_runs(self, file: Path, opened: browser.Browser) -> None:
        opened.open(file)
        for link in opened.run("[...document.querySelectorAll('nav a')].map(a => a.getAttribute('href'))"):
            assert opened.run(f"document.querySelector('{link} h2') !== null")

    def test_it_prints(self, file: Path, opened: browser.Browser) -> None:
        opened.open(file)
        assert opened.pdf().startswith(b"%PDF-")
        # Settings are on paper, and closed again on the screen.
        assert opened.run("[...document.querySelectorAll('details')].every(d => !d.open)")
        opened.run("dispatchEvent(new Event('beforeprint'))")
        assert opened.run("[...document.querySelectorAll('details')].every(d => d.open)")
