"""Choosing an implementation, and what happens where the extension is missing or does not fit."""

from __future__ import annotations

import importlib
import importlib.machinery
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PACKAGE

import bbb_fast
from bbb_fast import _backend, functional
from bbb_fast.layers import BBB

pytestmark = pytest.mark.cpu_only("about loading and choosing, not about devices")


@pytest.fixture(autouse=True)
def automatic() -> Iterator[None]:
    yield
    bbb_fast.set_backend("auto")


def run(code: str, root: Path = PACKAGE.parent, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs Python code in a fresh process that finds the package below ``root``."""
    variables = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=variables, cwd=root, capture_output=True, text=True, timeout=120)


class TestChoice:
    def test_reference(self) -> None:
        bbb_fast.set_backend("reference")
        assert bbb_fast.backend() == "reference"
        assert bbb_fast.build_info()["backend"] == "reference"
        assert not _backend.use_native(torch.device("cpu"))

    def test_auto(self) -> None:
        bbb_fast.set_backend("auto")
        assert bbb_fast.backend() == ("native" if _backend.native_available() else "reference")
        assert _backend.use_native(torch.device("cpu")) == _backend.native_available()
        # A device type nobody built kernels for.
        assert not _backend.use_native(torch.device("xla"))

    def test_native(self, native: None) -> None:
        bbb_fast.set_backend("native")
        assert bbb_fast.backend() == "native" and _backend.use_native(torch.device("cpu"))
        with pytest.raises(RuntimeError, match="no kernels for device type 'xla'"):
            _backend.use_native(torch.device("xla"))

    def test_decides_what_runs(self, native: None) -> None:
        """Autograd nodes tell the two apart."""
        layer: Any = BBB.BBBLinear(3, 2)
        bbb_fast.set_backend("native")
        assert "kl_backward" in layer.kl_loss().grad_fn.name()
        bbb_fast.set_backend("reference")
        assert "kl_backward" not in layer.kl_loss().grad_fn.name()

    @pytest.mark.parametrize("name", ["cuda", "", "Native", None, 1, True])
    def test_unknown(self, name: Any) -> None:
        bbb_fast.set_backend("reference")
        with pytest.raises(ValueError, match="unknown backend") as caught:
            bbb_fast.set_backend(name)
        assert "auto, native, reference" in str(caught.value)
        assert bbb_fast.backend() == "reference"  # the choice stands

    def test_native_where_it_is_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_backend, "_C", None)
        monkeypatch.setattr(_backend, "_why_not", "no compiler was found")
        with pytest.raises(RuntimeError, match="not available: no compiler was found"):
            bbb_fast.set_backend("native")
        bbb_fast.set_backend("auto")
        assert bbb_fast.backend() == "reference"
        assert bbb_fast.build_info()["native"] is False
        assert bbb_fast.build_info()["reason"] == "no compiler was found"
        assert functional.normal(3, torch.tensor([1, 2])).shape == (3,)

    def test_both_give_the_same_layer(self, native: None) -> None:
        layer, x = BBB.BBBLinear(6, 5), torch.randn(4, 6)
        results = []
        for name in ("native", "reference"):
            bbb_fast.set_backend(name)
            torch.manual_seed(1)
            results.append(layer(x))
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


class TestBuildInfo:
    def test_keys(self) -> None:
        info = bbb_fast.build_info()
        assert {"bbb_fast", "torch", "backend", "native", "reason", "build", "threads"} <= info.keys()
        assert info["bbb_fast"] == bbb_fast.__version__ and info["torch"] == torch.__version__
        assert info["threads"] == torch.get_num_threads()
        assert (info["reason"] is None) == info["native"]
        json.dumps(info)

    def test_extension(self, native: None) -> None:
        info = bbb_fast.build_info()
        assert {"devices", "torch", "compiler", "instruction_set"} <= info["extension"].keys()
        assert "cpu" in info["extension"]["devices"].split(",")
        assert info["extension"]["torch"].split(".")[:2] == torch.__version__.split(".")[:2]

    def test_is_a_copy(self) -> None:
        bbb_fast.build_info()["build"]["torch"] = "0.1"
        bbb_fast.build_info().clear()
        assert bbb_fast.build_info()["build"].get("torch") != "0.1"


class TestLoading:
    """_load, which runs at import: the module or None, and the reason."""

    @pytest.fixture(autouse=True)
    def no_variable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("BBB_FAST_NO_EXT", raising=False)

    def record(self, monkeypatch: pytest.MonkeyPatch, **record: Any) -> None:
        monkeypatch.setattr(_backend, "read_build_record", lambda: record)

    def importing(self, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
        def fail(name: str) -> None:
            raise error

        monkeypatch.setattr(importlib, "import_module", fail)

    def refused(self, reason: str) -> None:
        module, said = _backend._load()
        assert module is None and said is not None and said.startswith(reason) and "\n" not in said

    def test_another_torch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Not even tried: it may import and crash later."""
        self.record(monkeypatch, native=True, reason=None, torch="1.4.0+cu92")
        self.importing(monkeypatch, AssertionError("must not import"))
        module, reason = _backend._load()
        assert module is None and reason is not None
        assert f"the extension was built for torch 1.4 and this is torch {torch.__version__};" in reason
        assert "`pip install --no-build-isolation" in reason and "\n" not in reason

    def test_a_wheel_names_the_one_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.record(monkeypatch, native=True, reason=None, torch="1.13.1+cu117", wheel="pt113cpu")
        self.importing(monkeypatch, AssertionError("must not import"))
        monkeypatch.setattr(torch, "__version__", "2.15.0+cu130")
        assert _backend._load() == (
            None,
            "this wheel (+pt113cpu) was built for torch 1.13 and this is torch 2.15.0+cu130; "
            f"install bbb_fast-{bbb_fast.__version__}+pt215cpu, if there is such a wheel, or from source",
        )

    @pytest.mark.parametrize("suffix", ["", "+cpu", "+cu130"])
    def test_a_patch_release_is_no_other_torch(self, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
        major, minor, *_ = torch.__version__.split("+")[0].split(".")
        self.record(monkeypatch, native=True, reason=None, torch=f"{major}.{minor}.99{suffix}")
        monkeypatch.setattr(importlib, "import_module", lambda name: name)
        assert _backend._load() == ("bbb_fast._C", None)

    def test_broken(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.record(monkeypatch, native=True, reason=None, torch=torch.__version__)
        self.importing(monkeypatch, ImportError("undefined symbol: _ZN3c10"))
        self.refused("the extension failed to load: undefined symbol: _ZN3c10; build it again")

    def test_something_it_needs_is_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.record(monkeypatch, native=True, reason=None, torch=torch.__version__)
        self.importing(monkeypatch, ModuleNotFoundError("No module named 'x'", name="x"))
        self.refused("the extension failed to load: No module named 'x'; build it again")

    def test_of_another_python(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.record(monkeypatch, native=True, reason=None, torch=torch.__version__)
        self.importing(monkeypatch, ModuleNotFoundError("none", name="bbb_fast._C"))
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        self.refused(f"the extension has no file here for Python {python}; build it again")
        self.record(monkeypatch, native=True, reason=None, torch="2.15.0", wheel="pt215cpu")
        monkeypatch.setattr(torch, "__version__", "2.15.1+cpu")
        self.refused(
            f"this wheel (+pt215cpu) has no file here for Python {python}; install it again, or from"
        )

    def test_not_built(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """An older extension that still lies there is not taken: nobody knows what it was built for."""
        self.importing(monkeypatch, AssertionError("must not import"))
        self.record(monkeypatch, native=False, reason="no C++ compiler was found", torch="2.0")
        assert _backend._load() == (None, "no C++ compiler was found")
        self.record(monkeypatch)
        assert _backend._load() == (None, "the extension was not built")
        self.record(monkeypatch, native=True, torch=1.4)
        self.refused("the extension was built for torch 1.4 ")

    @pytest.mark.parametrize("value", ["1", "true", "YES", " on "])
    def test_switched_off(self, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
        monkeypatch.setenv("BBB_FAST_NO_EXT", value)
        self.importing(monkeypatch, AssertionError("must not import"))
        assert _backend._load() == (None, "BBB_FAST_NO_EXT is set")

    @pytest.mark.parametrize("value", ["0", "", "false", "No", "off"])
    def test_not_switched_off(self, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
        monkeypatch.setenv("BBB_FAST_NO_EXT", value)
        self.record(monkeypatch, native=True, torch=torch.__version__)
        monkeypatch.setattr(importlib, "import_module", lambda name: name)
        assert _backend._load() == ("bbb_fast._C", None)

    @pytest.mark.parametrize("text", ["", "{", "\x00", "[1]", "null", '"native"'])
    def test_unreadable_record(self, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
        monkeypatch.setattr(Path, "read_text", lambda self: text)
        assert _backend.read_build_record() == {}

    def test_no_record(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def missing(self: Path) -> str:
            raise FileNotFoundError

        monkeypatch.setattr(Path, "read_text", missing)
        assert _backend.read_build_record() == {}


USE = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import bbb_fast
    import torch
    from bbb_fast.models import BBBLeNet
    y, kl = BBBLeNet(10, 1)(torch.randn(2, 1, 32, 32))
    (y.square().sum() + kl).backward()
    bbb_fast.set_backend("auto")
    bbb_fast.predict(BBBLeNet(10, 1), torch.randn(2, 1, 32, 32), 2)
ours = [w for w in caught if "bbb_fast" in str(w.message)]
print(len(ours), *{(w.category.__name__, w.filename) for w in ours}, bbb_fast.backend())
print(*(w.message for w in ours))
try:
    bbb_fast.set_backend("native")
except RuntimeError as error:
    print("RuntimeError", error)
"""


def test_without_the_extension() -> None:
    """Everything works, and whoever asked for it is not told."""
    result = run(USE, BBB_FAST_NO_EXT="1")
    assert result.returncode == 0, result.stderr
    counts, message, error = result.stdout.splitlines()
    assert counts == "0 reference" and message == ""
    assert error.startswith("RuntimeError") and "BBB_FAST_NO_EXT is set" in error
    assert result.stderr == ""


def test_with_the_extension(native: None) -> None:
    """No warning at all."""
    result = run(USE, BBB_FAST_NO_EXT="")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[0] == "0 native"
    assert result.stderr == ""


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The package's Python files alone, in a folder."""
    for source in PACKAGE.rglob("*.py"):
        target = tmp_path / source.relative_to(PACKAGE.parent)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    return tmp_path


def test_a_broken_extension_file(copied: Path) -> None:
    """No shared library, under the name of one: the reference path, and to whoever called, once, why."""
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    (copied / "bbb_fast" / f"_C{suffix}").write_bytes(b"\x7fELF and no more")
    record = {"native": True, "reason": None, "torch": torch.__version__}
    (copied / "bbb_fast" / "_build_info.json").write_text(json.dumps(record))
    result = run(USE, copied, BBB_FAST_NO_EXT="")
    assert result.returncode == 0, result.stderr
    counts, message, _ = result.stdout.strip().splitlines()
    assert counts == "1 ('RuntimeWarning', '<string>') reference"
    assert "the extension failed to load" in message and "BBB_FAST_NO_EXT=1" in message


ERRORS = """
import warnings
import torch
warnings.simplefilter("error")
import bbb_fast
from bbb_fast.layers import BBB_Linear
print("imported")
{before}
for _ in range(2):
    try:
        BBB_Linear(3, 2)(torch.ones(1, 3))
        print("quiet")
    except RuntimeWarning as warning:
        print(warning)
"""


@pytest.mark.parametrize(
    ("record", "before", "told"),
    [
        ({"native": False, "reason": "no C++ compiler was found"}, "", True),
        ({}, "", True),
        ({"native": False, "reason": "asked", "reference_asked_for": True}, "", False),
        ({"native": False, "reason": "none"}, "bbb_fast.set_backend('reference')", False),
        (
            {"native": False, "reason": "none"},
            "warnings.filterwarnings('ignore', 'bbb_fast runs on its reference path')",
            False,
        ),
    ],
)
def test_who_is_told(copied: Path, record: dict[str, Any], before: str, told: bool) -> None:
    """Never by the import, so that `python -W error` can have it; once, by the first op."""
    (copied / "bbb_fast" / "_build_info.json").write_text(json.dumps(record))
    result = run(ERRORS.format(before=before), copied, BBB_FAST_NO_EXT="")
    assert result.returncode == 0, result.stderr
    imported, first, second = result.stdout.splitlines()
    assert (imported, second) == ("imported", "quiet")
    if told:
        assert "reference path (correct, slower)" in first
        assert record.get("reason", "the extension was not built") in first
    else:
        assert first == "quiet"


def test_compiled_code_does_not_carry_the_notice(copied: Path) -> None:
    code = (
        "import bbb_fast, torch, warnings; from bbb_fast.layers import BBB_LRT_Linear\n"
        "layer = torch.compile(BBB_LRT_Linear(3, 2), fullgraph=True, backend='eager')\n"
        "warnings.simplefilter('error', RuntimeWarning)\n"
        "print(layer(torch.ones(1, 3)).shape, bbb_fast.backend())"
    )
    result = run(code, copied, BBB_FAST_NO_EXT="")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "torch.Size([1, 2]) reference\n"
