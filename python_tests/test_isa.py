"""The instruction sets of the CPU kernels: they agree up to rounding, and are chosen or refused clearly."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch
from helpers import DTYPES, KERNELS, kernels
from torch import Tensor

import bbb_fast
from bbb_fast import _backend, layers

pytestmark = [
    pytest.mark.usefixtures("native"),
    pytest.mark.cpu_only("instruction sets of the CPU kernels"),
]

F32, F64, BF16, F16 = DTYPES
ALL = ("base", "avx2", "avx512")


def set_isa(name: str) -> None:
    _backend._C.set_isa(name)


def current() -> str:
    return bbb_fast.build_info()["extension"]["instruction_set"]


def available() -> list[str]:
    """The instruction sets this CPU and this build have, whichever is in use."""
    if _backend._C is None:
        return []
    before = current()
    set_isa("auto")
    best = current()
    set_isa(before)
    return list(ALL[: ALL.index(best) + 1])


AVAILABLE = available()
several = pytest.mark.skipif(len(AVAILABLE) < 2, reason=f"nothing to compare: {AVAILABLE} alone")

# Two results that each round a float32 computation: a few units in the last place of the summands, which
# are about 1 in float32, and then one of the narrower type. float64's noise is float32's.
TOLERANCE: dict[torch.dtype, dict[str, Any]] = {
    F32: {"rtol": 1e-6, "atol": 1e-6},
    F64: {"rtol": 1e-6, "atol": 1e-6},
    BF16: {"rtol": 2**-7, "atol": 1e-6},
    F16: {"rtol": 2**-10, "atol": 1e-6},
}


def assert_agree(results: dict[str, list[Tensor]]) -> None:
    expected = results["base"]
    for name, result in results.items():
        for k, (a, b) in enumerate(zip(result, expected, strict=True)):
            assert a.dtype == b.dtype
            where = f"result {k} on {name} and base"
            torch.testing.assert_close(a, b, **TOLERANCE[a.dtype], msg=partial("{}: {}".format, where))


@several
@pytest.mark.parametrize("count", [1, 3, 17, 63, 65, 4095, 12_301])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", KERNELS)
def test_ops_agree(isa_restored: None, name: str, dtype: torch.dtype, count: int) -> None:
    """Forward and backward ops, on tiles that are whole, cut short, and alone."""
    for other in DTYPES:
        kernel = kernels(count, dtype, other)[name]
        results = {}
        for isa in AVAILABLE:
            set_isa(isa)
            results[isa] = kernel()
        assert_agree(results)


LAYERS = {
    "linear": (lambda family, **o: family.BBBLinear(37, 19, **o), (5, 37)),
    "conv2d": (lambda family, **o: family.BBBConv2d(3, 5, 3, padding=1, **o), (3, 3, 9, 7)),
    "conv1d": (lambda family, **o: family.BBBConv1d(4, 6, 4, stride=2, groups=2, **o), (2, 4, 11)),
}


@several
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("family", ["BBB", "BBB_LRT"])
def test_layers_agree(isa_restored: None, family: str, kind: str, dtype: torch.dtype) -> None:
    """Output, KL and every gradient of whole layers."""
    make, shape = LAYERS[kind]
    layer = make(getattr(layers, family), dtype=dtype)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    results = {}
    for isa in AVAILABLE:
        set_isa(isa)
        torch.manual_seed(7)
        y, kl = layer(x), layer.kl_loss()
        gradients = torch.autograd.grad(y.square().mean() + kl / 1000, [x, *layer.parameters()])
        results[isa] = [y.detach(), kl.detach(), *gradients]
    assert_agree(results)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", KERNELS)
def test_thread_count_changes_no_bit(isa: str, threads: None, name: str, dtype: torch.dtype) -> None:
    kernel = kernels(100_003, dtype, BF16 if dtype == F32 else dtype)[name]
    results = []
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        results.append(kernel())
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@pytest.mark.parametrize("name", AVAILABLE)
def test_is_reported(isa_restored: None, name: str) -> None:
    set_isa(name)
    assert current() == name


def test_auto_is_the_best(isa_restored: None) -> None:
    """PyTorch looks at the CPU for itself; its kernels' names are in capitals."""
    set_isa("auto")
    built = bbb_fast.build_info()["extension"]["instruction_sets"].split()
    found = torch.backends.cpu.get_cpu_capability().lower()
    assert current() == (found if found in built else "base")


def test_unknown_is_refused(isa_restored: None) -> None:
    before = current()
    with pytest.raises(ValueError, match="unknown instruction set 'mmx'; allowed: auto, base, avx2, avx512"):
        set_isa("mmx")
    assert current() == before


@pytest.mark.skipif(len(AVAILABLE) == len(ALL), reason="this CPU has every instruction set")
def test_what_the_cpu_lacks_is_refused(isa_restored: None) -> None:
    before = current()
    for name in ALL[len(AVAILABLE) :]:
        with pytest.raises(ValueError, match=f"'{name}' is not available .* the best is '{AVAILABLE[-1]}'"):
            set_isa(name)
    assert current() == before


def started_with(value: str) -> subprocess.CompletedProcess[str]:
    """A process that imports the package under BBB_FAST_ISA and prints the instruction set in use."""
    show = "import bbb_fast; print(bbb_fast.build_info()['extension']['instruction_set'])"
    return subprocess.run(
        [sys.executable, "-c", show],
        env={**os.environ, "BBB_FAST_ISA": value},
        capture_output=True,
        text=True,
        check=False,
    )


def test_environment_chooses() -> None:
    assert started_with("base").stdout == "base\n"


def test_environment_is_checked() -> None:
    process = started_with("mmx")
    assert process.returncode != 0
    assert "ValueError: BBB_FAST_ISA: unknown instruction set 'mmx'; allowed: auto" in process.stderr
