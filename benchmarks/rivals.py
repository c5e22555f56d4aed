"""Every contender of the layers' benchmarks: torch.nn, ours, the textbook formulas, and other libraries."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from cases import Case
from eager import EagerLayer
from harness import SkippedError
from torch import Tensor, nn

from bbb_fast.layers.base import BayesianLayer

Device = torch.device | str | None


class Layer(NamedTuple):
    """A layer, its output, and its output with the KL as its library forms it (None where there is none)."""

    module: nn.Module
    output: Callable[[Tensor], Tensor]
    output_with_kl: Callable[[Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Contender:
    """``family`` groups contenders in figures; ``note`` says what a reader of its numbers must know.

    ``build`` takes a case and, but for blitz and torchbnn, a device.

    ``for_overhead``: measured only where a case is about overhead.
    """

    label: str
    family: str
    build: Callable[..., Layer]
    note: str = ""
    for_overhead: bool = False


def output_alone(name: str, case: Case, device: Device = None) -> Layer:
    """Of torch.nn or ours, without the KL."""
    layer = case.layer(name, device)
    return Layer(layer, layer, lambda x: (layer(x), None))


def ours(name: str, case: Case, device: Device = None) -> Layer:
    """An estimator, or one of VARIANTS."""
    layer = case.layer(name, device)
    assert isinstance(layer, BayesianLayer)
    return Layer(layer, layer, lambda x: (layer(x), layer.kl_loss()))


def formulas(estimator: str, case: Case, device: Device = None) -> Layer:
    """The textbook's, in eager mode."""
    layer = case.layer(f"eager_{estimator}", device)
    assert isinstance(layer, EagerLayer)
    return Layer(layer, layer.forward, layer.output_with_kl)


def compiled(function: Callable[..., Any], autotuned: bool = False) -> Callable[..., Any]:
    """The function under torch.compile, one graph for its sizes."""
    # Of the autotuning modes the one without CUDA graphs, which would only add copies of the input.
    mode = "max-autotune-no-cudagraphs" if autotuned else "default"
    return torch.compile(function, mode=mode, fullgraph=True, dynamic=False)


def compiled_formulas(estimator: str, case: Case, device: Device = None, autotuned: bool = False) -> Layer:
    """The same under torch.compile, output and KL in one graph."""
    layer = formulas(estimator, case, device)
    of_output, of_both = compiled(layer.output, autotuned), compiled(layer.output_with_kl, autotuned)
    return Layer(layer.module, of_output, of_both)


def bayesian_torch(estimator: str, case: Case, device: Device = None) -> Layer:
    """ "Reparameterization" or "Flipout" of bayesian-torch. Raises SkippedError where it is not installed."""
    try:
        from bayesian_torch import layers
    except ImportError as error:
        raise SkippedError(f"bayesian-torch is not installed ({error})") from None
    i, o, k = case.inputs, case.outputs, case.kernel
    with torch.device(device or "cpu"):
        if k:
            layer = getattr(layers, f"Conv2d{estimator}")(i, o, k, padding=case.padding)
        else:
            layer = getattr(layers, f"Linear{estimator}")(i, o)
    layer = case.place(layer, device, torch.bfloat16 if case.precision == "bfloat16" else None)
    return Layer(layer, lambda x: layer(x, return_kl=False), layer)


def _blitz(case: Case) -> Layer:
    from blitz.losses import kl_divergence_from_nn
    from blitz.modules import BayesianConv2d, BayesianLinear

    i, o, k = case.inputs, case.outputs, case.kernel
    layer = BayesianConv2d(i, o, (k, k), padding=case.padding) if k else BayesianLinear(i, o)
    return Layer(layer, layer, lambda x: (layer(x), kl_divergence_from_nn(layer)))


def _torchbnn(case: Case) -> Layer:
    import torchbnn
    from torchbnn.functional import bayesian_kl_loss

    sizes, prior = (case.inputs, case.outputs), (0.0, 0.1)
    if case.kernel:
        layer = torchbnn.BayesConv2d(*prior, *sizes, case.kernel, padding=case.padding)
    else:
        layer = torchbnn.BayesLinear(*prior, *sizes)
    return Layer(layer, layer, lambda x: (layer(x), bayesian_kl_loss(layer, reduction="sum")))


def _ours(label: str, name: str, note: str = "") -> Contender:
    return Contender(label, "ours", partial(ours, name), note)


_FORMULAS = "the textbook formulas"
_COMPILED = "the same formulas under torch.compile, output and KL in one graph"
_ALONE = (
    "as much as torch.nn's layer gives, without the KL: backward starts from one result and not from two, "
    "which takes autograd time of its own"
)
CONTENDERS = {
    "nn": Contender("torch.nn", "torch.nn", partial(output_alone, "nn"), "the plain layer"),
    "bbb": _ours("BBB", "bbb"),
    "bbb_recompute": _ours(
        "BBB, recompute_weight", "bbb_recompute",
        "forms the sampled weight again in backward instead of keeping it",
    ),
    "lrt": _ours("LRT", "lrt"),
    "lrt_bf16": _ours("LRT, bf16 variance", "lrt_bf16", "variance_dtype=torch.bfloat16"),
    "lrt_auto": _ours("LRT, auto", "lrt_auto", 'variance_dtype="auto"'),
    "bbb_output": Contender("BBB, output alone", "ours", partial(output_alone, "bbb"), _ALONE, True),
    "lrt_output": Contender("LRT, output alone", "ours", partial(output_alone, "lrt"), _ALONE, True),
    "eager_bbb": Contender("eager BBB", "formulas", partial(formulas, "bbb"), _FORMULAS),
    "eager_lrt": Contender("eager LRT", "formulas", partial(formulas, "lrt"), _FORMULAS),
    "compiled_bbb": Contender("compiled BBB", "torch.compile", partial(compiled_formulas, "bbb"), _COMPILED),
    "compiled_lrt": Contender("compiled LRT", "torch.compile", partial(compiled_formulas, "lrt"), _COMPILED),
    "bayesian_torch": Contender(
        "bayesian-torch Reparameterization", "libraries", partial(bayesian_torch, "Reparameterization"),
        "one weight draw a forward, as BBB; its KL is a mean over the weights",
    ),
    "bayesian_torch_flipout": Contender(
        "bayesian-torch Flipout", "libraries", partial(bayesian_torch, "Flipout"),
        "signs for each example and two products: nearest to LRT, but another estimator; its KL is a mean",
    ),
    "blitz": Contender(
        "blitz", "libraries", _blitz,
        "one weight draw a forward, as BBB; its KL is a single-draw estimate, log q(w) - log p(w)",
    ),
    "torchbnn": Contender(
        "torchbnn", "libraries", _torchbnn,
        "one weight draw a forward, as BBB; sigma = exp of a parameter; the KL summed",
    ),
}  # fmt: skip


def label(name: str) -> str:
    """How a contender of any benchmark is called in tables and figures."""
    return CONTENDERS[name].label if name in CONTENDERS else name.replace("_", ", ")


def versions() -> dict[str, str]:
    """The other libraries' releases, or "not installed"."""
    found = {}
    for name in ("bayesian-torch", "blitz-bayesian-pytorch", "torchbnn"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
