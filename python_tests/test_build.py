"""What setup.py decides to build, and the check of compiled kernels; nothing is compiled here."""

from __future__ import annotations

import importlib.util
import runpy
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import setuptools
import torch

import bbb_fast

pytestmark = pytest.mark.cpu_only("about building")

ROOT = Path(bbb_fast.__file__).parents[1]
VARIABLES = ("BBB_FAST_NO_CUDA", "FORCE_CUDA", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH")


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The functions of setup.py, in an environment that asks for nothing."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
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
        assert build.why_no_cuda() == "it was installed with BBB_FAST_NO_CUDA=1"
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
        """The default ones that the compiler knows, and PTX of the last; or what is asked for."""
        kit = toolkit(tmp_path / "kit", "12.4", "compute_75 compute_80 compute_86 compute_89 compute_90")
        assert build.architectures(kit) == "8.0;8.6;8.9;9.0+PTX"
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5 9.0")
        assert build.architectures(kit) == "7.5;9.0"

    def test_every_kernel_of_the_cpu_has_one_for_cuda(self) -> None:
        """An op gets both, or neither; without CUDA it gets a clear error."""

        def ops(pattern: str) -> set[str]:
            return {path.stem for path in ROOT.glob(pattern)}

        not_of_an_op = {"isa", "direct_conv", "conv_by_pixels"}
        assert ops("csrc/cuda/*.cu") == ops("csrc/cpu/*.cpp") - not_of_an_op
        text = (ROOT / "csrc" / "without_cuda.cpp").read_text()
        for source in ROOT.glob("csrc/cuda/*.cu"):
            for line in source.read_text().splitlines():
                if "m.impl(" in line:
                    assert line.split('"')[1] in text


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
def cuda_check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cuda_check", ROOT / ".ci" / "cuda_check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
