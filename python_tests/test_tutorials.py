"""Each tutorial runs as the script that it is, and asserts itself what it claims."""

from __future__ import annotations

import ast
import importlib
import os
import re
import runpy
import warnings
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
from helpers import repository_root, write_output_to

SCRIPTS = sorted((repository_root() / "docs" / "tutorials").glob("*.py"))
pytestmark = pytest.mark.cpu_only("the tutorials are processes of their own, on the CPU")


def run(script: Path, folder: Path, out: Path, err: Path) -> None:
    """What ``python -W error::UserWarning -W error::RuntimeWarning SCRIPT`` does, in a process of its own."""
    write_output_to(out, err)
    os.chdir(folder)
    # Where there is a display, pyplot warns that Agg does not show on it.
    os.environ.pop("DISPLAY", None)
    importlib.import_module("matplotlib").use("Agg")
    for category in (UserWarning, RuntimeWarning):
        warnings.filterwarnings("error", category=category)
    # Where a wheel is tested beside another torch, it says so, as it should.
    warnings.filterwarnings("ignore", "bbb_fast runs on its reference path", RuntimeWarning)
    runpy.run_path(str(script), run_name="__main__")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_runs_without_a_warning_and_leaves_nothing(
    processes: ForkServerContext, script: Path, tmp_path: Path
) -> None:
    for package in ("matplotlib", "sklearn"):
        pytest.importorskip(package)
    folder, out, err = tmp_path / "folder", tmp_path / "out", tmp_path / "err"
    folder.mkdir()
    process = processes.Process(target=run, args=(script, folder, out, err))
    process.start()
    process.join(600)
    process.kill()
    assert err.read_text() == ""
    assert process.exitcode == 0
    assert out.read_text()
    assert not list(folder.iterdir())


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_is_a_page(script: Path) -> None:
    """It begins with a title, states claims, shows what it draws, and fixes every random number.

    It names the colours of what it draws, and takes them from the package.
    """
    text = script.read_text()
    assert text.startswith("# %% [markdown]\n# # ")
    nodes = list(ast.walk(ast.parse(text)))
    calls = {node: ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)}
    names = list(calls.values())
    assert any(isinstance(node, ast.Assert) for node in nodes)
    assert names.count("plt.subplots") == names.count("plt.show") > 0
    assert "torch.manual_seed" in names
    for call, name in calls.items():
        if name.rpartition(".")[2] in ("bar", "fill_between", "hist", "plot", "scatter", "stackplot"):
            assert {"color", "colors"} & {keyword.arg for keyword in call.keywords}, ast.unparse(call)
    assert "from bbb_fast.experiments.drawing import" in text
    assert not re.search(r"[\"']#[0-9a-fA-F]{3,8}[\"']", text)
