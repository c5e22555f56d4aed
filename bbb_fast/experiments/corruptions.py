"""Images made harder step by step: rotations, translations, noise, blur and others, each of rising strength.

What is done to an image depends on the image, the strength, and the seed and the image's number alone, not on
the images beside it. At strength 0 every one of them leaves the image as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .data import ImageSet

__all__ = ["CORRUPTIONS", "Corruption", "corrupt"]

# Pixels are uint8; every function takes and returns floats in [0, 1], [N, C, H, W], and clips nothing.
_Function = Callable[[Tensor, float, Callable[[tuple[int, ...]], Tensor]], Tensor]


class Corruption(NamedTuple):
    """``label`` and ``unit`` of its strength in words; ``strengths``: those above 0 that are judged."""

    label: str
    unit: str
    strengths: tuple[float, ...]
    function: _Function


def _rotation(images: Tensor, degrees: float, noise: object) -> Tensor:
    """Counterclockwise around the centre, black where nothing was."""
    angle = math.radians(degrees)
    turn = torch.tensor(
        [[math.cos(angle), -math.sin(angle), 0.0], [math.sin(angle), math.cos(angle), 0.0]],
        dtype=images.dtype, device=images.device,
    )  # fmt: skip
    grid = F.affine_grid(turn.expand(len(images), 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _translation(images: Tensor, pixels: float, noise: Callable[[tuple[int, ...]], Tensor]) -> Tensor:
    """By so many pixels, in a direction of the image's own, black where nothing was."""
    direction = noise((2,))
    direction = direction / direction.norm(dim=1, keepdim=True)
    moved = torch.zeros_like(images)
    height, width = images.shape[2:]
    for k, (down, right) in enumerate((direction * pixels).round().long().tolist()):
        part = images[k, :, max(0, -down) : height - max(0, down), max(0, -right) : width - max(0, right)]
        moved[k, :, max(0, down) : height - max(0, -down), max(0, right) : width - max(0, -right)] = part
    return moved


def _noise(images: Tensor, std: float, noise: Callable[[tuple[int, ...]], Tensor]) -> Tensor:
    """Gaussian noise in every pixel and channel."""
    return images + std * noise(tuple(images.shape[1:]))


def _blur(images: Tensor, sigma: float, noise: object) -> Tensor:
    """A Gaussian of this standard deviation in pixels, cut at three of them; edges are mirrored."""
    reach = min(math.ceil(3 * sigma), min(images.shape[2:]) - 1)
    steps = torch.arange(-reach, reach + 1, dtype=images.dtype, device=images.device)
    kernel = torch.exp(-0.5 * (steps / sigma) ** 2)
    kernel = kernel / kernel.sum()
    channels = images.shape[1]
    padded = F.pad(images, (reach, reach, reach, reach), mode="reflect")
    across = F.conv2d(padded, kernel.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
    return F.conv2d(across, kernel.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)


def _contrast(images: Tensor, lost: float, noise: object) -> Tensor:
    """This part of every pixel's difference from the mean of its channel is taken away."""
    mean = images.mean(dim=(2, 3), keepdim=True)
    return mean + (1 - lost) * (images - mean)


def _brightness(images: Tensor, added: float, noise: object) -> Tensor:
    """Every pixel is brighter by this."""
    return images + added


def _pixelate(images: Tensor, side: float, noise: object) -> Tensor:
    """Blocks of this side in pixels, each of its mean."""
    height, width = images.shape[2:]
    small = F.interpolate(images, size=(round(height / side), round(width / side)), mode="area")
    return F.interpolate(small, size=(height, width), mode="nearest")


CORRUPTIONS: dict[str, Corruption] = {
    "rotation": Corruption("rotation", "degrees", (15, 30, 45, 60, 75, 90), _rotation),
    "translation": Corruption("translation", "pixels", (2, 4, 6, 8, 10), _translation),
    "noise": Corruption("Gaussian noise", "standard deviation", (0.1, 0.2, 0.3, 0.4, 0.5), _noise),
    "blur": Corruption("Gaussian blur", "standard deviation, pixels", (0.5, 1, 1.5, 2, 3), _blur),
    "contrast": Corruption("loss of contrast", "part lost", (0.2, 0.4, 0.6, 0.8, 0.9), _contrast),
    "brightness": Corruption("brightness", "added", (0.1, 0.2, 0.3, 0.4, 0.5), _brightness),
    "pixelate": Corruption("pixelation", "pixels a block", (2, 3, 4, 6, 8), _pixelate),
}


def corrupt(
    images: ImageSet, kind: str, strength: float, seed: int, numbers: Tensor | None = None
) -> ImageSet:
    """The images under a corruption of this strength, rounded to pixels again.

    Args: ``kind``, a key of :data:`CORRUPTIONS`; ``strength`` >= 0, in its unit, 0 the images themselves;
    ``seed``, of noise and directions, 0 ... 2^63 - 1; ``numbers``, int64 [N], what each image is known by (None:
    its place), so that one of a subset gets what it gets in the whole set. Raises ValueError for another kind,
    and a strength that is negative or not finite.
    """
    if kind not in CORRUPTIONS:
        raise ValueError(f"unknown corruption {kind!r}: allowed are {', '.join(CORRUPTIONS)}")
    if not 0 <= strength < math.inf:
        raise ValueError(f"the strength of a corruption must be a finite number >= 0, got {strength!r}")
    if strength == 0:
        return images
    names = range(len(images)) if numbers is None else numbers.tolist()

    def noise(shape: tuple[int, ...]) -> Tensor:
        # A generator for each image. Its seed is spread over all bits: small seeds give alike first numbers.
        return torch.stack([torch.randn(shape, generator=_generator(seed, number)) for number in names])

    changed = CORRUPTIONS[kind].function(images.images.float() / 255, strength, noise)
    pixels = (changed * 255).round().clamp(0, 255).to(torch.uint8)
    return ImageSet(pixels, images.labels, images.classes, f"{images.name}, {kind} {strength:g}")


def _generator(seed: int, number: int) -> torch.Generator:
    mixed = (seed * 0x9E3779B97F4A7C15 + number * 0xD1B54A32D192ED03 + 0x8CB92BA72F3D8DD7) % (1 << 64)
    # splitmix64's last steps.
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % (1 << 64)
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % (1 << 64)
    return torch.Generator().manual_seed((mixed ^ (mixed >> 31)) >> 1)
