"""Imports run one way through the package, and `import bbb_fast` stays small."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import PACKAGE

# From what uses others to what is used. A module may import those of its own row and of the rows below.
ROWS = (
    ("__main__",),
    ("cli",),
    ("experiments",),
    ("methods",),
    ("predictive",),
    ("models", "frozen", "inference", "tuning"),
    ("losses", "_eval_mode", "conversion"),
    ("layers",),
    ("functional",),
    ("_noise", "_recompute", "_sharded", "priors"),
    ("_ops", "_backend", "routes"),
    ("reference",),
    ("_layer_functions",),
    ("metrics", "_autocast", "_checks", "_copies", "_files", "_version"),
)
ROW = {name: k for k, names in enumerate(ROWS) for name in names}


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the package that a module imports, wherever in its text."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    package = [part for part in package if part]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            start = [*base, *(node.module or "").split(".")]
            target = ".".join(part for part in start if part)
            for alias in node.names:
                inner = f"{target}.{alias.name}".strip(".")
                found.add(inner if inner in known else target)
    return found


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: imports(name, path, known) - {name} for name, path in known.items()}


def test_imports_run_one_way(graph: dict[str, set[str]]) -> None:
    for name, targets in graph.items():
        if not name:
            continue  # the package itself gathers the public names
        for target in targets:
            upper, lower = ROW[name.split(".")[0]], ROW[target.split(".")[0] or "__main__"]
            assert upper <= lower, f"{name} imports {target}, which is above it"


def test_no_circle(graph: dict[str, set[str]]) -> None:
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, f"a circle of imports: {' > '.join((*above, name))}"
        if name not in done:
            for target in sorted(graph[name]):
                visit(target, (*above, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


def test_import_brings_torch_and_numpy_alone() -> None:
    """No experiment, and nothing from other packages that torch has not brought."""
    program = (
        "import sys, torch, numpy; before = {name.split('.')[0] for name in sys.modules}\n"
        "import bbb_fast; names = [n for n in sys.modules if n.startswith('bbb_fast.experiments')]\n"
        "assert not names, names\n"
        "new = {name.split('.')[0] for name in sys.modules} - before - set(sys.stdlib_module_names)\n"
        "assert new == {'bbb_fast'}, new\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
