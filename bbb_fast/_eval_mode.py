"""A model in eval mode for the length of a call, with nothing written to a model that others may be using."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ._copies import Copies, NotCopiedError

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
        copies = Copies(model)
    except NotCopiedError:
        copies = None
    if copies is not None:
        for _, copy in copies.pairs:
            vars(copy)["training"] = False
        yield copies.model
        return
    with _set_to_eval(model):
        yield model
