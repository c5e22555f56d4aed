"""A model in eval mode for the length of a call, with nothing written to a model that others may be using."""

from __future__ import annotations

import enum
import functools
import gc
import threading
import types
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
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


class _NotCopiedError(Exception):
    pass


class _Copies:
    """Shallow copies of a model's modules, which refer to each other and share all else."""

    def __init__(self, model: nn.Module) -> None:
        originals = list(model.modules())
        self._copies: dict[int, nn.Module] = {id(m): object.__new__(type(m)) for m in originals}
        self._unrelated: dict[int, Any] = {}  # the objects too, so that no id is used twice
        for module in originals:
            if isinstance(module, (torch.jit.ScriptModule, nn.modules.lazy.LazyModuleMixin)):
                raise _NotCopiedError
            state = vars(module).copy()
            own = {name: state.pop(name).copy() for name in ("_parameters", "_buffers", "_modules")}
            for name, child in module._modules.items():
                own["_modules"][name] = None if child is None else self._copies[id(child)]
            state = {name: self._moved(value) for name, value in state.items()}
            vars(self._copies[id(module)]).update(state, **own, training=False)
        self.model = self._copies[id(model)]

    def _moved(self, value: Any) -> Any:
        """``value`` with every module of the model in it replaced by its copy."""
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
        if type(value) is functools.partial:
            words = {k: self._moved(v) for k, v in value.keywords.items()}
            return functools.partial(self._moved(value.func), *map(self._moved, value.args), **words)
        if self._reaches(value):
            raise _NotCopiedError
        return value

    def _reaches(self, value: Any) -> bool:
        """Whether a module of the model can be got at through ``value``."""
        pending, looked_at = [value], {}
        while pending:
            at = pending.pop()
            if id(at) in self._copies:
                return True
            if isinstance(at, _LEAVES) or id(at) in looked_at or id(at) in self._unrelated:
                continue
            looked_at[id(at)] = at
            if len(looked_at) + len(self._unrelated) > _MAX_OBJECTS:
                raise _NotCopiedError
            if isinstance(at, types.FunctionType):
                # Not its globals: what they hold is no part of a model.
                pending += (at.__closure__, at.__defaults__, at.__kwdefaults__)
            elif isinstance(at, weakref.ReferenceType):
                pending.append(at())
            else:
                pending += gc.get_referents(at)
        self._unrelated.update(looked_at)
        return False


_lock = threading.Lock()
# By module: how many calls need it in eval mode, and the mode that it gets back after the last.
_lent: dict[nn.Module, tuple[int, bool]] = {}


@contextmanager
def _set_to_eval(model: nn.Module) -> Iterator[None]:
    modules = list(model.modules())
    with _lock:
        # All modes before the first is set: a compiled module's is that of the module inside.
        for module in modules:
            users, mode = _lent.get(module, (0, module.training))
            _lent[module] = users + 1, mode
        for module in modules:
            module.training = False
    try:
        yield
    finally:
        with _lock:
            for module in modules:
                users, mode = _lent.pop(module)
                if users > 1:
                    _lent[module] = users - 1, mode
                else:
                    module.training = mode


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[nn.Module]:
    """``model`` in eval mode: a copy of its module objects around the same tensors.

    Where a copy would not do (compiled and scripted models, modules that others reach by a closure or
    through an object) it is the model itself, set to eval mode until the last of several such calls ends.
    """
    try:
        copy = _Copies(model).model
    except _NotCopiedError:
        copy = None
    if copy is not None:
        yield copy
        return
    with _set_to_eval(model):
        yield model
