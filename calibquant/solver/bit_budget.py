"""From what each unit costs at each bit-width to the best assignment within a budget of weight bits.

The assumption is ZeroQ's (Cai et al., CVPR 2020, section 3.2) and HAWQ-V2's (Dong et al., NeurIPS 2020):
what units cost one at a time adds up when all are quantized. Under it the best assignment is a knapsack
with one choice per unit, solved exactly here.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from calibquant.model.quant_layer import layers
from calibquant.model.quant_resnet import QuantResNet, Unit
from calibquant.quantization.fake_quant import FakeQuantize, Role
from calibquant.quantization.state import quantizers
from calibquant.solver.probe import Bits, Measurement, Probe


@dataclass(frozen=True)
class Choice:
    """One way to quantize a unit: the bits that its weights take, and what it costs."""

    weight_bits: int
    cost: float


def best_choices(units: list[list[Choice]], limit: int) -> list[int]:
    """The index of each unit's choice, such that costs add up to the least with at most ``limit`` bits.

    Dynamic programming over the units that keeps, of all partial assignments, those that no other beats
    in both bits and cost (Nemhauser and Ullmann 1969): exact, without rounding bits to steps. There are no
    more of them than distinct sums of bits, of which a ResNet, whose layers are multiples of each other,
    has few: its 156 layers at 7 bit-widths take seconds.

    Raises:
        ValueError: even each unit's fewest bits exceed the limit.
    """
    fewest = [min(choice.weight_bits for choice in choices) for choices in units]
    if sum(fewest) > limit:
        raise ValueError("the limit is below the fewest bits possible")
    bits, costs = np.zeros(1, dtype=np.int64), np.zeros(1)
    came_from: list[tuple[np.ndarray, np.ndarray]] = []
    for place, choices in enumerate(units):
        room = limit - sum(fewest[place + 1 :])
        bits = np.add.outer(bits, np.array([choice.weight_bits for choice in choices])).ravel()
        costs = np.add.outer(costs, np.array([choice.cost for choice in choices])).ravel()
        order = np.lexsort((costs, bits))
        order = order[bits[order] <= room]
        least_before = np.minimum.accumulate(np.concatenate([[np.inf], costs[order][:-1]]))
        kept = order[costs[order] < least_before]
        bits, costs = bits[kept], costs[kept]
        came_from.append((kept // len(choices), kept % len(choices)))
    state, chosen = len(costs) - 1, []  # the most bits, hence the least cost
    for parents, picks in reversed(came_from):
        chosen.append(int(picks[state]))
        state = int(parents[state])
    return chosen[::-1]


def best_assignment(measurements: list[Measurement], budget: float) -> list[Measurement]:
    """One measurement per unit: those of least summed KL within ``budget`` bits per weight on average.

    Raises:
        ValueError: the budget is below the fewest bits possible.
    """
    options = [list(of_unit) for _, of_unit in groupby(measurements, key=lambda m: m.unit)]
    weights = sum(of_unit[0].weights for of_unit in options)
    choices = [[Choice(m.weight_bits, m.cost.kl) for m in of_unit] for of_unit in options]
    picks = best_choices(choices, math.floor(budget * weights + 1e-6))  # but for a product's rounding
    return [of_unit[pick] for of_unit, pick in zip(options, picks, strict=True)]


def fewest_bits_per_weight(
    model: QuantResNet, special: Mapping[FakeQuantize, int], candidates: list[Bits]
) -> float:
    """The least average of any assignment: special weights at their own bits, others at the fewest."""
    fewest = min(bits.weight for bits in candidates if bits.weight is not None)
    bits = sizes = 0
    for _, layer in layers(model):
        assert isinstance(layer.weight_quantizer, FakeQuantize)
        bits += special.get(layer.weight_quantizer, fewest) * layer.weight.numel()
        sizes += layer.weight.numel()
    return bits / sizes


def assignment_overrides(probe: Probe, assignment: Mapping[str, Bits], usual: Bits) -> list[dict[str, Any]]:
    """`quant.overrides` that give each unit the bits assigned to its name and leave special ones alone.

    Args:
        usual: the config's own bits, which need no override.
    """
    overrides: list[dict[str, Any]] = []
    for unit in probe.units:
        free = {q.role for _, q in quantizers(unit.module) if q not in probe.special}
        wanted = {role: assignment[unit.name].of(role) for role in Role if role in free}
        changed = {role: bits for role, bits in wanted.items() if bits not in (None, usual.of(role))}
        if changed:
            overrides.append({"match": unit.name} | {_KEY[role]: bits for role, bits in changed.items()})
            overrides += _put_back(probe, unit, changed)
    return overrides


_KEY = {Role.WEIGHT: "w_bit", Role.ACTIVATION: "a_bit"}


def _put_back(probe: Probe, unit: Unit, changed: Mapping[Role, int | None]) -> list[dict[str, Any]]:
    """Overrides of single layers, for the special quantizers that the override of their block changes."""
    inside = dict.fromkeys(q for _, q in quantizers(unit.module))
    return [
        {"match": layer.name, _KEY[quantizer.role]: probe.special[quantizer]}
        for layer in probe.model.units("layer")
        for _, quantizer in quantizers(layer.module)
        if quantizer in inside
        and quantizer in probe.special
        and changed.get(quantizer.role) not in (None, probe.special[quantizer])
    ]
