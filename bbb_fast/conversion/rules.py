"""Which Bayesian layer stands for which module of torch.nn, and the arguments that make one of the other."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from .._checks import is_lazy
from ..layers import BBB, BBB_LRT, Flipout, MCDropout, MCDropout1d, MCDropout2d, MCDropout3d, shapes
from ..layers.base import BayesianLayer, BayesianModule
from ..layers.weight_space import Around

Select = Callable[[str, nn.Module], bool]


FAMILIES: dict[str, ModuleType] = {"bbb": BBB, "lrt": BBB_LRT, "flipout": Flipout}

# Layers that every estimator has.
DIMENSIONS = (1, 2, 3)
PRODUCTS: dict[type[nn.Module], type[BayesianLayer]] = {
    nn.Linear: shapes.Linear,
    nn.Bilinear: shapes.Bilinear,
    **{getattr(nn, f"Conv{d}d"): getattr(shapes, f"Conv{d}d") for d in DIMENSIONS},
    **{getattr(nn, f"ConvTranspose{d}d"): getattr(shapes, f"ConvTranspose{d}d") for d in DIMENSIONS},
}
# Those in weight space.
TABLES: dict[type[nn.Module], type[BayesianLayer]] = {
    nn.Embedding: BBB.BBBEmbedding,
    nn.EmbeddingBag: BBB.BBBEmbeddingBag,
}
WHOLE: dict[type[nn.Module], type[Around]] = {
    kind: getattr(BBB, f"BBB{kind.__name__}")
    for kind in (nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell, nn.MultiheadAttention)
}
# Dropout that draws in eval mode too.
DROPOUT: dict[type[nn.Module], type[MCDropout]] = {
    nn.Dropout: MCDropout,
    nn.Dropout1d: MCDropout1d,
    nn.Dropout2d: MCDropout2d,
    nn.Dropout3d: MCDropout3d,
}
LAYERS = {**PRODUCTS, **TABLES, **WHOLE}
# Their forward reads the weights of a layer within them, which therefore has to stay what it is.
READERS: tuple[type[nn.Module], ...] = tuple(
    getattr(nn, name)
    for name in ("MultiheadAttention", "LinearCrossEntropyLoss")  # the second since torch 2.13
    if hasattr(nn, name)
)
# Normalisation: few parameters, whose noise would act on all of a layer at once.
NORMS: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    *((nn.RMSNorm,) if hasattr(nn, "RMSNorm") else ()),
)


def kind_of(module: nn.Module) -> type[nn.Module] | None:
    """The kind of torch.nn that a module computes as: its class, or one whose forward it has inherited."""
    for kind in (*LAYERS, *READERS):
        if isinstance(module, kind) and _computes_as(module, kind):
            return kind
    return None


def _computes_as(module: nn.Module, kind: type[nn.Module]) -> bool:
    if "forward" in vars(module):  # replaced on the object
        return False
    own = [getattr(type(module), name, None) for name in ("forward", "_conv_forward")]
    return own == [getattr(kind, name, None) for name in ("forward", "_conv_forward")]


def is_wrapper(module: nn.Module) -> bool:
    """Whether it keeps lists of the parameters that there were when it was made."""
    # Whoever has one has imported it; importing it here would take a second.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kinds = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    return isinstance(module, kinds if fsdp is None else (*kinds, fsdp.FullyShardedDataParallel))


def is_complex(module: nn.Module) -> bool:
    """Whether it has complex parameters, which there are no posteriors over."""
    return any(p.is_complex() for p in module.parameters())


def may_be_whole(module: nn.Module) -> bool:
    """Whether WeightSpace can take it: it has a forward, real numbers, and nothing Bayesian in it."""
    runs = getattr(type(module), "forward", None) is not nn.Module.forward
    real = any(p.is_floating_point() for p in module.parameters())
    bayesian = any(isinstance(m, BayesianModule) for m in module.modules())
    return runs and real and not bayesian and not is_lazy(module)


def is_parametrized(module: nn.Module) -> bool:
    """By ``torch.nn.utils.parametrize``, or by a hook that forms the weight at each forward (prune)."""
    formed = isinstance(getattr(module, "weight", None), Tensor) and "weight" not in module._parameters
    return formed or parametrize.is_parametrized(module)


def product_options(module: Any, kind: type[nn.Module]) -> dict[str, Any]:
    """The arguments that make the Bayesian layer of a linear or bilinear layer or a convolution."""
    if kind in (nn.Linear, nn.Bilinear):
        inputs = ("in_features",) if kind is nn.Linear else ("in1_features", "in2_features")
        return {name: getattr(module, name) for name in (*inputs, "out_features")}
    options = {
        name: getattr(module, name)
        for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
    }
    if "Transpose" in kind.__name__:
        options["output_padding"] = module.output_padding
    return {**options, "padding_mode": module.padding_mode}


def table_options(module: Any, kind: type[nn.Module]) -> dict[str, Any]:
    names = ["num_embeddings", "embedding_dim", "padding_idx", "scale_grad_by_freq", "sparse"]
    if kind is nn.EmbeddingBag:
        names += ["mode", "include_last_offset"]
    return {name: getattr(module, name) for name in names}


def twin_of(layer: BayesianModule) -> tuple[type[nn.Module], dict[str, Any]]:
    """The class of torch.nn, and the arguments that make the twin of a Bayesian layer."""
    for kind, shape in PRODUCTS.items():
        if isinstance(layer, shape):
            return kind, {**product_options(layer, kind), "bias": layer.bias_mu is not None}
    for kind, table in TABLES.items():
        if isinstance(layer, table):
            return kind, table_options(layer, kind)
    raise TypeError(f"to_deterministic: there is no torch.nn layer for {type(layer).__name__}")


def move_hooks(source: nn.Module, target: nn.Module) -> None:
    """The hooks of forward and backward; those of state_dict know other names."""
    for slot, value in vars(source).items():
        if slot.startswith(("_forward_", "_backward_")):
            vars(target)[slot] = type(value)({**vars(target)[slot], **value})
        elif slot == "_is_full_backward_hook" and value is not None:
            vars(target)[slot] = value


def copy_of(model: nn.Module, shared: Iterable[Tensor] = ()) -> nn.Module:
    """``copy.deepcopy``, also where a module keeps a tensor with a graph: a weight that a hook forms.

    The tensors ``shared`` are not copied.
    """
    memo: dict[int, Any] = {id(t): t for t in shared}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)


def point_to(module: nn.Module, replaced: dict[int, nn.Module]) -> None:
    """Replaces modules in a module's other attributes, and in lists, tuples and dicts there."""

    def moved(value: Any) -> Any:
        if id(value) in replaced:
            return replaced[id(value)]
        if type(value) is dict:
            return {key: moved(v) for key, v in value.items()}
        return type(value)(map(moved, value)) if type(value) in (list, tuple) else value

    def reaches(value: Any) -> bool:
        if id(value) in replaced:
            return True
        inner = value.values() if type(value) is dict else value if type(value) in (list, tuple) else ()
        return any(map(reaches, inner))

    for name, value in list(vars(module).items()):
        if name != "_modules" and reaches(value):
            vars(module)[name] = moved(value)
