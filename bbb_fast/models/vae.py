"""A variational autoencoder for 32 x 32 images (Kingma and Welling 2014)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from .. import functional
from .._checks import integer
from .._noise import _INT64_MAX, RandomModule, draw_rng, fixed_noise
from ..reference import log_softplus, softplus

__all__ = ["VAE", "Bound", "GaussianSample"]

_SIDE = 32
# What three halvings leave of it.
_CODE = _SIDE // 8


class Bound(NamedTuple):
    """The evidence lower bound and its two parts: scalars, in nats per image.

    ``elbo = reconstruction - beta * kl``, with the mean of log p(x|z) and of KL(q(z|x) || N(0, I)).
    """

    elbo: Tensor
    reconstruction: Tensor
    kl: Tensor


class GaussianSample(RandomModule):
    """z = mu + softplus(rho) * eps: a draw of each row's q(z|x), with gradients to both.

    Each row and each forward has noise of its own, from PyTorch's generator. Under ``posterior_means()`` z is
    mu. Under ``fixed_noise(seed, sample=k)`` one draw is one function of x: all rows share the eps of the
    draw, so that z depends on neither the batch nor the row's place in it. Each row alone has still the
    distribution q(z|x). Under ``fixed_noise(..., draw="activations")`` the noise is pinned, and the rows have
    their own, by their places in the batch.
    """

    def rng(self, device: torch.device) -> Tensor:
        """The ``rng`` of this forward: a fresh one, or that of the pinned draw."""
        draw = self.wanted_draw()
        return draw_rng(device) if draw.pinned is None else draw.pinned.rng(self, device)

    def forward(self, mu: Tensor, rho: Tensor) -> Tensor:
        """z, of the shape [N, latent] and the type of mu and rho."""
        draw = self.wanted_draw()
        if draw.means:
            return mu
        if draw.pinned is None:
            return _draw(mu, rho, draw_rng(mu.device))
        rng = draw.pinned.rng(self, mu.device)
        if draw.pinned.draw == "activations":
            return _draw(mu, rho, rng)
        return mu + softplus(rho) * functional.normal(mu.shape[1:], rng, dtype=mu.dtype)


def _draw(mu: Tensor, rho: Tensor, rng: Tensor) -> Tensor:
    (drawn,), _ = functional.sample_weights([mu], [rho], rng)
    return drawn


class VAE(nn.Module):
    """A variational autoencoder with Gaussian codes and Bernoulli pixels, for 32 x 32 images.

    q(z|x) = N(mu, softplus(rho)^2), elementwise, from a convolutional encoder; p(z) = N(0, I); p(x|z) is a
    Bernoulli distribution for each pixel, whose logits a decoder of transposed convolutions gives. Codes are
    drawn by :func:`bbb_fast.functional.sample_weight` and their KL is
    :func:`bbb_fast.functional.kl_divergence`. ``encoder``, ``code`` (a :class:`GaussianSample`) and
    ``decoder`` are modules; ``vae.decoder = bbb_fast.convert(vae.decoder)`` makes the decoder Bayesian, and
    its loss then has ``bbb_fast.kl_loss(vae)`` over the number of images as well.

    Kingma and Welling, "Auto-encoding variational Bayes", ICLR 2014 (arXiv:1312.6114).

    Args: ``inputs`` channels; ``latent`` numbers a code; ``width`` channels of the first convolution, twice
    as many of the others. Raises ValueError for sizes below 1.
    """

    def __init__(self, inputs: int = 1, latent: int = 16, width: int = 32) -> None:
        super().__init__()
        for name, value in (("inputs", inputs), ("latent", latent), ("width", width)):
            number = integer(value)
            if number is None or number < 1:
                raise ValueError(f"VAE: {name} must be an int >= 1, got {value!r}")
        self.inputs, self.latent = inputs, latent
        wide = 2 * width
        flat = wide * _CODE * _CODE
        half: dict[str, Any] = {"kernel_size": 4, "stride": 2, "padding": 1}
        self.encoder = nn.Sequential(
            nn.Conv2d(inputs, width, **half), nn.ReLU(),
            nn.Conv2d(width, wide, **half), nn.ReLU(),
            nn.Conv2d(wide, wide, **half), nn.ReLU(),
            nn.Flatten(), nn.Linear(flat, 2 * latent),
        )  # fmt: skip
        self.code = GaussianSample()
        self.decoder = nn.Sequential(
            nn.Linear(latent, flat), nn.ReLU(), nn.Unflatten(1, (wide, _CODE, _CODE)),
            nn.ConvTranspose2d(wide, wide, **half), nn.ReLU(),
            nn.ConvTranspose2d(wide, width, **half), nn.ReLU(),
            nn.ConvTranspose2d(width, inputs, **half),
        )  # fmt: skip

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(mu, rho) of q(z|x), each [N, latent], for images [N, inputs, 32, 32] of the parameters' type.

        Raises TypeError for what is no floating-point tensor, ValueError for another shape.
        """
        self._check_images("encode", x)
        mu, rho = self.encoder(x).chunk(2, dim=-1)
        return mu, rho

    def decode(self, z: Tensor) -> Tensor:
        """The pixels' logits, [N, inputs, 32, 32], of codes [N, latent]; ValueError for another shape."""
        if z.dim() != 2 or z.shape[1] != self.latent:
            raise ValueError(f"VAE.decode: z must have shape [N, {self.latent}], got {list(z.shape)}")
        logits: Tensor = self.decoder(z)
        return logits

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(logits, mu, rho): the images' q(z|x), and the pixels' logits for one draw of it each."""
        mu, rho = self.encode(x)
        return self.decode(self.code(mu, rho)), mu, rho

    def elbo(self, x: Tensor, beta: float = 1.0) -> Bound:
        """The bound of a batch, to be maximised; one draw of each image's code.

        log p(x|z) - beta * KL(q(z|x) || N(0, I)), the mean over the images (Kingma and Welling, eq. 10 and
        appendix B, with L = 1). With beta = 1 its expectation is a lower bound of log p(x); other weights
        (Higgins et al., "beta-VAE", ICLR 2017) are trained with, not judged by.

        Args: x [N, inputs, 32, 32] in [0, 1] (looking at them makes the CPU wait for a GPU); beta >= 0.
        Raises as :meth:`encode` does, and ValueError for other pixels, no images or a negative beta.
        """
        self._check_images("elbo", x)
        self._check_pixels("elbo", x)
        if not beta >= 0:
            raise ValueError(f"VAE.elbo: beta must be >= 0, got {beta}")
        logits, mu, rho = self(x)
        reconstruction = _log_bernoulli(x, logits).mean()
        kl = functional.kl_divergence(mu, rho, 0.0, 1.0) / len(x)
        return Bound(reconstruction - beta * kl, reconstruction, kl)

    @torch.no_grad()
    def sample(self, count: int) -> Tensor:
        """Images of the prior's codes: the pixels' probabilities, [count, inputs, 32, 32].

        Codes are drawn from PyTorch's generator, or are those of the draw that ``fixed_noise`` pins. Raises
        ValueError for count < 1.
        """
        number = integer(count)
        if number is None or number < 1:
            raise ValueError(f"VAE.sample: count must be an int >= 1, got {count!r}")
        like = next(self.parameters())
        z = functional.normal((number, self.latent), self.code.rng(like.device), dtype=like.dtype)
        return self.decode(z).sigmoid()

    @torch.no_grad()
    def log_likelihood(
        self, x: Tensor, samples: int = 100, *, seed: int | None = None, batch_size: int = 500
    ) -> Tensor:
        """log p(x) of each image in nats, float64 [N], by importance sampling.

        log 1/K sum_k p(x|z_k) p(z_k) / q(z_k|x) with z_k from q(z|x): a lower bound of log p(x) in
        expectation, which rises to it with ``samples`` = K (Burda, Grosse and Salakhutdinov, "Importance
        weighted autoencoders", ICLR 2016, eq. 8). The sum is streamed: memory does not grow with K.
        Draw k is that of ``fixed_noise(seed, sample=k, model=self)``, with noise of its own for each image;
        the result depends on the seed, and on ``batch_size`` by rounding only. Weights of Bayesian layers are
        drawn along with the codes, so that p(x) is then the mean over their posterior too.

        Args: x as in :meth:`elbo`; ``seed`` from PyTorch's generator if None; ``batch_size`` images go
        through the networks at a time. Raises as :meth:`elbo` does, and ValueError for counts < 1.
        """
        self._check_images("log_likelihood", x)
        self._check_pixels("log_likelihood", x)
        for name, value in (("samples", samples), ("batch_size", batch_size)):
            number = integer(value)
            if number is None or number < 1:
                raise ValueError(f"VAE.log_likelihood: {name} must be an int >= 1, got {value!r}")
        if seed is None:
            seed = int(torch.randint(0, _INT64_MAX, ()).item())
        parts = x.split(batch_size)
        random_encoder = any(isinstance(module, RandomModule) for module in self.encoder.modules())
        total = torch.full((len(x),), -torch.inf, dtype=torch.float64, device=x.device)
        functions = fixed_noise(seed, model=self).samples(samples)
        # Of all images at once: a part's noise would depend on where it begins.
        codes = fixed_noise(seed, model=self, draw="activations").samples(samples)
        for k, (function, code) in enumerate(zip(functions, codes, strict=True)):
            with function:
                if k == 0 or random_encoder:
                    mu, rho = (torch.cat(t) for t in zip(*map(self.encode, parts), strict=True))
                with code:
                    z = self.code(mu, rho)
                given_code = [
                    _log_bernoulli(part, self.decode(own))
                    for part, own in zip(parts, z.split(batch_size), strict=True)
                ]
            total = torch.logaddexp(total, torch.cat(given_code).double() + _log_prior_ratio(z, mu, rho))
        return total - torch.tensor(samples, dtype=torch.float64).log()

    def _check_images(self, method: str, x: Tensor) -> None:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            what = str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"VAE.{method}: x must be a floating-point tensor, got {what}")
        if x.dim() != 4 or x.shape[1:] != (self.inputs, _SIDE, _SIDE):
            wanted = f"[N, {self.inputs}, {_SIDE}, {_SIDE}]"
            raise ValueError(f"VAE.{method}: x must have shape {wanted}, got {list(x.shape)}")

    def _check_pixels(self, method: str, x: Tensor) -> None:
        if len(x) == 0:
            raise ValueError(f"VAE.{method}: x has no images, got shape {list(x.shape)}")
        if is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
            return
        try:
            low, high = (float(extreme) for extreme in x.detach().aminmax())
        except RuntimeError:  # a tensor without values: vmap, meta, fake
            return
        # So that NaN, which fails every comparison, is refused.
        if not (low >= 0 and high <= 1):
            raise ValueError(f"VAE.{method}: x must be in [0, 1], got numbers from {low:.4g} to {high:.4g}")

    def extra_repr(self) -> str:
        return f"inputs={self.inputs}, latent={self.latent}"


def _log_bernoulli(x: Tensor, logits: Tensor) -> Tensor:
    """log p(x|z) of each image, summed over its pixels."""
    return -F.binary_cross_entropy_with_logits(logits, x, reduction="none").flatten(1).sum(1)


def _log_prior_ratio(z: Tensor, mu: Tensor, rho: Tensor) -> Tensor:
    """log p(z) - log q(z) of each row, in float64."""
    z, mu, rho = z.double(), mu.double(), rho.double()
    eps = (z - mu) / softplus(rho)
    return (0.5 * (eps.square() - z.square()) + log_softplus(rho)).sum(1)
