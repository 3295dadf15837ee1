"""Equalization, learned: a step size for each channel of an activation, chosen by what reads it.

What an activation's own error says of its channels is not what the block that reads them says. Of a real
ResNet-50 with its stem's output alone at 4 bits, KL to the float network is 0.10 with the range that suits
the output itself, 0.085 with channels scaled to like ranges, and 0.05 with a step size for each channel,
learned for the output of the first block. A writer takes such step sizes into its weight's channels, which
have step sizes of their own, and a reader into what it multiplies them by (`model/equalize.py`), as learned
equivalent transformations do (OmniQuant, Shao et al., ICLR 2024, section 3.3).
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from calibquant.model.equalize import Junction, junctions, rescale
from calibquant.model.quant_resnet import QuantResNet, Unit
from calibquant.quantization.affine import broadcastable, fake_quantize_affine
from calibquant.quantization.fake_quant import FakeQuantize, Role
from calibquant.quantization.state import full_precision, quantizers
from calibquant.solver.caches import Store, run_batched
from calibquant.solver.learn import Progress, batch_order, cosine, learning, reconstruction_loss

IMAGES = 256
"""Images that are looked at: a step size for each channel needs no more."""


@dataclass(frozen=True)
class EqualizeSettings:
    """`quant.equalize` of the config, whose reference says what each means."""

    iters: int = 0
    lr: float = 0.05


def settle_ranges(model: QuantResNet) -> None:
    """Let reconstruction leave the range of what is read outside of its own unit as it is.

    The stem alone would learn for its own output what equalization learns for its reader.
    """
    if any(junction.quantizer is model.stem.output_quantizer for junction in junctions(model)):
        model.stem.output_quantizer = model.stem.output_quantizer.hardened()


def equalize(
    model: QuantResNet,
    images: Tensor,
    settings: EqualizeSettings,
    batch_size: int,
    seed: int,
    progress: Progress,
) -> list[tuple[str, float, float]]:
    """Scale channels, in place, block by block in the float network.

    Activations' ranges must be calibrated before, and weights' afterwards.

    Args:
        images: calibration images ``[N, 3, H, W]``, normalised, on any device.
        batch_size: images of a step.
        seed: of the images' order.

    Returns:
        Name of each unit, and its output's squared error, with only the activations between its layers
        quantized, before and after; the same where learning made it no better, which is then left alone.
    """
    device = next(model.buffers()).device
    generator = torch.Generator(device).manual_seed(seed)
    store = Store(device, torch.float16)
    found, results = junctions(model), []
    chosen = torch.randperm(len(images), generator=generator, device=device)[:IMAGES]
    x = images[chosen.to(images.device)]
    for unit in units_of(model, found):
        inside = [quantizer for _, quantizer in quantizers(unit.module, Role.ACTIVATION)]
        here = [junction for junction in found if junction.quantizer in inside]
        with full_precision(unit.module):
            target = run_batched(unit.module, [x], batch_size, device, store)
            if here:
                task = Task(unit.module, here, x, target, batch_size)
                calibrated = [log_steps(junction) for junction in here]
                before = task.error(calibrated)
                learned = learn_steps(
                    task, calibrated, settings, generator, progress(unit.name, settings.iters)
                )
                after = task.error(learned)
                if after < before:
                    settle(here, learned)
                results.append((unit.name, before, min(before, after)))
        x = target
    return results


def units_of(model: QuantResNet, found: list[Junction]) -> list[Unit]:
    """The blocks, the first one together with the stem where channels are scaled between the two."""
    with_stem = any(junction.writer is model.stem.conv1 for junction in found)
    return model.units("block", model.block_names[:1] if with_stem else [])[:-1]


@dataclass(frozen=True)
class Task:
    """A unit's junctions, and what its output should be.

    Attributes:
        module: the unit's, whose quantizers are off.
        inputs, target: of all images looked at, ``[N, ...]``.
    """

    module: nn.Module
    junctions: list[Junction]
    inputs: Tensor
    target: Tensor
    batch_size: int

    def loss(self, rows: Tensor | slice, steps: list[Tensor]) -> Tensor:
        """Error of the unit's output on some images, with activations quantized by channel.

        Args:
            steps: logarithms of the step sizes, ``[C]`` for each junction.
        """
        device = steps[0].device
        x, wanted = (values[rows].to(device, torch.float32) for values in (self.inputs, self.target))
        with quantizing_by_channel(self.junctions, steps):
            return reconstruction_loss(self.module(x), wanted)

    @torch.no_grad()
    def error(self, steps: list[Tensor]) -> float:
        """The loss over all images."""
        total = 0.0
        for start in range(0, len(self.target), self.batch_size):
            rows = slice(start, min(start + self.batch_size, len(self.target)))
            total += float(self.loss(rows, steps)) * (rows.stop - start)
        return total / len(self.target)


@contextmanager
def quantizing_by_channel(junctions: list[Junction], steps: list[Tensor]) -> Iterator[None]:
    """Inside, the junctions' activations, whose quantizers are off, have a step size for each channel."""

    def quantize(log_step: Tensor, module: FakeQuantize, _inputs: tuple[Tensor, ...], x: Tensor) -> Tensor:
        scale = broadcastable(log_step.exp(), x.ndim, 1)
        _, zero_point = module.hard_qparams()
        return fake_quantize_affine(x, scale, zero_point, module.quant_min, module.quant_max)

    hooks = [
        junction.quantizer.register_forward_hook(partial(quantize, log_step))
        for junction, log_step in zip(junctions, steps, strict=True)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def log_steps(junction: Junction) -> Tensor:
    """Logarithms of a junction's step sizes as they are now, the same for each channel, ``[C]``."""
    scale, _ = junction.quantizer.hard_qparams()
    return scale.log().repeat(len(junction.writer.bias))


@torch.enable_grad()
def learn_steps(
    task: Task,
    start: list[Tensor],
    settings: EqualizeSettings,
    generator: torch.Generator,
    steps: Iterable[int],
) -> list[Tensor]:
    """Logarithms of the step sizes that serve the unit's output best, found by Adam from a start."""
    learned = [log_step.clone() for log_step in start]
    order = batch_order(len(task.target), task.batch_size, settings.iters, generator)
    optimizer = torch.optim.Adam(learned, settings.lr)
    order = order.to(task.target.device)
    with learning(learned):
        for number in steps:
            optimizer.zero_grad()
            task.loss(order[number], learned).backward()
            optimizer.param_groups[0]["lr"] = settings.lr * cosine(number, settings.iters)
            optimizer.step()
    return learned


def settle(junctions: list[Junction], log_steps: list[Tensor]) -> None:
    """Scale each junction's channels so that one step size, their geometric mean, is each channel's own."""
    for junction, log_step in zip(junctions, log_steps, strict=True):
        mean = log_step.mean()
        rescale(junction, (log_step - mean).exp())
        junction.quantizer.scale.data = mean.exp().view(1)
