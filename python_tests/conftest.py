"""Fixtures: which implementation, instruction set and number of threads a test runs on."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

import bbb_fast
from bbb_fast import _backend

NATIVE = _backend.native_available()

# One thread, here and in the processes tests start: on a small busy machine a second one waits more than
# it works. Tests of threads set their own number.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


def _instruction_sets() -> list[str]:
    if _backend._C is None:
        return []
    names = ["base", "avx2", "avx512"]
    return names[: names.index(_backend._C.build_info()["instruction_set"]) + 1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "slow" in item.keywords and not config.getoption("--run-slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --run-slow"))
        if "native" in getattr(item, "fixturenames", ()) and not NATIVE:
            item.add_marker(pytest.mark.skip(reason=f"native extension: {_backend.why_not_native()}"))


@pytest.fixture
def native() -> None:
    """The test needs the native extension (skipped where it is not loaded)."""


@pytest.fixture(params=["reference", *(["native"] if NATIVE else [])])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test on each implementation that is there."""
    bbb_fast.set_backend(request.param)
    yield request.param
    bbb_fast.set_backend("auto")


@pytest.fixture(params=_instruction_sets() or [None])
def isa(request: pytest.FixtureRequest, native: None) -> Iterator[str]:
    """Runs the test on each instruction set this CPU has."""
    _backend._C.set_isa(request.param)
    yield request.param
    _backend._C.set_isa("auto")


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
