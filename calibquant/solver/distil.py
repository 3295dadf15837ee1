"""Learning by the network's output: finished units learn on together, with the rest of the network float.

Squared error of a unit's output counts all of it alike; what later units make of it differs. In a real
ResNet-50 at 2 bits the first of sixteen blocks makes two fifths of the divergence between the network's
predictions and the float network's. By that, as PD-Quant (Liu et al., CVPR 2023) judges step sizes, units
learn here what they have: step sizes of weights and activations, biases, and maybe the weights' integers.
No label is needed.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calibquant.model.quant_layer import layers, soften
from calibquant.model.quant_resnet import Unit, nearest_names
from calibquant.quantization.fake_quant import Role
from calibquant.quantization.state import full_precision, quantizers
from calibquant.solver.caches import UnitData, live_names
from calibquant.solver.learn import (
    DistilSettings,
    Learned,
    Loop,
    ReconSettings,
    TracePoint,
    start_rounding,
    take_steps,
    weight_rate,
)

LAST = Unit("", nn.Identity())
"""Reads what the network gives."""
JUDGED = 256
"""Images at most on which it is judged what was learned: they run through all that is behind."""


def learns_after(unit: Unit, distil: DistilSettings) -> bool:
    """Whether units learn on once this one is finished."""
    return last_name(unit) in distil.after


def last_name(unit: Unit) -> str:
    """A unit's name; of several merged ones the last."""
    return unit.name.split("+")[-1]


def require_units(after: Sequence[str], units: Sequence[Unit]) -> None:
    """Check that each name is of a unit behind which the trunk is all that goes on.

    Raises:
        ValueError: one is not.
    """
    places = [n for n, _ in enumerate(units) if live_names([*units[n + 1 :], LAST]) == {"x"}]
    allowed = [last_name(units[n]) for n in places]
    for name in after:
        if name not in allowed:
            nearest = nearest_names(name, allowed)
            raise ValueError(f"{name} is no unit that learning can follow; nearest are {nearest}")


class Chain(nn.Module):
    """Units one after the other as one module, from the trunk to the trunk."""

    def __init__(self, units: Sequence[Unit]) -> None:
        super().__init__()
        self.units = tuple(units)
        self.parts = nn.ModuleList(unit.module for unit in units)
        self.names = [(unit.reads, unit.writes) for unit in units]

    def forward(self, x: Tensor) -> Tensor:
        here = {"x": x}
        for part, (reads, writes) in zip(self.parts, self.names, strict=True):
            here[writes] = part(*(here[name] for name in reads))
        return here["x"]


def divergence(output: Tensor, target: Tensor) -> Tensor:
    """KL(float || quantized) of the softmax of logits ``[n, classes]`` in nats, the mean over images."""
    return F.kl_div(output.log_softmax(1), target.log_softmax(1), log_target=True, reduction="batchmean")


def distil_units(
    name: str,
    done: Chain,
    behind: Chain,
    data: UnitData,
    settings: ReconSettings,
    loop: Loop,
) -> list[TracePoint]:
    """Have finished units learn on, together, by the network's output.

    Args:
        done: units that are hardened; afterwards they are soft, and what they learned is to be hardened.
        behind: the rest of the network, which is float here and learns nothing.
        data: images, and the float network's logits ``[N, classes]`` as the target.

    Returns:
        The divergences on the way.
    """
    soften(done)
    learned = start_learning_on(done, settings.distil)
    if not learned.tensors:  # every rate is 0
        return []
    steps = replace(settings, iters=settings.distil.iters, drop_prob=1.0)
    whole = Unit(name, Chain([*done.units, *behind.units]))
    elements = data.quantized[0][0].numel() * len(layers(whole.module))  # as many from a layer, about
    with full_precision(behind):
        return take_steps(whole, learned, data, steps, divergence, elements, loop)


def start_learning_on(module: nn.Module, distil: DistilSettings) -> Learned:
    """What softened units learn; tensors whose rates are alike are moved together."""
    settings = ReconSettings(round_mode="straight_through")
    rounding_of = start_rounding(module, settings)
    rounding = list(rounding_of.values())
    widths = [quantizer.scale for quantizer in rounding_of]
    steps = [quantizer.scale for _, quantizer in quantizers(module, Role.ACTIVATION)]
    biases = [layer.bias for _, layer in layers(module)]
    rated: list[tuple[Tensor, float]] = [(r.learned, weight_rate(r, distil.round_lr)) for r in rounding]
    rated += [(x, alike(distil.lr * float(x.detach().abs().mean()))) for x in (*widths, *steps, *biases)]
    falling = [([x for x, own in rated if own == rate], rate) for rate in sorted({own for _, own in rated})]
    return Learned([group for group in falling if group[1]], widths=widths, rounding=rounding)


def alike(rate: float) -> float:
    """A rate to the nearest power of two, so that few groups of tensors are moved; 0 and infinity stay."""
    return float(torch.tensor(rate, dtype=torch.float64).log2().round().exp2())
