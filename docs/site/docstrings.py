"""What the site makes of docstrings, which griffe reads from the sources."""

from __future__ import annotations

import inspect
import re
from typing import Any

from griffe import Alias, Extension, Module, Object, dynamic_import

_ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`~?([\w.]+)`")
# Those whose public names have a place on the pages of reference/.
_DOCUMENTED = (
    "conversion", "functional", "layers.BBB", "layers", "losses", "methods", "metrics", "models", "priors",
    "tuning",
)  # fmt: skip


class Assembled(Extension):
    """A layer's docstring is put together when its class is made: that one is taken, not the source's."""

    def on_package(self, *, pkg: Module, **_: Any) -> None:
        for module in pkg["layers"].modules.values():
            for layer in module.classes.values():
                if not layer.is_alias and layer.docstring:
                    layer.docstring.value = inspect.cleandoc(dynamic_import(layer.path).__doc__)


class Roles(Extension):
    """What a docstring refers to as ``:func:`name` `` becomes a link to it, where it has a page."""

    def on_package(self, *, pkg: Module, **_: Any) -> None:
        modules = [pkg, *(pkg[name] for name in _DOCUMENTED)]
        places = {
            name: f"{module.path}.{name}"
            for module in modules
            for name in map(str, module.exports or ())
            if not module[name].is_module
        }
        self._visit(pkg, {**places, **{path: path for path in places.values()}})

    def _visit(self, scope: Object | Alias, places: dict[str, str]) -> None:
        if scope.docstring:
            text = _ROLE.sub(lambda match: _link(match[1], places), scope.docstring.value)
            scope.docstring.value = text
        for member in scope.members.values():
            if not member.is_alias:
                self._visit(member, places)


def _link(name: str, places: dict[str, str]) -> str:
    return f"[`{name}`][{places[name]}]" if name in places else f"`{name}`"
