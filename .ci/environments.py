"""What scripts here share: running commands, environments with a release of torch, the sources to build."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("setuptools>=68,<81", "wheel", "ninja", "pybind11", "numpy")
TESTS = ("pytest", "scipy", "scikit-learn", "matplotlib", "tqdm", "expecttest", "hypothesis")
OP_TESTS = "noise,dropout,sample_weights,kl_divergence,bbb,lrt,flipout,conv_transpose"
# torch's CUDA build takes 5 GB with what it needs, and half as much again while it is unpacked.
NEEDED_BYTES = 10 << 30


def run(*command: object, quiet: bool = True, **options: Any) -> str:
    """Runs a command and returns what it printed; stops with that if it fails."""
    pipe = subprocess.PIPE if quiet else None
    words = [str(c) for c in command]
    done = subprocess.run(words, text=True, stdout=pipe, stderr=subprocess.STDOUT, check=False, **options)
    if done.returncode:
        raise SystemExit(f"{done.stdout or ''}\n{Path(sys.argv[0]).name}: failed: {' '.join(words)}")
    return done.stdout or ""


def long_run(title: str, *command: object, **options: Any) -> None:
    """Runs a command that takes long, and says what it does meanwhile."""
    run(sys.executable, ROOT / ".ci" / "progress.py", title, *command, quiet=False, **options)


def environment(folder: Path, torch: str, *packages: str) -> Path:
    """The Python of a virtual environment in this folder, with the torch that is required and packages."""
    python = folder / "bin" / "python"
    if not (folder / ".ready").exists():
        if shutil.disk_usage(folder.parent).free < NEEDED_BYTES:
            raise SystemExit(f"{torch} needs {NEEDED_BYTES >> 30} GiB of disk, in {folder}")
        run(sys.executable, "-m", "venv", "--clear", folder)
        # Whatever release the machine keeps others to.
        unconstrained = {**os.environ, "PIP_CONSTRAINT": os.devnull}
        long_run(f"installing {torch}", python, "-m", "pip", "install", "-q", torch, env=unconstrained)
        run(python, "-m", "pip", "install", "-q", *packages)
        (folder / ".ready").touch()
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
