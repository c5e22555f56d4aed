"""Checks the CUDA build where there is no GPU; what ``make cuda-check`` runs.

For each release of torch asked for: an environment of its own with PyPI's CUDA build of torch, the package
built of its source distribution for the architectures asked for, the registers of every kernel listed, an
error if one spills, the build imported, and the CPU tests run through it. Needs Python, a C++ compiler, and
either a CUDA toolkit or access to PyPI, which has the compiler too.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

from checks import ROOT, CheckError, run, stopwatch
from environments import NEEDED_BYTES, TESTS, TOOLS, environment, source_distribution, tests_of, unpack

WORK = ROOT / "build" / "cuda-check"


def environment_of(release: str) -> Path:
    """The Python of a virtual environment with PyPI's CUDA build of this torch."""
    # "===": never a CPU build, whose version has a suffix.
    return environment(WORK / f"torch-{release}", f"torch==={release}", *TOOLS, *TESTS)


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
            raise CheckError(f"no kernel was compiled for {column}")
    spilling = [f"{names[n]} for {a}: {b} bytes" for (n, a), (_, b) in sorted(found.items()) if b]
    if spilling:
        raise CheckError("registers spill:\n  " + "\n  ".join(spilling))
    print(f"{len(rows)} kernels, no spills", flush=True)


def check(release: str, architectures: list[str], tests: str) -> None:
    done = stopwatch(f"torch {release}")
    python = environment_of(release)
    done("environment ready")
    tree = unpack(source_distribution(python, WORK / "source"), WORK / f"tree-{release}")
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
        raise CheckError(f"the build has no CUDA kernels:\n{info}")
    print(info.strip())
    if tests != "none":
        run(python, "-m", "pytest", *tests_of(tests, tree), shown=True, cwd=tree, env=env)
        done("CPU tests passed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--torch",
        default="2.11.0,2.13.0",
        help="releases (default 2.11.0,2.13.0); those after the first are left out where the disk is short, "
        "and with --tests all run those of the ops alone",
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
        tests = "ops" if k > 0 and args.tests == "all" else args.tests
        check(release, args.architectures.split(","), tests)


if __name__ == "__main__":
    main()
