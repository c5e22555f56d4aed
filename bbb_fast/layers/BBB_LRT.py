"""Local-reparameterization layers: each forward draws one number for each output element."""

from torch import Tensor

from .. import functional
from .base import LRT_CONV, ConvBase, LinearBase, LocalReparameterization

__all__ = ["BBBConv1d", "BBBConv2d", "BBBConv3d", "BBBLinear"]


class BBBLinear(LocalReparameterization, LinearBase):
    """Linear layer, y = m + sqrt(v) * eps: input [..., in_features]."""

    def _sample_forward(self, input: Tensor, rng: Tensor) -> Tensor:
        return functional.lrt_linear(input, self.W_mu, self.W_rho, self.bias_mu, self.bias_rho, rng)


class _Conv(LocalReparameterization, ConvBase):
    def _sample_forward(self, input: Tensor, rng: Tensor) -> Tensor:
        input, padding = self._pad(input)
        return LRT_CONV[self.spatial](
            input,
            self.W_mu,
            self.W_rho,
            self.bias_mu,
            self.bias_rho,
            rng,
            self.stride,
            padding,
            self.dilation,
            self.groups,
        )


class BBBConv1d(_Conv):
    """1-d convolution: input [N, C_in, L] or [C_in, L]."""

    spatial = 1


class BBBConv2d(_Conv):
    """2-d convolution: input [N, C_in, H, W] or [C_in, H, W]."""

    spatial = 2


class BBBConv3d(_Conv):
    """3-d convolution: input [N, C_in, D, H, W] or [C_in, D, H, W]."""

    spatial = 3
