"""Before a unit learns: its weights, layer by layer, rounded so that they make up for each other's errors.

The arithmetic stands in `quantization/compensation.py`; here are the inputs that it takes, which come from
the unit's own data.
"""

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from calibquant.model.quant_layer import QuantConv2d, QuantLayer, QuantLinear, layers
from calibquant.model.quant_resnet import Unit, layer_units
from calibquant.quantization.affine import SCALE_EPS
from calibquant.quantization.compensation import Moments, WeightGrid, added_error, beside, compensated_steps
from calibquant.quantization.fake_quant import FakeQuantize
from calibquant.quantization.state import full_precision, watching
from calibquant.solver.caches import Store, UnitData, run_batched
from calibquant.solver.peers import Peers

SAMPLES = 16
"""Places sampled of a layer's input, for each of the inputs to one output."""
IMAGES, PLACES = 256, 2**16
"""Images that are looked at, or more where all of their outputs have fewer places than these."""
HELD_OUT = 4
"""One batch of so many is kept back, to choose the damping by."""
WIDEST = 2.0
"""Largest factor, and its inverse the smallest, by which an input's spread is matched."""
DAMPINGS = (10.0, 1.0, 0.1, 0.01)
"""Dampings that are tried, in this order, until one serves the images held out worse."""


@torch.no_grad()
def compensate(
    unit: Unit, data: UnitData, batch: int, drop_prob: float, generator: torch.Generator, peers: Peers
) -> None:
    """Replace a unit's weights, in dataflow order, by ones near the grid points that serve it together.

    Each layer's inputs are those that come through the quantized layers before it.

    Args:
        batch: images run at once.
        drop_prob: chance that an input stays quantized, as while learning (QDrop). What is fitted to
            noise alone shrinks: at 1 the network's logits come out too small.
        generator: on the device to work on; draws images and places.
        peers: processes whose moments are averaged.
    """
    device = generator.device
    rows = some_images(data.target, generator).to(data.target.device)
    store = Store(data.target.device, data.target.dtype)
    full = {name: x[rows] for name, x in zip(unit.reads, data.full, strict=True)}
    quantized = {name: x[rows] for name, x in zip(unit.reads, data.quantized, strict=True)}
    parts = layer_units(unit)
    for part in parts:
        here, there = ([flow[name] for name in part.reads] for flow in (full, quantized))
        ((_, layer),) = layers(part.module)
        each = math.ceil(SAMPLES * layer.weight[0].numel() * batch / len(rows))
        given = layer_inputs(part, layer, here, there, batch, device)
        moments = input_moments(layer, given, each, drop_prob, generator)
        if isinstance(layer, QuantLinear):
            a, b = zip(*layer_inputs(part, layer, here, there, batch, device), strict=True)
            match_inputs(layer, torch.cat(a), torch.cat(b), peers)
            for some in moments:
                some.cross.zero_()  # its weight is fitted already
        peers.average([m for some in moments for m in (some.second, some.cross)])
        compensate_layer(layer, *moments)
        peers.match(part.module)  # the same to the last bit
        if part is not parts[-1]:
            with full_precision(part.module):
                full[part.writes] = run_batched(part.module, here, batch, device, store)
            quantized[part.writes] = run_batched(part.module, there, batch, device, store)


def some_images(target: Tensor, generator: torch.Generator) -> Tensor:
    """Row indices of the images that are looked at: all of them, or enough drawn at random."""
    count = number_of_images(len(target), target[0, 0].numel())
    return torch.randperm(len(target), generator=generator, device=generator.device)[:count]


def number_of_images(count: int, places: int) -> int:
    """How many of ``count`` images are looked at, with so many places in a unit's output."""
    return min(count, max(IMAGES, PLACES // places))


def layer_inputs(
    part: Unit,
    layer: QuantLayer,
    full: list[Tensor],
    quantized: list[Tensor],
    batch: int,
    device: torch.device,
) -> Iterator[tuple[Tensor, Tensor]]:
    """What a part's layer is given in the float and in the quantized network, batch by batch."""
    seen: list[Tensor] = []
    with watching({layer: seen.append}), full_precision(part.module):
        for start in range(0, len(full[0]), batch):
            for inputs in (full, quantized):
                part.module(*(x[start : start + batch].to(device, torch.float32) for x in inputs))
            a, b = seen
            seen.clear()
            yield a, b


def input_moments(
    layer: QuantLayer,
    given: Iterable[tuple[Tensor, Tensor]],
    each: int,
    drop_prob: float,
    generator: torch.Generator,
) -> tuple[Moments, Moments]:
    """Moments of what a layer is given, at places drawn at random.

    Args:
        given: batches of its inputs, as :func:`layer_inputs` gives them.
        each: places drawn of each batch.

    Returns:
        Those of most batches, and those of the batches held out; of few batches both times the same.
    """
    device = generator.device
    groups, size = groups_of(layer), layer.weight[0].numel()
    sums = torch.zeros(2, 2, groups, size, size, device=device)
    counts = [0, 0]
    for number, pair in enumerate(given):
        read = [windows(layer, x) for x in pair]
        shape = read[0].shape[:-3]
        drawn = torch.randperm(shape.numel(), generator=generator, device=device)[:each]
        at = torch.unravel_index(drawn, shape)
        a, b = (w[at].reshape(len(drawn), groups, size).transpose(0, 1) for w in read)
        stays = torch.rand(b.shape, generator=generator, device=device) < drop_prob
        b = torch.where(stays, b, a)
        kept_back = int(number % HELD_OUT == HELD_OUT - 1)
        sums[kept_back] += torch.stack((b.mT @ b, (a - b).mT @ b))
        counts[kept_back] += len(drawn)
    if not counts[1]:
        sums[1], counts[1] = sums[0], counts[0]
    learned, held_out = (Moments(*(some / count)) for some, count in zip(sums, counts, strict=True))
    return learned, held_out


def match_inputs(layer: QuantLinear, full: Tensor, quantized: Tensor, peers: Peers) -> None:
    """Fold into a layer what gives each of its inputs the mean and the spread that it has in float.

    Each layer that was fitted to noisy inputs gives a little less than the float one, as every regression
    does: at the end of a real ResNet-50 pooled features were a tenth too small, and predictions too unsure.
    Another regression would make them smaller still, so that here moments are matched, as by taking batch
    norm's statistics anew after quantization.

    Args:
        full, quantized: inputs ``[N, K]`` of the layer in both networks.
    """
    moments = [m for x in (full, quantized) for m in (x.mean(0), (x * x).mean(0))]
    peers.average(moments)
    mean, square, mean_quantized, square_quantized = moments
    spread, spread_quantized = square - mean**2, square_quantized - mean_quantized**2
    factor = (spread / spread_quantized.clamp(min=SCALE_EPS)).clamp(min=0).sqrt().clamp(1 / WIDEST, WIDEST)
    layer.bias += layer.weight @ (mean - factor * mean_quantized)
    layer.weight *= factor
    layer.calibrate_weight()


def groups_of(layer: QuantLayer) -> int:
    """Groups of a convolution's channels; 1 for any other layer."""
    return layer.groups if isinstance(layer, QuantConv2d) else 1


def windows(layer: QuantLayer, x: Tensor) -> Tensor:
    """A view of a layer's input by what each output reads: ``[..., C, kh, kw]``, before that the places."""
    if not isinstance(layer, QuantConv2d):
        return x[..., None, None]
    (down, right), (height, width) = layer.padding, layer.weight.shape[2:]
    padded = F.pad(x, (right, right, down, down))
    found = padded.unfold(2, height, layer.stride[0]).unfold(3, width, layer.stride[1])
    return found.permute(0, 2, 3, 1, 4, 5)


def compensate_layer(layer: QuantLayer, learned: Moments, held_out: Moments) -> None:
    """Replace one layer's weight, with the damping that serves the images held out best.

    Nothing changes where nearest rounding serves them better.
    """
    quantizer = layer.weight_quantizer
    assert isinstance(quantizer, FakeQuantize)
    groups = groups_of(layer)
    weight = layer.weight.reshape(groups, layer.weight.shape[0] // groups, -1)
    scale, zero_point = (p.view(groups, -1, 1) if p.numel() > 1 else p for p in quantizer.hard_qparams())
    grid = WeightGrid(scale, zero_point, quantizer.quant_min, quantizer.quant_max)
    nearest = added_error(weight, grid.steps(weight) * scale, held_out)
    least, best = math.inf, None
    for damping in DAMPINGS:
        found = compensated_steps(weight, learned, damping, grid)
        error = math.inf if found is None else added_error(weight, found[1] * scale, held_out)
        if not error < least:
            break
        least, best = error, found
    if best is not None and least < nearest:
        layer.weight.copy_(beside(*best, grid).view_as(layer.weight))
