"""The functions of the layers, put together from estimators and shapes: signatures, help, stubs, errors."""

from __future__ import annotations

import ast
import copy
import inspect
import pickle
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, cast

import pytest
import torch
from helpers import PACKAGE, linear_case, repository_root, rng

from bbb_fast import functional, reference
from bbb_fast._layer_functions import ESTIMATORS

# Their outputs are one tensor or two, by their arguments.
lrt_linear: Callable[..., Any] = functional.lrt_linear
SHAPES = ["linear", *(f"{kind}{d}d" for kind in ("conv", "conv_transpose") for d in (1, 2, 3))]
NAMES = [f"{estimator}_{shape}" for estimator in ESTIMATORS for shape in SHAPES]
OPERANDS = ["input", "W_mu", "W_rho", "bias_mu", "bias_rho", "rng"]
GEOMETRY = {
    "linear": [],
    "conv": ["stride", "padding", "dilation", "groups"],
    "conv_transpose": ["stride", "padding", "output_padding", "groups", "dilation"],
}


@pytest.mark.parametrize("name", NAMES)
def test_signatures(name: str) -> None:
    estimator, shape = name.split("_", 1)
    option = {"lrt": "variance_dtype"}.get(estimator, "recompute_weight")
    parameters = inspect.signature(getattr(functional, name)).parameters
    order = [*OPERANDS, *GEOMETRY[shape.rstrip("123d")], "prior_mu", "prior_sigma", "with_kl", option]
    assert list(parameters) == order
    by_position = {p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD}
    assert by_position == set(order[:-4])
    assert all(p.default is p.empty for p in list(parameters.values())[:6])


@pytest.mark.parametrize("name", functional.__all__)
def test_the_reference_has_the_same_functions(name: str) -> None:
    if name != "draw_rng":  # PyTorch's generator has no twin
        ours, twin = getattr(functional, name), getattr(reference, name)
        assert inspect.signature(ours) == inspect.signature(twin)
        assert twin.__doc__.startswith(f"See :func:`bbb_fast.functional.{name}`")


@pytest.mark.parametrize("name", NAMES)
def test_what_help_says(name: str) -> None:
    function = getattr(functional, name)
    assert function.__name__ == function.__qualname__ == name
    assert function.__module__ == "bbb_fast.functional"
    text = inspect.getdoc(function) or ""
    for parameter in inspect.signature(function).parameters:
        assert parameter in text
    assert all(part in text for part in ("Args:", "Returns [", "20")) and "{" not in text
    assert max(map(len, text.splitlines())) <= 110


@pytest.mark.parametrize("module", [functional, reference])
def test_they_pickle_and_copy(module: ModuleType) -> None:
    for name in NAMES:
        function = getattr(module, name)
        assert pickle.loads(pickle.dumps(function)) is function and copy.deepcopy(function) is function


@pytest.mark.parametrize("module", [functional, reference])
@pytest.mark.parametrize(("estimator", "option"), [("bbb", "variance_dtype"), ("lrt", "recompute_weight")])
def test_another_estimators_option(module: ModuleType, estimator: str, option: str) -> None:
    case = linear_case((2,), 3, 4)
    with pytest.raises(
        TypeError, match=rf"{estimator}_linear\(\) got an unexpected keyword argument '{option}'"
    ):
        getattr(module, f"{estimator}_linear")(*case, rng(), **{option: None})


def test_the_reference_by_itself() -> None:
    """Its functions take what those of functional take, without being called through them."""
    case, alone = linear_case((2,), 3, 4), cast(Any, reference.lrt_linear)
    for option in (None, "auto", torch.float32):
        y = alone(*case, rng(), variance_dtype=option)
        torch.testing.assert_close(y, lrt_linear(*case, rng()))
    mu, rho = case[1:3]
    torch.testing.assert_close(reference.kl_divergence(mu, rho), functional.kl_divergence([mu], [rho]))
    for both in zip(
        *(m.sample_weight(mu, rho, rng(), with_kl=True) for m in (reference, functional)), strict=True
    ):
        torch.testing.assert_close(*both)


@pytest.mark.parametrize("name", ["functional", "reference"])
def test_stubs_are_those_of_the_code(name: str) -> None:
    """``python .ci/stubs.py`` writes what static tools read; its formatting alone may differ."""
    made = subprocess.run(
        [sys.executable, str(repository_root() / ".ci" / "stubs.py"), "--print", name],
        capture_output=True,
        text=True,
        check=True,
    )
    kept = (PACKAGE / f"{name}.pyi").read_text()
    assert ast.dump(ast.parse(made.stdout)) == ast.dump(ast.parse(kept)), "run make stubs"
