"""Docstrings name what they refer to as ``:func:`name` ``: on the site, a link to it, where it has a page."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Module, Object

_ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`~?([\w.]+)`")
# Those whose public names have a place on the pages of reference/.
_DOCUMENTED = ("functional", "layers.BBB", "layers", "methods", "metrics", "models", "priors")


class Roles(Extension):
    def on_package(self, *, pkg: Module, **_: Any) -> None:
        modules = [pkg, *(pkg[name] for name in _DOCUMENTED)]
        places = {
            name: f"{module.path}.{name}"
            for module in modules
            for name in map(str, module.exports or ())
            if not module[name].is_module
        }
        self._visit(pkg, {**places, **{path: path for path in places.values()}})

    def _visit(self, scope: Object, places: dict[str, str]) -> None:
        if scope.docstring:
            text = _ROLE.sub(lambda match: _link(match[1], places), scope.docstring.value)
            scope.docstring.value = text
        for member in scope.members.values():
            if not member.is_alias:
                self._visit(member, places)


def _link(name: str, places: dict[str, str]) -> str:
    return f"[`{name}`][{places[name]}]" if name in places else f"`{name}`"
