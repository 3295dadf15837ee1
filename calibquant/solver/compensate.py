"""Before a unit learns: its weights, layer by layer, rounded so that they make up for each other's errors.

The arithmetic stands in `quantization/compensation.py`; here are the inputs that it takes, which come from
the unit's own data.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calibquant.model.quant_layer import QuantConv2d, QuantLayer, layers
from calibquant.model.quant_resnet import QuantClassifier, ResidualJoin, Unit, layer_units
from calibquant.quantization.compensation import (
    Moments,
    WeightGrid,
    added_error,
    compensated_steps,
    descent,
    fitted,
    wanted_steps,
)
from calibquant.quantization.fake_quant import FakeQuantize
from calibquant.quantization.rounding import Rounding
from calibquant.quantization.state import full_precision
from calibquant.solver.caches import Store, UnitData, run_batched
from calibquant.solver.peers import Peers

SAMPLES = 16
"""Places sampled of a layer's input, for each of the inputs to one output."""
IMAGES, PLACES = 256, 2**16
"""Images that are looked at, or more where all of their outputs have fewer places than these."""
HELD_OUT = 4
"""One image of so many is kept back, with all its views, to choose damping and passes by."""
DAMPINGS = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01)
"""Dampings of which the one is taken that serves the images held out best, looked for from 1 on."""
PASSES = 4
"""Passes over a layer's weights at most, that improve step sizes and grid points in turn."""
LAST_PASSES = 2
"""Passes that then do so by all images, those held out among them."""


@dataclass(frozen=True)
class Given:
    """What a layer is given for a batch: its inputs in both networks, and what is lost beside it.

    Attributes:
        held_out: these images are kept back.
        lost: by how much the shortcut to which the layer's output is added falls short of the float one,
            shaped as that output; None where nothing is added.
    """

    full: Tensor
    quantized: Tensor
    held_out: bool = False
    lost: Tensor | None = None


@torch.no_grad()
def compensate(
    unit: Unit,
    data: UnitData,
    images: int,
    batch: int,
    drop_prob: float,
    kind: type[Rounding],
    generator: torch.Generator,
    peers: Peers,
) -> None:
    """Replace a unit's weights, in dataflow order, by ones near the grid points that serve it together.

    Each layer's inputs are those that come through the quantized layers before it.

    Args:
        images: how many the data's rows show: all in one view, then all in the next.
        batch: rows run at once.
        drop_prob: chance that an input stays quantized, as while learning (QDrop). What is fitted to
            noise alone shrinks: at 1 the network's logits come out too small.
        kind: of the rounding that is learned afterwards, which says where weights wait for it.
        generator: on the device to work on; draws images and places.
        peers: processes whose moments are averaged.
    """
    device = generator.device
    learned, held_out = some_rows(data.target, images, generator)
    rows = torch.cat([learned, held_out]).to(data.target.device)
    store = Store(data.target.device, data.target.dtype)
    full = {name: x[rows] for name, x in zip(unit.reads, data.full, strict=True)}
    quantized = {name: x[rows] for name, x in zip(unit.reads, data.quantized, strict=True)}
    parts = layer_units(unit)
    for part in parts:
        here, there = ([flow[name] for name in part.reads] for flow in (full, quantized))
        ((_, layer),) = layers(part.module)
        each = SAMPLES * layer.weight[0].numel() / len(rows)
        given = layer_inputs(part, here, there, len(learned), batch, device)
        sums = layer_sums(layer, given, each, drop_prob, generator)
        peers.average([x for some in sums for x in vars(some).values()])
        if part is not parts[-1]:  # while its weight is still the float network's
            with full_precision(part.module):
                full[part.writes] = run_batched(part.module, here, batch, device, store)
        compensate_layer(layer, *sums, kind)
        peers.match(part.module)  # the same to the last bit
        if part is not parts[-1]:
            quantized[part.writes] = run_batched(part.module, there, batch, device, store)


def some_rows(target: Tensor, images: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Row indices of what is looked at, all or enough at random: to learn from, and held out.

    No image has views in both. Further views are taken only where the images themselves are not enough.

    Args:
        target: of a unit's output, ``[N, C, ...]``, views of an image ``images`` rows apart.
    """
    count = number_of_rows(len(target), target[0, 0].numel())
    order = torch.randperm(images, generator=generator, device=generator.device)
    views = torch.arange(0, len(target), images, device=order.device)[:, None]
    back = images // HELD_OUT
    held_out = (views + order[:back]).flatten()[: count // HELD_OUT]
    return (views + order[back:]).flatten()[: count - len(held_out)], held_out


def number_of_rows(count: int, places: int) -> int:
    """How many of ``count`` rows are looked at, with so many places in a unit's output."""
    return min(count, max(IMAGES, PLACES // places))


def layer_inputs(
    part: Unit,
    full: list[Tensor],
    quantized: list[Tensor],
    learned: int,
    batch: int,
    device: torch.device,
) -> Iterator[Given]:
    """What the layer of a part is given in both networks, batch by batch.

    Args:
        learned: rows of the part's inputs that are learned from, which come first.
    """
    read = part.module.pool if isinstance(part.module, QuantClassifier) else nn.Identity()
    joins = isinstance(part.module, ResidualJoin)
    for first, last in ((0, learned), (learned, len(full[0]))):
        for start in range(first, last, batch):
            rows = slice(start, min(start + batch, last))
            here, there = (
                [x[rows].to(device, torch.float32) for x in inputs] for inputs in (full, quantized)
            )
            lost = here[1] - there[1] if joins else None
            yield Given(read(here[0]), read(there[0]), first > 0, lost)


@dataclass(frozen=True)
class LayerSums:
    """Averages over places drawn at random, for a layer whose inputs are ``a`` in the float network.

    Its inputs here are ``b``, of which some are quantized; it should give ``y``.

    Attributes:
        second: of ``b b^T``, ``[g, K, K]``.
        missing: of ``(y - W b) b^T``, ``[g, O, K]``.
        input: of ``b``, ``[g, K, 1]``.
        lacking: of ``y - W b``, ``[g, O, 1]``.
        quantized: of ``b`` where all is quantized, ``[g, K, 1]``.
        wanted: of ``y`` there, without the layer's bias, ``[g, O, 1]``.
        places: how many they are, ``[]``.
    """

    second: Tensor
    missing: Tensor
    input: Tensor
    lacking: Tensor
    quantized: Tensor
    wanted: Tensor
    places: Tensor

    def with_those_of(self, other: "LayerSums") -> "LayerSums":
        """The averages over both's places."""
        places = self.places + other.places
        share = self.places / places
        *mine, _ = vars(self).values()
        *theirs, _ = vars(other).values()
        mixed = (y + share * (x - y) for x, y in zip(mine, theirs, strict=True))
        return LayerSums(*[*mixed, places])

    def moments(self) -> Moments:
        """Central moments: a layer's bias takes care of the means."""
        return Moments(
            self.second - self.input @ self.input.mT, self.missing - self.lacking @ self.input.mT
        )


def layer_sums(
    layer: QuantLayer, given: Iterable[Given], each: float, drop_prob: float, generator: torch.Generator
) -> tuple[LayerSums, LayerSums]:
    """What a layer is given and should give, averaged over places drawn at random.

    It should give what it gives in the float network, and in the last layer of a residual block also what
    the shortcut has lost.

    Args:
        given: batches of its inputs, as :func:`layer_inputs` gives them.
        each: places drawn of each image, on average.

    Returns:
        That of what is learned from, and that of what is held out; if nothing is, both times the same.
    """
    groups = groups_of(layer)
    weight = by_group(layer.weight, groups)
    sums: list[list[Tensor]] = [[], []]
    counts = [0, 0]
    for one in given:
        read = [windows(layer, x) for x in (one.full, one.quantized)]
        shape = read[0].shape[:-3]
        drawn = torch.randperm(shape.numel(), generator=generator, device=generator.device)
        drawn = drawn[: math.ceil(each * len(one.full))]
        at = torch.unravel_index(drawn, shape)
        a, quantized = (x[at].reshape(len(drawn), groups, -1).permute(1, 2, 0) for x in read)
        stays = torch.rand(a.shape, generator=generator, device=a.device) < drop_prob
        b = torch.where(stays, quantized, a)
        wanted, lacking = weight @ total(a), weight @ (a - b)
        if one.lost is not None:
            lost = one.lost.movedim(1, -1)[at].view(len(drawn), groups, -1).permute(1, 2, 0)
            wanted += total(lost)
            lacking += drop_prob * lost
        found = [b @ b.mT, lacking @ b.mT, total(b), total(lacking), total(quantized), wanted]
        part = int(one.held_out)
        sums[part] = [x + y for x, y in zip(sums[part], found, strict=True)] if sums[part] else found
        counts[part] += len(drawn)
    learned, *held_out = (
        LayerSums(*[*(x / count for x in some), some[0].new_tensor(count)])
        for some, count in zip(sums, counts, strict=True)
        if count
    )
    return learned, held_out[0] if held_out else learned


def total(x: Tensor) -> Tensor:
    """``[g, C, places]`` summed over places, ``[g, C, 1]``."""
    return x.sum(2, keepdim=True)


def groups_of(layer: QuantLayer) -> int:
    """Groups of a convolution's channels; 1 for any other layer."""
    return layer.groups if isinstance(layer, QuantConv2d) else 1


def by_group(weight: Tensor, groups: int) -> Tensor:
    """A layer's weight as ``[g, O, K]``."""
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def windows(layer: QuantLayer, x: Tensor) -> Tensor:
    """A view of a layer's input by what each output reads: ``[..., C, kh, kw]``, before that the places."""
    if not isinstance(layer, QuantConv2d):
        return x[..., None, None]
    (down, right), (height, width) = layer.padding, layer.weight.shape[2:]
    padded = F.pad(x, (right, right, down, down))
    found = padded.unfold(2, height, layer.stride[0]).unfold(3, width, layer.stride[1])
    return found.permute(0, 2, 3, 1, 4, 5)


def compensate_layer(
    layer: QuantLayer, learned: LayerSums, held_out: LayerSums, kind: type[Rounding]
) -> None:
    """Replace one layer's weight, its step sizes and its bias.

    How is chosen by what serves the images held out; the weight stays where nearest rounding serves them
    better. What was chosen is then improved by all images. The bias makes up for how far outputs are
    off on average (bias correction, Nagel et al. 2019): pre-activations are mostly negative, so that what
    shrinks them, as every regression on noisy inputs does, lets more of them through a ReLU.
    """
    quantizer = layer.weight_quantizer
    assert isinstance(quantizer, FakeQuantize)
    groups = groups_of(layer)
    weight = by_group(layer.weight, groups)
    scale, zero_point = (p.view(groups, -1, 1) if p.numel() > 1 else p for p in quantizer.hard_qparams())
    grid = WeightGrid(scale, zero_point, quantizer.quant_min, quantizer.quant_max)
    every = learned.with_those_of(held_out)
    found = compensated(weight, learned.moments(), held_out.moments(), every.moments(), grid)
    rounded = grid.steps(weight) * scale
    if found is not None:
        rounded = found.steps * found.grid.scale
        ends = (end - zero_point for end in (grid.quant_min, grid.quant_max))
        waiting = kind.waiting(found.wanted, found.steps, *ends) * found.grid.scale
        layer.weight.copy_(waiting.view_as(layer.weight))
        quantizer.scale.data = found.grid.scale.reshape(quantizer.scale.shape)
    layer.bias += (every.wanted - rounded @ every.quantized).flatten()


@dataclass(frozen=True)
class Rounded:
    """A weight on a grid, both as compensation found them.

    Attributes:
        wanted: where each weight would be, in steps from zero, ``[g, O, K]``.
        steps: where it is.
    """

    grid: WeightGrid
    wanted: Tensor
    steps: Tensor


def compensated(
    weight: Tensor, moments: Moments, unseen: Moments, every: Moments, grid: WeightGrid
) -> Rounded | None:
    """A weight rounded with the damping, and improved as far, as serves the images held out best.

    It is then improved a little more by all images.

    Args:
        moments, unseen, every: of the images learned from, of those held out, and of both.

    Returns:
        None where nearest rounding serves those held out better, or the moments cannot be factored.
    """

    def error(grid: WeightGrid, steps: Tensor) -> float:
        return added_error(weight, steps * grid.scale, unseen)

    @cache
    def at(place: int) -> tuple[float, Tensor | None]:
        inside = 0 <= place < len(DAMPINGS)
        found = compensated_steps(weight, moments, DAMPINGS[place], grid) if inside else None
        return (math.inf, None) if found is None else (error(grid, found), found)

    chosen = lowest(lambda place: at(place)[0], DAMPINGS.index(1.0))
    least, steps = at(chosen)
    if steps is None or not least < error(grid, grid.steps(weight)):
        return None
    problem, better = fitted(weight, moments, DAMPINGS[chosen]), (grid, steps)
    if problem is None:  # in another order of columns than the one in which they could be
        return None
    for passed in islice(descent(*problem, grid, steps), PASSES):
        now = error(*passed)
        if not now < least:
            break
        least, better = now, passed
    problem = fitted(weight, every, DAMPINGS[chosen])
    if problem is None:
        return None
    *_, last = islice(descent(*problem, *better), LAST_PASSES)
    return Rounded(last[0], wanted_steps(*problem, *last), last[1])


def lowest(of: Callable[[int], float], start: int) -> int:
    """Where a function of one valley is lowest, gone to from a start step by step."""
    for step in (-1, 1):
        place = start
        while of(place + step) < of(place):
            place += step
        if place != start:
            return place
    return start
