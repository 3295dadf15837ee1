"""Learning one unit: AdaRound's rounding and LSQ's step sizes under QDrop's dropping.

All that a step needs lives on the device: schedules are tables, the step's number a tensor, random
bytes and losses have their places. A step therefore neither waits for the host nor, once captured,
allocates anything; `fast.py` compiles and captures what stands here, and nothing in this file
depends on whether it did.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calibquant.model.quant_layer import layers
from calibquant.model.quant_resnet import Unit
from calibquant.quantization.drop import Draws, Drop
from calibquant.quantization.fake_quant import AdaRoundFakeQuantize, Role
from calibquant.quantization.rounding import ROUNDINGS, Rounding
from calibquant.quantization.state import dropping, quantizer_inputs, quantizers
from calibquant.solver.caches import Batches, UnitData, batches_of
from calibquant.solver.peers import Peers

FAN_IN = 1024
"""Inputs to an output for which `round_lr` is the rate of weights learned straight through.

For others it goes with the root of their number: the fewer they are, the more does one that moves change
the output. In a real ResNet-50's layer1.0 (64 and 576 inputs) the rate that suits its layer3 does harm.
"""
WIDEST = 2.0
"""Factor, and its inverse, by which a weight's step size may change at most while it is learned. All of a
layer move at one rate: without bounds a channel of small weights ends at a step size of zero."""
TRACE_POINTS = 50
"""Losses kept for each unit's curve."""

Progress = Callable[[str, int], Iterable[int]]
"""Turns a unit's name and its number of steps into the steps, showing progress on the way."""


def plain_steps(name: str, iters: int) -> Iterable[int]:
    """Steps without any display."""
    return range(iters)


@dataclass(frozen=True)
class DistilSettings:
    """`quant.distil` of the config, whose reference says what each means."""

    after: tuple[str, ...] = ()
    iters: int = 200
    lr: float = 1.0e-3
    round_lr: float = 0.0


@dataclass(frozen=True)
class ReconSettings:
    """`quant.recon` of the config, whose reference says what each means, and `quant.distil`."""

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
    precision: str = "tf32"
    cache: str = "fp16"
    compile: str = "auto"
    compensate: bool = False
    weight_scale_lr: float = 0.0
    ranges: str = "float"
    merge: tuple[str, ...] = ()
    views: int = 1
    held_out: float = 0.0
    distil: DistilSettings = DistilSettings()

    @property
    def rounding(self) -> type[Rounding] | None:
        """How rounding is learned, None where it is to nearest."""
        return ROUNDINGS.get(self.round_mode)


@dataclass(frozen=True)
class TracePoint:
    """Losses at one step: of the reconstruction, and the weighted rounding regulariser."""

    step: int
    reconstruction: float
    rounding: float


Loss = Callable[[Tensor, Tensor], Tensor]
"""Of a module's output against its target, ``[]``."""


@dataclass(frozen=True)
class Problem:
    """What a unit's steps are about; the same tensors in every step.

    Attributes:
        mixing: where elements of each input are dropped, None where none are.
        rounding: of the unit's weights, where it is learned.
        narrow: convolutions run in bfloat16.
        loss: of the module's output against the target.
    """

    module: nn.Module
    batches: Batches
    mixing: list[Drop | None]
    rounding: list[Rounding]
    narrow: bool
    loss: Loss


Objective = Callable[[Problem, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""See :func:`objective`."""


class Engine:
    """How steps are run: this one as they are written; see ``fast.py`` for a faster one."""

    def objective(self, problem: Problem, work: float, device: torch.device) -> Objective:
        """The objective in the form that a step calls; ``work``: elements of the output, over all steps."""
        return objective

    def optimizer(self, groups: list[dict[str, Any]], device: torch.device) -> torch.optim.Optimizer:
        """Adam for groups of parameters, each with a learning rate: a number, or a tensor that changes."""
        return torch.optim.Adam(groups, fused=True, capturable=device.type == "cuda")

    def step(self, step: Callable[[], None], generator: torch.Generator) -> Callable[[], None]:
        """The step in the form that the loop calls."""
        return step


@dataclass(frozen=True)
class Loop:
    """How steps are taken, whatever they learn: their draws, what shows and runs them, and with whom."""

    generator: torch.Generator
    progress: Progress
    engine: Engine
    peers: Peers


@dataclass(frozen=True)
class Learned:
    """What steps move.

    Attributes:
        falling: tensors whose rate falls along half a cosine, in groups, each with where it begins.
        staying: tensors that keep the rate `round_lr`.
        widths: step sizes of weights among them, which stay within :data:`WIDEST`.
        rounding: of weights, where it is learned.
    """

    falling: list[tuple[Sequence[Tensor], float]]
    staying: list[Tensor] = field(default_factory=list)
    widths: list[Tensor] = field(default_factory=list)
    rounding: list[Rounding] = field(default_factory=list)

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.staying, *(tensor for some, _ in self.falling for tensor in some)]


def learn_unit(
    unit: Unit, data: UnitData, settings: ReconSettings, loop: Loop
) -> tuple[list[TracePoint], float]:
    """Learn a unit's rounding of weights, step sizes and zero-points.

    Returns:
        The losses on the way, and the share of weights whose rounding was undecided at the end.
    """
    learned = start_learning(unit.module, settings) if settings.iters else Learned([])
    if not learned.tensors:
        return [], 0.0
    trace = take_steps(unit, learned, data, settings, reconstruction_loss, data.target[0].numel(), loop)
    return trace, unconverged(learned.rounding)


def start_learning(module: nn.Module, settings: ReconSettings) -> Learned:
    """What is learned of a unit.

    Where `weight_scale_lr` is set, weights' step sizes are learned as well, under integers that do not
    follow them (Genie-M, Jeon et al., CVPR 2023, section 3.3).
    """
    rounding_of = start_rounding(module, settings)
    rounding = list(rounding_of.values())
    qparams = [p for _, q in quantizers(module) for p in q.learned_qparams()]
    falling: list[tuple[Sequence[Tensor], float]] = [(qparams, settings.scale_lr)] if qparams else []
    falling += [([r.learned], weight_rate(r, settings.round_lr)) for r in rounding if r.rate_falls]
    widths = [q.scale for q in rounding_of] if settings.weight_scale_lr else []
    falling += [([width], settings.weight_scale_lr * float(width.mean())) for width in widths]
    return Learned(falling, [r.learned for r in rounding if not r.rate_falls], widths, rounding)


def weight_rate(rounding: Rounding, rate: float) -> float:
    """Learning rate of weights that are learned straight through, by how many an output has."""
    return rate * math.sqrt(rounding.fan_in / FAN_IN)


def take_steps(
    unit: Unit,
    learned: Learned,
    data: UnitData,
    settings: ReconSettings,
    loss: Loss,
    elements: int,
    loop: Loop,
) -> list[TracePoint]:
    """Learn by the unit's output on batches of its data; returns the losses on the way.

    Args:
        elements: that a step computes for each image, by which it is judged whether compiling pays.
    """
    generator, engine, peers = loop.generator, loop.engine, loop.peers
    device = generator.device
    order = batch_order(len(data.target), settings.batch_size, settings.iters, generator)
    batches = batches_of(data, order, device)
    mixing, inside, draws = places_to_drop(unit, batches, settings.drop_prob, generator)
    work = float(elements * batches.batch_size * settings.iters)
    narrow = settings.precision == "bf16" and bfloat16_pays(device)
    problem = Problem(unit.module, batches, mixing, learned.rounding, narrow, loss)
    losses_of = engine.objective(problem, work, device)
    table = schedule(settings).to(device)
    moved, staying = learned.tensors, learned.staying
    constant: list[dict[str, Any]] = [{"params": staying, "lr": settings.round_lr}] if staying else []
    falling: list[dict[str, Any]] = [
        {"params": some, "lr": torch.tensor(lr, device=device), "initial_lr": lr}
        for some, lr in learned.falling
    ]
    optimizer = engine.optimizer([*constant, *falling], device)
    bounded = [(width.detach(), width / WIDEST, width * WIDEST) for width in learned.widths]
    counter = torch.zeros(1, dtype=torch.int64, device=device)
    trace = torch.zeros(settings.iters, 2, device=device)

    def one_step() -> None:
        optimizer.zero_grad(set_to_none=True)
        draws.refill()
        exponent, weight, factor = table.index_select(0, counter).view(-1).unbind()
        error, penalty = losses_of(problem, batches.rows(counter), exponent, weight)
        (error + penalty).backward()
        peers.average([p.grad for p in moved if p.grad is not None])
        for group in falling:
            torch.mul(factor, group["initial_lr"], out=group["lr"])
        optimizer.step()
        for width, least, most in bounded:
            width.clamp_(least, most)
        trace.index_copy_(0, counter, torch.stack((error.detach(), penalty.detach()))[None])
        counter.add_(1)

    points, done = trace_points(settings.iters), 0
    with dropping(unit.module, inside), learning(moved), batches:
        step = engine.step(one_step, generator)
        for number in loop.progress(unit.name, settings.iters):
            batches.stage(number)
            step()
            done = number + 1
            if number in points and not math.isfinite(peers.mean(float(trace[number, 0]), 1)):
                break  # diverged: the unit's error will show it
    peers.average([trace])
    losses = trace[:done].cpu()
    finite = [n for n in points if n < done and bool(torch.isfinite(losses[n]).all())]
    return [TracePoint(n, *losses[n].tolist()) for n in finite]


def objective(problem: Problem, rows: Tensor, exponent: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """What a step differentiates.

    Args:
        rows: of the batches, ``[batch]``.
        exponent, weight: of the rounding penalty, ``[]``.

    Returns:
        The unit's error on a batch, and the weighted rounding penalty.
    """
    batches = problem.batches
    pairs = zip(batches.quantized, batches.full, problem.mixing, strict=True)
    inputs = [mixed_input(quantized, full, rows, drop) for quantized, full, drop in pairs]
    with torch.autocast(rows.device.type, torch.bfloat16, enabled=problem.narrow):
        output = problem.module(*inputs)
    error = problem.loss(output.float(), batches.target[rows].float())
    penalty = error.new_zeros(())
    for each in problem.rounding:
        penalty = penalty + each.penalty(exponent)
    return error, weight * penalty


def bfloat16_pays(device: torch.device) -> bool:
    """Whether convolutions are faster in bfloat16: on a CPU, where it has instructions for them.

    With AVX-512 alone bfloat16 takes twice the time of float32 (measured).
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(bfloat16_instructions())


def bfloat16_instructions() -> list[str]:
    """What the CPU multiplies bfloat16 with: matrix units (AMX), vectors (AVX512-BF16), or nothing."""
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return [name for name in ("amx_bf16", "avx512_bf16") if capabilities.get(name, False)]


def mixed_input(quantized: Tensor, full: Tensor, rows: Tensor, drop: Drop | None) -> Tensor:
    """A batch of a unit's input, each element quantized with chance `drop_prob`, else float (QDrop)."""
    batch = quantized[rows].float()
    return batch if drop is None else torch.where(drop.mask(), batch, full[rows].float())


def places_to_drop(
    unit: Unit, batches: Batches, drop_prob: float, generator: torch.Generator
) -> tuple[list[Drop | None], list[Drop | None], Draws]:
    """Where elements are dropped: at inputs that differ between the networks, and at quantizers.

    Returns:
        A drop for each input and for each activation quantizer, None where all stay quantized, and
        the random bytes that they share.
    """
    if drop_prob >= 1.0:
        sites = quantizers(unit.module, Role.ACTIVATION)
        return [None for _ in batches.quantized], [None for _ in sites], Draws([], drop_prob, generator)
    rows = torch.zeros(batches.batch_size, dtype=torch.int64, device=batches.target.device)
    inputs = [quantized[rows].float() for quantized in batches.quantized]
    differ = [q is not f for q, f in zip(batches.quantized, batches.full, strict=True)]
    mixed = [x for x, differs in zip(inputs, differ, strict=True) if differs]
    draws = Draws([*mixed, *quantizer_inputs(unit.module, inputs)], drop_prob, generator)
    drops = iter(draws.drops)
    return [next(drops) if differs else None for differs in differ], list(drops), draws


def schedule(settings: ReconSettings) -> Tensor:
    """What changes with the step, ``[steps, 3]``.

    The regulariser's exponent, its weight, and the factor of the learning rates that fall.
    """
    lines = []
    for step in range(settings.iters):
        exponent = regularizer_exponent(step, settings)
        weight = 0.0 if exponent is None else settings.weight
        factor = cosine(step, settings.iters)
        lines.append((settings.b_range[0] if exponent is None else exponent, weight, factor))
    return torch.tensor(lines)


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


def trace_points(steps: int) -> list[int]:
    """Steps whose losses are kept: evenly spread, and the last."""
    return sorted({*range(0, steps, max(1, steps // TRACE_POINTS)), steps - 1})


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """Squared error summed over channels (axis 1) and averaged over the rest."""
    total = F.mse_loss(output, target, reduction="sum")
    return total * (output.shape[1] / output.numel())


def batch_order(count: int, batch: int, steps: int, generator: torch.Generator) -> Tensor:
    """Image indices ``[steps, batch]``: shuffled passes end to end, so each image is used equally often."""
    batch = min(batch, count)
    passes = math.ceil(steps * batch / count)
    orders = [torch.randperm(count, generator=generator, device=generator.device) for _ in range(passes)]
    return torch.cat(orders)[: steps * batch].view(steps, batch)


@contextmanager
def learning(parameters: list[Tensor]) -> Iterator[None]:
    """Inside, gradients flow into the given tensors, which otherwise never take any."""
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False).grad = None


def start_rounding(module: nn.Module, settings: ReconSettings) -> dict[AdaRoundFakeQuantize, Rounding]:
    """Begin to learn the rounding of a module's weights where it can be learned; by their quantizers."""
    if settings.rounding is None:
        return {}
    found = [(layer, layer.weight_quantizer) for _, layer in layers(module)]
    return {
        quantizer: quantizer.start_rounding(layer.weight, settings.rounding)
        for layer, quantizer in found
        if isinstance(quantizer, AdaRoundFakeQuantize)
    }


def unconverged(rounding: Sequence[Rounding]) -> float:
    """Share of weights whose rounding is not yet decided: farther than 0.01 from their grid point."""
    return sum(r.undecided() for r in rounding) / max(1, sum(r.learned.numel() for r in rounding))
