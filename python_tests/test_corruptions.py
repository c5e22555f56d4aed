"""Corruptions of images, against formulas of their own."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from bbb_fast.experiments.corruptions import CORRUPTIONS, corrupt
from bbb_fast.experiments.data import ImageSet

pytestmark = pytest.mark.cpu_only("images are corrupted on the CPU, whatever the device of the model")


def images(n: int = 3, channels: int = 1) -> ImageSet:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (n, channels, 32, 32), dtype=torch.uint8, generator=generator)
    return ImageSet(pixels, torch.arange(n) % 2, ("a", "b"), "random")


def blob() -> ImageSet:
    """A bright square left of and above the centre."""
    pixels = torch.zeros(1, 1, 32, 32, dtype=torch.uint8)
    pixels[0, 0, 8:12, 4:10] = 200
    return ImageSet(pixels, torch.zeros(1, dtype=torch.int64), ("a",), "blob")


def centre(pixels: Tensor) -> tuple[float, float]:
    """The centre of mass, from the image's: right, and up."""
    weight = pixels.double()
    rows = (weight.sum(1) * torch.arange(32)).sum() / weight.sum() - 15.5
    columns = (weight.sum(0) * torch.arange(32)).sum() / weight.sum() - 15.5
    return float(columns), -float(rows)


@pytest.mark.parametrize("kind", CORRUPTIONS)
class TestEvery:
    def test_strength_0_is_the_identity(self, kind: str) -> None:
        assert torch.equal(corrupt(images(), kind, 0, 5).images, images().images)

    @pytest.mark.parametrize("channels", [1, 3])
    def test_labels_shape_and_name(self, kind: str, channels: int) -> None:
        given = images(channels=channels)
        for strength in CORRUPTIONS[kind].strengths:
            made = corrupt(given, kind, strength, 5)
            assert made.images.shape == given.images.shape
            assert torch.equal(made.labels, given.labels)
            assert made.classes == given.classes
            assert not torch.equal(made.images, given.images)
            assert made.name == f"random, {kind} {strength:g}"

    def test_strengths_rise(self, kind: str) -> None:
        strengths = CORRUPTIONS[kind].strengths
        assert list(strengths) == sorted(set(strengths))
        assert strengths[0] > 0

    def test_an_image_is_alone(self, kind: str) -> None:
        """What becomes of it hangs on its number, not on its neighbours."""
        whole = corrupt(images(4), kind, CORRUPTIONS[kind].strengths[-1], 5)
        chosen = torch.tensor([3, 1])
        part = corrupt(images(4).subset(chosen), kind, CORRUPTIONS[kind].strengths[-1], 5, chosen)
        assert torch.equal(part.images, whole.images[chosen])

    def test_the_caller_keeps_its_random_state(self, kind: str) -> None:
        before = torch.get_rng_state()
        corrupt(images(), kind, 1, 5)
        assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.parametrize("strength", [-1, math.nan, math.inf])
    def test_wrong_strength(self, kind: str, strength: float) -> None:
        with pytest.raises(ValueError, match="strength of a corruption must be a finite number >= 0"):
            corrupt(images(), kind, strength, 5)


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match="unknown corruption 'fog': allowed are rotation"):
        corrupt(images(), "fog", 1, 5)


@pytest.mark.parametrize(("degrees", "turns"), [(90, 1), (180, 2), (270, 3), (360, 0)])
def test_quarter_turns_are_exact(degrees: int, turns: int) -> None:
    made = corrupt(images(channels=3), "rotation", degrees, 5)
    assert torch.equal(made.images, images(channels=3).images.rot90(turns, (2, 3)))


def test_rotation_turns_counterclockwise() -> None:
    right, up = centre(blob().images[0, 0])
    angle = math.radians(30)
    expected = (
        right * math.cos(angle) - up * math.sin(angle),
        right * math.sin(angle) + up * math.cos(angle),
    )
    found = centre(corrupt(blob(), "rotation", 30, 5).images[0, 0])
    assert found == pytest.approx(expected, abs=0.05)


def test_translation_goes_so_far_in_each_images_own_direction() -> None:
    many = ImageSet(
        blob().images.expand(40, 1, 32, 32).contiguous(), torch.zeros(40, dtype=torch.int64), ("a",), "blob"
    )
    moved = corrupt(many, "translation", 4, 5).images
    here = np.array(centre(blob().images[0, 0]))
    steps = np.array([centre(image[0]) for image in moved]) - here
    assert np.allclose(steps, steps.round(), atol=1e-9)
    assert np.all(np.abs(np.hypot(*steps.T) - 4) <= math.sqrt(0.5))
    assert len({tuple(step) for step in steps.round().tolist()}) > 10
    # Nothing is lost, as the square stays inside.
    assert torch.equal(moved.long().sum((1, 2, 3)), many.images.long().sum((1, 2, 3)))


def test_noise() -> None:
    grey = ImageSet(
        torch.full((20, 3, 32, 32), 128, dtype=torch.uint8), images(20).labels, ("a", "b"), "grey"
    )
    added = corrupt(grey, "noise", 0.1, 5).images.double() / 255 - 128 / 255
    n = added.numel()
    assert abs(float(added.mean())) < 5 * 0.1 / math.sqrt(n)
    assert float(added.std()) == pytest.approx(0.1, abs=5 * 0.1 / math.sqrt(2 * n))
    one, other = added[0].flatten(), added[1].flatten()
    assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 5 / math.sqrt(len(one))
    half = corrupt(grey, "noise", 0.05, 5).images.double() / 255 - 128 / 255
    torch.testing.assert_close(2 * half, added, rtol=0, atol=1.6 / 255)  # the same noise, half as large
    assert not torch.equal(corrupt(grey, "noise", 0.1, 6).images, corrupt(grey, "noise", 0.1, 5).images)


def test_blur() -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    given = images(channels=3)
    expected = [
        [ndimage.gaussian_filter(channel.numpy() / 255, 1.5, mode="mirror", radius=5) for channel in image]
        for image in given.images
    ]
    found = corrupt(given, "blur", 1.5, 5).images.double() / 255
    torch.testing.assert_close(found, torch.tensor(np.array(expected)), rtol=0, atol=0.51 / 255)


def test_contrast_and_brightness() -> None:
    given = images(channels=3)
    x = given.images.double() / 255
    mean = x.mean((2, 3), keepdim=True)
    for kind, expected in (("contrast", 0.4 * x + 0.6 * mean), ("brightness", (x + 0.6).clamp(max=1))):
        found = corrupt(given, kind, 0.6, 5).images.double() / 255
        torch.testing.assert_close(found, expected, rtol=0, atol=0.51 / 255)


def test_pixelate() -> None:
    given = images()
    blocks = given.images.double().reshape(3, 1, 8, 4, 8, 4).mean((3, 5))
    expected = blocks.repeat_interleave(4, 2).repeat_interleave(4, 3)
    found = corrupt(given, "pixelate", 4, 5).images.double()
    torch.testing.assert_close(found, expected, rtol=0, atol=0.51)
