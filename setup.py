"""Builds bbb_fast: the Python package and, where a compiler is at hand, its native extension.

Environment: BBB_FAST_NO_EXT=1 leaves the extension out; CXX, CFLAGS and MAX_JOBS as usual.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
SOURCES = sorted(str(p.relative_to(ROOT)) for d in ("csrc", "csrc/cpu") for p in (ROOT / d).glob("*.cpp"))
HEADERS = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.h"))
# The kernels never read errno or floating point exceptions; without these two, selects and roots would
# not vectorise. Nothing here changes a result the way -ffast-math would.
COMPILE_ARGS = [
    "-O3",
    "-g0",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wno-psabi",
    "-Wno-maybe-uninitialized",
]
OPENMP = ["-fopenmp"] if platform.system() == "Linux" else []


def why_no_extension() -> str | None:
    """The reason to install the reference path alone, or None."""
    if os.environ.get("BBB_FAST_NO_EXT", "").strip().lower() not in ("", "0", "false", "no", "off"):
        return "it was installed with BBB_FAST_NO_EXT=1"
    compilers = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    if not any(shutil.which(name) for name in compilers):
        return f"no C++ compiler was found at installation (looked for {', '.join(compilers)})"
    return None


def build_record() -> dict[str, object]:
    reason = why_no_extension()
    record: dict[str, object] = {"native": reason is None, "reason": reason, "devices": "cpu"}
    try:
        import torch

        record["torch"] = torch.__version__
    except ImportError:
        record["torch"] = None
    return record


class BuildPy(build_py):
    """Also writes down what was built, for ``python -m bbb_fast info`` and the loader."""

    def run(self) -> None:
        super().run()
        folder = ROOT if self.editable_mode else Path(self.build_lib)
        target = folder / "bbb_fast" / "_build_info.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(build_record(), indent=2) + "\n")


commands: dict[str, type] = {"build_py": BuildPy}
extensions = []
if why_no_extension() is None:
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    extensions.append(
        CppExtension(
            "bbb_fast._C",
            SOURCES,
            depends=HEADERS,
            extra_compile_args={"cxx": COMPILE_ARGS + OPENMP},
            extra_link_args=OPENMP,
        )
    )
    commands["build_ext"] = BuildExtension
else:
    print(f"bbb_fast: installing the reference path only: {why_no_extension()}")

setup(ext_modules=extensions, cmdclass=commands)
