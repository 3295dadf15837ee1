"""Equalization: where activations' channels may be scaled, and the scaling itself.

What passes through a ReLU, a pooling or an addition of its like may be scaled channel by channel,
``x_c / s_c``, if the weights that wrote it are divided and those that read it multiplied by ``s_c``: the
float network stays the same function (cross-layer equalization, Nagel et al., ICCV 2019, section 4.1). One
step size for the whole activation is then a step size for each channel.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from calibquant.model.quant_layer import QuantLayer
from calibquant.model.quant_resnet import QuantResidualBlock, QuantResNet
from calibquant.quantization.affine import PER_TENSOR, broadcastable
from calibquant.quantization.fake_quant import FakeQuantize


@dataclass(frozen=True)
class Junction:
    """Activations whose channels must be scaled alike, since additions join them.

    Attributes:
        writers: layers that write them.
        readings: each one's quantizer, in dataflow order, and the layers that read it.
    """

    writers: list[QuantLayer]
    readings: list[tuple[FakeQuantize, list[QuantLayer]]]

    @property
    def channels(self) -> int:
        return len(self.writers[0].bias)


def junctions(model: QuantResNet) -> list[Junction]:
    """Where channels may be scaled: between a block's layers, and along each run of identity shortcuts.

    Not where that gains nothing or costs something: where an activation has a step size for each channel
    already, or a writer one step size for all.
    """
    found, trunk = [], Junction([model.stem.conv1], [(model.stem.output_quantizer, [])])
    for block in model.blocks:
        assert isinstance(block, QuantResidualBlock)
        path = block.path()
        for writer, reader in pairwise(path):
            assert isinstance(writer.output_quantizer, FakeQuantize)
            found.append(Junction([writer], [(writer.output_quantizer, [reader])]))
        trunk.readings[-1][1].append(path[0])
        if isinstance(block.shortcut, QuantLayer):
            trunk.readings[-1][1].append(block.shortcut)
            found.append(trunk)
            trunk = Junction([block.shortcut], [])
        trunk.writers.append(path[-1])
        trunk.readings.append((block.join.output_quantizer, []))
    trunk.readings[-1][1].append(model.classifier.fc)
    return [junction for junction in (*found, trunk) if pays(junction)]


def pays(junction: Junction) -> bool:
    """Whether all activations have one step size for all channels, and all writers one for each."""
    by_channel = (
        isinstance(layer.weight_quantizer, FakeQuantize) and layer.weight_quantizer.ch_axis != PER_TENSOR
        for layer in junction.writers
    )
    return all(by_channel) and all(quantizer.ch_axis == PER_TENSOR for quantizer, _ in junction.readings)


@torch.no_grad()
def rescale(junction: Junction, factors: Tensor) -> None:
    """Divide what the writers write, and multiply what the readers' weights take, channel by channel.

    Args:
        factors: ``[C]``, above 0.
    """
    for layer in junction.writers:
        layer.weight /= broadcastable(factors, layer.weight.ndim, 0)
        layer.bias /= factors
    for layer in (layer for _, readers in junction.readings for layer in readers):
        taken = layer.weight.shape[1]  # of a grouped convolution's weight: the channels of one group
        by_group = layer.weight.view(len(factors) // taken, -1, *layer.weight.shape[1:])
        by_group *= factors.view(-1, 1, taken, *[1] * (layer.weight.ndim - 2))
