"""What reconstruction makes of the calibration images: further views of them, and some held out.

What is learned on a few hundred images must hold for others.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as V

from calibquant.solver.learn import ReconSettings

SMALLEST_CROP = 0.3
"""Share of an image's area that a random crop shows at least."""
RATIOS = (3 / 4, 4 / 3)
"""Of a crop's width to its height, as in the training of the usual networks (Szegedy et al., CVPR 2015)."""


@dataclass(frozen=True)
class Rows:
    """Which rows of the activations show what, one after the other.

    Attributes:
        images: learned from.
        views: all views of them, the images themselves among these.
        held_out: images that no unit learns from.
    """

    images: int
    views: int
    held_out: int

    @property
    def count(self) -> int:
        return self.views + self.held_out


def rows_of(count: int, settings: ReconSettings) -> Rows:
    """Rows for ``count`` images: as many views of each, and as many held out, as the settings say."""
    share = settings.held_out
    kept_back = min(max(1, round(share * count)), count - 1) if share else 0
    learned = count - kept_back
    return Rows(learned, settings.views * learned, kept_back)


def arrange(images: Tensor, rows: Rows, seed: int) -> Tensor:
    """The rows' images ``[count, 3, H, W]``; those held out are spread evenly over the set.

    Args:
        images: ``[N, 3, H, W]``, normalised.
        seed: of the crops.
    """
    learned, held_out = split_off(images, rows)
    views = [view_of(learned, number, seed) for number in range(rows.views // rows.images)]
    every = [*views, held_out] if rows.held_out else views
    return torch.cat(every) if len(every) > 1 else images


def split_off(images: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """Images ``[N, 3, H, W]`` that are learned from, and those held out, in their order."""
    if not rows.held_out:
        return images, images[:0]
    held_out = torch.zeros(len(images), dtype=torch.bool)
    held_out[(torch.arange(rows.held_out) * len(images) + len(images) // 2) // rows.held_out] = True
    return images[~held_out], images[held_out]


def view_of(images: Tensor, number: int, seed: int) -> Tensor:
    """A view of each image: itself, the same mirrored, and from number 2 on random crops, some mirrored.

    Args:
        images: ``[N, 3, H, W]``, normalised.
        number: of the view, from 0; each has draws of its own, whichever others there are.
        seed: of the crops, independent of torch's global generator.
    """
    if number == 0:
        return images
    if number == 1:
        return images.flip(3)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed * 10_007 + number)
        return random_crops(images)


def random_crops(images: Tensor) -> Tensor:
    """Of each image a random part, resized and maybe mirrored; draws from torch's generator."""
    size = list(images.shape[2:])
    cropped = torch.empty_like(images)
    for place, image in zip(cropped, images, strict=True):
        part = RandomResizedCrop.get_params(image, [SMALLEST_CROP, 1.0], list(RATIOS))
        view = V.resized_crop(image, *part, size, InterpolationMode.BILINEAR, antialias=True)
        place.copy_(view.flip(2) if bool(torch.rand(()) < 0.5) else view)
    return cropped
