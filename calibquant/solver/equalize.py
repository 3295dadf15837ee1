"""Equalization, learned: a step size for each channel of activations, chosen by what reads them.

What an activation's own error says of its channels is not what its readers say. Of a real ResNet-50 with
its stem's output alone at 4 bits, KL to the float network is 0.10 with the range that suits the output
itself, 0.085 with channels scaled to like ranges, and 0.05 with a step size for each channel, learned for
the output of the first block. A writer takes such step sizes into its weight's channels, which have step
sizes of their own, and a reader into what it multiplies them by (`model/equalize.py`), as learned
equivalent transformations do (OmniQuant, Shao et al., ICLR 2024, section 3.3).
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from calibquant.model.equalize import Junction, junctions, rescale, shift
from calibquant.model.quant_layer import QuantLayer
from calibquant.model.quant_resnet import QuantResidualBlock, QuantResNet
from calibquant.quantization.affine import broadcastable, fake_quantize_affine
from calibquant.quantization.fake_quant import FakeQuantize, Role, SharedRangeFakeQuantize
from calibquant.quantization.state import full_precision, hooked, quantizers, watching
from calibquant.solver.caches import Store, run_batched
from calibquant.solver.learn import Progress, batch_order, cosine, learning, reconstruction_loss

BELOW = 0.001
"""Share of a channel's values that may lie below what counts as its floor."""
IMAGES = 256
"""Images that are looked at: a step size for each channel needs no more."""
HIGHEST_LR = 1e30
"""Far beyond any use; torch refuses rates that, divided by Adam's corrections, leave float32."""
SCOPES = ("network", "stem")
"""Whose activations are scaled: all, or those that the stem writes."""


@dataclass(frozen=True)
class EqualizeSettings:
    """`quant.equalize` of the config, whose reference says what each means."""

    shift: bool = False
    iters: int = 0
    lr: float = 0.05
    scope: str = "network"


@torch.no_grad()
def shift_to_floors(model: QuantResNet, images: Tensor, batch_size: int) -> int:
    """Shift channels, in place, by what their values in the float network never fall below.

    A max pooling leaves many of a stem's channels such floors, up to a quarter of their range, and with
    them as many levels unused. Behind an addition or a convolution without pooling there is hardly one.

    Args:
        images: calibration images ``[N, 3, H, W]``, normalised, on any device.
        batch_size: images run at once.

    Returns:
        How many channels were shifted.
    """
    device = next(model.buffers()).device
    found = [junction for junction in junctions(model) if junction.can_shift]
    seen: dict[FakeQuantize, list[Tensor]] = {q: [] for junction in found for q, _ in junction.readings}

    def look(seen_here: list[Tensor], x: Tensor) -> None:
        values = x.transpose(0, 1).flatten(1)
        # not by kthvalue: releases of torch refuse it on CUDA where only deterministic algorithms may run
        lowest = values.topk(1 + int(BELOW * values.shape[1]), largest=False)
        seen_here.append(lowest.values[:, -1])

    with full_precision(model), watching({q: partial(look, floors) for q, floors in seen.items()}):
        for batch in images.split(batch_size):
            model(batch.to(device))
    shifted = 0
    for junction in found:
        floors = torch.stack([torch.stack(seen[q]).mean(0) for q, _ in junction.readings]).amin(0)
        shift(junction, floors)
        shifted += int((floors > 0).sum())
    return shifted


@dataclass(frozen=True)
class Stage:
    """Parts of the network that identity shortcuts join, and the part that reads them.

    Attributes:
        name: of the first and the last block.
        parts: the blocks, before the first ones the stem.
        reader: the block behind them, or the classifier.
    """

    name: str
    parts: list[nn.Module]
    reader: nn.Module


def stages(model: QuantResNet) -> list[Stage]:
    """The network's blocks, split before each projection."""
    blocks = list(zip(model.block_names, model.blocks, strict=True))
    starts = [
        number
        for number, block in enumerate(model.blocks)
        if number and isinstance(block, QuantResidualBlock) and isinstance(block.shortcut, QuantLayer)
    ]
    found = []
    for start, end in pairwise([0, *starts, len(blocks)]):
        names, parts = zip(*blocks[start:end], strict=True)
        before = [] if start else [model.stem]
        reader = model.blocks[end] if end < len(blocks) else model.classifier
        found.append(Stage(f"{names[0]} to {names[-1]}", [*before, *parts], reader))
    return found


def scaled_junctions(model: QuantResNet, scope: str) -> list[Junction]:
    """The junctions in a scope: all, or the one that the stem writes to, if scaling it pays."""
    return [j for j in junctions(model) if scope == "network" or model.stem.conv1 in j.writers]


def settle_ranges(model: QuantResNet, scope: str) -> None:
    """Let reconstruction leave the ranges of what is read outside of its own unit as they are.

    A unit would learn for its own output what equalization learns for those who read it.
    """
    scaled = {
        quantizer for junction in scaled_junctions(model, scope) for quantizer, _ in junction.readings
    }
    joins = [block.join for block in model.blocks if isinstance(block, QuantResidualBlock)]
    for part in (model.stem, *joins):
        quantizer = part.output_quantizer
        if isinstance(quantizer, FakeQuantize) and quantizer in scaled:
            part.output_quantizer = quantizer.of_kind(SharedRangeFakeQuantize)


def equalize(
    model: QuantResNet,
    images: Tensor,
    settings: EqualizeSettings,
    batch_size: int,
    seed: int,
    progress: Progress,
) -> list[tuple[str, float, float]]:
    """Scale channels, in place, stage by stage in the float network.

    Activations' ranges must be calibrated before, and weights' afterwards.

    Args:
        images: calibration images ``[N, 3, H, W]``, normalised, on any device.
        batch_size: images of a step.
        seed: of the images' order.

    Returns:
        Name of each stage, and the squared error of its reader's output, with the stage's activations
        quantized and nothing else, before and after; the same where learning made it no better, which is
        then left alone.
    """
    device = next(model.buffers()).device
    generator = torch.Generator(device).manual_seed(seed)
    store = Store(device, torch.float16)
    scaled, results = scaled_junctions(model, settings.scope), []
    chosen = torch.randperm(len(images), generator=generator, device=device)[:IMAGES]
    x = images[chosen.to(images.device)].to(device)
    for stage in stages(model):
        inside = {q for part in stage.parts for _, q in quantizers(part, Role.ACTIVATION)}
        here = [junction for junction in scaled if junction.readings[0][0] in inside]
        own, whole = nn.Sequential(*stage.parts), nn.Sequential(*stage.parts, stage.reader)
        with full_precision(whole):
            output = run_batched(own, [x], batch_size, device, store)
            if here:
                target = run_batched(stage.reader, [output], batch_size, device, store)
                task = Task(whole, here, x, target, batch_size)
                start = [log_steps(junction) for junction in here]
                before = task.error(start)
                steps = progress(stage.name, settings.iters)
                learned = learn_steps(task, start, settings, generator, steps)
                after = task.error(learned)
                if after < before:
                    settle(here, learned)
                    output = run_batched(own, [x], batch_size, device, store)  # what is read now
                results.append((stage.name, before, min(before, after)))
        x = output
    return results


@dataclass(frozen=True)
class LogSteps:
    """Logarithms of a junction's step sizes: of a channel and a reading, the sum of both.

    Attributes:
        channels: ``[C]``.
        readings: ``[R]``.
    """

    channels: Tensor
    readings: Tensor

    @property
    def parameters(self) -> list[Tensor]:
        return [self.channels, self.readings]

    def clone(self) -> "LogSteps":
        return LogSteps(*(parameter.clone() for parameter in self.parameters))


def log_steps(junction: Junction) -> LogSteps:
    """A junction's step sizes as they are now, the same for each channel."""
    scales = torch.cat([quantizer.hard_qparams()[0] for quantizer, _ in junction.readings])
    return LogSteps(scales.new_zeros(junction.channels), scales.log())


@dataclass(frozen=True)
class Task:
    """A stage's junctions, and what its reader's output should be.

    Attributes:
        module: the stage and its reader, whose quantizers are off.
        inputs, target: of all images looked at, ``[N, ...]``.
    """

    module: nn.Module
    junctions: list[Junction]
    inputs: Tensor
    target: Tensor
    batch_size: int

    def loss(self, rows: Tensor | slice, steps: list[LogSteps]) -> Tensor:
        """Error of the reader's output on some images, with activations quantized by channel."""
        x, wanted = (values[rows].float() for values in (self.inputs, self.target))
        with quantizing_by_channel(self.junctions, steps):
            return reconstruction_loss(self.module(x), wanted)

    @torch.no_grad()
    def error(self, steps: list[LogSteps]) -> float:
        """The loss over all images."""
        total = 0.0
        for start in range(0, len(self.target), self.batch_size):
            rows = slice(start, min(start + self.batch_size, len(self.target)))
            total += float(self.loss(rows, steps)) * (rows.stop - start)
        return total / len(self.target)


def quantizing_by_channel(junctions: list[Junction], steps: list[LogSteps]) -> AbstractContextManager[None]:
    """Inside, the junctions' activations, whose quantizers are off, have a step size for each channel."""

    def quantize(
        steps: LogSteps, place: int, module: FakeQuantize, _inputs: tuple[Tensor, ...], x: Tensor
    ) -> Tensor:
        scale = broadcastable((steps.channels + steps.readings[place]).exp(), x.ndim, 1)
        _, zero_point = module.hard_qparams()
        return fake_quantize_affine(x, scale, zero_point, module.quant_min, module.quant_max)

    return hooked(
        {
            quantizer: partial(quantize, own, place)
            for junction, own in zip(junctions, steps, strict=True)
            for place, (quantizer, _) in enumerate(junction.readings)
        }
    )


@torch.enable_grad()
def learn_steps(
    task: Task,
    start: list[LogSteps],
    settings: EqualizeSettings,
    generator: torch.Generator,
    numbers: Iterable[int],
) -> list[LogSteps]:
    """The step sizes that serve the reader best, found by Adam from a start.

    Args:
        numbers: of the optimisation steps.
    """
    learned = [steps.clone() for steps in start]
    parameters = [parameter for steps in learned for parameter in steps.parameters]
    order = batch_order(len(task.target), task.batch_size, settings.iters, generator)
    highest = min(settings.lr, HIGHEST_LR)
    optimizer = torch.optim.Adam(parameters, highest)
    with learning(parameters):
        for number in numbers:
            optimizer.zero_grad()
            task.loss(order[number], learned).backward()
            optimizer.param_groups[0]["lr"] = highest * cosine(number, settings.iters)
            optimizer.step()
    return learned


def settle(junctions: list[Junction], steps: list[LogSteps]) -> None:
    """Scale channels so that one step size for each activation is each channel's own."""
    for junction, learned in zip(junctions, steps, strict=True):
        mean = learned.channels.mean()
        rescale(junction, (learned.channels - mean).exp())
        for (quantizer, _), step in zip(junction.readings, (learned.readings + mean).exp(), strict=True):
            quantizer.scale.data = step.view(1)
