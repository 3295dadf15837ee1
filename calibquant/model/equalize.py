"""Equalization: where activations' channels may be scaled, and the scaling itself.

What passes through a ReLU, a pooling or an addition of its like may be scaled channel by channel,
``x_c / s_c``, if the weights that wrote it are divided and those that read it multiplied by ``s_c``: the
float network stays the same function (cross-layer equalization, Nagel et al., ICCV 2019, section 4.1). One
step size for the whole activation is then a step size for each channel.

What a channel never falls below need not pass at all: taken from the biases before the ReLU and given back
by those behind it, it leaves all levels to what varies (channel-wise shifting, Outlier Suppression+, Wei et
al., EMNLP 2023).
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

    @property
    def readers(self) -> list[QuantLayer]:
        """All layers that read the activations, each as often as it does."""
        return [layer for _, readers in self.readings for layer in readers]

    @property
    def can_shift(self) -> bool:
        """Whether readers' biases can give back what is taken from each channel: not beside zeros."""
        return not any(layer.pads for layer in self.readers)


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
    for layer in junction.readers:
        taken = layer.weight.shape[1]  # of a grouped convolution's weight: the channels of one group
        by_group = layer.weight.view(len(factors) // taken, -1, *layer.weight.shape[1:])
        by_group *= factors.view(-1, 1, taken, *[1] * (layer.weight.ndim - 2))


@torch.no_grad()
def shift(junction: Junction, floors: Tensor) -> None:
    """Take from each channel, before the ReLU, what it never falls below, and give it back to the readers.

    Along identity shortcuts the shift is carried on, so that only the first writer takes it off. Where
    values do fall below, the ReLU now cuts them off at the floor.

    Args:
        junction: one that can be shifted.
        floors: ``[C]``, 0 or above.
    """
    junction.writers[0].bias -= floors
    for layer in junction.readers:
        layer.bias += layer.weight.reshape(*layer.weight.shape[:2], -1).sum(2) @ floors
