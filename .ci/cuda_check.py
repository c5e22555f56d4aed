"""Checks the CUDA build where there is no GPU; what ``make cuda-check`` runs.

For each release of torch asked for: an environment of its own with PyPI's CUDA build of torch, the package
built in a copy of the tree for the architectures asked for, the registers of every kernel listed, an error
if one spills, the build imported, and the CPU tests run through it. Needs Python, a C++ compiler, and
either a CUDA toolkit or access to PyPI, which has the compiler too.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "cuda-check"
FOLDERS = ("bbb_fast", "csrc", "python_tests", "benchmarks", "docs", ".ci")
FILES = ("setup.py", "pyproject.toml", "README.md", "MANIFEST.in", "LICENSE", "Makefile", "CMakeLists.txt")
TOOLS = ("setuptools>=68,<81", "wheel", "ninja", "pybind11", "numpy")
TESTS = ("pytest", "scipy", "scikit-learn", "matplotlib", "tqdm", "expecttest")
OP_TESTS = "noise,dropout,sample_weights,kl_divergence,bbb,lrt,flipout,conv_transpose"
# An environment with torch's CUDA packages takes 5 GB, and half as much again while they are unpacked.
NEEDED_BYTES = 10 << 30


def run(*command: object, quiet: bool = True, **options: Any) -> str:
    """Runs a command and returns what it printed; stops with that if it fails."""
    pipe = subprocess.PIPE if quiet else None
    words = [str(c) for c in command]
    done = subprocess.run(words, text=True, stdout=pipe, stderr=subprocess.STDOUT, check=False, **options)
    if done.returncode:
        raise SystemExit(f"{done.stdout or ''}\ncuda-check: failed: {' '.join(words)}")
    return done.stdout or ""


def environment(release: str) -> Path:
    """The Python of a virtual environment with PyPI's CUDA build of this torch."""
    folder = WORK / f"torch-{release}"
    python = folder / "bin" / "python"
    if not (folder / ".ready").exists():
        run(sys.executable, "-m", "venv", "--clear", folder)
        # "===": never a CPU build, whose version has a suffix.
        run(python, "-m", "pip", "install", "-q", f"torch==={release}")
        run(python, "-m", "pip", "install", "-q", *TOOLS, *TESTS)
        (folder / ".ready").touch()
    return python


def copy_of_the_tree(release: str) -> Path:
    """A fresh copy, so that no build in the tree itself is touched."""
    folder = WORK / f"tree-{release}"
    shutil.rmtree(folder, ignore_errors=True)
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "_build_info.json")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in FILES:
        shutil.copy(ROOT / name, folder / name)
    return folder


def ensure_toolkit(python: Path, tree: Path, env: dict[str, str]) -> None:
    """Installs PyPI's CUDA compiler where setup.py finds none that fits this torch."""
    probe = [str(python), "setup.py", "--version"]
    done = subprocess.run(probe, cwd=tree, env=env, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    print(f"{done.stderr.strip().splitlines()[-1]}\ntaking the CUDA compiler from PyPI", flush=True)
    cuda = run(python, "-W", "ignore", "-c", "import torch; print(torch.version.cuda)").split()[-1]
    parts = ("cuda-nvcc", "cuda-crt", "cuda-cccl", "cuda-runtime", "nvvm")
    run(python, "-m", "pip", "install", "-q", *(f"nvidia-{part}=={cuda}.*" for part in parts))


def kernels(log: str) -> dict[tuple[str, str], tuple[int, int]]:
    """What ptxas -v says: (kernel, architecture) -> (registers, bytes spilled)."""
    found: dict[tuple[str, str], tuple[int, int]] = {}
    name: tuple[str, str] | None = None
    spilled = 0
    for line in log.splitlines():
        if entry := re.search(r"Compiling entry function '(\S+)' for '(\S+)'", line):
            name = entry.group(1), entry.group(2)
        elif frame := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spilled = sum(map(int, frame.groups()))
        elif (used := re.search(r"Used (\d+) registers", line)) and name:
            found[name] = (int(used.group(1)), spilled)
            name = None
    return found


def readable(names: list[str]) -> dict[str, str]:
    """Demangled and shortened: sample_kernel<float, BFloat16, true>."""
    plain = names
    if shutil.which("c++filt"):
        plain = run("c++filt", input="\n".join(names)).splitlines()
    noise = r"void |bbb_fast::cuda::|\(anonymous namespace\)::|c10::|\(.*"
    return {name: re.sub(noise, "", text) for name, text in zip(names, plain, strict=True)}


def report(log: str, architectures: list[str]) -> None:
    """Lists every kernel's registers; stops if one spills, or if an architecture is missing."""
    found = kernels(log)
    names = readable(sorted({name for name, _ in found}))
    rows: dict[str, dict[str, int]] = defaultdict(dict)
    for (name, arch), (registers, _) in found.items():
        rows[names[name]][arch] = registers
    columns = [f"sm_{a.replace('.', '')}" for a in architectures]
    print(f"registers {'':44}" + "".join(f"{c:>8}" for c in columns))
    for name in sorted(rows):
        print(f"  {name:52}" + "".join(f"{rows[name].get(c, '-'):>8}" for c in columns))
    for column in columns:
        if not any(column in row for row in rows.values()):
            raise SystemExit(f"cuda-check: no kernel was compiled for {column}")
    spilling = [f"{names[n]} for {a}: {b} bytes" for (n, a), (_, b) in sorted(found.items()) if b]
    if spilling:
        raise SystemExit("cuda-check: registers spill:\n  " + "\n  ".join(spilling))
    print(f"{len(rows)} kernels, no spills", flush=True)


def check(release: str, architectures: list[str], tests: str) -> None:
    start = time.monotonic()

    def done(what: str) -> None:
        print(f"[{time.monotonic() - start:4.0f} s] torch {release}: {what}", flush=True)

    python = environment(release)
    done("environment ready")
    tree = copy_of_the_tree(release)
    env = {
        **os.environ,
        "FORCE_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": ";".join(architectures),
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
        "NVCC_APPEND_FLAGS": "-Xptxas=-v",
        "PYTHONPATH": str(tree),
    }
    for name in ("BBB_FAST_NO_EXT", "BBB_FAST_NO_CUDA"):
        env.pop(name, None)
    ensure_toolkit(python, tree, env)
    log = run(python, "setup.py", "build_py", "build_ext", "--inplace", cwd=tree, env=env)
    done("built")
    report(log, architectures)
    info = run(python, "-m", "bbb_fast", "info", cwd=tree, env=env)
    if not re.search(r"extension: devices\s+cpu,cuda\s", info):
        raise SystemExit(f"cuda-check: the build has no CUDA kernels:\n{info}")
    print(info.strip())
    if tests != "none":
        chosen = [] if tests == "all" else [f"python_tests/test_{t}.py" for t in tests.split(",")]
        run(python, "-m", "pytest", *chosen, quiet=False, cwd=tree, env=env)
        done("CPU tests passed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--torch",
        default="2.11.0,2.13.0",
        help="releases (default 2.11.0,2.13.0); those after the first are left out where the disk is short, "
        "and run the tests of the ops alone",
    )
    parser.add_argument("--architectures", default="8.0,9.0", help="compute capabilities (default 8.0,9.0)")
    parser.add_argument("--tests", default="all", help="all, none, ops, or names as noise,lrt (default all)")
    args = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    for k, release in enumerate(args.torch.split(",")):
        ready = (WORK / f"torch-{release}" / ".ready").exists()
        if k > 0 and not ready and shutil.disk_usage(WORK).free < NEEDED_BYTES:
            print(f"torch {release} left out: less than {NEEDED_BYTES >> 30} GiB of disk are free")
            continue
        tests = OP_TESTS if args.tests == "ops" or (k > 0 and args.tests == "all") else args.tests
        check(release, args.architectures.split(","), tests)


if __name__ == "__main__":
    main()
