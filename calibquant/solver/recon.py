"""Block-wise reconstruction: AdaRound's rounding and LSQ's steps learned under QDrop's dropping.

Unit by unit, in dataflow order, the quantized unit learns to give the float unit's output when its
own input is what the already quantized part of the network really gives it (BRECQ, Li et al. 2021;
QDrop, Wei et al. 2022). Activations of all calibration images are carried from unit to unit, so the
network is never re-run. How one unit learns stands in `learn.py`.
"""

import copy
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from calibquant.model.quant_layer import harden, layers
from calibquant.model.quant_resnet import QuantClassifier, QuantResNet, Unit
from calibquant.quantization.fake_quant import IntegerWeight
from calibquant.quantization.rounding import StraightThroughRounding
from calibquant.quantization.state import calibrating, full_precision, quantizers
from calibquant.solver.augment import Rows, arrange, rows_of
from calibquant.solver.caches import CACHE_TYPES, Activations, Store, UnitData, live_names, run_batched
from calibquant.solver.compensate import compensate
from calibquant.solver.distil import JUDGED, Chain, distil_units, divergence, learns_after
from calibquant.solver.learn import (
    Engine,
    Loop,
    Loss,
    Progress,
    ReconSettings,
    TracePoint,
    learn_unit,
    plain_steps,
    reconstruction_loss,
)
from calibquant.solver.match import match_classifier
from calibquant.solver.memory import return_freed_memory
from calibquant.solver.peers import Peers

logger = logging.getLogger("calibquant")

BEHIND_UNITS = 500
"""Added to a unit's place, for the draws of what learns after it."""


@dataclass
class UnitResult:
    """What reconstruction did to one unit.

    Attributes:
        error_before, error_start, error_after: squared error of the unit's output against the float
            network's, summed over channels and averaged over the rest, on the calibration images that it
            learned from: with calibrated ranges and nearest rounding, when learning began, and hardened.
            Of a classifier that was matched to its inputs (`match.py`), against the matched one's.
        held_out_before, held_out_after: the same on the images held out, None where there are none.
        distilled: these are units that learned on by the network's output, and errors its divergence from
            the float network's (`distil.py`).
        unconverged: share of weights whose soft rounding was not yet near 0 or 1 at the end.
        moved: share of weights that learning took to another grid point than that at which it began,
            which is the nearest, or compensation's choice.
        reverted: learning made the unit worse or diverged, so that it was kept as it was before.
    """

    name: str
    error_before: float
    error_start: float
    error_after: float = math.nan
    seconds: float = 0.0
    unconverged: float = 0.0
    moved: float = 0.0
    reverted: bool = False
    held_out_before: float | None = None
    held_out_after: float | None = None
    distilled: bool = False
    trace: list[TracePoint] = field(default_factory=list)

    @property
    def measure(self) -> str:
        """What errors are called."""
        return "divergence" if self.distilled else "error"


@dataclass(frozen=True)
class Errors:
    """A unit's error on the images that it learns from, and on those held out, if there are any."""

    learned: float
    held_out: float | None

    def no_worse_than(self, before: "Errors") -> bool:
        """Whether what came to these is to be kept; what diverged is not."""
        return self.deciding <= before.deciding and not math.isinf(self.deciding)

    @property
    def deciding(self) -> float:
        """The one by which a unit's learning is judged."""
        return self.learned if self.held_out is None else self.held_out


class Memory:
    """What outlives a killed run: this one keeps nothing; see ``resume.py`` for one on disk."""

    def recall(self, unit: Unit) -> UnitResult | None:
        """Put a unit that was finished earlier into its final state, if there is one."""
        return None

    def remember(self, unit: Unit, result: UnitResult) -> None:
        """Keep a unit that has just been finished."""


@dataclass(frozen=True)
class Means:
    """What all units share: settings, the working device, where activations live, and how steps run.

    Attributes:
        rows: which of the activations are of the images themselves, of views of them, or held out.
    """

    settings: ReconSettings
    device: torch.device
    store: Store
    rows: Rows
    progress: Progress = plain_steps
    engine: Engine = field(default_factory=Engine)
    peers: Peers = field(default_factory=Peers)

    def loop(self, generator: torch.Generator) -> Loop:
        """How steps are taken, with draws from a generator."""
        return Loop(generator, self.progress, self.engine, self.peers)


def reconstruct(
    model: QuantResNet,
    images: Tensor,
    settings: ReconSettings,
    seed: int,
    progress: Progress = plain_steps,
    memory: Memory | None = None,
    store: Store | None = None,
    engine: Engine | None = None,
    peers: Peers | None = None,
) -> Iterator[UnitResult]:
    """Reconstruct and harden every unit of a calibrated model in place, yielding after each.

    After the units that `quant.distil` names, those finished so far learn on together (`distil.py`).

    Args:
        model: quantized network with calibrated ranges, on the device to work on.
        images: calibration images ``[N, 3, H, W]``, normalised, on any device.
        seed: of the batches' order and of dropping; each unit's draws depend on it and its place alone.
        memory: units finished by an earlier run are recalled from it instead of learned again.
        store: keeps activations of all images; None: as the settings say.
        engine: runs the steps; None: as they are written.
        peers: processes that reconstruct the same units, each from its own images.
    """
    memory = memory or Memory()
    device = next(model.buffers()).device
    store = store or store_for(settings, device)
    rows = rows_of(len(images), settings)
    means = Means(settings, device, store, rows, progress, engine or Engine(), peers or Peers())
    activations = Activations(channels_last(arrange(images, rows, seed + means.peers.rank), store.device))
    units = model.units(settings.granularity, settings.merge)
    return_freed_memory()
    with float32_precision(settings.precision):
        shown = images_and_logits(units, activations.full["x"], means) if settings.distil.after else None
        for index, unit in enumerate(units):
            started = time.perf_counter()
            data = unit_data(unit, activations, means)
            result = memory.recall(unit)
            if result is None:
                if settings.compensate and isinstance(unit.module, QuantClassifier):
                    data = match(unit.module, data, means)
                draws = unit_seed(seed, index, means.peers.rank)
                generator = torch.Generator(device).manual_seed(draws)
                result = reconstruct_unit(unit, data, means, generator)
                result.seconds = time.perf_counter() - started
                memory.remember(unit, result)
            over = activations.place(unit, data.target)
            output = run_batched(unit.module, data.quantized, settings.batch_size, device, store, over)
            done, behind = units[: index + 1], units[index + 1 :]
            learn = learns_after(unit, settings.distil)
            activations.write(unit, output, data.target, live_names(behind) | ({"x"} if learn else set()))
            del data, output, over
            return_freed_memory()
            yield result
            if shown is not None and learn:
                draws = unit_seed(seed, index + BEHIND_UNITS, means.peers.rank)
                generator = torch.Generator(device).manual_seed(draws)
                yield learn_on(done, behind, shown, activations, means, generator, memory)


def images_and_logits(units: list[Unit], images: Tensor, means: Means) -> UnitData:
    """The images, and what the float network gives for them."""
    network = Chain(units)
    with full_precision(network):
        size, store = means.settings.batch_size, Store(means.store.device, torch.float32)
        logits = run_batched(network, [images], size, means.device, store)
    return UnitData([images], [images], logits)


def learn_on(
    done: list[Unit],
    behind: list[Unit],
    shown: UnitData,
    activations: Activations,
    means: Means,
    generator: torch.Generator,
    memory: Memory,
) -> UnitResult:
    """Have finished units learn on by the network's output, and carry on what they then give.

    Args:
        done, behind: the finished units, and the rest of the network.
        shown: all images, and the float network's logits.
        activations: that the first unit behind reads.
    """
    front, rest = Chain(done), Chain(behind)
    unit = Unit(f"up_to_{done[-1].name}", front)

    def carry() -> None:
        over = activations.quantized["x"]
        size, store = means.settings.batch_size, means.store
        activations.quantized["x"] = run_batched(front, shown.quantized, size, means.device, store, over)

    def errors() -> Errors:
        x, every = activations.quantized["x"], math.ceil(means.rows.images / JUDGED)
        with full_precision(rest):
            return unit_errors(rest, UnitData([x], [x], shown.target), means, divergence, every)

    result = memory.recall(unit)
    if result is not None:
        carry()
        return result
    started, before = time.perf_counter(), errors()
    kept, began = [copy.deepcopy(each.parts) for each in done], weight_codes(front)
    result = UnitResult(unit.name, before.learned, before.learned, distilled=True)
    learned = shown.part(slice(means.rows.views))
    result.trace = distil_units(unit.name, front, rest, learned, means.settings, means.loop(generator))
    means.peers.match(front)
    after = Errors(math.inf, None)
    if learned_is_finite(front):
        result.moved = share_that_differs(began, weight_codes(front))
        harden(front)
        carry()
        after = errors()
    if not after.no_worse_than(before):
        for each, parts in zip(done, kept, strict=True):
            take_back(each, parts)
        carry()
        after, result.moved, result.reverted = before, 0.0, True
    result.error_after = after.learned
    result.held_out_before, result.held_out_after = before.held_out, after.held_out
    result.seconds = time.perf_counter() - started
    memory.remember(unit, result)
    return result


def channels_last(x: Tensor, device: torch.device) -> Tensor:
    """Images ``[N, C, H, W]`` on a device, the channels of each place side by side."""
    return x.to(device).contiguous(memory_format=torch.channels_last)


def unit_seed(seed: int, index: int, rank: int) -> int:
    """Seed of a unit's draws: the run's, the unit's place (below 1,000), and the process's number."""
    return seed * 10_007 + index + 1_000 * rank


def store_for(settings: ReconSettings, device: torch.device) -> Store:
    """The store that the settings name: on the device or, for a GPU, in host memory."""
    return Store(device if settings.keep_gpu else torch.device("cpu"), CACHE_TYPES[settings.cache])


@contextmanager
def float32_precision(precision: str) -> Iterator[None]:
    """Inside, float32 convolutions on a GPU may use TF32 unless the precision is `fp32`.

    Where whoever called has set that by torch's newer names, it stays as it is, with a line that says so.
    """
    try:
        before = torch.backends.cudnn.allow_tf32
    except RuntimeError:  # torch lets nobody read by the old name what was set by a new one
        logger.warning(
            "quant.recon.precision %s: torch.backends.cudnn.conv.fp32_precision is set and stays %s",
            precision,
            torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        )
        yield
        return
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def unit_data(unit: Unit, activations: Activations, means: Means) -> UnitData:
    """What a unit learns from, given the activations carried so far."""
    quantized, full = activations.read(unit)
    with full_precision(unit.module):
        target = run_batched(unit.module, full, means.settings.batch_size, means.device, means.store)
    return UnitData(quantized, full, target)


def match(classifier: QuantClassifier, data: UnitData, means: Means) -> UnitData:
    """Fit a classifier to what its inputs have become; returns what its unit then learns from."""
    batch, learned = means.settings.batch_size, data.part(slice(means.rows.views))
    return match_classifier(classifier, data, learned, batch, means.device, means.peers)


def reconstruct_unit(unit: Unit, data: UnitData, means: Means, generator: torch.Generator) -> UnitResult:
    """Learn and harden one unit, each step of it taken back where it makes the unit's error larger."""
    settings = means.settings
    if settings.ranges == "quantized":
        set_ranges(unit.module, data, means)
    before = start = unit_errors(unit.module, data, means)
    learned = data.part(slice(means.rows.views))
    kept = copy.deepcopy(unit.parts)
    if settings.compensate:
        kind = settings.rounding or StraightThroughRounding
        batch, drop_prob = settings.batch_size, settings.drop_prob
        images = means.rows.images
        compensate(unit, learned, images, batch, drop_prob, kind, generator, means.peers)
        start = unit_errors(unit.module, data, means)
        if not start.deciding <= before.deciding:  # NaN is worse, too
            take_back(unit, kept)
            start = before
        kept = copy.deepcopy(unit.parts)  # what learning must not make worse
    began = weight_codes(unit.module)
    result = UnitResult(unit.name, before.learned, start.learned)
    result.trace, result.unconverged = learn_unit(unit, learned, settings, means.loop(generator))
    means.peers.match(unit.module)  # the same to the last bit, also where not all of them compile
    after = Errors(math.inf, None)
    if learned_is_finite(unit.module):
        result.moved = share_that_differs(began, weight_codes(unit.module))
        harden(unit.module)
        after = unit_errors(unit.module, data, means)
    if not after.no_worse_than(start):
        take_back(unit, kept)
        harden(unit.module)
        after, result.moved, result.reverted = start, 0.0, True
    result.error_after = after.learned
    result.held_out_before, result.held_out_after = before.held_out, after.held_out
    return result


def take_back(unit: Unit, kept: list[nn.Module]) -> None:
    """Put all of a unit's state back to that of copies of its parts, which must not be used again."""
    for part, before in zip(unit.parts, kept, strict=True):
        vars(part).update(vars(before))


def set_ranges(module: nn.Module, data: UnitData, means: Means) -> None:
    """Set a unit's activation ranges from what it is really given, as QDrop's later code does.

    Of several processes the first one's images count.
    """
    with calibrating(module, again=True):
        for inputs, _ in image_batches(data.part(slice(means.rows.images)), means):
            module(*inputs)
    means.peers.match(module)


def unit_errors(
    module: nn.Module, data: UnitData, means: Means, loss: Loss = reconstruction_loss, every: int = 1
) -> Errors:
    """A unit's errors on the images themselves, without their other views, and on those held out.

    Args:
        every: of how many images learned from one is looked at.
    """
    rows = means.rows
    learned = output_error(module, data.part(slice(0, rows.images, every)), means, loss)
    if not rows.held_out:
        return Errors(learned, None)
    return Errors(learned, output_error(module, data.part(slice(-rows.held_out, None)), means, loss))


@torch.no_grad()
def output_error(
    module: nn.Module, data: UnitData, means: Means, loss: Loss = reconstruction_loss
) -> float:
    """Error of a unit's output against its target on the data's images, of all processes."""
    total, count = 0.0, len(data.target)
    for inputs, target in image_batches(data, means):
        total += float(loss(module(*inputs), target)) * len(target)
    return means.peers.mean(total / count, count)


def image_batches(data: UnitData, means: Means) -> Iterator[tuple[list[Tensor], Tensor]]:
    """A unit's quantized inputs and its target, some images at a time."""
    size = means.settings.batch_size
    for start in range(0, len(data.target), size):
        rows = slice(start, start + size)
        *inputs, target = (x[rows].to(means.device, torch.float32) for x in (*data.quantized, data.target))
        yield inputs, target


def learned_is_finite(module: nn.Module) -> bool:
    """Whether everything learned in a module is a number: step sizes, zero-points, rounding logits."""
    steps = [quantizer.scale for _, quantizer in quantizers(module)]  # a weight's are no parameters
    return all(bool(torch.isfinite(each).all()) for each in (*module.parameters(), *steps))


@torch.no_grad()
def weight_codes(module: nn.Module) -> list[Tensor]:
    """The integers that the weights of a module's layers have got so far, from 0; one tensor a layer."""
    found = []
    for _, layer in layers(module):
        quantizer = layer.weight_quantizer
        if isinstance(quantizer, IntegerWeight):
            found.append(quantizer.codes)
        else:
            found.append((quantizer.codes(layer.weight) - quantizer.quant_min).to(torch.uint8))
    return found


def share_that_differs(before: list[Tensor], after: list[Tensor]) -> float:
    """Share of all elements that are not the same in both lists of tensors, which are of equal shapes."""
    differing = sum(int((x != y).sum()) for x, y in zip(before, after, strict=True))
    return differing / sum(x.numel() for x in before)
