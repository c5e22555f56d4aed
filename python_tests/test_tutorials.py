"""Each tutorial runs as the script that it is, and asserts itself what it claims."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import repository_root

SCRIPTS = sorted((repository_root() / "docs" / "tutorials").glob("*.py"))
pytestmark = pytest.mark.cpu_only("the tutorials are processes of their own, on the CPU")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_runs_without_a_warning_and_leaves_nothing(script: Path, tmp_path: Path) -> None:
    for package in ("matplotlib", "sklearn"):
        pytest.importorskip(package)
    # Where there is a display, pyplot warns that Agg does not show on it.
    environment = {name: value for name, value in os.environ.items() if name != "DISPLAY"}
    environment["MPLBACKEND"] = "Agg"
    command = [sys.executable, "-W", "error::UserWarning", "-W", "error::RuntimeWarning", str(script)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout
    assert not list(tmp_path.iterdir())


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
