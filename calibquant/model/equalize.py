"""Equalization: where an activation's channels may be scaled, and the scaling itself.

What passes through a ReLU or a pooling may be scaled channel by channel, ``x_c / s_c``, if the weight that
wrote it is divided and those that read it multiplied by ``s_c``: the float network stays the same function
(cross-layer equalization, Nagel et al., ICCV 2019, section 4.1). One step size for the whole activation is
then a step size for each channel.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from calibquant.model.quant_layer import QuantLayer
from calibquant.model.quant_resnet import QuantResidualBlock, QuantResNet
from calibquant.quantization.affine import PER_TENSOR, broadcastable
from calibquant.quantization.fake_quant import FakeQuantize


@dataclass(frozen=True)
class Junction:
    """An activation with one step size, the layer that writes it, and the layers that read it."""

    writer: QuantLayer
    quantizer: FakeQuantize
    readers: list[QuantLayer]


def junctions(model: QuantResNet) -> list[Junction]:
    """Where channels may be scaled, in dataflow order: between a block's layers, and behind the stem.

    Not where an addition joins the activation to others, whose channels would have to be scaled alike: so
    not behind the stem where the first block has no projection, and behind no block. And not where scaling
    gains nothing or costs something: an activation with a step size for each channel already, or a writer
    with one step size for all.
    """
    found = []
    first = model.blocks[0]
    assert isinstance(first, QuantResidualBlock)
    if isinstance(first.shortcut, QuantLayer):
        path = first.path()
        found.append(Junction(model.stem.conv1, model.stem.output_quantizer, [first.shortcut, path[0]]))
    for block in model.blocks:
        assert isinstance(block, QuantResidualBlock)
        *inner, last = block.path()
        for writer, reader in zip(inner, [*inner[1:], last], strict=True):
            assert isinstance(writer.output_quantizer, FakeQuantize)
            found.append(Junction(writer, writer.output_quantizer, [reader]))
    return [junction for junction in found if gains(junction)]


def gains(junction: Junction) -> bool:
    """Whether the activation has one step size for all channels, and its writer one for each."""
    written = junction.writer.weight_quantizer
    by_channel = isinstance(written, FakeQuantize) and written.ch_axis != PER_TENSOR
    return by_channel and junction.quantizer.ch_axis == PER_TENSOR


@torch.no_grad()
def rescale(junction: Junction, factors: Tensor) -> None:
    """Divide what the writer writes, and multiply what the readers' weights take, channel by channel.

    Args:
        factors: ``[C]``, above 0.
    """
    writer = junction.writer
    writer.weight /= broadcastable(factors, writer.weight.ndim, 0)
    writer.bias /= factors
    for layer in junction.readers:
        taken = layer.weight.shape[1]  # of a grouped convolution's weight: the channels of one group
        by_group = layer.weight.view(len(factors) // taken, -1, *layer.weight.shape[1:])
        by_group *= factors.view(-1, 1, taken, *[1] * (layer.weight.ndim - 2))
