"""Equalization: an activation's channels are brought to like ranges before one step size serves them all.

What passes through a ReLU, a pooling or an addition of its like may be scaled channel by channel,
``x_c / s_c``, if the weights that wrote it are divided and those that read it multiplied by ``s_c``: the
float network stays the same function (cross-layer equalization, Nagel et al., ICCV 2019, section 4.1), and
a weight with one step size per output channel is written as well as before. One step size for all of an
activation's channels then loses less, but a weight that reads channels of unlike scale loses more. An
exponent, the strength, shares the burden: ``s_c = range_c ** strength`` (SmoothQuant, Xiao et al., ICML
2023, eq. 4).
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from calibquant.model.quant_layer import QuantLayer, layers
from calibquant.model.quant_resnet import QuantResidualBlock, QuantResNet
from calibquant.quantization.affine import PER_TENSOR, broadcastable
from calibquant.quantization.fake_quant import FakeQuantize, Role
from calibquant.quantization.observer import MSEFastObserver
from calibquant.quantization.range_search import Grid
from calibquant.quantization.state import full_precision, quantizers, watching

WIDEST = 8.0
"""Farthest that a channel's range counts as being from their geometric mean: one that calibration images
hardly excite must not be made so large that it is clipped when another image does."""
POSITIONS = 8192
"""Places sampled from each activation, over all images."""


@dataclass(frozen=True)
class Junction:
    """Activations whose channels must be scaled alike, since additions join them.

    Attributes:
        writers: layers that write them.
        readings: each one's quantizer, in dataflow order, and the layers that read it.
    """

    writers: list[QuantLayer]
    readings: list[tuple[FakeQuantize, list[QuantLayer]]]


def junctions(model: QuantResNet) -> list[Junction]:
    """Where channels may be scaled: between a block's layers, and along each run of identity shortcuts."""
    found, trunk = [], Junction([model.stem.conv1], [(model.stem.output_quantizer, [])])
    for block in model.blocks:
        assert isinstance(block, QuantResidualBlock)
        path: list[QuantLayer] = [*block.inner_layers(), block.join.last]
        for writer, reader in pairwise(path):
            assert isinstance(writer.output_quantizer, FakeQuantize)
            found.append(Junction([writer], [(writer.output_quantizer, [reader])]))
        trunk.readings[-1][1].append(path[0])
        if isinstance(block.shortcut, QuantLayer):
            trunk.readings[-1][1].append(block.shortcut)
            found.append(trunk)
            trunk = Junction([block.shortcut], [])
        trunk.writers.append(path[-1])
        trunk.readings.append((block.join.output_quantizer, []))
    trunk.readings[-1][1].append(model.classifier.fc)
    return [*found, trunk]


@torch.no_grad()
def equalize(model: QuantResNet, images: Tensor, batch_size: int, seed: int, strength: float) -> None:
    """Scale the channels of every junction, in place; ranges must be calibrated afterwards.

    Args:
        model: quantized network, not hardened, with bit-widths settled.
        images: calibration images ``[N, 3, H, W]``, on any device.
        seed: of the places at which activations are sampled.
        strength: 0 leaves the network as it is, 1 gives all channels the same range.

    Raises:
        ValueError: a weight is hardened.
    """
    require_unhardened(model)
    samples = sample_activations(model, images, batch_size, seed)
    for junction in junctions(model):
        if writes_by_channel(junction):
            found = [channel_ranges(quantizer, samples[quantizer]) for quantizer, _ in junction.readings]
            rescale(junction, scale_factors(torch.stack(found).mean(0), strength))


def require_unhardened(model: QuantResNet) -> None:
    """Raise ValueError where a weight is integers already: those cannot be scaled."""
    for name, layer in layers(model):
        if not isinstance(layer.weight_quantizer, FakeQuantize):
            raise ValueError(f"{name}: its weight is hardened, and cannot be scaled any more")


def sample_activations(
    model: QuantResNet, images: Tensor, batch_size: int, seed: int
) -> dict[FakeQuantize, Tensor]:
    """The float values ``[about POSITIONS, C]`` that each activation quantizer sees at random places."""
    device = next(model.buffers()).device
    generator = torch.Generator(device).manual_seed(seed)
    batches = images.split(batch_size)
    each = -(-POSITIONS // len(batches))
    seen: dict[FakeQuantize, list[Tensor]] = {q: [] for _, q in quantizers(model, Role.ACTIVATION)}

    def view(kept: list[Tensor]) -> Callable[[Tensor], None]:
        def keep(x: Tensor) -> None:
            places = x.movedim(1, -1).flatten(0, -2)
            rows = torch.randint(len(places), (each,), generator=generator, device=x.device)
            kept.append(places[rows])

        return keep

    with watching({q: view(kept) for q, kept in seen.items()}), full_precision(model):
        for batch in batches:
            model(batch.to(device))
    return {q: torch.cat(kept) for q, kept in seen.items()}


def writes_by_channel(junction: Junction) -> bool:
    """Whether every writer has a step size for each channel, so that scaling costs it nothing."""
    return all(
        isinstance(layer.weight_quantizer, FakeQuantize) and layer.weight_quantizer.ch_axis != PER_TENSOR
        for layer in junction.writers
    )


def channel_ranges(quantizer: FakeQuantize, x: Tensor) -> Tensor:
    """Width of the clipping range that would suit each channel of ``x [n, C]`` best alone, ``[C]``."""
    grid = Grid(quantizer.quant_min, quantizer.quant_max, quantizer.symmetric)
    low, high = MSEFastObserver(grid, 1).range_of(x)
    return high - low


def scale_factors(ranges: Tensor, strength: float) -> Tensor:
    """Factors ``[C]`` around 1: the ranges over their geometric mean, to the power ``strength``."""
    live = ranges > 0
    mean = ranges[live].log().mean().exp()
    relative = torch.where(live, ranges / mean, torch.ones_like(ranges))
    return relative.clamp(1 / WIDEST, WIDEST) ** strength


@torch.no_grad()
def rescale(junction: Junction, factors: Tensor) -> None:
    """Divide what the writers write, and multiply what the readers' weights take, channel by channel."""
    for layer in junction.writers:
        layer.weight /= broadcastable(factors, layer.weight.ndim, 0)
        layer.bias /= factors
    for layer in (layer for _, readers in junction.readings for layer in readers):
        taken = layer.weight.shape[1]  # of a grouped convolution's weight: the channels of one group
        by_group = layer.weight.view(len(factors) // taken, -1, *layer.weight.shape[1:])
        by_group *= factors.view(-1, 1, taken, *[1] * (layer.weight.ndim - 2))
