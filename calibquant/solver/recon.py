"""Block-wise reconstruction: AdaRound's rounding and LSQ's steps learned under QDrop's dropping.

Unit by unit, in dataflow order, the quantized unit learns to give the float unit's output when its
own input is what the already quantized part of the network really gives it (BRECQ, Li et al. 2021;
QDrop, Wei et al. 2022). Activations of all calibration images are carried from unit to unit, so the
network is never re-run. No I/O happens here.
"""

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calibquant.model.quant_layer import harden, layers
from calibquant.model.quant_resnet import QuantResNet, Unit
from calibquant.quantization.affine import rounding_regularizer
from calibquant.quantization.fake_quant import AdaRoundFakeQuantize, Drop, FakeQuantize, IntegerWeight
from calibquant.quantization.state import dropping, full_precision, quantizers

CONVERGED = 0.01
"""A soft rounding this near to 0 or 1 counts as decided."""
TRACE_POINTS = 50
"""Losses kept for each unit's curve."""


@dataclass(frozen=True)
class ReconSettings:
    """`quant.recon` of the config, whose reference says what each means."""

    batch_size: int = 32
    scale_lr: float = 4.0e-5
    round_lr: float = 1.0e-3
    warm_up: float = 0.2
    weight: float = 0.01
    iters: int = 20000
    b_range: tuple[float, float] = (20, 2)
    keep_gpu: bool = True
    round_mode: str = "learned_hard_sigmoid"
    drop_prob: float = 0.5
    granularity: str = "block"


@dataclass(frozen=True)
class TracePoint:
    """Losses at one step: of the reconstruction, and the weighted rounding regulariser."""

    step: int
    reconstruction: float
    rounding: float


@dataclass
class UnitResult:
    """What reconstruction did to one unit.

    Attributes:
        error_before, error_after: squared error of the unit's output against the float network's,
            summed over channels and averaged over the rest, on all calibration images: with
            calibrated ranges and nearest rounding, and hardened.
        unconverged: share of weights whose soft rounding was not yet near 0 or 1 at the end.
        rounded_away: share of weights that did not go to their nearest grid point.
        reverted: learning made the unit worse or diverged, so that it was kept as calibrated.
    """

    name: str
    error_before: float
    error_after: float = math.nan
    seconds: float = 0.0
    unconverged: float = 0.0
    rounded_away: float = 0.0
    reverted: bool = False
    trace: list[TracePoint] = field(default_factory=list)


Progress = Callable[[str, int], Iterable[int]]
"""Turns a unit's name and its number of steps into the steps, showing progress on the way."""


def plain_steps(name: str, iters: int) -> Iterable[int]:
    """Steps without any display."""
    return range(iters)


class Memory:
    """What outlives a killed run: this one keeps nothing; see ``resume.py`` for one on disk."""

    def recall(self, unit: Unit) -> UnitResult | None:
        """Put a unit that was finished earlier into its final state, if there is one."""
        return None

    def remember(self, unit: Unit, result: UnitResult) -> None:
        """Keep a unit that has just been finished."""


class Activations:
    """Named activations of all calibration images, ``[N, ...]`` each, of both networks."""

    def __init__(self, images: Tensor) -> None:
        self.full = {"x": images}
        self.quantized = {"x": images}

    def read(self, unit: Unit) -> tuple[list[Tensor], list[Tensor]]:
        """The unit's inputs: ``(quantized, full precision)``."""
        return [self.quantized[n] for n in unit.reads], [self.full[n] for n in unit.reads]

    def write(self, unit: Unit, quantized: Tensor, full: Tensor, still_read: set[str]) -> None:
        """Store the unit's output and free whatever no later unit reads."""
        self.quantized[unit.writes], self.full[unit.writes] = quantized, full
        for name in self.full.keys() - still_read:
            del self.quantized[name], self.full[name]


@dataclass(frozen=True)
class UnitData:
    """What a unit learns from, for all calibration images, ``[N, ...]`` each.

    Attributes:
        quantized, full: its inputs in the quantized and in the float network.
        target: the float unit's output.
    """

    quantized: list[Tensor]
    full: list[Tensor]
    target: Tensor


def reconstruct(
    model: QuantResNet,
    images: Tensor,
    settings: ReconSettings,
    seed: int,
    progress: Progress = plain_steps,
    memory: Memory | None = None,
) -> Iterator[UnitResult]:
    """Reconstruct and harden every unit of a calibrated model in place, yielding after each.

    Args:
        model: quantized network with calibrated ranges, on the device to work on.
        images: calibration images ``[N, 3, H, W]``, normalised, on any device.
        seed: of the batches' order and of dropping; each unit's draws depend on it and its place alone.
        memory: units finished by an earlier run are recalled from it instead of learned again.
    """
    memory = memory or Memory()
    device = next(model.buffers()).device
    store = device if settings.keep_gpu else torch.device("cpu")
    activations = Activations(images.to(store))
    units = model.units(settings.granularity)
    for index, unit in enumerate(units):
        started = time.perf_counter()
        data = unit_data(unit, activations, settings, device)
        result = memory.recall(unit)
        if result is None:
            generator = torch.Generator(device).manual_seed(seed * 10_007 + index)
            result, output = reconstruct_unit(unit, data, settings, generator, progress)
            result.seconds = time.perf_counter() - started
            memory.remember(unit, result)
        else:
            output = run_batched(unit.module, data.quantized, settings.batch_size, device)
        still_read = _names_read_before_written(units[index + 1 :])
        activations.write(unit, output, data.target, still_read)
        del data, output
        yield result


def unit_data(
    unit: Unit, activations: Activations, settings: ReconSettings, device: torch.device
) -> UnitData:
    """What a unit learns from, given the activations carried so far."""
    quantized, full = activations.read(unit)
    with full_precision(unit.module):
        target = run_batched(unit.module, full, settings.batch_size, device)
    return UnitData(quantized, full, target)


def reconstruct_unit(
    unit: Unit,
    data: UnitData,
    settings: ReconSettings,
    generator: torch.Generator,
    progress: Progress,
) -> tuple[UnitResult, Tensor]:
    """Learn and harden one unit; where that is no better than its calibrated state, harden that.

    Returns:
        What it did, and the hardened unit's output for all images.
    """

    def output() -> Tensor:
        return run_batched(unit.module, data.quantized, settings.batch_size, generator.device)

    before = output_error(output(), data.target, settings.batch_size)
    calibrated = copy.deepcopy(unit.module)
    result = UnitResult(unit.name, before, error_after=math.inf)
    result.trace, result.unconverged = learn_unit(unit, data, settings, generator, progress)
    if learned_is_finite(unit.module):
        result.rounded_away = rounded_away(unit.module)
        harden(unit.module)
        hardened = output()
        result.error_after = output_error(hardened, data.target, settings.batch_size)
    if not result.error_after <= before:  # NaN is worse, too
        vars(unit.module).update(vars(calibrated))  # all of the module's state, taken back
        harden(unit.module)
        hardened = data.target.new_empty(0)  # lets go of the worse output before the next is made
        hardened = output()
        result.error_after, result.rounded_away, result.reverted = before, 0.0, True
    return result, hardened


def learned_is_finite(module: nn.Module) -> bool:
    """Whether everything learned in a module is a number: step sizes, zero-points, rounding logits."""
    return all(bool(torch.isfinite(parameter).all()) for parameter in module.parameters())


def _names_read_before_written(units: list[Unit]) -> set[str]:
    """Names whose present value some later unit reads."""
    live: set[str] = set()
    for unit in reversed(units):
        live = (live - {unit.writes}) | set(unit.reads)
    return live


@torch.no_grad()
def run_batched(module: nn.Module, inputs: list[Tensor], batch: int, device: torch.device) -> Tensor:
    """Output of a module for all images, in batches, stored where the inputs are stored."""
    result: Tensor | None = None
    for start in range(0, len(inputs[0]), batch):
        rows = slice(start, start + batch)
        out = module(*(x[rows].to(device, non_blocking=True) for x in inputs))
        if result is None:
            result = torch.empty((len(inputs[0]), *out.shape[1:]), device=inputs[0].device)
        result[rows] = out
    assert result is not None
    return result


@torch.no_grad()
def output_error(output: Tensor, target: Tensor, batch: int) -> float:
    """Error of a unit's output for all images."""
    parts = zip(output.split(batch), target.split(batch), strict=True)
    return sum(float(reconstruction_loss(o, t)) * len(o) for o, t in parts) / len(output)


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """Squared error summed over channels (axis 1) and averaged over the rest."""
    total = F.mse_loss(output, target, reduction="sum")
    return total * (output.shape[1] / output.numel())


def regularizer_exponent(step: int, settings: ReconSettings) -> float | None:
    """The regulariser's exponent b at a step: None during warm-up, then linear over `b_range`."""
    begin = settings.warm_up * settings.iters
    if step < begin or settings.iters == begin:
        return None
    start, end = settings.b_range
    return start + (end - start) * (step - begin) / (settings.iters - begin)


def cosine(step: int, steps: int) -> float:
    """Factor of a learning rate that falls from 1 to 0 along half a cosine."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def batch_order(count: int, batch: int, steps: int, generator: torch.Generator) -> Tensor:
    """Image indices ``[steps, batch]``: shuffled passes end to end, so each image is used equally often."""
    batch = min(batch, count)
    passes = math.ceil(steps * batch / count)
    orders = [torch.randperm(count, generator=generator, device=generator.device) for _ in range(passes)]
    return torch.cat(orders)[: steps * batch].view(steps, batch)


@contextmanager
def learning(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Inside, gradients flow into the given parameters, which otherwise never take any."""
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False).grad = None


def learn_unit(
    unit: Unit,
    data: UnitData,
    settings: ReconSettings,
    generator: torch.Generator,
    progress: Progress,
) -> tuple[list[TracePoint], float]:
    """Learn a unit's rounding logits, step sizes and zero-points.

    Returns:
        The losses on the way, and the share of weights whose rounding was undecided at the end.
    """
    steps = settings.iters
    rounding = start_rounding(unit.module, settings) if steps else []
    logits = [q.logits for q in rounding if q.logits is not None]
    qparams = [p for _, q in quantizers(unit.module) for p in q.learned_qparams()]
    if not steps or not (logits or qparams):
        return [], 0.0
    groups = [(logits, settings.round_lr), (qparams, settings.scale_lr)]
    optimizer = torch.optim.Adam([{"params": p, "lr": lr} for p, lr in groups if p], fused=True)
    drop = Drop(settings.drop_prob, generator)
    order = batch_order(len(data.target), settings.batch_size, steps, generator).to(data.target.device)
    device = generator.device
    curve: list[tuple[int, Tensor, Tensor]] = []
    with dropping(unit.module, drop), learning(logits + qparams):
        for step in progress(unit.name, steps):
            rows = order[step]
            pairs = zip(data.quantized, data.full, strict=True)
            inputs = [mixed_input(quantized, full, rows, drop, device) for quantized, full in pairs]
            wanted = data.target[rows].to(device, non_blocking=True)
            error = reconstruction_loss(unit.module(*inputs), wanted)
            penalty = rounding_penalty(rounding, step, settings)
            optimizer.zero_grad(set_to_none=True)
            (error if penalty is None else error + penalty).backward()
            if qparams:
                optimizer.param_groups[-1]["lr"] = settings.scale_lr * cosine(step, steps)
            optimizer.step()
            if step % max(1, steps // TRACE_POINTS) == 0 or step == steps - 1:
                if not math.isfinite(float(error.detach())):
                    break  # diverged: the unit's error will show it
                curve.append(
                    (step, error.detach(), error.new_zeros(()) if penalty is None else penalty.detach())
                )
    return [TracePoint(step, float(e), float(p)) for step, e, p in curve], unconverged(rounding)


def start_rounding(module: nn.Module, settings: ReconSettings) -> list[AdaRoundFakeQuantize]:
    """Make rounding logits for the weights whose rounding is to be learned."""
    if settings.round_mode == "nearest":
        return []
    rounding = []
    for _, layer in layers(module):
        if isinstance(layer.weight_quantizer, AdaRoundFakeQuantize):
            layer.weight_quantizer.start_rounding(layer.weight)
            rounding.append(layer.weight_quantizer)
    return rounding


def mixed_input(quantized: Tensor, full: Tensor, rows: Tensor, drop: Drop, device: torch.device) -> Tensor:
    """A batch of a unit's input, each element quantized with chance `drop_prob`, else float (QDrop)."""
    batch = quantized[rows].to(device, non_blocking=True)
    mask = None if quantized is full else drop.mask_for(batch)
    if mask is None:
        return batch
    return torch.where(mask, batch, full[rows].to(device, non_blocking=True))


def rounding_penalty(
    rounding: list[AdaRoundFakeQuantize], step: int, settings: ReconSettings
) -> Tensor | None:
    """The weighted rounding regulariser at a step, None where it does not act."""
    exponent = regularizer_exponent(step, settings)
    if exponent is None or not rounding or settings.weight == 0:
        return None
    terms = [rounding_regularizer(q.soft_rounding(), exponent) for q in rounding]
    return settings.weight * torch.stack(terms).sum()


@torch.no_grad()
def unconverged(rounding: list[AdaRoundFakeQuantize]) -> float:
    """Share of weights whose soft rounding is farther than 0.01 from both 0 and 1."""
    soft = [q.soft_rounding() for q in rounding]
    undecided = sum(int(((h > CONVERGED) & (h < 1 - CONVERGED)).sum()) for h in soft)
    return undecided / max(1, sum(h.numel() for h in soft))


@torch.no_grad()
def rounded_away(module: nn.Module) -> float:
    """Share of a unit's weights whose integer is not the nearest one."""
    moved = total = 0
    for _, layer in layers(module):
        quantizer = layer.weight_quantizer
        assert not isinstance(quantizer, IntegerWeight)
        nearest = FakeQuantize.codes(quantizer, layer.weight)
        moved += int((quantizer.codes(layer.weight) != nearest).sum())
        total += layer.weight.numel()
    return moved / total
