"""The rivals: Bayesian layers as the textbooks and PyTorch-BayesianCNN write them, in eager PyTorch."""

from __future__ import annotations

from collections.abc import Callable

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

    def forward(self, x: Tensor) -> Tensor:
        W_sigma, bias_sigma = sigma(self.W_rho), sigma(self.bias_rho)
        self.sigmas = W_sigma, bias_sigma
        if self.estimator == "bbb":
            W = self.W_mu + torch.empty_like(W_sigma).normal_(0, 1) * W_sigma
            b = self.bias_mu + torch.empty_like(bias_sigma).normal_(0, 1) * bias_sigma
            return self.apply_weights(x, W, b)
        mean = self.apply_weights(x, self.W_mu, self.bias_mu)
        std = torch.sqrt(1e-16 + self.apply_weights(x**2, W_sigma**2, bias_sigma**2))
        return mean + std * torch.empty_like(mean).normal_(0, 1)

    def kl_loss(self) -> Tensor:
        return kl(self.W_mu, self.sigmas[0]) + kl(self.bias_mu, self.sigmas[1])


def linear(i: int, o: int, estimator: str) -> EagerLayer:
    return EagerLayer((o, i), F.linear, estimator)


def conv2d(i: int, o: int, k: int, padding: int, estimator: str) -> EagerLayer:
    return EagerLayer((o, i, k, k), lambda x, w, b: F.conv2d(x, w, b, padding=padding), estimator)
