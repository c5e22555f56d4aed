"""Laplace's approximation around a trained network's last layer, fitted by the laplace-torch package."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional
from .._noise import RandomModule, draw_rng

__all__ = ["LaplaceLinear", "last_layer_laplace"]


class LaplaceLinear(RandomModule):
    """A linear layer with a Gaussian posterior whose precision is a Kronecker product and a prior's.

    The posterior precision of the weight [out, in] is U (u v^T + delta) V^T: a draw is
    W + U (E / sqrt(u v^T + delta)) V^T with E of standard normals; that of the bias is U_b (u_b + delta_b),
    likewise. Ritter, Botev, Barber 2018, "A scalable Laplace approximation for neural networks", section 3.2;
    Daxberger et al. 2021, "Laplace redux" (arXiv:2106.14806).

    Every forward draws once, for all rows: in train and in eval mode, the same draw under the same
    ``fixed_noise``; ``posterior_means()`` and ``sample=False`` give the trained layer. input: [..., in], of
    the weight's dtype. Everything is a buffer: nothing is trained any more, all of it is in the
    ``state_dict``.

    Args:
        layer: the trained ``nn.Linear``; its weight and bias are the means.
        weight_vectors: U [out, out] and V [in, in], eigenvectors in columns.
        weight_scale: 1 / sqrt(u v^T + delta), [out, in].
        bias_vectors, bias_scale: U_b [out, out] and 1 / sqrt(u_b + delta_b) [out], of a layer with a bias.

    Raises TypeError for another layer, ValueError for other shapes, and for scales that are negative or not
    finite.
    """

    weight: Tensor
    bias: Tensor | None
    out_vectors: Tensor
    in_vectors: Tensor
    weight_scale: Tensor
    bias_vectors: Tensor | None
    bias_scale: Tensor | None

    def __init__(
        self,
        layer: nn.Linear,
        weight_vectors: tuple[Tensor, Tensor],
        weight_scale: Tensor,
        bias_vectors: Tensor | None = None,
        bias_scale: Tensor | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(layer, nn.Linear):
            raise TypeError(f"LaplaceLinear: layer must be a torch.nn.Linear, got {type(layer).__name__}")
        out_features, in_features = layer.weight.shape
        square = {"U": (out_features, weight_vectors[0]), "V": (in_features, weight_vectors[1])}
        shapes: dict[str, tuple[Tensor, tuple[int, ...]]]
        shapes = {name: (given, (n, n)) for name, (n, given) in square.items()}
        shapes["weight_scale"] = (weight_scale, (out_features, in_features))
        if layer.bias is not None:
            if bias_vectors is None or bias_scale is None:
                raise ValueError("LaplaceLinear: a layer with a bias needs bias_vectors and bias_scale")
            shapes["bias_vectors"] = (bias_vectors, (out_features, out_features))
            shapes["bias_scale"] = (bias_scale, (out_features,))
        elif bias_vectors is not None or bias_scale is not None:
            raise ValueError("LaplaceLinear: the layer has no bias, but bias_vectors or bias_scale are given")
        for name, (given, wanted) in shapes.items():
            if tuple(given.shape) != wanted:
                raise ValueError(f"LaplaceLinear: {name} must be {list(wanted)}, got {list(given.shape)}")
            if "scale" in name and not (given.isfinite() & (given >= 0)).all():
                raise ValueError(f"LaplaceLinear: {name} must be finite and >= 0")
        like = layer.weight.detach()
        kept = {
            "weight": like, "bias": layer.bias, "out_vectors": weight_vectors[0],
            "in_vectors": weight_vectors[1], "weight_scale": weight_scale, "bias_vectors": bias_vectors,
            "bias_scale": bias_scale,
        }  # fmt: skip
        for name, tensor in kept.items():
            self.register_buffer(name, None if tensor is None else tensor.detach().to(like).clone())

    def forward(self, input: Tensor, sample: bool = True) -> Tensor:
        """[..., in] to [..., out], by one draw; by the means where ``sample`` is False."""
        draw = self.wanted_draw() if sample else None
        if draw is None or draw.means:
            return F.linear(input, self.weight, self.bias)
        rng = draw_rng(input.device) if draw.pinned is None else draw.pinned.rng(self, input.device)
        count = 0 if self.bias is None else len(self.bias)
        noise = functional.normal([self.weight.numel() + count], rng, dtype=self.weight.dtype)
        eps = noise[count:].view_as(self.weight)
        weight = self.weight + self.out_vectors @ (self.weight_scale * eps) @ self.in_vectors.T
        if self.bias is None or self.bias_vectors is None or self.bias_scale is None:
            return F.linear(input, weight)
        return F.linear(input, weight, self.bias + self.bias_vectors @ (self.bias_scale * noise[:count]))

    def extra_repr(self) -> str:
        out_features, in_features = self.weight.shape
        return f"in_features={in_features}, out_features={out_features}, bias={self.bias is not None}"


def last_layer_laplace(
    model: nn.Module, data: Iterable[tuple[Tensor, Tensor]], *, layer: str | None = None
) -> nn.Module:
    """A copy of a trained classifier whose last linear layer is a :class:`LaplaceLinear` around its weights.

    The curvature is a Kronecker-factored generalised Gauss-Newton matrix of the training data; the prior's
    precision maximises the marginal likelihood, so no held-out data are needed. Both are computed by
    laplace-torch (``pip install laplace-torch``; Daxberger et al. 2021, "Laplace redux", arXiv:2106.14806).
    The copy is in eval mode, and answers to ``fixed_noise``, ``predict`` and ``predictive`` as every random
    model here does: the Monte Carlo estimate over the weights, not the linearised predictive.

    Args:
        model: trained with the cross-entropy; returns logits [N, C], and draws nothing yet.
        data: the training data in batches (input, label int64 [N]), as a ``DataLoader`` has them, with a
            ``dataset`` whose length is their number.
        layer: the name of the last linear layer, for a model in which it is not the last of
            ``named_modules()``.

    Raises ImportError without laplace-torch, TypeError for what is no module, ValueError for a model without
    a linear layer, a name it does not have, and one that answers at random.
    """
    try:
        from laplace import Laplace
    except ImportError as error:
        raise ImportError(
            f"last_layer_laplace needs laplace-torch ({error}): pip install laplace-torch"
        ) from error
    if not isinstance(model, nn.Module):
        raise TypeError(f"last_layer_laplace: model must be a torch.nn.Module, got {type(model).__name__}")
    if any(isinstance(module, RandomModule) for module in model.modules()):
        raise ValueError("last_layer_laplace: the model must not answer at random already")
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ValueError("last_layer_laplace: the model has no torch.nn.Linear")
    name = linear[-1] if layer is None else layer
    if name not in linear:
        raise ValueError(f"last_layer_laplace: layer must be one of {', '.join(linear)}, got {name!r}")
    # laplace-torch hooks into the model and changes it.
    fitted = Laplace(
        copy.deepcopy(model).eval(), "classification",
        subset_of_weights="last_layer", hessian_structure="kron", last_layer_name=name,
    )  # fmt: skip
    fitted.fit(data)
    fitted.optimize_prior_precision(method="marglik")
    found = fitted.posterior_precision
    result = copy.deepcopy(model).eval().requires_grad_(False)
    trained = result.get_submodule(name)
    assert isinstance(trained, nn.Linear)
    scales = [_scale(values, delta) for values, delta in zip(found.eigenvalues, found.deltas, strict=True)]
    vectors = found.eigenvectors
    biased = () if trained.bias is None else (vectors[1][0], scales[1])
    own = LaplaceLinear(trained, (vectors[0][0], vectors[0][1]), scales[0], *biased)
    if not name:
        return own.eval()
    result.set_submodule(name, own.eval())
    return result


def _scale(values: list[Tensor], delta: Tensor) -> Tensor:
    """1 / sqrt(eigenvalues + delta) of a block: a matrix, or the Kronecker product of two."""
    return (values[0] if len(values) == 1 else torch.outer(*values)).add(delta).rsqrt().detach()
