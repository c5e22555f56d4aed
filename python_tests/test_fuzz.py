"""Some hundred cases of the fuzz (python_tests/fuzz), and that it finds what it is there for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fuzz import malformed, valid
from fuzz.choices import Case
from fuzz.operands import LAYOUTS, Witness
from fuzz.outcome import Status

from bbb_fast import reference

pytestmark = [
    pytest.mark.usefixtures("native"),
    pytest.mark.cpu_only("both implementations and their processes are the CPU's"),
]


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The fuzz as a process of its own: where nothing has run yet it can start others."""
    here = str(Path(__file__).parent)
    path = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-m", "fuzz", *arguments],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


def test_no_faults() -> None:
    process = command("--calls", "200", "--malformed", "400")
    assert process.returncode == 0, process.stdout + process.stderr


def case_of(op: str) -> Case:
    """The first valid case that calls ``op``."""
    return next(case for case in (Case(0, index) for index in range(1000)) if valid.op_of(case) == op)


def test_a_case_repeats(threads: None) -> None:
    """From its two numbers alone, and whatever ran before."""
    case = case_of("lrt_conv2d")
    first, second = valid.Draft(case), valid.Draft(case)
    assert first.choices.taken == second.choices.taken
    assert first.run() == second.run()
    assert Case.parse(str(case)) == case


def test_leaving_a_choice_plain_moves_no_other() -> None:
    name = "seed"  # a choice that decides about no other
    case = next(
        case
        for case in (Case(0, index) for index in range(1000))
        if valid.op_of(case) == "bbb_linear" and name in valid.Draft(case).choices.taken
    )
    taken = valid.Draft(case).choices.taken
    plainer = valid.Draft(case.plainer(name)).choices.taken
    assert plainer == {key: value for key, value in taken.items() if key != name}


@pytest.mark.parametrize("op", ["sample_weight", "bbb_linear", "lrt_conv2d", "BBB.BBBLinear"])
def test_a_wrong_number_is_found(monkeypatch: pytest.MonkeyPatch, threads: None, op: str) -> None:
    """A sigma that is too large by a ten-thousandth, on one path, fails some of the first cases."""
    right = reference.softplus
    monkeypatch.setattr(reference, "softplus", lambda rho: right(rho) * 1.0001)
    cases = [case for case in (Case(0, k) for k in range(400)) if valid.op_of(case) == op]
    outcomes = [valid.Draft(case).run() for case in cases]
    assert any(o.status is Status.FAULT and o.what.startswith("value of") for o in outcomes)


def test_words_that_differ_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("lrt_linear: no")

    monkeypatch.setattr("bbb_fast._checks.layer", refuse)
    cases = [Case(0, k, "malformed") for k in range(2400)]
    drafts = [malformed.Draft(case) for case in cases if malformed.op_of(case) == "lrt_linear"]
    assert "different words" in [draft.run().what for draft in drafts]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 4), (1, 5), (2, 0), (), (2, 3, 1, 4)])
def test_layouts_keep_the_values(layout: str, shape: tuple[int, ...]) -> None:
    t = torch.randn(shape)
    made = LAYOUTS[layout](t.clone())
    assert made.shape == t.shape
    if layout == "expanded" and t.numel():
        t = t[:1].expand(shape) if shape else t
    assert torch.equal(made, t)


def test_a_write_beside_a_tensor_is_seen() -> None:
    view = LAYOUTS["sliced"](torch.zeros(3, 4))
    witness = Witness([view])
    assert witness.untouched()
    assert view._base is not None
    view._base[0, 0] = 1.0
    assert not witness.untouched()


CRASH = """
import ctypes, time, torch
from fuzz import runner
from fuzz.choices import Case, Choices
from fuzz.operands import fenced
from fuzz.outcome import Outcome, Status

class Draft:
    def __init__(self, case):
        self.choices = Choices(case)

    def run(self):
        index = self.choices.case.index
        if index == 3:
            t = fenced(torch.zeros(4))
            ctypes.string_at(t.data_ptr() + 16, 1)
        if index == 5:
            time.sleep(600)
        return Outcome(Status.OK, "nothing", what="well")

runner.DRAFTS["valid"] = Draft
for case, outcome in runner.run([Case(0, k) for k in range(8)], timeout=3.0):
    print(case, outcome.what)
"""


def test_a_crash_and_a_hang_are_each_one_failure() -> None:
    """Reading past a fence is a crash; the cases after it run all the same."""
    here = str(Path(__file__).parent)
    process = subprocess.run(
        [sys.executable, "-c", CRASH],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        check=True,
    )
    said = dict(line.split(" ", 1) for line in process.stdout.splitlines())
    wrong = {"0:3": "died of SIGSEGV", "0:5": "no answer for 3 seconds"}
    assert said == {f"0:{k}": wrong.get(f"0:{k}", "well") for k in range(8)}
