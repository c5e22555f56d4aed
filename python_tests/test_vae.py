"""The variational autoencoder: its bound against the textbook, its draws, and the command that trains it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE
from torch import Tensor, nn
from torch.distributions import Bernoulli, Independent, Normal

import bbb_fast
from bbb_fast import convert, fixed_noise, functional, kl_loss, multi_sample, posterior_means, predict
from bbb_fast.models import VAE
from bbb_fast.models.vae import GaussianSample

SEED = 5


def images(count: int, inputs: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.rand(count, inputs, 32, 32) < 0.3).to(dtype)


def small(inputs: int = 1, latent: int = 3) -> VAE:
    """Wide enough for codes that say something: by default the first KL is nearly the same for all images."""
    vae = VAE(inputs, latent, width=4)
    with torch.no_grad():
        vae.encoder[-1].weight.mul_(20)
        vae.encoder[-1].bias.normal_()
    return vae


@pytest.fixture
def eps() -> Tensor:
    """The noise of six images' codes of three numbers under ``fixed_noise(SEED, draw="activations")``."""
    return functional.normal((6, 3), torch.tensor([SEED, 0]), dtype=torch.float64)


def textbook(vae: VAE, x: Tensor, eps: Tensor, beta: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """The bound, its reconstruction and its KL from torch.distributions, with the noise given."""
    mu, rho = vae.encoder(x).split(vae.latent, 1)
    sigma = torch.log1p(torch.exp(rho))
    q, p = Normal(mu, sigma), Normal(torch.zeros_like(mu), torch.ones_like(mu))
    logits = vae.decoder(mu + sigma * eps)
    reconstruction = Independent(Bernoulli(logits=logits), 3).log_prob(x).mean()
    kl = torch.distributions.kl_divergence(q, p).sum(1).mean()
    return reconstruction - beta * kl, reconstruction, kl


class TestBound:
    @pytest.mark.parametrize("beta", [1.0, 4.0, 0.0])
    def test_is_the_textbooks(self, backend: str, eps: Tensor, beta: float) -> None:
        """Values and the gradients of all parameters, element by element, in float64."""
        vae, x = small().double(), images(6, dtype=torch.float64)
        with fixed_noise(SEED, model=vae, draw="activations"):
            bound = vae.elbo(x, beta)
        expected = textbook(vae, x, eps, beta)
        torch.testing.assert_close(tuple(bound), expected, rtol=1e-10, atol=1e-10)
        parameters = list(vae.parameters())
        found = torch.autograd.grad(bound.elbo, parameters)
        torch.testing.assert_close(found, torch.autograd.grad(expected[0], parameters), rtol=1e-8, atol=1e-8)
        assert all(g.any() for g in found)

    def test_both_backends_have_one_noise(self, native: None) -> None:
        vae, x = small(), images(6)
        results = []
        for name in ("native", "reference"):
            bbb_fast.set_backend(name)
            try:
                torch.manual_seed(1)
                bound = vae.elbo(x)
                results.append((*bound, *torch.autograd.grad(bound.elbo, list(vae.parameters()))))
            finally:
                bbb_fast.set_backend("auto")
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)

    def test_grey_pixels_are_probabilities(self, eps: Tensor) -> None:
        """The cross-entropy is linear in the pixel."""
        vae, x = small().double(), torch.rand(6, 1, 32, 32, dtype=torch.float64)
        with fixed_noise(SEED, model=vae, draw="activations"):
            bound = vae.elbo(x)
            logits, mu, rho = vae(x)
        by_hand = (x * F.logsigmoid(logits) + (1 - x) * F.logsigmoid(-logits)).sum() / 6
        torch.testing.assert_close(bound.reconstruction, by_hand)
        torch.testing.assert_close(logits, vae.decode(mu + F.softplus(rho) * eps))

    def test_is_below_the_log_likelihood(self) -> None:
        """One code number: log p(x) by the trapezoidal rule. More draws come closer, from below."""
        vae, x = small(latent=1).double(), images(3, dtype=torch.float64)
        z = torch.linspace(-8, 8, 4001, dtype=torch.float64)[:, None]
        with torch.no_grad():
            logits = vae.decode(z)
            log_p = torch.stack([Independent(Bernoulli(logits=logits), 3).log_prob(one) for one in x], 1)
            log_p += Normal(0.0, 1.0).log_prob(z)
            exact = log_p.logsumexp(0) + math.log(16 / 4000)
            elbos = []
            for k in range(200):
                with fixed_noise(SEED, k, model=vae, draw="activations"):
                    elbos.append(vae.elbo(x).elbo)
            elbo = float(torch.stack(elbos).mean())
        few, many = (
            torch.stack([vae.log_likelihood(x, samples, seed=seed).mean() for seed in range(8)])
            for samples in (5, 500)
        )
        exact_mean = float(exact.mean())
        assert elbo < float(few.mean()) < exact_mean + 0.02
        assert abs(float(many.mean()) - exact_mean) < 0.3 * (exact_mean - float(few.mean())) + 1e-3
        assert elbo < exact_mean - 0.05


class TestLogLikelihood:
    def test_is_the_formula(self, backend: str) -> None:
        """log mean_k p(x|z_k) p(z_k) / q(z_k|x), not streamed, from torch.distributions."""
        vae, x, samples = small().double(), images(6, dtype=torch.float64), 7
        mu, rho = vae.encode(x)
        q, p = (Independent(Normal(*of), 1) for of in ((mu, F.softplus(rho)), (0 * mu, 1 + 0 * mu)))
        log_weights = []
        for k in range(samples):
            noise = functional.normal((6, 3), torch.tensor([SEED, k << 32]), dtype=torch.float64)
            z = mu + F.softplus(rho) * noise
            of_pixels = Independent(Bernoulli(logits=vae.decode(z)), 3).log_prob(x)
            log_weights.append(of_pixels + p.log_prob(z) - q.log_prob(z))
        expected = torch.stack(log_weights).logsumexp(0) - math.log(samples)
        found = vae.log_likelihood(x, samples, seed=SEED)
        torch.testing.assert_close(found, expected.detach(), rtol=1e-10, atol=1e-9)

    def test_batches_and_seeds(self) -> None:
        vae, x = small(), images(7)
        whole = vae.log_likelihood(x, 4, seed=1)
        assert whole.dtype == torch.float64 and whole.shape == (7,) and not whole.requires_grad
        torch.testing.assert_close(
            vae.log_likelihood(x, 4, seed=1, batch_size=3), whole, rtol=1e-5, atol=1e-3
        )
        assert not torch.isclose(vae.log_likelihood(x, 4, seed=2), whole, rtol=1e-6).any()
        torch.manual_seed(3)
        one = vae.log_likelihood(x, 4)
        assert not torch.equal(vae.log_likelihood(x, 4), one)
        torch.manual_seed(3)
        assert torch.equal(vae.log_likelihood(x, 4), one)

    def test_one_draw_is_one_draws_bound(self) -> None:
        """K = 1: its expectation is the bound, here with the KL by the same draw."""
        vae, x = small().double(), images(6, dtype=torch.float64)
        with fixed_noise(SEED, model=vae, draw="activations"):
            logits, mu, rho = vae(x)
            z = vae.code(mu, rho)
        kl = Normal(mu, F.softplus(rho)).log_prob(z) - Normal(0.0, 1.0).log_prob(z)
        expected = Independent(Bernoulli(logits=logits), 3).log_prob(x) - kl.sum(1)
        torch.testing.assert_close(vae.log_likelihood(x, 1, seed=SEED), expected.detach())


class TestDraws:
    def test_free_draws(self, backend: str) -> None:
        code, mu = GaussianSample(), torch.randn(5, 3)
        rho = torch.randn(5, 3)
        one, other = code(mu, rho), code(mu, rho)
        assert not torch.isclose(one, other).any()
        torch.manual_seed(4)
        first = code(mu, rho)
        torch.manual_seed(4)
        expected = functional.sample_weight(mu, rho, functional.draw_rng(DEVICE))
        assert torch.equal(first, expected)
        noise = (first - mu) / F.softplus(rho)
        assert not torch.isclose(noise[0], noise[1]).any()

    def test_moments(self) -> None:
        mu, rho = torch.tensor([[1.0, -2.0]]), torch.tensor([[0.5, -1.0]])
        z = GaussianSample()(mu.expand(40000, 2), rho.expand(40000, 2))
        torch.testing.assert_close(z.mean(0), mu[0], rtol=0, atol=0.02)
        torch.testing.assert_close(z.std(0), F.softplus(rho)[0], rtol=0.02, atol=0)

    def test_means(self) -> None:
        vae, x = small(), images(4)
        before = torch.get_rng_state()
        with posterior_means():
            logits, mu, _ = vae(x)
        assert torch.equal(logits, vae.decode(mu))
        assert torch.equal(torch.get_rng_state(), before)

    def test_a_pinned_draw_is_one_function(self, backend: str) -> None:
        """The same for each row in every batch; its gradients are those of free draws."""
        vae, x = small(), images(6)
        with fixed_noise(SEED, 2, model=vae):
            whole, mu, rho = vae(x)
            turned = vae(x.flip(0))[0].flip(0)
            alone = torch.cat([vae(row[None])[0] for row in x])
        torch.testing.assert_close(turned, whole)
        torch.testing.assert_close(alone, whole)
        noise = functional.normal((3,), torch.tensor([SEED, 2 << 32]))
        torch.testing.assert_close(vae.decode(mu + F.softplus(rho) * noise), whole)
        outputs = predict(vae, x, 4, seed=SEED)
        torch.testing.assert_close(outputs[2], whole.detach())
        torch.testing.assert_close(predict(vae, x, 4, seed=SEED, batch_size=4), outputs)
        assert not torch.isclose(outputs[0], outputs[1]).all(dim=0).any()
        mu, rho = (t.detach().requires_grad_() for t in (mu, rho))
        with fixed_noise(SEED, 2):
            z = vae.code(mu, rho)
        one = torch.autograd.grad(z.sum(), (mu, rho))
        torch.testing.assert_close(one, (torch.ones_like(mu), noise * rho.sigmoid()))

    def test_pinned_activations_are_the_rows_own(self) -> None:
        vae, x = small(), images(4)
        draws = []
        for _ in range(2):
            with fixed_noise(SEED, 1, model=vae, draw="activations"):
                draws.append(vae(x)[0])
        assert torch.equal(*draws)
        torch.testing.assert_close(multi_sample(vae, x, 2, seed=SEED)[1], draws[0])
        same = x[:1].expand(4, 1, 32, 32)
        with fixed_noise(SEED, 1, model=vae, draw="activations"):
            rows = vae(same)[0]
        assert not torch.isclose(rows[0], rows[1]).all()

    def test_samples_of_the_prior(self, backend: str) -> None:
        vae = small()
        one, other = vae.sample(50), vae.sample(50)
        assert one.shape == (50, 1, 32, 32) and not one.requires_grad
        assert bool(((one > 0) & (one < 1)).all()) and not torch.isclose(one, other).all(dim=0).any()
        with fixed_noise(SEED, model=vae):
            pinned = vae.sample(4)
        z = functional.normal((4, 3), torch.tensor([SEED, 0]))
        torch.testing.assert_close(pinned, vae.decode(z).sigmoid().detach())

    @pytest.mark.slow
    def test_compiled(self) -> None:
        vae, x = small(), images(4)
        compiled = torch.compile(vae, fullgraph=True)
        with fixed_noise(SEED, model=vae, draw="activations"):
            torch.testing.assert_close(compiled(x)[0], vae(x)[0], rtol=1e-4, atol=1e-4)
        compiled(x)[0].sum().backward()
        assert vae.encoder[0].weight.grad is not None


def test_a_bayesian_decoder(backend: str) -> None:
    vae, x = small(inputs=2), images(5, inputs=2)
    with posterior_means():
        plain = vae(x)[0]
    decoder = vae.decoder
    vae.decoder = convert(decoder)
    assert not any(isinstance(m, (nn.Linear, nn.ConvTranspose2d)) for m in vae.decoder.modules())
    with posterior_means():
        torch.testing.assert_close(vae(x)[0], plain)
        assert torch.equal(vae.decode(vae.encode(x)[0]), vae(x)[0])
    kl = kl_loss(vae)
    torch.testing.assert_close(kl, kl_loss(vae.decoder))
    (kl / 100 - vae.elbo(x).elbo).backward()
    assert all(p.grad is not None and p.grad.any() for p in vae.parameters())
    # One draw has one decoder and one noise.
    with fixed_noise(SEED, 1, model=vae):
        whole, mu, _ = vae(x)
        torch.testing.assert_close(vae(x[3:])[0], whole[3:])
        assert not torch.isclose(vae.decode(mu), plain).all()
    likelihood = vae.log_likelihood(x, 3, seed=SEED)
    torch.testing.assert_close(
        vae.log_likelihood(x, 3, seed=SEED, batch_size=2), likelihood, rtol=1e-5, atol=1e-2
    )
    vae.decoder = decoder
    assert not torch.isclose(vae.log_likelihood(x, 3, seed=SEED), likelihood, rtol=1e-5).any()


def test_a_bayesian_encoder_draws_with_each_code() -> None:
    vae, x = small(), images(3)
    vae.encoder = convert(vae.encoder)
    drawn = []
    vae.encoder.register_forward_hook(lambda _, __, output: drawn.append(output))
    vae.log_likelihood(x, 3, seed=SEED)
    assert len(drawn) == 3 and not torch.equal(drawn[0], drawn[1])


def test_types() -> None:
    vae, x = VAE(width=2).double(), images(2, dtype=torch.float64)
    assert vae.elbo(x).elbo.dtype == vae.sample(1).dtype == torch.float64
    with torch.autocast(DEVICE.type, torch.bfloat16):
        bound = VAE(width=2).elbo(images(2))
    assert bound.elbo.isfinite()
    assert repr(vae).startswith("VAE(\n  inputs=1, latent=16")


def test_wrong_arguments() -> None:
    vae, x = VAE(latent=3, width=1), images(2)
    for call, error, message in (
        (lambda: VAE(0), ValueError, "VAE: inputs must be an int >= 1, got 0"),
        (lambda: VAE(latent=1.5), ValueError, "VAE: latent must be an int >= 1, got 1.5"),
        (lambda: VAE(width=True), ValueError, "VAE: width must be an int >= 1, got True"),
        (lambda: vae(x[0]), ValueError, r"x must have shape \[N, 1, 32, 32\], got \[1, 32, 32\]"),
        (lambda: vae.encode(images(1, 3)), ValueError, r"VAE.encode: x must .* got \[1, 3, 32, 32\]"),
        (lambda: vae.encode([1]), TypeError, "VAE.encode: x must be a floating-point tensor, got list"),
        (
            lambda: vae.elbo(x.byte()),
            TypeError,
            "VAE.elbo: x must be a floating-point tensor, got torch.uint8",
        ),
        (lambda: vae.elbo(2 * x), ValueError, r"VAE.elbo: x must be in \[0, 1\], got numbers from 0 to 2"),
        (lambda: vae.elbo(x - torch.nan), ValueError, r"VAE.elbo: x must be in \[0, 1\], got .* nan"),
        (lambda: vae.elbo(x[:0]), ValueError, r"VAE.elbo: x has no images, got shape \[0, 1, 32, 32\]"),
        (lambda: vae.elbo(x, -1), ValueError, "VAE.elbo: beta must be >= 0, got -1"),
        (lambda: vae.elbo(x, math.nan), ValueError, "VAE.elbo: beta must be >= 0, got nan"),
        (lambda: vae.decode(x), ValueError, r"z must have shape \[N, 3\], got \[2, 1, 32, 32\]"),
        (lambda: vae.decode(x[0, 0, :, :4]), ValueError, r"z must have shape \[N, 3\], got \[32, 4\]"),
        (lambda: vae.sample(0), ValueError, "VAE.sample: count must be an int >= 1, got 0"),
        (lambda: vae.log_likelihood(x, 0), ValueError, "log_likelihood: samples must be an int >= 1, got 0"),
        (lambda: vae.log_likelihood(x, batch_size=0), ValueError, "batch_size must be an int >= 1, got 0"),
        (lambda: vae.log_likelihood(x - 1), ValueError, r"VAE.log_likelihood: x must be in \[0, 1\]"),
    ):
        with pytest.raises(error, match=message):
            call()
