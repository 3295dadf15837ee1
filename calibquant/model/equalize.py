"""Equalization: an activation's channels are brought to like ranges before one step size serves them all.

What passes through a ReLU, a pooling or an addition of its like may be scaled channel by channel,
``x_c / s_c``, if the weights that wrote it are divided and those that read it multiplied by ``s_c``: the
float network stays the same function (cross-layer equalization, Nagel et al., ICCV 2019, section 4.1), and
a weight with one step size per output channel is written as well as before. One step size for all of an
activation's channels then loses less, but a weight that reads channels of unlike scale loses more. An
exponent shares the burden, ``s_c = range_c ** strength`` (SmoothQuant, Xiao et al., ICML 2023, eq. 4);
here each junction gets the strength at which activation and weights together bring least noise to what is
computed from them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from calibquant.model.quant_layer import QuantLayer, layers
from calibquant.model.quant_resnet import QuantResidualBlock, QuantResNet
from calibquant.quantization.affine import (
    PER_TENSOR,
    broadcastable,
    choose_qparams_affine,
    fake_quantize_affine,
)
from calibquant.quantization.fake_quant import FakeQuantize, Role
from calibquant.quantization.observer import as_rows
from calibquant.quantization.range_search import Grid, Samples, golden_section_search
from calibquant.quantization.state import full_precision, quantizers, watching

STRENGTHS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
LEARNED = 0.5
"""What learned rounding is taken to leave of the noise that rounding a weight to nearest makes."""
WIDEST = 16.0
"""Farthest that a channel is scaled from the others' geometric mean: one that calibration images hardly
excite must not be made so large that it is clipped when another image does."""
POSITIONS = 4096
"""Places sampled from each activation, over all images."""
ELEMENTS = 2**17
"""Elements of an activation, and of a weight, whose quantization is tried at each strength."""


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
def equalize(model: QuantResNet, images: Tensor, batch_size: int, seed: int) -> dict[str, float]:
    """Scale the channels of every junction, in place; ranges must be calibrated afterwards.

    Args:
        model: quantized network, not hardened, with bit-widths settled.
        images: calibration images ``[N, 3, H, W]``, on any device.
        seed: of the places at which activations are sampled.

    Returns:
        The strength chosen, by the name of each junction's first quantizer; 0 leaves it as it was.

    Raises:
        ValueError: a weight is hardened.
    """
    require_unhardened(model)
    samples = sample_activations(model, images, batch_size, seed)
    names = {quantizer: name for name, quantizer in quantizers(model, Role.ACTIVATION)}
    chosen = {}
    for junction in junctions(model):
        strength, factors = best_factors(junction, samples)
        rescale(junction, factors)
        for quantizer, _ in junction.readings:
            samples[quantizer] /= factors
        chosen[names[junction.readings[0][0]]] = strength
    return chosen


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


def best_factors(junction: Junction, samples: Mapping[FakeQuantize, Tensor]) -> tuple[float, Tensor]:
    """The strength of least noise, and the factors ``[C]`` that it gives."""
    activations = [samples[quantizer] for quantizer, _ in junction.readings]
    strengths = STRENGTHS if _per_channel(junction) else STRENGTHS[:1]
    ranges = torch.stack([channel_ranges(q, samples[q]) for q, _ in junction.readings]).mean(0)
    candidates = [(strength, scale_factors(ranges, strength)) for strength in strengths]
    return min(candidates, key=lambda pair: noise(junction, activations, pair[1]))


def _per_channel(junction: Junction) -> bool:
    """Whether every writer has a step size for each channel, so that scaling costs it nothing."""
    return all(
        isinstance(layer.weight_quantizer, FakeQuantize) and layer.weight_quantizer.ch_axis != PER_TENSOR
        for layer in junction.writers
    )


def channel_ranges(quantizer: FakeQuantize, x: Tensor) -> Tensor:
    """Width of the clipping range that would suit each channel of ``x [n, C]`` best alone, ``[C]``."""
    low, high = clipping_range(x, quantizer, 1)
    return high - low


def scale_factors(ranges: Tensor, strength: float) -> Tensor:
    """Factors ``[C]`` around 1: the ranges over their geometric mean, to the power ``strength``."""
    live = ranges > 0
    mean = ranges[live].log().mean().exp()
    relative = torch.where(live, ranges / mean, torch.ones_like(ranges))
    return relative.clamp(1 / WIDEST, WIDEST) ** strength


def noise(junction: Junction, activations: list[Tensor], factors: Tensor) -> float:
    """Power that quantizing the scaled activations and weights adds to what their readers compute.

    An addition carries an activation's error on, so that later readers of the run get it, too. Errors of
    channels and taps are taken to be independent.
    """
    total, carried = 0.0, torch.zeros_like(factors)
    for (quantizer, readers), x in zip(junction.readings, activations, strict=True):
        few = x[: max(1, ELEMENTS // x.shape[1])]
        error = fake_quantized(few / factors, quantizer, quantizer.ch_axis) * factors - few
        carried = carried + error.square().mean(0)
        power = x.square().mean(0)
        for layer in readers:
            assert isinstance(layer.weight_quantizer, FakeQuantize)
            weight = layer.weight.movedim(1, -1)  # [out, ..., C]
            rows = weight[:: max(1, weight.numel() // ELEMENTS)]
            error = fake_quantized(rows * factors, layer.weight_quantizer, layer.weight_quantizer.ch_axis)
            error = (error / factors - rows).square().flatten(0, -2).sum(0) * (len(weight) / len(rows))
            gain = weight.square().flatten(0, -2).sum(0)
            total += float((carried * gain).sum() + LEARNED * (error * power).sum())
    return total


def fake_quantized(x: Tensor, quantizer: FakeQuantize, ch_axis: int) -> Tensor:
    """``x`` on the quantizer's grid, with the range that suits it best, per tensor or channel."""
    bounds = quantizer.quant_min, quantizer.quant_max
    scale, zero_point = choose_qparams_affine(
        *clipping_range(x, quantizer, ch_axis), *bounds, quantizer.symmetric
    )
    scale, zero_point = (broadcastable(qparam, x.ndim, ch_axis) for qparam in (scale, zero_point))
    return fake_quantize_affine(x, scale, zero_point, *bounds)


def clipping_range(x: Tensor, quantizer: FakeQuantize, ch_axis: int) -> tuple[Tensor, Tensor]:
    """Range of least L2.4 error on the quantizer's grid, each ``[1]`` or ``[C]``, nearly."""
    rows = as_rows(x, ch_axis)
    grid = Grid(quantizer.quant_min, quantizer.quant_max, quantizer.symmetric)
    return golden_section_search(Samples(rows, None, *torch.aminmax(rows, dim=1)), grid, tolerance=0.01)


@torch.no_grad()
def rescale(junction: Junction, factors: Tensor) -> None:
    """Divide what the writers write, and multiply what the readers' weights take, channel by channel."""
    for layer in junction.writers:
        layer.weight /= broadcastable(factors, layer.weight.ndim, 0)
        layer.bias /= factors
    for layer in (layer for _, readers in junction.readings for layer in readers):
        layer.weight *= broadcastable(factors, layer.weight.ndim, 1)
