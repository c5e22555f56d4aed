"""Copies of a model's module objects around the same tensors: the model itself is not written to."""

from __future__ import annotations

import enum
import functools
import gc
import types
import weakref
from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# What leads to no module. The rest is looked through, up to so many objects.
_SIMPLE = frozenset((type(None), bool, int, float, str, nn.Parameter, Tensor, torch.dtype, torch.device))
_LEAVES = (
    *(*_SIMPLE, complex, bytes, type, enum.Enum, np.ndarray),
    *(types.ModuleType, types.BuiltinFunctionType, types.CodeType),
)
_CONTAINERS = (dict, OrderedDict, list, tuple, set)
_MAX_OBJECTS = 5_000
_OWN = ("_parameters", "_buffers", "_modules")


class NotCopiedError(Exception):
    """A copy would not do: a module is compiled or scripted, or reached by a closure or an object."""


class Copies:
    """Shallow copies of a model's modules, which refer to each other and share all else.

    ``tensors``, by the id of a parameter: what the copies have in its place. Raises NotCopiedError.
    """

    def __init__(self, model: nn.Module, tensors: dict[int, Tensor] | None = None) -> None:
        originals = list(model.modules())
        self._tensors = tensors or {}
        self._copies: dict[int, nn.Module] = {id(m): object.__new__(type(m)) for m in originals}
        self._states: dict[int, dict[str, Any]] = {}
        self._unrelated: dict[int, Any] = {}  # the objects too, so that no id is used twice
        for module in originals:
            if isinstance(module, (torch.jit.ScriptModule, nn.modules.lazy.LazyModuleMixin)):
                raise NotCopiedError
            state = vars(module).copy()
            own = {name: state.pop(name).copy() for name in _OWN}
            for name, child in module._modules.items():
                own["_modules"][name] = None if child is None else self._copies[id(child)]
            for name, parameter in module._parameters.items():
                own["_parameters"][name] = self._tensors.get(id(parameter), parameter)
            state = {name: self._moved(value) for name, value in state.items()}
            self._states[id(module)] = state
            vars(self._copies[id(module)]).update(state, **own)
        self.model = self._copies[id(model)]
        self.pairs = [(module, self._copies[id(module)]) for module in originals]

    def keep_what_was_stored(self) -> None:
        """Gives the modules what a forward of their copies has put into buffers and other attributes."""
        for original, copy in self.pairs:
            for name, value in copy._buffers.items():
                if value is not original._buffers.get(name):
                    original._buffers[name] = value
            before = self._states[id(original)]
            for name, value in vars(copy).items():
                if name not in _OWN and before.get(name, self) is not value:
                    vars(original)[name] = value

    def _moved(self, value: Any) -> Any:
        """``value`` with every module of the model in it replaced by its copy, and every such tensor."""
        if id(value) in self._tensors:
            return self._tensors[id(value)]
        if type(value) in _SIMPLE or (type(value) in _CONTAINERS and not value):
            return value
        copy = self._copies.get(id(value))
        if copy is not None:
            return copy
        if type(value) in _CONTAINERS:
            if not self._reaches(value):
                return value
            if isinstance(value, dict):
                return type(value)((self._moved(k), self._moved(v)) for k, v in value.items())
            return type(value)(self._moved(v) for v in value)
        if isinstance(value, types.MethodType):
            return types.MethodType(value.__func__, self._moved(value.__self__))
        if isinstance(value, weakref.ReferenceType):
            there = value()
            moved = self._moved(there)
            return value if moved is there else weakref.ref(moved)
        if type(value) is functools.partial:
            words = {k: self._moved(v) for k, v in value.keywords.items()}
            return functools.partial(self._moved(value.func), *map(self._moved, value.args), **words)
        if self._reaches(value):
            raise NotCopiedError
        return value

    def _reaches(self, value: Any) -> bool:
        """Whether a module of the model, or a tensor to replace, can be got at through ``value``."""
        pending, looked_at = [value], {}
        while pending:
            at = pending.pop()
            if id(at) in self._copies or id(at) in self._tensors:
                return True
            if isinstance(at, _LEAVES) or id(at) in looked_at or id(at) in self._unrelated:
                continue
            looked_at[id(at)] = at
            if len(looked_at) + len(self._unrelated) > _MAX_OBJECTS:
                raise NotCopiedError
            if isinstance(at, types.FunctionType):
                # Not its globals: what they hold is no part of a model.
                pending += (at.__closure__, at.__defaults__, at.__kwdefaults__)
            elif isinstance(at, weakref.ReferenceType):
                pending.append(at())
            else:
                pending += gc.get_referents(at)
        self._unrelated.update(looked_at)
        return False
