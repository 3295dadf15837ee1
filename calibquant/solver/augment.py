"""More views of the calibration images: what is learned on a few hundred images must hold for others."""

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as V

SMALLEST_CROP = 0.3
"""Share of an image's area that a random crop shows at least."""
RATIOS = (3 / 4, 4 / 3)
"""Of a crop's width to its height, as in the training of the usual networks (Szegedy et al., CVPR 2015)."""


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
