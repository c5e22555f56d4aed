"""What setup.py decides to build, and the check of compiled kernels; nothing is compiled here."""

from __future__ import annotations

import importlib
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import setuptools
import torch
from helpers import repository_root

import bbb_fast

pytestmark = pytest.mark.cpu_only("about building")

ROOT = repository_root()
VARIABLES = ("BBB_FAST_NO_CUDA", "FORCE_CUDA", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH")


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The functions of setup.py, in an environment that asks for nothing, with something for a compiler."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CXX", sys.executable)
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    monkeypatch.setenv("BBB_FAST_NO_EXT", "1")
    names = runpy.run_path(str(ROOT / "setup.py"))
    monkeypatch.delenv("BBB_FAST_NO_EXT")
    return SimpleNamespace(**names)


def toolkit(folder: Path, release: str, known: str) -> Path:
    """A folder that looks like a CUDA toolkit, whose compiler says these things of itself."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        "#!/bin/sh\n"
        f'case "$1" in --version) echo "Cuda compilation tools, release {release}, V{release}.1";;\n'
        f'--list-gpu-arch) echo "{known}";;\n'
        f'--dryrun) echo "#\\$ TOP={folder}/bin/.." >&2;; esac\n'
    )
    nvcc.chmod(0o755)
    (folder / "include").mkdir()
    (folder / "include" / "cuda_runtime.h").touch()
    return folder


class TestCuda:
    def test_torch_without_cuda(self, build: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.version, "cuda", None)
        assert "is not a CUDA build" in build.why_no_cuda()
        monkeypatch.setenv("FORCE_CUDA", "1")
        with pytest.raises(SystemExit, match="FORCE_CUDA=1, but torch .* is not a CUDA build"):
            build.why_no_cuda()

    def test_another_major_version(
        self, build: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "kit", "12.4", "compute_80")))
        reason = build.why_no_cuda()
        assert "toolkit is 12.4" in reason and "13.0" in reason

    def test_builds_with_a_fitting_toolkit(
        self, build: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(torch.version, "cuda", "13.2")
        monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "kit", "13.0", "compute_80")))
        assert build.why_no_cuda() is None
        record = build.build_record()
        assert record["devices"] == "cpu,cuda" and record["cuda_toolkit"] == "13.0"

    def test_an_explicit_no(self, build: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
        """It counts even beside FORCE_CUDA."""
        monkeypatch.setenv("BBB_FAST_NO_CUDA", "1")
        monkeypatch.setenv("FORCE_CUDA", "1")
        assert build.why_no_cuda() == "it was built with BBB_FAST_NO_CUDA=1"
        assert build.build_record()["devices"] == "cpu"

    def test_the_compiler_on_the_path_says_where_it_lives(
        self, build: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """nvcc on PATH may be a link from a folder that holds nothing else."""
        kit = toolkit(tmp_path / "kit", "13.0", "compute_80")
        (tmp_path / "links").mkdir()
        (tmp_path / "links" / "nvcc").symlink_to(kit / "bin" / "nvcc")
        monkeypatch.setenv("PATH", str(tmp_path / "links"), prepend=":")
        assert build.find_toolkit() == kit

    def test_architectures(
        self, build: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """What is asked for, or of the GPUs at hand, or two; as far as the compiler knows them."""
        kit = toolkit(tmp_path / "kit", "12.4", "compute_75 compute_80 compute_86 compute_89 compute_90")
        old = toolkit(tmp_path / "old", "11.4", "compute_75 compute_80")
        odd = toolkit(tmp_path / "odd", "12.4", "")
        gpus: list[tuple[int, int]] = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: gpus[i])
        assert build.architectures(kit) == build.architectures(odd) == "8.0;9.0+PTX"
        assert build.architectures(old) == "8.0+PTX"
        gpus[:] = [(9, 0), (8, 6), (8, 6)]
        assert build.architectures(kit) == "8.6;9.0+PTX"
        gpus[:] = [(12, 0)]  # newer than the compiler
        assert build.architectures(kit) == "8.0;9.0+PTX"
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5 9.0")
        assert build.architectures(kit) == "7.5;9.0"

    def test_what_is_going_on_is_announced(
        self, build: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
        monkeypatch.delenv("MAX_JOBS", raising=False)
        monkeypatch.setattr(shutil, "which", lambda name: name)
        sources = len([*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")])
        text = build.announcement({})
        assert f"compiling {sources} C++ files, 8 at a time (MAX_JOBS): about 1 minute" in text
        for asked, used in (("2", 2), ("100", 8), ("0", 1), ("many", 8)):
            monkeypatch.setenv("MAX_JOBS", asked)
            assert f", {used} at a time" in build.announcement({})
        monkeypatch.setenv("MAX_JOBS", "1")
        kernels = len([*ROOT.glob("csrc/cuda/*.cu")])
        few, many = (build.announcement({"cuda_architectures": a}) for a in ("9.0", "8.0 9.0 10.0+PTX"))
        assert f"and {kernels} CUDA files for 9.0, 1 at a time" in few
        minutes = [int(text.split("about ")[1].split()[0]) for text in (few, many)]
        assert minutes[1] - minutes[0] == pytest.approx(2 * kernels * build.ARCHITECTURE_SECONDS / 60, abs=1)
        monkeypatch.delenv("MAX_JOBS")
        monkeypatch.setattr(shutil, "which", lambda name: None)
        assert ", 1 at a time (ninja is not installed)" in build.announcement({})

    def test_ninja_beside_the_interpreter_is_found(
        self, build: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """Of a virtual environment that is not activated; what PATH has comes first."""
        (tmp_path / "ninja").touch(mode=0o755)
        monkeypatch.setenv("PATH", "/first")
        monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
        build.show_ninja()
        assert os.environ["PATH"].startswith(f"/first{os.pathsep}{tmp_path}")
        assert shutil.which("ninja") == str(tmp_path / "ninja")

    def test_every_kernel_of_the_cpu_has_one_for_cuda(self) -> None:
        """An op gets both, or neither; without CUDA it gets a clear error."""

        def ops(pattern: str) -> set[str]:
            return {path.stem for path in ROOT.glob(pattern)}

        not_of_an_op = {"isa", "direct_conv", "conv_by_pixels", "matrix_product"}
        assert ops("csrc/cuda/*.cu") == ops("csrc/cpu/*.cpp") - not_of_an_op
        text = (ROOT / "csrc" / "without_cuda.cpp").read_text()
        for source in ROOT.glob("csrc/cuda/*.cu"):
            for line in source.read_text().splitlines():
                if "m.impl(" in line:
                    assert line.split('"')[1] in text


class TestReference:
    """Installing without the extension."""

    def test_asked_for(self, build: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("BBB_FAST_NO_EXT", "1")
        record = build.build_record()
        assert record["native"] is False and record["reference_asked_for"] is True

    def test_no_compiler(
        self, build: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """Nobody asked for that, and the user will be told."""
        monkeypatch.setenv("CXX", " ")
        monkeypatch.setenv("PATH", str(tmp_path))
        record = build.build_record()
        assert record["native"] is False and "reference_asked_for" not in record
        assert record["reason"].startswith("no C++ compiler was found at installation (looked for c++, g++")
        monkeypatch.setenv("FORCE_CUDA", "1")
        with pytest.raises(SystemExit, match="FORCE_CUDA=1, but no C"):
            build.build_record()


def run_setup(root: Path, *command: str | Path, **environment: str) -> None:
    """Runs commands of setup.py that compile nothing."""
    subprocess.run(
        [sys.executable, "-W", "ignore", "setup.py", "-q", *map(str, command)],
        cwd=root, check=True, capture_output=True, timeout=120,
        env={**os.environ, "BBB_FAST_NO_EXT": "1", **environment},
    )  # fmt: skip


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, unpacked."""
    folder = tmp_path_factory.mktemp("sources")
    run_setup(ROOT, "egg_info", "--egg-base", folder, "sdist", "-d", folder, "--formats=tar")
    shutil.unpack_archive(next(folder.glob("*.tar")), folder)
    return next(folder.glob("*/setup.py")).parent


def files_of(root: Path, *folders: str) -> set[str]:
    """The names of files of a tree, without what building and running leave there."""
    left = (".so", ".pyc", "_build_info.json")
    found = {path for folder in folders for path in (root / folder).rglob("*") if path.is_file()}
    found |= {path for pattern in ("*.md", "*.py", "*.toml", "*.yml") for path in root.glob(pattern)}
    found |= {
        root / name
        for name in ("CITATION.cff", "CMakeLists.txt", "LICENSE", "Makefile", ".clang-format", ".gitignore")
    }
    return {path.relative_to(root).as_posix() for path in found if not path.name.endswith(left)}


class TestSourceDistribution:
    def test_is_complete(self, sources: Path) -> None:
        """It has what building, testing and the documents need, and nothing that was built here."""
        folders = ("bbb_fast", "csrc", "python_tests", "benchmarks", "docs", ".ci")
        assert files_of(sources, *folders) == files_of(ROOT, *folders)
        assert all((sources / name).is_file() for name in files_of(sources))
        assert not [path for path in sources.rglob("*") if path.name.endswith((".so", "_build_info.json"))]

    def test_a_wheel_of_it_has_a_name_of_its_own(
        self, sources: Path, build: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """In its version, and in the record that the loader reads."""
        run_setup(sources, "egg_info", "--egg-base", tmp_path, BBB_FAST_WHEEL="pt214cpu")
        text = (tmp_path / "bbb_fast.egg-info" / "PKG-INFO").read_text()
        assert f"\nVersion: {bbb_fast.__version__}+pt214cpu\n" in text
        assert "wheel" not in build.build_record()
        monkeypatch.setenv("BBB_FAST_WHEEL", "pt214cpu")
        assert build.build_record()["wheel"] == "pt214cpu"
        for wrong in ("pt214 cpu", "+pt214", "PT214", "pt..cpu"):
            monkeypatch.setenv("BBB_FAST_WHEEL", wrong)
            with pytest.raises(SystemExit, match=re.escape(repr(wrong))):
                build.build_record()


REPORT = """ptxas info    : Compiling entry function '_Z1aPf' for 'sm_80'
ptxas info    : Function properties for _Z1aPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers
ptxas info    : Compiling entry function '_Z1bPf' for 'sm_80'
ptxas info    : Function properties for _Z1bPf
    16 bytes stack frame, {spill} bytes spill stores, {spill} bytes spill loads
ptxas info    : Used 96 registers, used 1 barriers, 64 bytes smem
"""


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in .ci can be imported."""
    monkeypatch.syspath_prepend(ROOT / ".ci")


@pytest.fixture
def cuda_check(scripts: None) -> ModuleType:
    return importlib.import_module("cuda_check")


class TestReport:
    def test_registers_are_listed(self, cuda_check: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
        cuda_check.report(REPORT.format(spill=0), ["8.0"])
        printed = capsys.readouterr().out
        assert "40" in printed and "96" in printed and "2 kernels, no spills" in printed

    def test_a_spill_fails(self, cuda_check: ModuleType) -> None:
        with pytest.raises(SystemExit, match="spill:\n.*b.* for sm_80: 16 bytes"):
            cuda_check.report(REPORT.format(spill=8), ["8.0"])

    def test_a_missing_architecture_fails(self, cuda_check: ModuleType) -> None:
        with pytest.raises(SystemExit, match="no kernel was compiled for sm_90"):
            cuda_check.report(REPORT.format(spill=0), ["8.0", "9.0"])


class TestReleases:
    """Which releases of torch are promised, and what CI tests of them."""

    def test_ci_has_the_oldest_and_the_newest(self) -> None:
        oldest = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
        text = (ROOT / ".ci" / "run").read_text()
        assert oldest and f"--torch {oldest[1]}." in text
        assert "make wheels TORCH=newest" in text

    def test_the_citation_has_the_version(self) -> None:
        assert f"\nversion: {bbb_fast.__version__}\n" in (ROOT / "CITATION.cff").read_text()

    def test_wheels_are_for_four_in_a_row(self, scripts: None) -> None:
        supported = importlib.import_module("wheels").SUPPORTED
        minor = [int(release.split(".")[1]) for release in supported]
        assert minor == list(range(minor[0], minor[0] + 4))
        whole = re.search(r"torch==([\d.]+)", (ROOT / "Makefile").read_text())
        assert whole and whole[1] in supported

    def test_names_of_tests(self, scripts: None) -> None:
        tests_of = importlib.import_module("environments").tests_of
        assert tests_of("all", ROOT) == [ROOT / "python_tests"]
        found = tests_of("ops,layers", ROOT)
        assert found[-1] == ROOT / "python_tests" / "test_layers.py" and len(found) > 5
        assert all(path.is_file() for path in found)
