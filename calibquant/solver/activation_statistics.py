"""What images do to a float network's batch norms, and how far that is from the training distribution.

Batch norm keeps the mean and variance that its inputs had in training. A set of images whose activations
have the same is, to the network, like the training data: ZeroQ (Cai et al., CVPR 2020) and The Knowledge
Within (Haroush et al., CVPR 2020) make images on that ground; here given ones are judged. A set's moments
are the averages of its images', so that each image runs through the network once. No I/O happens here.

Moments of n images take 8 bytes per image and channel of a batch norm: 421 kB per image for ResNet-101
(52,672 channels), 3.5 GB for 8,192 images. Choosing among these needs their Gram matrix besides, n x n in
float64, and copies of it while it is worked with: 2.2 GB at most for 8,192.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calibquant.errors import UserError
from calibquant.quantization.state import watching

Features = Callable[[Tensor, Tensor], Tensor]
"""Moments ``[n, 2, C]`` and weights ``[C]`` -> features of each image, ``[n, 2 * C]``."""

SMALLEST_VARIANCE = 2.0**-20
"""Relative to that of the training data."""
BLOCK = 2048
"""Channels whose features are in memory at a time."""


def batch_norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    """The batch norms of a network, in the order of its modules."""
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def channel_weights(model: nn.Module) -> Tensor:
    """Share of each batch-norm channel in a mean over channels, then over layers: ``[C]``, sum 1."""
    norms = batch_norms(model)
    sizes = torch.tensor([norm.num_features for norm in norms])
    return (1.0 / (len(norms) * sizes.double())).repeat_interleave(sizes)


@torch.no_grad()
def image_moments(model: nn.Module, images: Tensor) -> Tensor:
    """First and second moment, over an image's pixels, of the input of every batch norm.

    Inputs count relative to the running statistics, ``z = (x - mean) / sqrt(var + eps)``. With ``eps`` on
    both sides the training data then have mean 0 and second moment 1 in every channel, also in one that
    hardly ever varies.

    Args:
        model: float, in evaluation mode.
        images: ``[n, 3, H, W]`` on its device.

    Returns:
        ``[n, 2, C]``, float32; C counts the channels of all batch norms, one norm after the other.

    Raises:
        ValueError: activations hold NaN or infinity.
    """
    found: dict[nn.Module, Tensor] = {}

    def view(norm: nn.BatchNorm2d, x: Tensor) -> None:
        mean, var, eps = norm.running_mean, norm.running_var, norm.eps
        assert mean is not None and var is not None
        z = F.batch_norm(x, mean, var, eps=eps)
        power = torch.linalg.vector_norm(z, dim=(2, 3)).square() / z[0, 0].numel()
        found[norm] = torch.stack([z.mean((2, 3)), power + eps / (var + eps)], dim=1)

    norms = batch_norms(model)
    with watching({norm: partial(view, norm) for norm in norms}):
        model(images)
    moments = torch.cat([found[norm] for norm in norms], dim=2)
    if not moments.isfinite().all():
        raise ValueError("activations of the float network hold NaN or infinity")
    return moments


def variance_of(first: Tensor, second: Tensor) -> Tensor:
    """Variance from moments; at least what rounding them to float32 leaves of one that is zero."""
    return (second - first.square()).clamp(min=SMALLEST_VARIANCE)


def statistics_distance(moments: Tensor, weights: Tensor) -> float:
    """KL divergence of Gaussians with a set's mean and variance from those with the running statistics.

    Per channel ``(var + mean^2 - 1 - ln var) / 2`` in the units of :func:`image_moments` (Haroush et al.
    2020), in nats; 0 where the set has the statistics of the training data.

    Args:
        moments: of a set, ``[2, C]``: the mean of its images'.
        weights: ``[C]``, see :func:`channel_weights`.
    """
    first, second = moments.double().cpu()
    divergence = (second - 1 - variance_of(first, second).log()) / 2
    return float((divergence * weights).sum())


def deviation_features(moments: Tensor, weights: Tensor) -> Tensor:
    """Features whose mean over a set has about :func:`statistics_distance` as its squared norm.

    That is the divergence to second order around the running statistics, per channel
    ``mean^2 / 2 + (second - 1)^2 / 4``.

    Args:
        moments: ``[n, 2, C]``.
        weights: ``[C]``.

    Returns:
        ``[n, 2 * C]``; zero for an image with the running statistics.
    """
    first, second = moments.unbind(1)
    root = weights.to(moments).sqrt()
    return torch.cat([first * (root / 2**0.5), (second - 1) * (root / 2)], dim=1)


def image_features(moments: Tensor, weights: Tensor) -> Tensor:
    """Features of single images, mean and log variance per channel, in which near images are alike.

    The logarithm keeps an image with one extreme channel from being far from all others.

    Args:
        moments: ``[n, 2, C]``.
        weights: ``[C]``.

    Returns:
        ``[n, 2 * C]``.
    """
    first, second = moments.unbind(1)
    root = weights.to(moments).sqrt()
    return torch.cat([first * (root / 2**0.5), variance_of(first, second).log() * (root / 2)], dim=1)


def gram_matrix(moments: Tensor, weights: Tensor, features: Features) -> Tensor:
    """Inner products of images' features, ``[n, n]`` in float64, from a block of channels at a time.

    Args:
        moments: ``[n, 2, C]``.
        weights: ``[C]``.
        features: :func:`deviation_features` or :func:`image_features`.

    Raises:
        UserError: activations are so large that a product is not finite.
    """
    gram = torch.zeros(len(moments), len(moments), dtype=torch.float64)
    for some, share in zip(moments.split(BLOCK, dim=2), weights.split(BLOCK), strict=True):
        block = features(some, share)
        gram += block @ block.T
    if not gram.isfinite().all():
        raise UserError(
            "activations of the float network are too large, allowed are activations whose statistics' "
            "products are finite in float32; see model.path"
        )
    return gram
