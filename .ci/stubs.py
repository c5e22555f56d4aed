"""Writes bbb_fast/functional.pyi and reference.pyi, which static tools read.

    python .ci/stubs.py [--print functional|reference]

Most functions of these modules are made at import, from an estimator and a shape; an editor that does not run
the code would know neither their arguments nor what they do.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import FunctionType, ModuleType

ROOT = Path(__file__).resolve().parent.parent
MODULES = ("functional", "reference")
# What annotations may name, and where it comes from.
IMPORTS = {
    "Callable": "from collections.abc import Callable",
    "Sequence": "from collections.abc import Sequence",
    "torch.": "import torch",
    "Tensor": "from torch import Tensor",
    "Call": "from ._layer_functions import Call",
    "VarianceDtype": "from .routes import VarianceDtype",
}


def functions(module: ModuleType) -> dict[str, FunctionType]:
    """The module's own functions; of one with ``__all__``, those it lists."""
    names = getattr(module, "__all__", [n for n in vars(module) if not n.startswith("_")])
    found = {name: getattr(module, name) for name in sorted(names)}
    listed = hasattr(module, "__all__")
    return {
        name: f
        for name, f in found.items()
        if isinstance(f, FunctionType) and (listed or f.__module__ == module.__name__)
    }


def stub(name: str, function: FunctionType) -> str:
    signature = inspect.signature(function)
    parts, star = [], False
    for p in signature.parameters.values():
        if p.kind is p.KEYWORD_ONLY and not star:
            parts.append("*")
            star = True
        stars = "*" if p.kind is p.VAR_POSITIONAL else ""
        parts.append(
            f"{stars}{p.name}: {p.annotation}" + ("" if p.default is p.empty else f" = {p.default!r}")
        )
    documentation = (inspect.getdoc(function) or "").replace("\\", "\\\\")
    lines = "\n".join(f"    {line}".rstrip() for line in documentation.splitlines()).strip()
    body = f'    """{lines}"""' if documentation else "    ..."
    return f"def {name}({', '.join(parts)}) -> {signature.return_annotation}:\n{body}\n"


def text_of(name: str) -> str:
    module = importlib.import_module(f"bbb_fast.{name}")
    body = "\n".join(stub(n, f) for n, f in functions(module).items())
    used = [line for word, line in IMPORTS.items() if re.search(rf"(?<![\w`]){re.escape(word)}\b", body)]
    listed = f"__all__ = {module.__all__!r}\n" if hasattr(module, "__all__") else ""
    return "\n".join(['"""Written by .ci/stubs.py."""', *used, listed, body])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--print", choices=MODULES)
    asked = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if asked.print:
        print(text_of(asked.print))
        return
    for name in MODULES:
        path = ROOT / "bbb_fast" / f"{name}.pyi"
        path.write_text(text_of(name))
        for command in (["check", "--select", "I", "--fix", "-q"], ["format", "-q"]):
            subprocess.run([sys.executable, "-m", "ruff", *command, str(path)], check=True)


if __name__ == "__main__":
    main()
