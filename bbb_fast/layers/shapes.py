"""What a layer computes, and its arguments: the shapes of ``torch.nn``. Estimators: ``estimators.py``."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _autocast
from .._checks import integer
from ..reference import conv_memory_format, in_format
from ..routes import VarianceDtype
from .base import BayesianLayer, _Parameters

__all__ = [
    "Bilinear",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "Linear",
]


def _help_of(sizes: str, input: str, output: str, call: str = "layer(input, sample=False)") -> str:
    """The help of a shape: its own arguments, those that all layers have, and what a forward does."""
    return f"""\
Args:
{textwrap.indent(textwrap.dedent(sizes).strip(), "    ")}
    bias: whether there is one.
    priors: a mapping, see :func:`bbb_fast.priors.resolve_priors`; None: the defaults.
    device, dtype: of the parameters, as in torch.nn; float32, float64, bfloat16 or float16.
    recompute_weight: option of bbb and flipout: what is drawn is not kept for backward, but drawn again.
    variance_dtype: option of lrt: the type of the variance product, as in
        :func:`bbb_fast.functional.lrt_linear`.

Takes {input}, of the parameters' dtype (float32 parameters take bfloat16 and float16 too); returns
{output} in the input's dtype. ``{call}`` uses the posterior means. Raises ValueError for
sizes and priors out of range and another estimator's option, TypeError for another dtype or device; in a
forward TypeError for inputs of another type, ValueError for another shape."""


class InputSize(NamedTuple):
    """The size of its input that a layer is made for: the attribute, and where the size is to be read."""

    name: str
    input_dim: int
    weight_dim: int


class _Features(BayesianLayer):
    """What layers of features share."""

    _shape_name = "linear"

    def _checked_size(self, name: str, value: Any, least: int = 0) -> int:
        size = integer(value)
        if size is None or size < least:
            raise ValueError(f"{type(self).__name__}: {name} must be an int >= {least}, got {value!r}")
        return size


class Linear(_Features):
    """Shape and arithmetic of ``torch.nn.Linear``: input [..., in_features]."""

    _takes_any_layout = True
    _input_size = InputSize("in_features", -1, 1)
    _help = _help_of(
        "in_features, out_features: of the last dimension of input and output, at least 0.",
        "input [..., in_features]",
        "[..., out_features]",
    )

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        priors: Mapping[str, Any] | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        recompute_weight: bool = False,
        variance_dtype: VarianceDtype = None,
    ) -> None:
        self.in_features = self._checked_size("in_features", in_features)
        self.out_features = self._checked_size("out_features", out_features)
        super().__init__(
            (self.out_features, self.in_features),
            self.out_features if bias else None,
            priors,
            device,
            dtype,
            recompute_weight,
            variance_dtype,
        )

    def _mean_output(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(input, weight, bias)

    def _draw_at_once(self, native: Any, input: Tensor) -> tuple[Tensor, Any] | None:
        return self._call_native(native, input, None)

    def _shape_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias_mu is not None}"


class Bilinear(_Features):
    """Shape and arithmetic of ``torch.nn.Bilinear``: inputs [..., in1_features] and [..., in2_features].

    It is linear in the outer product of its inputs. Under "lrt" and "flipout" that is formed, a matrix of
    in1_features * in2_features numbers for each row; a drawn weight ("bbb", ``fixed_noise``, ``predict``) and
    the means need none, as in torch.nn, unless ``recompute_weight`` is set.
    """

    _help = _help_of(
        """
        in1_features, in2_features: of the last dimension of the two inputs, at least 1.
        out_features: of that of the output, at least 0.
        """,
        "inputs [..., in1_features] and [..., in2_features]",
        "[..., out_features]",
        "layer(input1, input2, sample=False)",
    )

    def __init__(
        self,
        in1_features: int,
        in2_features: int,
        out_features: int,
        bias: bool = True,
        priors: Mapping[str, Any] | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        recompute_weight: bool = False,
        variance_dtype: VarianceDtype = None,
    ) -> None:
        self.in1_features = self._checked_size("in1_features", in1_features, 1)
        self.in2_features = self._checked_size("in2_features", in2_features, 1)
        self.out_features = self._checked_size("out_features", out_features)
        super().__init__(
            (self.out_features, self.in1_features, self.in2_features),
            self.out_features if bias else None,
            priors,
            device,
            dtype,
            recompute_weight,
            variance_dtype,
        )

    def forward(  # type: ignore[override]  # of two inputs
        self, input1: Tensor, input2: Tensor, sample: bool = True
    ) -> Tensor:
        """As the other layers', of two inputs whose dimensions but the last are the same.

        Raises TypeError for inputs that are no dense tensors of one type, ValueError for other shapes.
        """
        return self._output(self._joined(input1, input2), sample)

    def _joined(self, input1: Tensor, input2: Tensor) -> Tensor:
        """Both inputs in one tensor, [..., in1_features + in2_features]: rows are split and batched once."""
        name = type(self).__name__
        for label, t in (("input1", input1), ("input2", input2)):
            if not isinstance(t, Tensor):
                raise TypeError(f"{name}: {label} must be a tensor, got {type(t).__name__}")
            if t.is_nested or t.layout is not torch.strided:
                raise TypeError(f"{name}: {label} must be a dense tensor")
        widths, shapes = [self.in1_features, self.in2_features], [list(input1.shape), list(input2.shape)]
        if [shape[-1:] for shape in shapes] != [[w] for w in widths] or shapes[0][:-1] != shapes[1][:-1]:
            raise ValueError(
                f"{name}: the inputs must be [..., {widths[0]}] and [..., {widths[1]}] with the same "
                f"dimensions before, got {shapes[0]} and {shapes[1]}"
            )
        # Not in float32 and then rounded: under autocast the product is one of its type's numbers.
        input1, input2 = _autocast.narrowed(input1), _autocast.narrowed(input2)
        if input1.dtype != input2.dtype:
            raise TypeError(f"{name}: the inputs must have one dtype, got {input1.dtype} and {input2.dtype}")
        return torch.cat((input1, input2), dim=-1)

    def _mean_output(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.bilinear(*self._parts(input), weight, bias)

    def _draw_output(
        self, estimator: str, input: Tensor, parameters: _Parameters, rng: Tensor, **options: Any
    ) -> Tensor:
        if estimator == "bbb" and not self.recompute_weight:
            drawn = self._drawn_weights(input, rng)
            if rng.dim() == 1:
                return self._mean_output(input, *drawn)
            parts = zip(input.tensor_split(len(rng)), *(w.unbind() for w in drawn), strict=True)
            return torch.cat([self._mean_output(*part) for part in parts])
        first, second = self._parts(input)
        outer = (first.unsqueeze(-1) * second.unsqueeze(-2)).flatten(-2)
        W_mu, W_rho, *bias = parameters
        matrices = W_mu.flatten(1), W_rho.flatten(1)
        output: Tensor = self._function(estimator)(outer, *matrices, *bias, rng, **options)
        return output

    def _parts(self, input: Tensor) -> tuple[Tensor, Tensor]:
        first, second = input.split((self.in1_features, self.in2_features), dim=-1)
        return first, second

    def _draw_at_once(self, native: Any, input: Tensor) -> tuple[Tensor, Any] | None:
        return None

    def _shape_repr(self) -> str:
        return (
            f"{self.in1_features}, {self.in2_features}, {self.out_features}, bias={self.bias_mu is not None}"
        )


_CHANNELS = """
in_channels, out_channels: of dimension 1 of input and output, at least 1.
kernel_size, stride, padding, dilation, groups, padding_mode: as in torch.nn.
"""
_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


class _Convolution(BayesianLayer):
    """What convolutions and transposed ones share; a subclass sets ``spatial`` and ``_shape_name``."""

    spatial: int
    transposed: bool

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int],
        dilation: int | Sequence[int],
        groups: int,
        bias: bool,
        priors: Mapping[str, Any] | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        recompute_weight: bool,
        variance_dtype: VarianceDtype,
    ) -> None:
        name = type(self).__name__
        count = integer(groups)
        if count is None or count < 1:
            raise ValueError(f"{name}: groups must be an int >= 1, got {groups!r}")
        self.groups = count
        self.in_channels = self._checked_size("in_channels", in_channels)
        self.out_channels = self._checked_size("out_channels", out_channels)
        self.kernel_size = self._numbers("kernel_size", kernel_size, 1)
        first, second = self.out_channels, self.in_channels
        if self.transposed:
            first, second = second, first
        super().__init__(
            (first, second // self.groups, *self.kernel_size),
            self.out_channels if bias else None,
            priors,
            device,
            dtype,
            recompute_weight,
            variance_dtype,
        )
        self.stride = self._numbers("stride", stride, 1)
        self.dilation = self._numbers("dilation", dilation, 1)

    @property
    def _input_size(self) -> InputSize:
        return InputSize("in_channels", -1 - self.spatial, 0 if self.transposed else 1)

    def _checked_size(self, name: str, value: Any) -> int:
        count = integer(value)
        if count is None or count < 1 or count % self.groups:
            raise ValueError(
                f"{type(self).__name__}: {name} must be positive and divisible by groups = {self.groups}, "
                f"got {value!r}"
            )
        return count

    def _numbers(self, label: str, value: Any, least: int) -> tuple[int, ...]:
        if isinstance(value, Iterable) and not isinstance(value, Tensor):
            given = tuple(value)
        else:
            given = (value,) * self.spatial
        numbers = tuple(n for n in map(integer, given) if n is not None and n >= least)
        if len(given) != self.spatial or len(numbers) != self.spatial:
            raise ValueError(
                f"{type(self).__name__}: {label} must be an int >= {least} or {self.spatial} of them, "
                f"got {value!r}"
            )
        return numbers

    def _shape_repr(self) -> str:
        text = (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding!r}"
        )
        if any(d != 1 for d in self.dilation):
            text += f", dilation={self.dilation}"
        if any(getattr(self, "output_padding", ())):
            text += f", output_padding={self.output_padding}"
        if self.groups != 1:
            text += f", groups={self.groups}"
        if self.padding_mode != "zeros":
            text += f", padding_mode={self.padding_mode!r}"
        return text + f", bias={self.bias_mu is not None}"


class Conv(_Convolution):
    """Shape and arithmetic of ``torch.nn.ConvNd``."""

    _help = _help_of(_CHANNELS, "input [N, in_channels, ...] or [in_channels, ...]", "[N, out_channels, ...]")
    transposed = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        bias: bool = True,
        priors: Mapping[str, Any] | None = None,
        *,
        groups: int = 1,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        recompute_weight: bool = False,
        variance_dtype: VarianceDtype = None,
    ) -> None:
        name = type(self).__name__
        if padding_mode not in _PADDING_MODES:
            raise ValueError(
                f"{name}: padding_mode must be one of {', '.join(_PADDING_MODES)}, got {padding_mode!r}"
            )
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            dilation,
            groups,
            bias,
            priors,
            device,
            dtype,
            recompute_weight,
            variance_dtype,
        )
        self.padding_mode = padding_mode
        self.padding: tuple[int, ...] | str
        if isinstance(padding, str):
            if padding not in ("same", "valid"):
                raise ValueError(f"{name}: padding must be numbers, 'same' or 'valid', got {padding!r}")
            if padding == "same" and any(s != 1 for s in self.stride):
                raise ValueError(f"{name}: padding='same' needs stride 1, got {self.stride}")
            self.padding = padding
        else:
            self.padding = self._numbers("padding", padding, 0)
        # What F.pad takes: last dimension first, before and after; "same" puts the odd one behind.
        self._input_padding: list[int] = []
        for d in reversed(range(self.spatial)):
            if self.padding == "same":
                total = self.dilation[d] * (self.kernel_size[d] - 1)
                self._input_padding += [total // 2, total - total // 2]
            else:
                size = 0 if isinstance(self.padding, str) else self.padding[d]
                self._input_padding += [size, size]

    def _pad(self, input: Tensor) -> tuple[Tensor, tuple[int, ...] | str]:
        """Applies a padding mode the convolution itself does not know."""
        if self.padding_mode == "zeros":
            return input, self.padding
        padded = F.pad(input, self._input_padding, mode=self.padding_mode)
        # The memory format numbers the noise; F.pad keeps it in some modes and on some devices only.
        return in_format(padded, conv_memory_format(input, self.W_mu)), (0,) * self.spatial

    def _mean_output(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        input, padding = self._pad(input)
        conv = getattr(F, self._shape_name)
        output: Tensor = conv(input, weight, bias, self.stride, padding, self.dilation, self.groups)
        return output

    def _draw_output(
        self, estimator: str, input: Tensor, parameters: _Parameters, rng: Tensor, **options: Any
    ) -> Tensor:
        input, padding = self._pad(input)
        geometry = (self.stride, padding, self.dilation, self.groups)
        output: Tensor = self._function(estimator)(input, *parameters, rng, *geometry, **options)
        return output

    def _draw_at_once(self, native: Any, input: Tensor) -> tuple[Tensor, Any] | None:
        padding = self.padding
        if input.dim() != self.spatial + 2 or isinstance(padding, str) or self.padding_mode != "zeros":
            return None
        none = (0,) * self.spatial
        return self._call_native(
            native, input, (self.stride, padding, self.dilation, False, none, self.groups)
        )


class ConvTranspose(_Convolution):
    """Shape and arithmetic of ``torch.nn.ConvTransposeNd``."""

    _help = _help_of(
        _CHANNELS.replace("padding_mode", "output_padding, padding_mode"),
        "input [N, in_channels, ...] or [in_channels, ...]",
        "[N, out_channels, ...]",
    )
    transposed = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        bias: bool = True,
        priors: Mapping[str, Any] | None = None,
        *,
        output_padding: int | Sequence[int] = 0,
        groups: int = 1,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        recompute_weight: bool = False,
        variance_dtype: VarianceDtype = None,
    ) -> None:
        if padding_mode != "zeros":
            raise ValueError(f"{type(self).__name__}: padding_mode must be zeros, got {padding_mode!r}")
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            dilation,
            groups,
            bias,
            priors,
            device,
            dtype,
            recompute_weight,
            variance_dtype,
        )
        self.padding_mode = padding_mode
        self.padding = self._numbers("padding", padding, 0)
        self.output_padding = self._numbers("output_padding", output_padding, 0)

    def forward(  # type: ignore[override]  # in torch.nn's order, where output_size is the second
        self, input: Tensor, output_size: Sequence[int] | bool | None = None, sample: bool = True
    ) -> Tensor:
        """As ``torch.nn.ConvTransposeNd``'s: ``output_size``, if given, chooses the ``output_padding``.

        ``sample`` as in the other layers, also as the second argument. Raises ValueError for an
        ``output_size`` that no ``output_padding`` gives.
        """
        if isinstance(output_size, bool):
            sample = output_size
            output_size = None
        padding = None if output_size is None else self._padding_for(input, output_size)
        return self._output(input, sample, output_padding=padding)

    def _padding_for(self, input: Tensor, output_size: Sequence[int]) -> tuple[int, ...]:
        """The output_padding that gives ``output_size``: of the image, or with the dimensions before it."""
        name, spatial = type(self).__name__, self.spatial
        sizes = list(output_size)
        if len(sizes) == input.dim():
            sizes = sizes[-spatial:]
        if len(sizes) != spatial:
            raise ValueError(
                f"{name}: output_size must have {spatial} or {input.dim()} elements, got {list(output_size)}"
            )
        least = [
            (length - 1) * s - 2 * p + d * (k - 1) + 1
            for length, s, p, d, k in zip(
                input.shape[-spatial:],
                self.stride,
                self.padding,
                self.dilation,
                self.kernel_size,
                strict=True,
            )
        ]
        most = [n + max(s, d) - 1 for n, s, d in zip(least, self.stride, self.dilation, strict=True)]
        if any(not low <= n <= high for low, n, high in zip(least, sizes, most, strict=True)):
            raise ValueError(f"{name}: output_size must be from {least} to {most}, got {sizes}")
        return tuple(n - low for n, low in zip(sizes, least, strict=True))

    def _mean_output(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        output_padding: tuple[int, ...] | None = None,
    ) -> Tensor:
        conv = getattr(F, self._shape_name)
        extra = output_padding or self.output_padding
        output: Tensor = conv(
            input, weight, bias, self.stride, self.padding, extra, self.groups, self.dilation
        )
        return output

    def _draw_output(
        self,
        estimator: str,
        input: Tensor,
        parameters: _Parameters,
        rng: Tensor,
        output_padding: tuple[int, ...] | None = None,
        **options: Any,
    ) -> Tensor:
        extra = output_padding or self.output_padding
        geometry = (self.stride, self.padding, extra, self.groups, self.dilation)
        output: Tensor = self._function(estimator)(input, *parameters, rng, *geometry, **options)
        return output

    def _draw_at_once(
        self, native: Any, input: Tensor, output_padding: tuple[int, ...] | None = None
    ) -> tuple[Tensor, Any] | None:
        if input.dim() != self.spatial + 2:
            return None
        extra = output_padding or self.output_padding
        geometry = (self.stride, self.padding, self.dilation, True, extra, self.groups)
        return self._call_native(native, input, geometry)


class Conv1d(Conv):
    spatial = 1
    _shape_name = "conv1d"


class Conv2d(Conv):
    spatial = 2
    _shape_name = "conv2d"


class Conv3d(Conv):
    spatial = 3
    _shape_name = "conv3d"


class ConvTranspose1d(ConvTranspose):
    spatial = 1
    _shape_name = "conv_transpose1d"


class ConvTranspose2d(ConvTranspose):
    spatial = 2
    _shape_name = "conv_transpose2d"


class ConvTranspose3d(ConvTranspose):
    spatial = 3
    _shape_name = "conv_transpose3d"
