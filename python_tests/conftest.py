"""Options and fixtures: on which device, implementation, instruction set and threads a test runs.

``--device cuda`` puts every tensor that a test makes on the GPU. ``--kernels-on-cpu LIBRARY`` loads the CUDA
kernels compiled as C++, which run block by block on the CPU in place of the CPU kernels; so the tests of the
ops test the text of the CUDA kernels where there is no GPU.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import browser
import helpers
import pytest
import torch

import bbb_fast
from bbb_fast import _backend

NATIVE = _backend.native_available()

# A run that is about the kernels of one instruction set; the reference has none.
ONE_ISA = NATIVE and os.environ.get("BBB_FAST_ISA", "auto") not in ("", "auto")

# One thread, here and in the processes tests start: on a small busy machine a second one waits more than
# it works. Tests of threads set their own number.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

# Processes that tests start import the package that is tested here, in whatever folder they start.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(helpers.PACKAGE.parent), os.environ.get("PYTHONPATH")])
)

_device = pytest.StashKey[str]()
_launched_before = pytest.StashKey[int]()
_launched_by_workers = pytest.StashKey[int]()


def _instruction_sets(config: pytest.Config) -> list[str | None]:
    """What the ``isa`` fixture goes through: None where there is only one set of kernels."""
    if _backend._C is None or config.stash[_device] == "cuda" or _launched_before in config.stash:
        return [None]
    names: list[str | None] = ["base", "avx2", "avx512"]
    best = names.index(_backend._C.build_info()["instruction_set"])
    return names[best : best + 1] if ONE_ISA else names[: best + 1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="also run the tests marked slow")
    parser.addoption(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where the tests' tensors are (default: cpu)"
    )
    parser.addoption(
        "--kernels-on-cpu",
        metavar="LIBRARY",
        help="run the CUDA kernels' source on the CPU: the shared library they were compiled to",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cpu_only(reason): skipped with --device cuda")
    config.addinivalue_line("markers", "inductor: skipped without a compiler for what inductor writes")
    config.addinivalue_line("markers", "cuda_only: skipped without --device cuda")
    config.addinivalue_line("markers", "blocks_only: skipped without --kernels-on-cpu")
    config.addinivalue_line("markers", "kernels: skipped without either, for the CUDA kernels' text")
    config.stash[_device] = config.getoption("--device")
    library = config.getoption("--kernels-on-cpu")
    if config.stash[_device] == "cuda":
        if library:
            raise pytest.UsageError("--kernels-on-cpu takes the GPU's place: leave out --device cuda")
        _use_cuda()
    if library:
        _replace_kernels(config, library)


def _use_cuda() -> None:
    if not torch.cuda.is_available():
        raise pytest.UsageError(f"--device cuda: PyTorch {torch.__version__} finds no CUDA device here")
    if NATIVE and "cuda" not in _backend._device_types:
        raise pytest.UsageError(
            f"--device cuda: the extension has kernels for {', '.join(sorted(_backend._device_types))} only; "
            "build it with CUDA, or set BBB_FAST_NO_EXT=1 to test the reference path on the GPU"
        )
    # Library products that repeat bit for bit and round like float32's.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    helpers.DEVICE = torch.device("cuda", torch.cuda.current_device())
    torch.set_default_device(helpers.DEVICE)


@contextmanager
def _without_override_warning() -> Iterator[None]:
    """Drops PyTorch's message that a kernel is replaced; it goes past Python to the process's stderr."""
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as caught:
        os.dup2(caught.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            caught.seek(0)
            text = caught.read()
            if b"verriding a previously registered kernel" not in text:
                os.write(2, text)


def _replace_kernels(config: pytest.Config, library: str) -> None:
    if not NATIVE:
        raise pytest.UsageError(f"--kernels-on-cpu: no extension ({_backend.why_not_native()})")
    try:
        with _without_override_warning():
            torch.ops.load_library(os.path.abspath(library))
        launches = torch.ops.bbb_fast_blocks.launches
        for name, kernel in helpers.kernels(5, torch.float32, torch.float32).items():
            before = launches()
            kernel()
            if launches() == before:
                raise pytest.UsageError(f"--kernels-on-cpu: {library} does not replace {name}")
    except (OSError, AttributeError) as error:
        raise pytest.UsageError(f"--kernels-on-cpu: {library}: {error}") from error
    config.stash[_launched_before] = launches()


def _launches(config: pytest.Config) -> int:
    """Launches by the tests since the library was loaded, those of worker processes included."""
    own = torch.ops.bbb_fast_blocks.launches() - config.stash[_launched_before]
    return own + config.stash.get(_launched_by_workers, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """A worker of pytest-xdist has ended: what it counted."""
    counted = getattr(node, "workeroutput", {}).get("launches", 0)
    stash = node.config.stash
    stash[_launched_by_workers] = stash.get(_launched_by_workers, 0) + counted


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A run with replaced kernels that never reached them must not pass."""
    config = session.config
    if hasattr(config, "workeroutput"):
        if _launched_before in config.stash:
            config.workeroutput["launches"] = _launches(config)
        return
    if _launched_before in config.stash and not config.option.collectonly and _launches(config) == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    path = "native" if NATIVE else f"reference ({_backend.why_not_native()})"
    terminalreporter.write_line(f"tested: {helpers.PACKAGE}, torch {torch.__version__}, {path}")
    if config.stash[_device] == "cuda":
        native = "native kernels and reference" if NATIVE else "reference alone"
        terminalreporter.write_line(f"on {torch.cuda.get_device_name(helpers.DEVICE)}: {native}")
    if _launched_before in config.stash:
        count = _launches(config)
        terminalreporter.write_line(f"launches of the CUDA kernels on the CPU: {count}")
        if count == 0 and not config.option.collectonly:
            terminalreporter.write_line("ERROR: no test reached the kernels this run is about", red=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    cuda, blocks = config.stash[_device] == "cuda", _launched_before in config.stash

    def skip(item: pytest.Item, reason: str) -> None:
        item.add_marker(pytest.mark.skip(reason=reason))

    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        if "slow" in item.keywords and not config.getoption("--run-slow"):
            skip(item, "slow: run with --run-slow")
        if "native" in fixtures and not NATIVE:
            skip(item, f"native extension: {_backend.why_not_native()}")
        if helpers.COMPILER is None and item.get_closest_marker("inductor"):
            skip(item, "inductor needs a C++ compiler")
        if cuda and "threads" in fixtures:
            skip(item, "threads of the CPU kernels")
        if cuda and (marker := item.get_closest_marker("cpu_only")):
            skip(item, f"only on the CPU: {marker.args[0]}")
        if not cuda and item.get_closest_marker("cuda_only"):
            skip(item, "needs a GPU: run with --device cuda")
        if not (cuda or blocks) and item.get_closest_marker("kernels"):
            skip(item, "about the CUDA kernels: run with --device cuda or --kernels-on-cpu")
        if not blocks and item.get_closest_marker("blocks_only"):
            skip(item, "needs the CUDA kernels as a CPU library: run with --kernels-on-cpu")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        names = ["reference", "native"] if NATIVE else ["reference"]
        # Runs that are about other kernels leave out what does not call them.
        if ONE_ISA or _launched_before in metafunc.config.stash:
            names = ["native"]
        metafunc.parametrize("backend", names, indirect=True)
    if "isa" in metafunc.fixturenames:
        sets = _instruction_sets(metafunc.config)
        metafunc.parametrize("isa", sets, indirect=True, ids=[name or "only" for name in sets])


@pytest.fixture(autouse=True)
def seed() -> None:
    """A test draws the same numbers alone, among others, and in another order."""
    torch.manual_seed(0)


@pytest.fixture
def device() -> torch.device:
    """Where the tests' tensors are, as ``helpers.DEVICE``."""
    return helpers.DEVICE


@pytest.fixture
def native() -> None:
    """The test needs the native extension (skipped where it is not loaded)."""


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test on each implementation that is there."""
    bbb_fast.set_backend(request.param)
    yield request.param
    bbb_fast.set_backend("auto")


@pytest.fixture
def isa_restored(native: None) -> Iterator[None]:
    """Restores the instruction set, which need not be the best one: BBB_FAST_ISA."""
    before = _backend._C.build_info()["instruction_set"]
    yield
    _backend._C.set_isa(before)


@pytest.fixture
def isa(request: pytest.FixtureRequest, isa_restored: None) -> str | None:
    """Runs the test on each instruction set this CPU has; once where others than its kernels run."""
    if request.param is not None:
        _backend._C.set_isa(request.param)
    return request.param


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def processes() -> ForkServerContext:
    """Starts processes in a moment: forks of one that has imported what takes long, and run nothing."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("needs a system that forks processes")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["bbb_fast.cli", "bbb_fast.experiments.plots", "matplotlib.pyplot", "pytest", "sklearn.datasets"]
    )
    waits_for_the_imports = context.Process(target=int)
    waits_for_the_imports.start()
    waits_for_the_imports.join()
    return context


@pytest.fixture(scope="session")
def opened() -> Iterator[browser.Browser]:
    """A headless Chromium, for the pages that are made here."""
    program = browser.find()
    if program is None or os.name != "posix":
        pytest.skip("needs Chromium (Debian: apt-get install chromium), or CHROMIUM=its path")
    # Of its own: the browser may still write to it when the test is over.
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
        browser.Browser(program, Path(profile)) as running,
    ):
        yield running
