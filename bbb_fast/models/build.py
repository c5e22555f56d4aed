"""What the models share: one description of each architecture, built Bayesian or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, TypeVar

from torch import Tensor, nn

from ..layers import BBB, BBB_LRT, Flipout
from ..layers.misc import ModuleWrapper

T = TypeVar("T")

LAYER_TYPES: dict[str, ModuleType] = {"bbb": BBB, "lrt": BBB_LRT, "flipout": Flipout}
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"softplus": nn.Softplus, "relu": nn.ReLU}


def choose(kind: str, value: str, allowed: Mapping[str, T]) -> T:
    """Looks a named option up, or says which names there are."""
    try:
        return allowed[value]
    except (KeyError, TypeError):
        raise ValueError(f"unknown {kind} {value!r}; allowed: {', '.join(allowed)}") from None


class Architecture:
    """A model's layers, written once in ``_build`` for both families.

    Activations rise everywhere, so the largest number's is the largest: they come behind the pooling, where
    fewer numbers are left.
    """

    def _build(
        self,
        outputs: int,
        inputs: int,
        conv: Callable[..., nn.Module],
        linear: Callable[..., nn.Module],
        act: Callable[[], nn.Module],
    ) -> None:
        raise NotImplementedError


class BayesianModel(ModuleWrapper, Architecture):
    """A model of Bayesian layers: images [N, inputs, 32, 32] to ``(output, kl)``, [N, outputs] and a scalar.

    ``output`` holds logits, in the type of the images and parameters. ``model(x, sample=False)`` uses the
    posterior means.

    Args: ``outputs`` classes; ``inputs`` channels of a 32 x 32 image; ``priors`` as the layers take them
    (None: defaults); ``layer_type`` "lrt", "bbb" or "flipout"; ``activation_type`` "softplus" or "relu".
    Raises ValueError for another layer_type or activation_type, and in forward for images of another size.
    """

    def __init__(
        self,
        outputs: int,
        inputs: int,
        priors: Mapping[str, Any] | None = None,
        layer_type: str = "lrt",
        activation_type: str = "softplus",
    ) -> None:
        super().__init__()
        layers = choose("layer_type", layer_type, LAYER_TYPES)
        act = choose("activation_type", activation_type, ACTIVATIONS)
        self.num_classes = outputs
        self.layer_type = layer_type
        self.activation_type = activation_type
        self.priors = priors

        def conv(*args: Any, **options: Any) -> nn.Module:
            layer: nn.Module = layers.BBBConv2d(*args, priors=priors, **options)
            return layer

        def linear(*args: Any) -> nn.Module:
            layer: nn.Module = layers.BBBLinear(*args, priors=priors)
            return layer

        self._build(outputs, inputs, conv, linear, act)


class PointModel(nn.Module, Architecture):
    """The frequentist twin: torch.nn layers under the same names, [N, inputs, 32, 32] to logits [N, outputs].

    A ``state_dict`` of the Bayesian model loads into it: it takes the posterior means.

    Args: ``outputs`` classes; ``inputs`` channels of a 32 x 32 image; ``activation_type`` "softplus" or
    "relu". Raises ValueError for another activation_type, and in forward for images of another size.
    """

    def __init__(self, outputs: int, inputs: int = 3, activation_type: str = "softplus") -> None:
        super().__init__()
        act = choose("activation_type", activation_type, ACTIVATIONS)
        self.num_classes = outputs
        self.activation_type = activation_type
        self._build(outputs, inputs, nn.Conv2d, nn.Linear, act)
        register: Any = self.register_load_state_dict_pre_hook
        register(_means_from_bayesian)

    def forward(self, x: Tensor) -> Tensor:
        # Not children(), which has a module under two names once.
        for module in self._modules.values():
            assert module is not None
            x = module(x)
        return x


_POSTERIOR_NAMES = {"weight": ("W_mu", "W_rho"), "bias": ("bias_mu", "bias_rho")}


def _means_from_bayesian(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Lets a point model load a Bayesian state_dict: it takes the posterior means."""
    for name in list(module.state_dict()):
        owner, _, kind = (prefix + name).rpartition(".")
        mu, rho = _POSTERIOR_NAMES.get(kind, ("", ""))
        if mu and f"{owner}.{mu}" in state:
            state[f"{owner}.{kind}"] = state.pop(f"{owner}.{mu}")
            state.pop(f"{owner}.{rho}", None)
