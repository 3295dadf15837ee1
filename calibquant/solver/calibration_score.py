"""How good a calibration set may be, for a given network, without labels and without reconstructing.

Two scores, lower is better: how far the set's activation statistics are from those of the training data,
and what the network costs that is quantized with ranges calibrated on the set alone. No I/O happens here.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from calibquant.model.quant_resnet import QuantResNet
from calibquant.quantization.state import calibrating, full_precision
from calibquant.solver.activation_statistics import channel_weights, image_moments, statistics_distance
from calibquant.solver.probe import Cost, Reference


def statistics_distances(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> list[float]:
    """:func:`statistics_distance` of several sets, with one run of the network for each image.

    Args:
        model: float, in evaluation mode.
        batches: images ``[n, 3, H, W]`` on the model's device, and how often sets hold them,
            ``[sets, n]``. Every set holds an image.

    Raises:
        ValueError: activations hold NaN or infinity.
    """
    sums: Tensor | None = None
    counts: Tensor | None = None
    for images, members in batches:
        held = members.double()
        moments = torch.einsum("sn,nmc->smc", held, image_moments(model, images).double().cpu())
        sums = moments if sums is None else sums + moments
        counts = held.sum(1) if counts is None else counts + held.sum(1)
    assert sums is not None and counts is not None
    weights = channel_weights(model)
    means = sums / counts[:, None, None]
    return [statistics_distance(moments, weights) for moments in means]


@torch.no_grad()
def float_reference(model: QuantResNet, batches: Iterable[Tensor]) -> Reference:
    """The float network's outputs for batches ``[n, 3, H, W]``, which need not be calibrated on."""
    with full_precision(model):
        return Reference([model(batch) for batch in batches])


@torch.no_grad()
def ranges_cost(
    model: QuantResNet, calibration: Iterable[Tensor], measured: Iterable[Tensor], reference: Reference
) -> Cost:
    """What quantizing costs with ranges of activations from a set, and nothing learned.

    Args:
        model: with ranges of weights, which no set changes. Its ranges of activations are replaced.
        calibration: batches of the set, ``[n, 3, H, W]``, on the model's device.
        measured: the batches of ``reference``.
        reference: see :func:`float_reference`.

    Raises:
        ValueError: activations hold NaN or infinity.
    """
    with calibrating(model):
        for batch in calibration:
            model(batch)
    return reference.compare(model(batch) for batch in measured)
