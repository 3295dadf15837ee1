"""What quantizing one part of a network at a time costs, measured at the network's output.

The cost of a unit is ZeroQ's sensitivity (Cai et al., CVPR 2020, section 3.2): the divergence between the
float network's output and that of the network in which this unit alone is quantized. Ranges are calibrated
and rounding is to nearest: nothing is learned. Float activations are carried from unit to unit, so that a
measurement runs the unit and what follows it. No I/O happens here.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from calibquant.errors import UserError
from calibquant.model.quant_layer import layers
from calibquant.model.quant_resnet import QuantResNet, Unit
from calibquant.quantization.fake_quant import FakeQuantize, Role
from calibquant.quantization.state import calibrating, full_precision, quantizers, quantizing_only
from calibquant.solver.imagenet_util import NO_NUMBERS


@dataclass(frozen=True)
class Bits:
    """Bit-widths to try: of weights and of activations, None for what stays float."""

    weight: int | None = None
    activation: int | None = None

    def of(self, role: Role) -> int | None:
        return self.weight if role is Role.WEIGHT else self.activation

    def __str__(self) -> str:
        named = (("w", self.weight), ("a", self.activation))
        return "".join(f"{letter}{bits}" for letter, bits in named if bits is not None)


@dataclass(frozen=True)
class Cost:
    """How far outputs are from the float network's.

    Attributes:
        kl: KL(float || quantized) of the softmax outputs in nats, the mean over images.
        agreement: images on which both predict the same class, in percent.
        top1: images whose class is predicted, in percent; None without labels.
    """

    kl: float
    agreement: float
    top1: float | None = None


@dataclass(frozen=True)
class Measurement:
    """What one unit costs at one choice of bits.

    Attributes:
        weight_bits: bits of all its weights together, those that stay float counted at none.
        work: units that had to be run for it.
    """

    unit: str
    bits: Bits
    cost: Cost
    weights: int
    weight_bits: int
    work: int


Activations = dict[str, Tensor]
"""A batch's activations by the names that units read and write."""


@torch.no_grad()
def run_units(units: Iterable[Unit], activations: Activations) -> Activations:
    """A batch's activations after the given units."""
    for unit in units:
        output = unit.module(*(activations[name] for name in unit.reads))
        activations = activations | {unit.writes: output}
    return activations


@dataclass(frozen=True)
class Reference:
    """The float network's logits, ``[n, classes]`` per batch, and maybe the classes, ``[n]`` per batch."""

    logits: list[Tensor]
    targets: list[Tensor] | None = None

    def compare(self, outputs: Iterable[Tensor]) -> Cost:
        """How far other logits for the same batches are from these.

        Raises:
            UserError: a logit is no number.
        """
        cost = self.cost(outputs)
        if not math.isfinite(cost.kl):
            raise UserError(NO_NUMBERS)
        return cost

    def cost(self, outputs: Iterable[Tensor]) -> Cost:
        """The same; where a logit is no number, KL is none."""
        images = agreements = hits = 0
        divergence = 0.0
        for number, (expected, found) in enumerate(zip(self.logits, outputs, strict=True)):
            images += len(expected)
            predicted = found.argmax(1)
            agreements += int((predicted == expected.argmax(1)).sum())
            ours, theirs = F.log_softmax(found.double(), 1), F.log_softmax(expected.double(), 1)
            divergence += float(F.kl_div(ours, theirs, reduction="sum", log_target=True))
            if self.targets is not None:
                hits += int((predicted == self.targets[number]).sum())
        top1 = None if self.targets is None else 100 * hits / images
        return Cost(divergence / images, 100 * agreements / images, top1)


class Probe:
    """A quantized network, images, and the ranges of its quantizers at every bit-width tried.

    Args:
        model: ranges need not be set; on the device to work on.
        granularity: what is quantized at a time, ``block`` or ``layer``.
        special: quantizers that keep bits of their own whatever is tried, such as the ends' 8 bits.
        calibration: batches ``[n, 3, H, W]`` from which ranges of activations are found.
        measured: batches for which outputs are compared; None for the same.
        targets: classes ``[n]`` of each measured batch, where they are known.
    """

    def __init__(
        self,
        model: QuantResNet,
        granularity: str,
        special: Mapping[FakeQuantize, int],
        calibration: list[Tensor],
        measured: list[Tensor] | None = None,
        targets: list[Tensor] | None = None,
    ) -> None:
        self.model = model
        self.units = model.units(granularity)
        self.special = special
        self.calibration = [{"x": images} for images in calibration]
        self.measured = self.calibration if measured is None else [{"x": images} for images in measured]
        self.ranges: dict[tuple[FakeQuantize, int], tuple[Tensor, Tensor]] = {}
        with full_precision(model):
            logits = [run_units(self.units, batch)["x"] for batch in self.measured]
        self.reference = Reference(logits, targets)

    @property
    def names(self) -> list[str]:
        """Names of the units, in dataflow order."""
        return [unit.name for unit in self.units]

    def settings(self, unit: Unit, bits: Bits) -> dict[FakeQuantize, int]:
        """A unit's quantizers that act where these bits are tried, each with its own bits."""
        roles = [(quantizer, bits.of(quantizer.role)) for _, quantizer in quantizers(unit.module)]
        return {q: self.special.get(q, wanted) for q, wanted in roles if wanted is not None}

    def sweep(self, candidates: list[Bits]) -> Iterator[Measurement]:
        """What each unit costs when it alone is quantized, in dataflow order, at each choice of bits.

        Raises:
            UserError: weights or activations hold NaN or infinity.
        """
        calibration, measured = self.calibration, self.measured
        for place, unit in enumerate(self.units):
            rest = self.units[place:]
            known: dict[tuple[tuple[FakeQuantize, int], ...], Cost] = {}
            for bits in candidates:
                settings = self.settings(unit, bits)
                self._find_ranges(unit, settings, calibration)
                key = tuple(settings.items())  # a unit of 8-bit ends alone costs the same whatever is tried
                if key not in known:
                    known[key] = self._cost(settings, rest, measured)
                yield self._measurement(unit, bits, settings, known[key], len(rest))
            with full_precision(unit.module):
                calibration, same = [run_units([unit], batch) for batch in calibration], calibration
                measured = (
                    calibration if measured is same else [run_units([unit], batch) for batch in measured]
                )

    def network_cost(self, assignment: Mapping[str, Bits]) -> Cost:
        """What the whole network costs with each unit at the bits given for its name.

        Nothing is reconstructed: calibrated ranges alone give this. Ranges that no sweep has found yet are
        found, from float inputs as a sweep does.

        Raises:
            UserError: weights or activations hold NaN or infinity.
        """
        settings: dict[FakeQuantize, int] = {}
        parts = [(unit, self.settings(unit, assignment[unit.name])) for unit in self.units]
        new = any((q, bits) not in self.ranges for _, part in parts for q, bits in part.items())
        calibration = self.calibration
        for unit, part in parts:
            settings |= part
            if new:
                self._find_ranges(unit, part, calibration)
                with full_precision(unit.module):
                    calibration = [run_units([unit], batch) for batch in calibration]
        return self._cost(settings, self.units, self.measured)

    def _cost(
        self, settings: Mapping[FakeQuantize, int], units: list[Unit], batches: list[Activations]
    ) -> Cost:
        for quantizer, bits in settings.items():
            quantizer.set_bits(bits)
            quantizer.scale.data, quantizer.zero_point.data = self.ranges[quantizer, bits]
        with quantizing_only(self.model, settings):
            return self.reference.compare(run_units(units, batch)["x"] for batch in batches)

    def _measurement(
        self, unit: Unit, bits: Bits, settings: Mapping[FakeQuantize, int], cost: Cost, work: int
    ) -> Measurement:
        sizes = [(layer.weight_quantizer, layer.weight.numel()) for _, layer in layers(unit.module)]
        weight_bits = sum(
            settings.get(quantizer, 0) * size
            for quantizer, size in sizes
            if isinstance(quantizer, FakeQuantize)
        )
        return Measurement(unit.name, bits, cost, sum(size for _, size in sizes), weight_bits, work)

    def _find_ranges(
        self, unit: Unit, settings: Mapping[FakeQuantize, int], calibration: list[Activations]
    ) -> None:
        """Find and keep the ranges that are not known yet, each once per bit-width."""
        missing = [q for q, bits in settings.items() if (q, bits) not in self.ranges]
        for quantizer in missing:
            quantizer.set_bits(settings[quantizer])
        try:
            for _, layer in layers(unit.module):
                if layer.weight_quantizer in missing:
                    layer.calibrate_weight()
            if any(quantizer.role is Role.ACTIVATION for quantizer in missing):
                with calibrating(unit.module):
                    for batch in calibration:
                        run_units([unit], batch)
        except ValueError as error:
            raise UserError(f"calibration: {unit.name}: {error}") from error
        for quantizer in missing:
            found = quantizer.scale.detach().clone(), quantizer.zero_point.detach().clone()
            self.ranges[quantizer, settings[quantizer]] = found
