"""Every public name says what it is, what it takes and gives, and what it raises.

A docstring need not say again what another says. What counts as said by one (``text_of``) is its own text
and, where it refers to others (by ``:func:``, ``:class:`` and so on), theirs; of a class also what the
classes of this package say that it inherits from. ``functional`` says once for all its functions what wrong
arguments raise.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest

import bbb_fast
from bbb_fast import _checks, conversion, functional, layers, losses, methods, metrics, models, priors
from bbb_fast.layers import BBB, BBB_LRT, Flipout

MODULES = (
    bbb_fast, functional, layers, BBB, BBB_LRT, Flipout, models, methods, metrics, losses, priors, conversion,
)  # fmt: skip
# What torch.nn calls, and says what it is there for.
OF_TORCH = {"forward", "extra_repr"}
REFERENCE = re.compile(r":(?:func|class|meth|attr|mod):`~?([\w.]+)`")
SHAPE = re.compile(r"\[[\w.,*+ /]*\]|any shape|scalar|shaped like|shape of")
CHECK = re.compile(r"^_?check(ed)?(_|$)")


def public() -> dict[str, Any]:
    """Everything that the modules list, each thing once, by a name that says where it is."""
    found: dict[str, Any] = {}
    seen: set[int] = set()
    for module in MODULES:
        for name in module.__all__:
            thing = getattr(module, name)
            if id(thing) not in seen:
                seen.add(id(thing))
                found[f"{module.__name__}.{name}"] = thing
    return found


THINGS = public()
CLASSES = {name: thing for name, thing in THINGS.items() if inspect.isclass(thing)}
FUNCTIONS = {name: thing for name, thing in THINGS.items() if inspect.isfunction(thing)}
CALLABLES: dict[str, Any] = {**CLASSES, **FUNCTIONS}


def is_ours(thing: Any) -> bool:
    return getattr(thing, "__module__", "").startswith("bbb_fast")


def referred(text: str, where: str) -> Iterator[Any]:
    """What a text refers to: names of the module ``where``, or dotted ones of the package."""
    for name in REFERENCE.findall(text):
        base, *rest = name.split(".")
        thing = sys.modules.get(name) or getattr(sys.modules[where], base, sys.modules.get(base))
        for part in rest if not isinstance(thing, ModuleType) or thing.__name__ != name else ():
            thing = getattr(thing, part, None)
        if thing is not None:
            yield thing


def own_text(thing: Any) -> str:
    if not inspect.isclass(thing):
        return inspect.getdoc(thing) or ""
    parts = [inspect.cleandoc(base.__dict__.get("__doc__") or "") for base in thing.__mro__ if is_ours(base)]
    return "\n".join(parts)


@functools.cache
def text_of(thing: Any) -> str:
    """What is said of a thing, as the head of this file has it."""
    text = own_text(thing)
    return "\n".join([text, *(own_text(other) for other in referred(text, thing.__module__))])


def methods_of(cls: type) -> dict[str, Any]:
    """The public methods and properties that a class of this package has from this package."""
    found = {}
    for base in reversed(cls.__mro__):
        if is_ours(base):
            for name, value in vars(base).items():
                member = getattr(value, "__func__", value)
                if inspect.isfunction(member) or isinstance(value, property):
                    found[name] = getattr(cls, name)
    return {name: value for name, value in found.items() if not name.startswith("_")}


def parameters(thing: Any) -> list[inspect.Parameter]:
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    given = inspect.signature(thing).parameters.values()
    return [p for p in given if p.kind not in variable and p.name != "self"]


def names_without_a_word(thing: Callable[..., Any], text: str) -> list[str]:
    names = [p.name for p in parameters(thing)]
    return [name for name in names if not re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", text)]


def code_of(thing: Any) -> list[ast.AST]:
    """The code that sees a callable's arguments: a function's; a class's constructor and forward."""
    parts = [thing]
    if inspect.isclass(thing):
        parts = [
            vars(base).get(n) for base in thing.__mro__ if is_ours(base) for n in ("__init__", "forward")
        ]
    found: list[ast.AST] = []
    for part in parts:
        part = inspect.unwrap(part) if callable(part) else None
        if inspect.isfunction(part) and "<string>" not in part.__code__.co_filename:
            found += ast.walk(ast.parse(textwrap.dedent(inspect.getsource(part))))
    return found


def raised(thing: Any) -> set[str]:
    """The errors that its code raises by name, and "?" where it calls something that checks."""
    found = set()
    for node in code_of(thing):
        if (
            isinstance(node, ast.Raise)
            and isinstance(node.exc, ast.Call)
            and isinstance(node.exc.func, ast.Name)
        ):
            found.add(node.exc.func.id)
        if isinstance(node, ast.Call):
            of = node.func
            name = of.id if isinstance(of, ast.Name) else of.attr if isinstance(of, ast.Attribute) else ""
            owner = of.value.id if isinstance(of, ast.Attribute) and isinstance(of.value, ast.Name) else ""
            if CHECK.match(name) or owner == "_checks":
                found.add("?")
    return found - {"NotImplementedError"} if inspect.isclass(thing) else found


def errors_without_a_word(thing: Any) -> list[str]:
    text = text_of(thing)
    if getattr(thing, "__module__", "") == functional.__name__:
        text += functional.__doc__ or ""
    some = any(word in text for word in ("TypeError", "ValueError", "OptionError"))
    return sorted(e for e in raised(thing) if (not some if e == "?" else e not in text))


def takes_tensors(thing: Any) -> bool:
    own = parameters(thing)
    if inspect.isclass(thing):
        forward = vars(thing).get("forward") or getattr(thing, "forward", None)
        if not is_ours(forward):
            return False
        own = parameters(forward)
    return any("Tensor" in str(p.annotation) for p in own)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_modules(module: ModuleType) -> None:
    first, *_ = (module.__doc__ or "").splitlines() or [""]
    assert first.rstrip('"').endswith(".")
    for name in module.__all__:
        thing = getattr(module, name)
        if not (callable(thing) or isinstance(thing, ModuleType)) or not hasattr(thing, "__module__"):
            # Values, and types of which Python keeps no docstring: their module says what they are.
            assert isinstance(thing, ModuleType) or f"``{name}``" in (module.__doc__ or ""), name


@pytest.mark.parametrize("name", CALLABLES)
def test_first_line_is_a_sentence(name: str) -> None:
    first, *rest = (inspect.getdoc(CALLABLES[name]) or "").splitlines() or [""]
    assert first.endswith(".") and len(first.split()) >= 2, first
    assert not rest or rest[0] == "", "a line of its own"


@pytest.mark.parametrize("name", CALLABLES)
def test_parameters_are_named(name: str) -> None:
    assert names_without_a_word(CALLABLES[name], text_of(CALLABLES[name])) == []


@pytest.mark.parametrize("name", CALLABLES)
def test_errors_are_named(name: str) -> None:
    assert errors_without_a_word(CALLABLES[name]) == []


@pytest.mark.parametrize("name", [name for name, thing in CALLABLES.items() if takes_tensors(thing)])
def test_shapes_are_given(name: str) -> None:
    assert SHAPE.search(text_of(CALLABLES[name]))


LAYERS = [name for name in CLASSES if name.startswith(("bbb_fast.layers.BBB", "bbb_fast.layers.Flipout"))]


@pytest.mark.parametrize("name", LAYERS)
def test_a_layers_own_text_says_everything(name: str) -> None:
    """As ``help`` and the reference show it: nobody has to look for what it inherits."""
    layer = CLASSES[name]
    text = inspect.getdoc(layer) or ""
    text = "\n".join([text, *(inspect.getdoc(other) or "" for other in referred(text, layer.__module__))])
    assert names_without_a_word(layer, text) == []
    assert SHAPE.search(text) and "Raises" in text and "Error" in text
    for word in ("Args:", "dtype", "bfloat16"):
        assert word in text
    assert re.search(r"(Blundell|Kingma|Wen)\b.*201\d", text)


@pytest.mark.parametrize("name", CLASSES)
def test_methods(name: str) -> None:
    cls: Any = CLASSES[name]
    for label, method in methods_of(cls).items():
        if label not in OF_TORCH:
            text = inspect.getdoc(method) or ""
            first = text.partition("\n\n")[0]
            assert first.endswith((".", ".)")), f"{label}: {first!r}"
            if not isinstance(method, property):
                missing = names_without_a_word(method, f"{text}\n{text_of(cls)}")
                assert missing == [], f"{label}: {missing}"


class Undocumented:
    """Takes something"""

    __module__ = "bbb_fast.nowhere"

    def __init__(self, count: int) -> None:
        if count < 0:
            raise ValueError(count)
        _checks.probability("Undocumented", "count", count)

    def method(self, other: int) -> None:
        return None


def test_what_is_missing_is_found() -> None:
    text = text_of(Undocumented)
    assert not text.endswith(".")
    assert names_without_a_word(Undocumented, text) == ["count"]
    assert errors_without_a_word(Undocumented) == ["?", "ValueError"]
    assert list(methods_of(Undocumented)) == ["method"]
    assert takes_tensors(functional.normal) and not takes_tensors(bbb_fast.convert)
    assert takes_tensors(layers.BBB_Linear) and not takes_tensors(metrics.Decomposition)
    assert not SHAPE.search("A tensor.") and SHAPE.search("[..., C]")


def test_what_others_say_counts() -> None:
    assert next(referred(":func:`ece` and", "bbb_fast.metrics.calibration")) is metrics.ece
    assert next(referred(":mod:`bbb_fast.metrics`", "bbb_fast.losses")) is metrics
    assert (
        next(referred(":func:`bbb_fast.functional.lrt_linear`", "bbb_fast.losses")) is functional.lrt_linear
    )
    assert methods_of(layers.WeightSpace).keys() >= {"draw", "posterior", "terms", "kl_loss"}
