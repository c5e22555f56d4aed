"""What is seen of an installation: .ci/progress.py."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu_only("about installing")

PROGRESS = Path(__file__).parents[1] / ".ci" / "progress.py"


def say(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *command: str, silent: float = 15
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["progress.py", *command])
    main = runpy.run_path(str(PROGRESS))["main"]
    main.__globals__["SILENT_SECONDS"] = silent
    return (main(), *capfd.readouterr())


def test_says_what_is_compiled_and_no_more(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    code = "print('noise'); print('[3/34] c++ -O3 -I/x -c -c /x/csrc/cpu/signs.cpp -o /x/csrc/cpu/signs.o')"
    status, out, error = say(monkeypatch, capfd, "building", sys.executable, "-c", code)
    assert (status, out, error) == (0, "building ...\n  [3/34] csrc/cpu/signs.cpp\n", "")


def test_says_that_it_goes_on(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    code = "import time; time.sleep(2.5)"
    _, out, _ = say(monkeypatch, capfd, "sleeping", sys.executable, "-c", code, silent=1)
    assert re.search(r"sleeping: \d+ s\n", out)


def test_a_failure_shows_everything(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    code = "import sys; print('why'); print('more', file=sys.stderr); sys.exit(3)"
    status, _, error = say(monkeypatch, capfd, "failing", sys.executable, "-c", code)
    assert status == 3
    assert "why\n" in error and "more\n" in error and "failing: failed with exit status 3" in error


def test_a_command_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    status, _, error = say(monkeypatch, capfd, "looking", "no-such-command")
    assert status == 127 and "looking: cannot run no-such-command" in error
