"""Layers that take the size of their input from the first one: as torch.nn's lazy modules."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedParameter, is_lazy

from .base import BayesianLayer, _Parameters
from .shapes import InputSize

__all__ = ["Lazy"]


class Lazy(LazyModuleMixin, BayesianLayer):
    """A layer that is made for the size of its first input: it has the plain one's arguments but the first.

    The first forward gives the parameters their shapes, draws them from ``priors`` as the plain layer does
    when it is made, and turns the layer into one of the plain class. So does loading a ``state_dict`` of
    the plain layer. Until then there is no posterior: ``posterior()`` and ``kl_loss()``, ``predict`` and
    ``multi_sample`` of a model raise RuntimeError.

    Raises what the plain layer raises; for a size that it cannot have, and for tensors in ``priors`` that do
    not have the weight's shape, at the first forward (which may then be run again with another input).
    """

    cls_to_become: type[BayesianLayer]
    __signature__: inspect.Signature
    # The plain class's.
    _input_size: InputSize
    # The weight's, with a size for the time being in the place of the input's; how often that goes into the
    # input's (groups, of a convolution); the bias's.
    _weight_shape: tuple[int, ...]
    _multiple: int
    _bias_shape: tuple[int, ...]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.cls_to_become = next(
            base for base in cls.__mro__ if issubclass(base, BayesianLayer) and not issubclass(base, Lazy)
        )
        signature = inspect.signature(cls.cls_to_become)
        cls.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])

    def __init__(self, *args: Any, **options: Any) -> None:
        given = self.__signature__.bind(*args, **options).arguments
        # Any size that the groups divide.
        super().__init__(given.get("groups", 1), **given)
        setattr(self, self._input_size.name, 0)

    def _start(self, weight_shape: tuple[int, ...], bias_shape: tuple[int, ...]) -> None:
        size = self._input_size
        self._multiple = getattr(self, size.name) // weight_shape[size.weight_dim]
        self._weight_shape, self._bias_shape = weight_shape, bias_shape
        for name, p in self._parameters.items():
            if p is not None:
                # Its __new__ has the two, which torch's types do not say; nor is it a Parameter to them.
                make: Any = UninitializedParameter
                self._parameters[name] = make(device=p.device, dtype=p.dtype)

    def reset_parameters(self) -> None:
        """As in the plain layer; nothing before the first forward, which draws."""
        if not self.has_uninitialized_params():
            super().reset_parameters()

    def initialize_parameters(self, *args: Any, **options: Any) -> None:
        """What ``torch.nn`` calls with the arguments of the first forward."""
        if self.has_uninitialized_params():
            self._initialise(self._size_of(*args, **options))

    def _size_of(self, input: Tensor, *args: Any, **options: Any) -> int:
        name, dim, _ = self._input_size
        if not isinstance(input, Tensor):
            raise TypeError(f"{type(self).__name__}: input must be a tensor, got {type(input).__name__}")
        spatial = -1 - dim
        if input.dim() < 1 or (spatial and input.dim() not in (spatial + 1, spatial + 2)):
            wanted = f"{spatial + 1} (unbatched) or {spatial + 2} dimensions" if spatial else "a dimension"
            raise ValueError(
                f"{type(self).__name__}: input must have {wanted}, of which one is {name}, got "
                f"{list(input.shape)}"
            )
        return input.shape[dim]

    def _initialise(self, size: int) -> None:
        name, _, dim = self._input_size
        size = self._checked_size(name, size)
        shape = self._shape_for(size)
        # Before anything changes.
        self._check_priors(shape, self._bias_shape)
        setattr(self, name, size)
        for label, p in self._parameters.items():
            if isinstance(p, UninitializedParameter):
                p.materialize(shape if label.startswith("W") else self._bias_shape)
        super()._start(shape, self._bias_shape)
        del self._weight_shape, self._multiple, self._bias_shape

    def _shape_for(self, size: Any) -> tuple[Any, ...]:
        """The weight's, for a size of the input, or for "any"."""
        dim = self._input_size.weight_dim
        own = size // self._multiple if isinstance(size, int) else size
        return (*self._weight_shape[:dim], own, *self._weight_shape[dim + 1 :])

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        given = {name: state_dict.get(prefix + name) for name in self._parameters}
        rest = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if all(value is None or is_lazy(value) for value in given.values()):
            super()._load_from_state_dict(state_dict, prefix, *rest)
            return
        weight = given["W_mu"]
        shape = () if weight is None or is_lazy(weight) else tuple(weight.shape)
        size = (
            shape[self._input_size.weight_dim] * self._multiple
            if len(shape) == len(self._weight_shape)
            else 0
        )
        if shape != self._shape_for(size):
            wanted = ", ".join(map(str, self._shape_for("any")))
            error_msgs.append(
                f"size mismatch for {prefix}W_mu, which {self._input_size.name} is taken from: it must be "
                f"[{wanted}], got {[*shape] if shape else 'none'}"
            )
            return
        try:
            self._initialise(size)
        except ValueError as error:
            error_msgs.append(f"{prefix}W_mu: {error}")
            return
        # It is of the plain class from here on.
        self._infer_parameters(self, ())
        self._load_from_state_dict(state_dict, prefix, *rest)

    def _check_initialised(self) -> None:
        if self.has_uninitialized_params():
            raise RuntimeError(
                f"{type(self).__name__}: not initialised; run a forward first, whose input says what "
                f"{self._input_size.name} is"
            )

    def _check_whole(self) -> None:
        self._check_initialised()
        super()._check_whole()

    def _parameters_in_order(self) -> _Parameters:
        self._check_initialised()
        return super()._parameters_in_order()
