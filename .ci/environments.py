"""What the scripts that try releases of torch share: environments with one, and the sources to build."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from checks import ROOT, CheckError, long_run, run

TOOLS = ("setuptools>=68", "wheel", "ninja", "pybind11", "numpy")
TESTS = ("pytest", "scipy", "scikit-learn", "matplotlib", "tqdm", "expecttest", "hypothesis")
OP_TESTS = "noise,dropout,sample_weights,kl_divergence,bbb,lrt,flipout,conv_transpose"
# torch's CUDA build takes 5 GB with what it needs, and half as much again while it is unpacked.
NEEDED_BYTES = 10 << 30


def environment(folder: Path, torch: str, *packages: str) -> Path:
    """The Python of a virtual environment in this folder, with the torch that is required and packages."""
    python, ready = folder / "bin" / "python", folder / ".ready"
    if not ready.exists():
        if shutil.disk_usage(folder.parent).free < NEEDED_BYTES:
            raise CheckError(f"{torch} needs {NEEDED_BYTES >> 30} GiB of disk, in {folder}")
        run(sys.executable, "-m", "venv", "--clear", folder)
        # Whatever release the machine keeps others to.
        unconstrained = {**os.environ, "PIP_CONSTRAINT": os.devnull}
        long_run(f"installing {torch}", python, "-m", "pip", "install", "-q", torch, env=unconstrained)
        ready.touch()
    if missing := sorted(set(packages).difference(ready.read_text().splitlines())):
        run(python, "-m", "pip", "install", "-q", *missing)
        with ready.open("a") as installed:
            installed.writelines(f"{package}\n" for package in missing)
    return python


def source_distribution(python: Path, folder: Path) -> Path:
    """The archive of the sources, as they are given away, in a fresh folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    env = {**os.environ, "BBB_FAST_NO_EXT": "1"}  # which leaves out nothing of the sources
    # Nothing is written into the tree, from which something else may be installed meanwhile.
    egg_info = ("egg_info", "--egg-base", folder)
    run(python, "setup.py", "-q", *egg_info, "sdist", "--formats", "gztar", "-d", folder, cwd=ROOT, env=env)
    return next(folder.glob("*.tar.gz"))


def unpack(archive: Path, folder: Path) -> Path:
    """The tree of an archive of sources, in a fresh folder."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.unpack_archive(archive, folder)  # tarfile's filters are newer than some Pythons
    return next(folder.iterdir())


def tests_of(names: str, root: Path) -> list[Path]:
    """The files of tests that an option names: ``all``, or names as noise,lrt; ``ops`` stands for several."""
    folder = root / "python_tests"
    if names == "all":
        return [folder]
    each = [name for word in names.split(",") for name in (OP_TESTS if word == "ops" else word).split(",")]
    return [folder / f"test_{name}.py" for name in each]
