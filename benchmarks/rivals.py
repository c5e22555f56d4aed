"""Every contender of the layer benchmark: torch.nn, ours, the textbook formulas, and other libraries."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from cases import Case
from torch import Tensor, nn


class Layer(NamedTuple):
    """A layer, and its output with the KL as its library forms it (None where there is none)."""

    module: nn.Module
    output_with_kl: Callable[[Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Contender:
    """``family`` groups contenders in figures; ``note`` says what a reader of its numbers must know.

    ``for_overhead``: measured only where a case is about overhead, and judged there.
    """

    label: str
    family: str
    build: Callable[[Case], Layer]
    note: str = ""
    for_overhead: bool = False


def _of_case(name: str) -> Callable[[Case], Layer]:
    def build(case: Case) -> Layer:
        layer = case.layer(name)
        if name == "nn":
            return Layer(layer, lambda x: (layer(x), None))
        if name.startswith("eager_"):
            return Layer(layer, layer.output_with_kl)
        return Layer(layer, lambda x: (layer(x), layer.kl_loss()))

    return build


def _output_alone(name: str) -> Callable[[Case], Layer]:
    def build(case: Case) -> Layer:
        layer = case.layer(name)
        return Layer(layer, lambda x: (layer(x), None))

    return build


def _compiled(estimator: str) -> Callable[[Case], Layer]:
    def build(case: Case) -> Layer:
        layer = case.layer(f"eager_{estimator}")
        return Layer(layer, compiled(layer.output_with_kl))

    return build


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function under torch.compile, one graph for its sizes."""
    return torch.compile(function, fullgraph=True, dynamic=False)


def _bayesian_torch(estimator: str) -> Callable[[Case], Layer]:
    def build(case: Case) -> Layer:
        from bayesian_torch import layers

        i, o, k = case.inputs, case.outputs, case.kernel
        if k:
            layer = getattr(layers, f"Conv2d{estimator}")(i, o, k, padding=case.padding)
        else:
            layer = getattr(layers, f"Linear{estimator}")(i, o)
        return Layer(layer, layer)

    return build


def _blitz(case: Case) -> Layer:
    from blitz.losses import kl_divergence_from_nn
    from blitz.modules import BayesianConv2d, BayesianLinear

    i, o, k = case.inputs, case.outputs, case.kernel
    layer = BayesianConv2d(i, o, (k, k), padding=case.padding) if k else BayesianLinear(i, o)
    return Layer(layer, lambda x: (layer(x), kl_divergence_from_nn(layer)))


def _torchbnn(case: Case) -> Layer:
    import torchbnn
    from torchbnn.functional import bayesian_kl_loss

    i, o, k = case.inputs, case.outputs, case.kernel
    prior = (0.0, 0.1)
    if k:
        layer = torchbnn.BayesConv2d(*prior, i, o, k, padding=case.padding)
    else:
        layer = torchbnn.BayesLinear(*prior, i, o)
    return Layer(layer, lambda x: (layer(x), bayesian_kl_loss(layer, reduction="sum")))


CONTENDERS = {
    "nn": Contender("torch.nn", "torch.nn", _of_case("nn"), "the plain layer"),
    "bbb": Contender("BBB", "ours", _of_case("bbb")),
    "bbb_recompute": Contender(
        "BBB, recompute_weight", "ours", _of_case("bbb_recompute"),
        "forms the sampled weight again in backward instead of keeping it",
    ),
    "lrt": Contender("LRT", "ours", _of_case("lrt")),
    "lrt_bf16": Contender(
        "LRT, bf16 variance", "ours", _of_case("lrt_bf16"), "variance_dtype=torch.bfloat16"
    ),
    "lrt_auto": Contender("LRT, auto", "ours", _of_case("lrt_auto"), 'variance_dtype="auto"'),
    **{
        f"{name}_output": Contender(
            f"{name.upper()}, output alone", "ours", _output_alone(name),
            "as much as torch.nn's layer gives, without the KL: backward starts from one result and not from "
            "two, which takes autograd time of its own",
            for_overhead=True,
        )
        for name in ("bbb", "lrt")
    },
    "eager_bbb": Contender("eager BBB", "formulas", _of_case("eager_bbb"), "the textbook formulas"),
    "eager_lrt": Contender("eager LRT", "formulas", _of_case("eager_lrt"), "the textbook formulas"),
    "compiled_bbb": Contender(
        "compiled BBB", "torch.compile", _compiled("bbb"),
        "the same formulas under torch.compile, output and KL in one graph",
    ),
    "compiled_lrt": Contender(
        "compiled LRT", "torch.compile", _compiled("lrt"),
        "the same formulas under torch.compile, output and KL in one graph",
    ),
    "bayesian_torch": Contender(
        "bayesian-torch Reparameterization", "libraries", _bayesian_torch("Reparameterization"),
        "one weight draw a forward, as BBB; its KL is a mean over the weights",
    ),
    "bayesian_torch_flipout": Contender(
        "bayesian-torch Flipout", "libraries", _bayesian_torch("Flipout"),
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
# Rivals by the estimator of ours that they stand against.
RIVALS = {
    "bbb": ("eager_bbb", "compiled_bbb", "bayesian_torch", "blitz", "torchbnn"),
    "lrt": ("eager_lrt", "compiled_lrt", "bayesian_torch_flipout"),
}


def versions() -> dict[str, str]:
    """The other libraries' releases, or "not installed"."""
    found = {}
    for name in ("bayesian-torch", "blitz-bayesian-pytorch", "torchbnn"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
