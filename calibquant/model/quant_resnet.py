"""The quantized residual network and the ordered list of units that reconstruction walks through.

Activations are quantized after the ReLU of the stem, of each inner convolution of a block, and after
each residual addition and its ReLU. The input image, a block's last convolution, its projection and
the logits are not (QDrop, Wei et al. 2022).
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from itertools import takewhile

from torch import Tensor, nn
from torch.nn import functional as F

from calibquant.model.pooling import max_pool
from calibquant.model.quant_layer import QuantConv2d, QuantLayer, QuantLinear, rectify_and_quantize
from calibquant.model.resnet import ResidualBlock, ResNet
from calibquant.quantization.fake_quant import FakeQuantize, QuantizerConfig, Role
from calibquant.quantization.state import quantizers


class End(Enum):
    """What may stay at 8 bits at the two ends of the network."""

    STEM_WEIGHT = "stem_weight"
    STEM_OUTPUT = "stem_output"
    CLASSIFIER_INPUT = "classifier_input"
    CLASSIFIER_WEIGHT = "classifier_weight"


@dataclass(frozen=True)
class Override:
    """Other bit-widths for the units and layers whose name fits a shell-style pattern; None keeps them."""

    match: str
    w_bit: int | None = None
    a_bit: int | None = None


@dataclass(frozen=True)
class QuantSpec:
    """How weights and activations are quantized, which ends stay at 8 bits, and what differs by name."""

    weight: QuantizerConfig
    activation: QuantizerConfig
    ends_8bit: frozenset[End]
    overrides: tuple[Override, ...] = ()

    def weight_quantizer(self) -> FakeQuantize:
        return self.weight.build(Role.WEIGHT)

    def activation_quantizer(self) -> FakeQuantize:
        return self.activation.build(Role.ACTIVATION)


@dataclass(frozen=True)
class Unit:
    """What is reconstructed at once: a module that reads named activations and writes one.

    A network is a straight-line program over the names ``x`` (the trunk), ``skip`` and ``h`` (inside a
    block, at layer granularity).
    """

    name: str
    module: nn.Module
    reads: tuple[str, ...] = ("x",)
    writes: str = "x"

    @property
    def parts(self) -> list[nn.Module]:
        """The network's own modules that the unit is made of: several where units were merged."""
        return list(self.module) if isinstance(self.module, nn.Sequential) else [self.module]


def merge_units(units: list[Unit], merged: Collection[str]) -> list[Unit]:
    """The units with each one that is named joined to the one before it (MRECG, Ma et al., CVPR 2023).

    Raises:
        ValueError: there is no such unit, or it does more than take the trunk and give it back.
    """
    found: list[Unit] = []
    for unit in units:
        if unit.name not in merged:
            found.append(unit)
            continue
        if not found or (*found[-1].reads, found[-1].writes, *unit.reads, unit.writes) != ("x",) * 4:
            raise ValueError(f"{unit.name} cannot be merged with what stands before it")
        before = found.pop()
        module = nn.Sequential(*before.parts, *unit.parts)
        found.append(Unit(f"{before.name}+{unit.name}", module))
    unknown = sorted(set(merged) - {unit.name for unit in units})
    if unknown:
        nearest = nearest_names(unknown[0], [unit.name for unit in units])
        raise ValueError(f"{unknown[0]} is no unit; nearest are {nearest}")
    return found


def layer_units(unit: Unit) -> list[Unit]:
    """A unit as units of one layer each, in dataflow order."""
    found: list[Unit] = []
    for part in unit.parts:
        if isinstance(part, QuantResidualBlock):
            found += part.layer_units(unit.name)
        else:
            found.append(Unit(unit.name, part, unit.reads, unit.writes))
    return found


class QuantStem(nn.Module):
    """First convolution, ReLU, pooling and quantizer.

    Quantizing after the pooling gives the same values as before it, since rounding keeps order, and
    dropping then leaves a mix of quantized and float values, not the larger of the two.
    """

    def __init__(self, model: ResNet, spec: QuantSpec) -> None:
        super().__init__()
        self.conv1 = QuantConv2d(model.conv1, model.bn1, spec.weight_quantizer(), relu=True)
        self.maxpool = model.maxpool
        self.output_quantizer = spec.activation_quantizer()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.output_quantizer(max_pool(self.maxpool, self.conv1(x)))
        return out


class ResidualJoin(nn.Module):
    """The last convolution of a branch, the residual addition, ReLU and the block's quantizer."""

    def __init__(self, last: QuantLayer, output_quantizer: FakeQuantize) -> None:
        super().__init__()
        self.last = last
        self.output_quantizer = output_quantizer

    def forward(self, h: Tensor, skip: Tensor) -> Tensor:
        return rectify_and_quantize(self.last(h).add_(skip), self.output_quantizer)


class QuantResidualBlock(nn.Module):
    """Any residual block: what differs between families is only its list of convolutions."""

    def __init__(self, block: ResidualBlock, spec: QuantSpec) -> None:
        super().__init__()
        *inner, (_, last) = block.branch()
        self.branch = nn.Sequential()
        for name, (convolution, norm) in inner:
            quantizers = spec.weight_quantizer(), spec.activation_quantizer()
            self.branch.add_module(name, QuantConv2d(convolution, norm, *quantizers, relu=True))
        projection = block.shortcut()
        self.shortcut: nn.Module = nn.Identity()
        if projection is not None:
            self.shortcut = QuantConv2d(*projection, spec.weight_quantizer())
        self.join = ResidualJoin(QuantConv2d(*last, spec.weight_quantizer()), spec.activation_quantizer())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.join(self.branch(x), self.shortcut(x))
        return out

    def path(self) -> list[QuantLayer]:
        """The branch's layers, in order."""
        return [*(layer for layer in self.branch if isinstance(layer, QuantLayer)), self.join.last]

    def layer_units(self, name: str) -> list[Unit]:
        """The block as units of one layer each; the last one includes the residual addition."""
        units, skip, h = [], "x", "x"
        if isinstance(self.shortcut, QuantLayer):
            units.append(Unit(f"{name}.shortcut", self.shortcut, ("x",), "skip"))
            skip = "skip"
        for child, layer in self.branch.named_children():
            units.append(Unit(f"{name}.{child}", layer, (h,), "h"))
            h = "h"
        return [*units, Unit(f"{name}.join", self.join, (h, skip), "x")]


class QuantClassifier(nn.Module):
    """Global average pooling and the fully connected layer."""

    def __init__(self, model: ResNet, spec: QuantSpec) -> None:
        super().__init__()
        self.fc = QuantLinear(model.fc, spec.weight_quantizer())

    def pool(self, x: Tensor) -> Tensor:
        """What the fully connected layer reads, ``[N, C]``."""
        return F.adaptive_avg_pool2d(x, 1).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.pool(x))
        return out


class QuantResNet(nn.Module):
    """A ResNet with batch norm folded and quantizers where the module's docstring says.

    Raises:
        ValueError: an override fits no unit and no layer, or none with what it wants to change.
    """

    def __init__(self, model: ResNet, spec: QuantSpec) -> None:
        super().__init__()
        self.stem = QuantStem(model, spec)
        self.block_names = [name for name, _ in model.blocks()]
        self.blocks = nn.ModuleList(QuantResidualBlock(b, spec) for _, b in model.blocks())
        self.classifier = QuantClassifier(model, spec)
        for quantizer, bits in self.special_bits(spec):
            quantizer.set_bits(bits)

    def special_bits(self, spec: QuantSpec) -> list[tuple[FakeQuantize, int]]:
        """Quantizers that the spec names apart from the rest, with their bits; the last mention counts."""
        special = [(self._end_quantizer(end), 8) for end in spec.ends_8bit]
        for override in spec.overrides:
            special += self._overridden(override)
        return special

    def _overridden(self, override: Override) -> list[tuple[FakeQuantize, int]]:
        every = [*self.units("block"), *self.units("layer")]
        units = [unit for unit in every if fnmatchcase(unit.name, override.match)]
        if not units:
            nearest = nearest_names(override.match, [unit.name for unit in every])
            raise ValueError(f"{override.match} fits no unit or layer; nearest are {nearest}")
        found: list[tuple[FakeQuantize, int]] = []
        for role, bits in ((Role.WEIGHT, override.w_bit), (Role.ACTIVATION, override.a_bit)):
            if bits is None:
                continue
            fitting = [
                (quantizer, bits) for unit in units for _, quantizer in quantizers(unit.module, role)
            ]
            if not fitting:
                raise ValueError(
                    f"{override.match} fits {units[0].name}, which has no {role.value} to quantize"
                )
            found += fitting
        return found

    def _end_quantizer(self, end: End) -> FakeQuantize:
        last_block = self.blocks[-1]
        assert isinstance(last_block, QuantResidualBlock)
        quantizer = {
            End.STEM_WEIGHT: self.stem.conv1.weight_quantizer,
            End.STEM_OUTPUT: self.stem.output_quantizer,
            End.CLASSIFIER_INPUT: last_block.join.output_quantizer,
            End.CLASSIFIER_WEIGHT: self.classifier.fc.weight_quantizer,
        }[end]
        assert isinstance(quantizer, FakeQuantize)
        return quantizer

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, num_classes]`` of images ``[N, 3, H, W]``."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.classifier(x)
        return logits

    def units(self, granularity: str, merged: Collection[str] = ()) -> list[Unit]:
        """What is reconstructed, in dataflow order: residual blocks, or (``layer``) single layers.

        Args:
            merged: names of residual blocks that make one unit with what stands before them.

        Raises:
            ValueError: a name to merge is no block's, or single layers are to be merged.
        """
        stem, classifier = Unit("stem", self.stem), Unit("classifier", self.classifier)
        middle: list[Unit] = []
        for name, block in zip(self.block_names, self.blocks, strict=True):
            assert isinstance(block, QuantResidualBlock)
            middle += block.layer_units(name) if granularity == "layer" else [Unit(name, block)]
        return merge_units([stem, *middle, classifier], merged)


def nearest_names(wanted: str, names: Sequence[str]) -> str:
    """The three of the names that begin most like what was wanted."""
    return ", ".join(sorted(names, key=lambda name: -_common_start(name, wanted))[:3])


def _common_start(first: str, second: str) -> int:
    """Number of characters that both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
