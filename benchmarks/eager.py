"""The rivals: Bayesian layers as the textbooks and PyTorch-BayesianCNN write them, in eager PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sigma(rho: Tensor) -> Tensor:
    return torch.log1p(torch.exp(rho))


def kl(mu: Tensor, sig: Tensor, prior_mu: float = 0.0, prior_sigma: float = 0.1) -> Tensor:
    return (
        0.5
        * (
            2 * torch.log(prior_sigma / sig)
            - 1
            + (sig / prior_sigma).pow(2)
            + ((mu - prior_mu) / prior_sigma).pow(2)
        ).sum()
    )


def sample_and_kl(mu: Tensor, rho: Tensor) -> tuple[Tensor, Tensor]:
    """One weight draw and its KL."""
    sig = sigma(rho)
    eps = torch.empty_like(mu).normal_(0, 1)
    return mu + eps * sig, kl(mu, sig)


def variance(rho: Tensor) -> Tensor:
    return sigma(rho) ** 2


def lrt_sample(m: Tensor, v: Tensor) -> Tensor:
    """m + sqrt(v) * eps, the last pass of local reparameterization."""
    return m + torch.sqrt(1e-16 + v) * torch.empty_like(m).normal_(0, 1)


class EagerLayer(nn.Module):
    """Weight-space (``bbb``) or local-reparameterization (``lrt``) layer around any linear map."""

    def __init__(self, weight_shape: tuple[int, ...], apply: Callable[..., Tensor], estimator: str) -> None:
        super().__init__()
        self.W_mu = nn.Parameter(torch.empty(weight_shape).normal_(0, 0.1))
        self.W_rho = nn.Parameter(torch.empty(weight_shape).normal_(-3, 0.1))
        self.bias_mu = nn.Parameter(torch.empty(weight_shape[0]).normal_(0, 0.1))
        self.bias_rho = nn.Parameter(torch.empty(weight_shape[0]).normal_(-3, 0.1))
        self.apply_weights = apply
        self.estimator = estimator

    def _run(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        W_sigma, bias_sigma = sigma(self.W_rho), sigma(self.bias_rho)
        if self.estimator == "bbb":
            W = self.W_mu + torch.empty_like(W_sigma).normal_(0, 1) * W_sigma
            b = self.bias_mu + torch.empty_like(bias_sigma).normal_(0, 1) * bias_sigma
            return self.apply_weights(x, W, b), (W_sigma, bias_sigma)
        mean = self.apply_weights(x, self.W_mu, self.bias_mu)
        v = self.apply_weights(x**2, W_sigma**2, bias_sigma**2)
        return lrt_sample(mean, v), (W_sigma, bias_sigma)

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x)[0]

    def output_with_kl(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, (W_sigma, bias_sigma) = self._run(x)
        return y, kl(self.W_mu, W_sigma) + kl(self.bias_mu, bias_sigma)


def linear(i: int, o: int, estimator: str) -> EagerLayer:
    return EagerLayer((o, i), F.linear, estimator)


def conv2d(i: int, o: int, k: int, padding: int, estimator: str, stride: int = 1) -> EagerLayer:
    return EagerLayer(
        (o, i, k, k), lambda x, w, b: F.conv2d(x, w, b, stride=stride, padding=padding), estimator
    )


class EagerModel(nn.Module):
    """One of bbb_fast's architectures (a class of ``bbb_fast.models``) with the layers above, and with what
    stands between them as PyTorch-BayesianCNN has it: the activation, then torch.nn's pooling."""

    def __init__(self, architecture: Any, outputs: int, inputs: int, estimator: str) -> None:
        super().__init__()

        def conv(i: int, o: int, k: int, stride: int = 1, padding: int = 0) -> EagerLayer:
            return conv2d(i, o, k, padding, estimator, stride)

        architecture._build(self, outputs, inputs, conv, lambda i, o: linear(i, o, estimator), nn.Softplus)
        modules = list(self._modules.items())
        pools = [(k, name, pool) for k, (name, pool) in enumerate(modules) if isinstance(pool, nn.MaxPool2d)]
        for k, name, pool in pools:
            modules[k : k + 2] = modules[k + 1], (name, nn.MaxPool2d(pool.kernel_size, pool.stride))
        self._modules.clear()
        self._modules.update(modules)

    def forward(self, x: Tensor) -> Tensor:
        for module in self.children():
            x = module(x)
        return x

    def output_with_kl(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(())
        for module in self.children():
            if isinstance(module, EagerLayer):
                x, part = module.output_with_kl(x)
                total = total + part
            else:
                x = module(x)
        return x, total
