"""The variational autoencoder: its bound against the textbook, its draws, and the command that trains it."""

from __future__ import annotations

import io
import itertools
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE
from torch import Tensor, nn
from torch.distributions import Bernoulli, Independent, Normal

import bbb_fast
from bbb_fast import convert, fixed_noise, functional, kl_loss, multi_sample, posterior_means, predict
from bbb_fast.cli import main
from bbb_fast.experiments import vae as experiments
from bbb_fast.experiments.document import read
from bbb_fast.experiments.vae import VaeConfig
from bbb_fast.models import VAE
from bbb_fast.models.vae import Bound, GaussianSample

SEED = 5


def images(count: int, inputs: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.rand(count, inputs, 32, 32) < 0.3).to(dtype)


def small(inputs: int = 1, latent: int = 3) -> VAE:
    """Wide enough for codes that say something: by default the first KL is nearly the same for all images."""
    vae: Any = VAE(inputs, latent, width=4)
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
        """One code number: log p(x) by the trapezoidal rule. More draws come closer."""
        vae: Any = small(latent=1).double()
        x = images(3, dtype=torch.float64)
        z = torch.linspace(-8, 8, 1001, dtype=torch.float64)[:, None]
        with torch.no_grad():
            vae.decoder[0].weight.mul_(4)
            logits = vae.decode(z)
            log_p = torch.stack([Independent(Bernoulli(logits=logits), 3).log_prob(one) for one in x], 1)
            log_p += Normal(0.0, 1.0).log_prob(z)
            exact = float((log_p.logsumexp(0) + math.log(16 / 1000)).mean())
            elbos = []
            for k in range(40):
                with fixed_noise(SEED, k, model=vae, draw="activations"):
                    elbos.append(vae.elbo(x).elbo)
        assert float(torch.stack(elbos).mean()) < exact - 1
        few = torch.stack([vae.log_likelihood(x, 3, seed=seed).mean() for seed in range(40)])
        assert exact - 1 < float(few.mean()) < exact - 0.1
        assert abs(float(vae.log_likelihood(x, 500, seed=SEED).mean()) - exact) < 0.1


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
        expected: Any = functional.sample_weight(mu, rho, functional.draw_rng(DEVICE))
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
    @pytest.mark.inductor
    def test_compiled(self) -> None:
        vae, x = small(), images(4)
        compiled = torch.compile(vae, fullgraph=True)
        with fixed_noise(SEED, model=vae, draw="activations"):
            torch.testing.assert_close(compiled(x)[0], vae(x)[0], rtol=1e-4, atol=1e-4)
        compiled(x)[0].sum().backward()
        assert vae.encoder[0].weight.grad is not None


def test_a_bayesian_decoder(backend: str) -> None:
    vae: Any = small(inputs=2)
    x = images(5, inputs=2)
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
    vae: Any = small()
    x = images(3)
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
        (lambda: VAE(latent=cast(Any, 1.5)), ValueError, "VAE: latent must be an int >= 1, got 1.5"),
        (lambda: VAE(width=True), ValueError, "VAE: width must be an int >= 1, got True"),
        (lambda: vae(x[0]), ValueError, r"x must have shape \[N, 1, 32, 32\], got \[1, 32, 32\]"),
        (lambda: vae.encode(images(1, 3)), ValueError, r"VAE.encode: x must .* got \[1, 3, 32, 32\]"),
        (
            lambda: vae.encode(cast(Any, [1])),
            TypeError,
            "VAE.encode: x must be a floating-point tensor, got list",
        ),
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


# ---------------------------------------------------------------- the command

SMALL = VaeConfig(
    latent=4, width=4, epochs=3, batch_size=8, lr=1e-2, samples=5, train_size=96, valid_size=50, test_size=40
)
OPTIONS = (
    "vae --latent 4 --width 4 --epochs 3 --batch-size 8 --lr 1e-2 --samples 5 --train-size 96 "
    "--valid-size 50 --test-size 40 --threads 1"
).split()
command = pytest.mark.cpu_only("the command line names its device itself")


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    err = capsys.readouterr().err
    assert err.startswith("bbb-fast: error: ") and err.count("\n") == 1
    return err.removeprefix("bbb-fast: error: ").rstrip()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run."""
    pytest.importorskip("sklearn")
    out = tmp_path_factory.mktemp("vae") / "run"
    assert main([*OPTIONS, "--out", str(out), "--quiet"]) == 0
    return out


@command
class TestCommand:
    def test_the_numbers_are_the_models(self, finished: Path) -> None:
        """The table's, from the weights in the folder, by the textbook."""
        document = read(finished / "vae.json")
        (table,) = document.tables
        (cells,) = table.rows
        row: dict[str, Any] = dict(zip((column.name for column in table.columns), cells, strict=True))
        state = experiments._read(finished / "tasks/train-beta-1/model.pt", {})
        history = document.results["1"]["history"]
        assert row["beta"] == 1 and row["epoch"] == state["best"]["epoch"]
        assert row["epoch"] - 1 == max(range(3), key=lambda k: history[k]["valid_elbo"])
        vae = VAE(1, 4, 4)
        vae.load_state_dict(state["best"]["model"])
        images = experiments._Images.load(SMALL.settings(), None)
        torch.testing.assert_close(images.test.unique(), torch.tensor([0.0, 1.0]))
        assert len(images.grey_test.unique()) > 100
        # The bound of the test images, at the noise that judges: draw 0 of the seed's complement.
        noise = functional.normal((40, 4), torch.tensor([~0, 0]))
        bound = [t.item() for t in textbook(vae, images.test, noise)]
        assert [row[key] for key in ("test", "reconstruction", "KL")] == pytest.approx(bound, rel=1e-5)
        of_images = vae.log_likelihood(images.test, 5, seed=0)
        assert row["log p(x)"] == pytest.approx(float(of_images.mean()), rel=1e-6)
        assert row["+-"] == pytest.approx(float(of_images.std()) / math.sqrt(40), rel=1e-4)
        activity = vae.encode(images.test)[0].detach().var(0, correction=0)
        assert document.results["1"]["activity"] == pytest.approx(activity.tolist(), rel=1e-4)
        assert row["active"] == int((activity > 0.01).sum())

    def test_training_improves_the_bound(self, finished: Path) -> None:
        history = read(finished / "vae.json").results["1"]["history"]
        for key in ("elbo", "valid_elbo"):
            first, *_, last = (entry[key] for entry in history)
            assert last > first + 20
        for entry in history:
            assert entry["elbo"] == pytest.approx(entry["reconstruction"] - entry["kl"])

    def test_pictures(self, finished: Path) -> None:
        image = pytest.importorskip("PIL.Image")
        figures = {figure.file: figure for figure in read(finished / "vae.json").figures}
        assert set(figures) == {"vae.png", "vae-curves.png"}
        for file, least in (("vae.png", (1500, 850)), ("vae-curves.png", (600, 300))):
            content = figures[file].png
            assert content.startswith(b"\x89PNG") and len(content) < 150_000
            with image.open(finished / file) as picture:
                assert all(size >= low for size, low in zip(picture.size, least, strict=True))
                # Paper, and ink in every quarter of it.
                pixels = torch.frombuffer(bytearray(picture.convert("L").tobytes()), dtype=torch.uint8)
                pixels = pixels.view(picture.size[::-1])
                for part in (half for side in pixels.chunk(2, 0) for half in side.chunk(2, 1)):
                    assert part.min() < 100 and part.max() == 255

    def test_broken_off_and_resumed_is_as_if_unbroken(
        self,
        finished: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        epoch = experiments._epoch

        def broken(vae: VAE, optimizer: Any, images: Any, settings: Any, beta: float, k: int, bar: Any):
            if k == 2:
                raise KeyboardInterrupt
            return epoch(vae, optimizer, images, settings, beta, k, bar)

        monkeypatch.setattr(experiments, "_epoch", broken)
        run = [*OPTIONS, "--out", str(tmp_path)]
        assert main(run) == 130
        output = capsys.readouterr()
        assert "epoch 2/3: ELBO -" in output.out and "--resume" in output.err
        file = tmp_path / "tasks/train-beta-1/model.pt"
        assert experiments._read(file, {})["epoch"] == 2
        monkeypatch.setattr(experiments, "_epoch", epoch)
        torch.manual_seed(17)  # the caller's state has no part in it
        assert main([*run, "--resume"]) == 0
        assert "epoch 2/3" not in capsys.readouterr().out
        one, other = (experiments._read(f / "tasks/train-beta-1/model.pt", {}) for f in (tmp_path, finished))
        assert one.pop("format") == other.pop("format") == "bbb_fast-vae" and one.pop("run") == other.pop(
            "run"
        )
        torch.testing.assert_close(one, other, rtol=0, atol=0)
        assert read(tmp_path / "vae.json").results == read(finished / "vae.json").results
        assert (tmp_path / "vae.png").read_bytes() == (finished / "vae.png").read_bytes()

    def test_every_step_has_noise_coins_and_a_rate_of_its_own(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        draws, rates, seen = [], [], []
        elbo, step = VAE.elbo, torch.optim.Adam.step

        def noted(vae: VAE, x: Tensor, beta: float = 1.0) -> Bound:
            if torch.is_grad_enabled():
                seen.append(x)
            return elbo(vae, x, beta)

        def draw(seed: int, sample: int, **options: Any) -> fixed_noise:
            draws.append((seed, sample))
            return fixed_noise(seed, sample, **options)

        def rate(optimizer: torch.optim.Adam) -> None:
            rates.append(optimizer.param_groups[0]["lr"])
            step(optimizer)

        monkeypatch.setattr(VAE, "elbo", noted)
        monkeypatch.setattr(experiments, "fixed_noise", draw)
        monkeypatch.setattr(torch.optim.Adam, "step", rate)
        experiments.train(tmp_path, SMALL.settings(), 1.0, None)
        assert [sample for seed, sample in draws if seed == 0] == list(range(36))
        expected = [0.01 * (1 + math.cos(math.pi * k / 36)) / 2 for k in range(36)]
        assert rates == pytest.approx(expected)
        epochs = [torch.cat(seen[k : k + 12]) for k in (0, 12, 24)]
        # The images come in another order, and the coins of an image fall otherwise.
        for one, other in itertools.combinations(epochs, 2):
            assert not torch.equal(one, other)
            assert not {row.numpy().tobytes() for row in one} & {row.numpy().tobytes() for row in other}

    def test_the_best_epoch_is_kept(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """By what was trained for: with the KL as often as in training."""
        bounds = [(-100.0, 20.0), (-80.0, 35.0), (-75.0, 50.0)]
        after = []

        def epoch(vae: Any, *_: Any) -> dict[str, float]:
            with torch.no_grad():
                vae.decoder[0].bias.add_(1.0)
            after.append(vae.decoder[0].bias.detach().clone())
            reconstruction, kl = bounds[len(after) - 1]
            parts = {"elbo": reconstruction - kl, "reconstruction": reconstruction, "kl": kl}
            return {**parts, **{f"valid_{name}": value for name, value in parts.items()}}

        monkeypatch.setattr(experiments, "_epoch", epoch)
        for beta, best in ((1.0, 2), (2.0, 1), (0.1, 3)):
            after.clear()
            folder = tmp_path / str(best)
            folder.mkdir()
            assert experiments.train(folder, SMALL.settings(), beta, None)["epoch"] == best
            state = experiments._read(folder / "model.pt", {})
            assert torch.equal(state["best"]["model"]["decoder.0.bias"], after[best - 1])
            assert torch.equal(state["model"]["decoder.0.bias"], after[-1])

    @pytest.mark.slow
    def test_killed(self, finished: Path, tmp_path: Path) -> None:
        """A real process, and workers side by side: the results are those of one after the other."""
        run = [*OPTIONS, "--beta", "1", "4", "--jobs", "2", "--out", str(tmp_path)]
        process = subprocess.Popen([sys.executable, "-m", "bbb_fast", *run])
        file, deadline = tmp_path / "tasks/train-beta-1/model.pt", time.monotonic() + 60
        while not file.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
        process.wait()
        assert file.exists()
        time.sleep(2.5)  # until its workers have noticed
        assert main([*run, "--resume"]) == 0
        results = read(tmp_path / "vae.json").results
        assert results["1"] == read(finished / "vae.json").results["1"]
        assert results["4"]["test"]["kl"] < results["1"]["test"]["kl"]
        assert (tmp_path / "vae-beta-4.png").exists()

    def test_beta_is_the_weight_in_training(self, finished: Path, tmp_path: Path) -> None:
        assert main([*OPTIONS, "--beta", "50", "0", "--out", str(tmp_path), "--quiet"]) == 0
        results = dict(read(tmp_path / "vae.json").results)
        results["1"] = read(finished / "vae.json").results["1"]
        large, one, none = (results[beta]["test"]["kl"] for beta in ("50", "1", "0"))
        assert 2 * large < one and 2 * one < none
        files = {"vae-beta-50.png", "vae-beta-0.png", "vae-curves.png"}
        assert files == {path.name for path in tmp_path.glob("*.png")}

    def test_without_matplotlib(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        monkeypatch.delitem(sys.modules, "bbb_fast.experiments.vae_plots", raising=False)
        monkeypatch.delattr("bbb_fast.experiments.vae_plots", raising=False)
        assert main([*OPTIONS, "--epochs", "1", "--out", str(tmp_path), "--quiet"]) == 0
        document = read(tmp_path / "vae.json")
        assert not document.figures and "matplotlib is missing" in document.notes[0]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--latent", "0"], "--latent must be an int >= 1, got 0"),
            (["--width", "0"], "--width must be an int >= 1, got 0"),
            (["--epochs", "0"], "--epochs must be an int >= 1, got 0"),
            (["--batch-size", "-1"], "--batch-size must be an int >= 1, got -1"),
            (["--samples", "0"], "--samples must be an int >= 1, got 0"),
            (["--beta", "-1"], "--beta must be finite numbers >= 0, got -1.0"),
            (["--beta", "nan"], "--beta must be finite numbers >= 0, got nan"),
            (["--beta", "1", "1.0"], "--beta must be different numbers, got 1.0 1.0"),
            (["--lr", "0"], "--lr must be a finite number > 0, got 0.0"),
            (["--seed", "-1"], "--seed must be an int >= 0, got -1"),
            (["--jobs", "0"], "--jobs must be an int >= 1, got 0"),
            (["--device", "tpu"], "--device must be cpu, cuda, cuda:0, cuda:1, ..., got 'tpu'"),
            (["--dataset", "mnist"], "mnist needs a folder: pass --data-dir FOLDER (data_dir=...)"),
            (["--test-size", "361"], "--test-size must be at most 360, the test images, got 361"),
            (["--train-size", "1400"], "digits: cannot train on 1400 samples: 1437 images less 50"),
            (["--lr", "1e30", "--epochs", "2"], "epoch 1: the bound is no longer finite; try a lower --lr"),
        ],
    )
    def test_wrong_options(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
    ) -> None:
        pytest.importorskip("sklearn")
        assert main([*OPTIONS, "--quiet", *options, "--out", str(tmp_path)]) == 1
        assert error_line(capsys).startswith(message)

    def test_usage(self, capsys: pytest.CaptureFixture[str]) -> None:
        for options in (["--dataset", "cifar10"], ["--pixels", "grey"], ["--latent", "many"]):
            with pytest.raises(SystemExit, match="2"):
                main(["vae", *options])
            assert f"argument {options[0]}: invalid" in capsys.readouterr().err

    def test_resuming_something_else(
        self, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "copy"
        shutil.copytree(finished, out)
        run = [*OPTIONS, "--quiet", "--resume", "--out", str(out)]
        assert main([*run, "--pixels", "threshold"]) == 1
        assert error_line(capsys).startswith(
            f"cannot resume {out}: its pixels was 'sample', now it is 'threshold'"
        )
        folder = out / "tasks/train-beta-1"
        (folder / "result.json").unlink()
        file = folder / "model.pt"
        whole = file.read_bytes()

        def refused(content: bytes) -> str:
            file.write_bytes(content)
            assert main(run) == 1
            return error_line(capsys)

        assert refused(whole[: len(whole) // 2]) == f"{file} is damaged or cut short: remove it to train anew"
        assert refused(b"GIF89a").startswith(
            f"{file} is not a bbb_fast checkpoint: allowed are those that `vae`"
        )
        state = torch.load(io.BytesIO(whole), weights_only=True)
        for change, message in (
            ({"version": 2}, "has checkpoint version 2: this bbb_fast reads 1"),
            ({"history": None}, "is incomplete: its entry 'history' is missing or malformed"),
            ({"epoch": 2}, "is inconsistent: remove it to train anew"),
            ({"run": {**state["run"], "images": 1}}, "is of another run: its images was 1, now it is "),
            ({"model": {}}, "does not fit VAE: it lacks encoder.0.weight"),
            ({"optimizer": {}}, "cannot be resumed: its optimizer does not fit"),
        ):
            buffer = io.BytesIO()
            torch.save({**state, **change}, buffer)
            assert refused(buffer.getvalue()).startswith(f"{file} {message}")


@command
def test_pixels() -> None:
    pytest.importorskip("sklearn")
    cut = experiments._Images.load({**SMALL.settings(), "pixels": "threshold"}, None)
    coins, other = (experiments._Images.load({**SMALL.settings(), "seed": seed}, None) for seed in (0, 1))
    assert torch.equal(cut.test, (cut.grey_test > 127).float())
    assert torch.equal(coins.grey_test, cut.grey_test)
    assert torch.equal(coins.grey_test, other.grey_test) and not torch.equal(coins.test, other.test)
    # Another number of held-out images changes nothing about those of the test.
    fewer = experiments._Images.load({**SMALL.settings(), "valid_size": 20}, None)
    assert torch.equal(fewer.test, coins.test)
    # A coin shows ink as often as the pixel is grey, and never where it is white or always where it is black.
    assert torch.equal(coins.test[coins.grey_test == 0].unique(), torch.tensor([0.0]))
    assert torch.equal(coins.test[coins.grey_test == 255].unique(), torch.tensor([1.0]))
    middle = (coins.grey_test > 64) & (coins.grey_test < 192)
    expected = coins.grey_test[middle].float().mean() / 255
    torch.testing.assert_close(coins.test[middle].mean(), expected, rtol=0, atol=0.03)
    assert len(cut.train) == 96 and len(cut.valid) == 50 and len(cut.test) == 40
