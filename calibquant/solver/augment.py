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
        views: all views of them that are learned from, the images themselves among these.
        unlearned: views of them that are not; what units have not learned from, they fit less well.
        held_out: images that no unit learns from.
    """

    images: int
    views: int
    unlearned: int
    held_out: int

    @property
    def count(self) -> int:
        return self.views + self.unlearned + self.held_out

    @property
    def matching(self) -> slice:
        """Those that the classifier's inputs are matched on: unlearned views, if there are any."""
        return slice(self.views, self.views + self.unlearned) if self.unlearned else slice(self.views)


def rows_of(count: int, settings: ReconSettings) -> Rows:
    """Rows for ``count`` images: as many views of each, and as many held out, as the settings say."""
    share = settings.held_out
    kept_back = min(max(1, round(share * count)), count - 1) if share else 0
    learned = count - kept_back
    matched = settings.compensate and "classifier" not in settings.merge  # see match.py
    unlearned = settings.match_views if matched else 0
    return Rows(learned, settings.views * learned, unlearned * learned, kept_back)


def arrange(images: Tensor, rows: Rows, seed: int) -> Tensor:
    """The rows' images ``[count, 3, H, W]``; those held out are spread evenly over the set.

    Args:
        images: ``[N, 3, H, W]``, normalised.
        seed: of the crops.
    """
    views = (rows.views + rows.unlearned) // rows.images
    if not rows.held_out:
        return views_of(images, views, seed)
    held_out = torch.zeros(len(images), dtype=torch.bool)
    held_out[(torch.arange(rows.held_out) * len(images) + len(images) // 2) // rows.held_out] = True
    return torch.cat([views_of(images[~held_out], views, seed), images[held_out]])


def views_of(images: Tensor, count: int, seed: int) -> Tensor:
    """The images, the same mirrored, and random crops of them, some mirrored, ``[count * N, 3, H, W]``.

    Args:
        images: ``[N, 3, H, W]``, normalised; they come first in the result, and alone for a count of 1.
        count: views of each image.
        seed: of the crops, independent of torch's global generator.
    """
    if count == 1:
        return images
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        crops = [random_crops(images) for _ in range(count - 2)]
    return torch.cat([images, images.flip(3), *crops])


def random_crops(images: Tensor) -> Tensor:
    """Of each image a random part, resized and maybe mirrored; draws from torch's generator."""
    size = list(images.shape[2:])
    cropped = torch.empty_like(images)
    for place, image in zip(cropped, images, strict=True):
        part = RandomResizedCrop.get_params(image, [SMALLEST_CROP, 1.0], list(RATIOS))
        view = V.resized_crop(image, *part, size, InterpolationMode.BILINEAR, antialias=True)
        place.copy_(view.flip(2) if bool(torch.rand(()) < 0.5) else view)
    return cropped
