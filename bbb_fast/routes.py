"""Which way a layer's products take on this CPU, where there are several: rules, and what `tune` measured.

A route is chosen by the CPU, the shape and the measurements, and by nothing else, so that a machine always
takes the same one; none changes a result by more than rounding. There are two choices:

- the way of a layer's products in float32 (csrc/routes.h): the library's own; for a convolution, the
  library's over channels_last, a direct kernel, or products by pixels; for a linear layer, oneDNN's instead
  of MKL's;
- for ``variance_dtype="auto"`` of local reparameterization, whether the variance product runs in bfloat16.

The rules were measured on three kinds of CPU (benchmarks/results). ``bbb-fast tune`` measures more shapes on
the machine at hand and keeps what it finds in :func:`cache_file`, which is read when bbb_fast is imported;
``BBB_FAST_ROUTES=rules`` leaves it unread. Training writes the routes into its checkpoints and takes them
from there again when it resumes.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from . import _backend

__all__ = [
    "WAYS",
    "Routes",
    "cache_file",
    "conv_key",
    "current",
    "linear_key",
    "load",
    "use",
    "variance_dtype",
]

WAYS = ("library", "channels_last", "direct", "by_pixels", "onednn")
Key = tuple[int, ...]
VarianceDtype = torch.dtype | Literal["auto"] | None

# Measured (benchmarks/results/routes-*.json): what a bfloat16 product gains grows with the inputs of an
# output and is more than its conversions cost from so many on; a linear layer needs a large weight too.
_NARROW_INPUTS = 64
_NARROW_LINEAR_WEIGHT = 1 << 15


@dataclass(frozen=True)
class Routes:
    """Rules by name, and the measured choices that go before them.

    Attributes:
        rules: "intel-avx512", "amd-zen5" or "other", the kind of CPU they were measured on.
        ways: by :func:`conv_key` or :func:`linear_key`, one of :data:`WAYS`.
        narrow: by :func:`narrow_key`, whether "auto" means bfloat16.
    """

    rules: str
    ways: Mapping[Key, str] = field(default_factory=dict)
    narrow: Mapping[Key, bool] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and checkpoints."""
        return {
            "rules": self.rules,
            "ways": [[list(key), way] for key, way in self.ways.items()],
            "narrow": [[list(key), value] for key, value in self.narrow.items()],
        }

    @classmethod
    def from_dict(cls, values: Any) -> Routes:
        """The inverse of :meth:`to_dict`. Raises ValueError for anything else."""
        try:
            ways = {_key(key): str(way) for key, way in values["ways"]}
            narrow = {_key(key): bool(value) for key, value in values["narrow"]}
            routes = cls(str(values["rules"]), ways, narrow)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a table of routes: {error!r}") from None
        if unknown := set(ways.values()) - set(WAYS):
            raise ValueError(f"unknown ways {sorted(unknown)}; allowed: {', '.join(WAYS)}")
        return routes


def _key(numbers: Sequence[int]) -> Key:
    return tuple(int(n) for n in numbers)


def rules_of_this_cpu() -> str:
    """The name of the rules that hold without measurements."""
    return "other" if _backend._C is None else _backend._C.rules_of_this_cpu()


_current = Routes(rules_of_this_cpu())


def current() -> Routes:
    """The routes in use."""
    return _current


def use(routes: Routes) -> None:
    """Takes these routes from now on, in the whole process. Raises ValueError for unknown rules or ways."""
    global _current
    if _backend._C is not None:
        _backend._C.set_routes(routes.rules, list(routes.ways.items()))
    _current = routes


def conv_key(
    input: Sequence[int],
    weight: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Key:
    """What the way of a convolution is kept under: input [N, C, ...], N by its power of 2; geometry."""
    batch = max(input[0] - 1, 0).bit_length()
    sizes = (*input[2:], *weight[2:], *stride, *padding, *dilation)
    return (len(input) - 2, batch, input[1], weight[0], groups, *sizes)


def linear_key(input: Sequence[int], weight: Sequence[int]) -> Key:
    """What the way of a linear layer is kept under: input [..., in], its rows by their power of 2."""
    return (0, max(math.prod(input[:-1]) - 1, 0).bit_length(), weight[1], weight[0])


def narrow_key(weight: Sequence[int]) -> Key:
    """What the choice of ``variance_dtype="auto"`` is kept under: the weight's shape, so not the batch."""
    return tuple(weight)


def variance_dtype(asked: VarianceDtype, weight: torch.Tensor, input: torch.Tensor) -> torch.dtype | None:
    """The type of a variance product: ``asked``, or where that is "auto", what is faster.

    bfloat16 for a float32 input on a CPU with bfloat16 instructions and a weight large enough, by rule or as
    measured; else None, the input's own (autocast's, where that is on).
    """
    if asked != "auto":
        return asked
    plain = input.dtype == torch.float32 and input.device.type == "cpu"
    if not (plain and _multiplies_bfloat16) or torch.is_autocast_enabled("cpu"):
        return None
    shape = tuple(weight.shape)
    measured = _current.narrow.get(narrow_key(shape))
    return torch.bfloat16 if (narrow_by_rule(shape) if measured is None else measured) else None


def narrow_by_rule(weight: Sequence[int]) -> bool:
    """Whether a variance product with such a weight is faster in bfloat16, on a CPU that multiplies that."""
    linear = len(weight) == 2
    if linear and math.prod(weight) < _NARROW_LINEAR_WEIGHT:
        return False
    return math.prod(weight[1:]) >= _NARROW_INPUTS


_multiplies_bfloat16 = _backend._C is not None and _backend._C.multiplies_bfloat16()


def cache_file() -> Path:
    """Where this machine's measurements are kept: one file for each model of CPU and release of torch.

    In ``$BBB_FAST_CACHE``, else ``$XDG_CACHE_HOME/bbb_fast``, else ``~/.cache/bbb_fast``.
    """
    if folder := os.environ.get("BBB_FAST_CACHE"):
        root = Path(folder)
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bbb_fast"
    release = ".".join(torch.__version__.split("+")[0].split(".")[:2])
    return root / f"routes-{_cpu_name()}-torch{release}.json"


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    # The number too: virtual machines may call every model of a maker by one name.
    found = (re.search(rf"^{what}\s*:\s*(.*)$", text, re.M) for what in ("model name", "cpu family", "model"))
    words = [match.group(1).lower() for match in found if match]
    return re.sub(r"[^a-z0-9]+", "-", " ".join(words)).strip("-") or "cpu"


def load() -> Routes | None:
    """The measurements kept for this machine; None if there are none, or ``BBB_FAST_ROUTES=rules`` is set.

    Raises ValueError for a file that holds something else, OSError for one that cannot be read.
    """
    if os.environ.get("BBB_FAST_ROUTES", "").strip().lower() == "rules":
        return None
    file = cache_file()
    try:
        text = file.read_text()
    except FileNotFoundError:
        return None
    try:
        return Routes.from_dict(json.loads(text)["routes"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} holds no routes ({error}); remove it, or measure again") from None


def _at_import() -> str | None:
    """Takes what was measured; why not, if there is something that cannot be taken."""
    try:
        found = load()
        if found is not None:
            use(found)
    except (OSError, ValueError) as error:
        return str(error)
    return None


# For `bbb-fast info`: a broken file is no reason to stop a program that imports bbb_fast.
problem = _at_import()
