"""Quantized layers: weights and biases as buffers, a weight quantizer and an output quantizer.

A layer is convolution or linear, then maybe ReLU, then maybe the output's quantizer. Batch norm is
folded before a layer is made.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calibquant.model.fold_bn import fold_bn
from calibquant.quantization.fake_quant import (
    FakeQuantize,
    FixedFakeQuantize,
    IntegerWeight,
    LSQFakeQuantize,
)
from calibquant.quantization.observer import Asked, Observer, naming, search_together
from calibquant.quantization.range_search import Samples

SAFE_CHANNELS = 8
"""With fewer input channels, oneDNN's weight gradient of a strided 1x1 convolution in channels-last writes
outside of its memory on CPUs without AVX-512 (oneDNN 3.12, its issue 6035)."""


class QuantLayer(nn.Module, ABC):
    """A weighted operation on a quantized weight.

    Args:
        weight, bias: the float parameters, kept as buffers: reconstruction never trains them.
        weight_quantizer: a quantizer, or the integers that the weight already is.
        output_quantizer: quantizes the output (after the ReLU), identity for none.
        relu: whether a ReLU follows the operation.
    """

    weight: Tensor
    bias: Tensor

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        weight_quantizer: FakeQuantize | IntegerWeight,
        output_quantizer: nn.Module | None = None,
        relu: bool = False,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", self.lay_out(weight.detach().clone()))
        self.register_buffer("bias", bias.detach().clone())
        self.weight_quantizer = weight_quantizer
        self.output_quantizer = nn.Identity() if output_quantizer is None else output_quantizer
        self.relu = relu

    def lay_out(self, weight: Tensor) -> Tensor:
        """The weight in the memory layout that the operation is fastest with."""
        return weight

    @property
    def pads(self) -> bool:
        """Whether outputs at the edge read zeros in place of inputs."""
        return False

    @abstractmethod
    def operate(self, x: Tensor, weight: Tensor) -> Tensor:
        """The operation itself, with the given weight and the layer's bias."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.operate(x, self.weight_quantizer(self.weight))
        if self.relu:
            return rectify_and_quantize(y, self.output_quantizer)
        out: Tensor = self.output_quantizer(y)
        return out

    def weight_to_observe(self) -> tuple[FakeQuantize, Observer, Samples]:
        """The weight's quantizer, and what that one's range follows from.

        Raises:
            ValueError: the weight is hardened, or it or the bias holds NaN or infinity.
        """
        if isinstance(self.weight_quantizer, IntegerWeight):
            raise ValueError("the weight is integer already; its range is settled")
        if not bool(torch.isfinite(self.bias).all()):  # which a ReLU may hide
            raise ValueError("the bias holds NaN or infinity")
        observer = self.weight_quantizer.make_observer()
        return self.weight_quantizer, observer, observer.whole(self.weight)

    def calibrate_weight(self) -> None:
        """Set the weight quantizer's range from the weight.

        Raises:
            ValueError: as :meth:`weight_to_observe`.
        """
        quantizer, observer, samples = self.weight_to_observe()
        quantizer.set_range(*observer.search(samples))

    def set_integer_weight(self, integers: IntegerWeight) -> None:
        """Replace weight and weight quantizer by integers and the values they stand for."""
        self.weight_quantizer = integers
        self.weight = self.lay_out(integers.dequantize())

    def harden_weight(self) -> None:
        """Settle the weight's integers; rounding logits, if any, are gone afterwards."""
        if isinstance(self.weight_quantizer, FakeQuantize):
            self.set_integer_weight(IntegerWeight.harden(self.weight_quantizer, self.weight))


class QuantConv2d(QuantLayer):
    """A convolution with its batch norm folded in."""

    def __init__(
        self,
        convolution: nn.Conv2d,
        norm: nn.BatchNorm2d,
        weight_quantizer: FakeQuantize | IntegerWeight,
        output_quantizer: nn.Module | None = None,
        relu: bool = False,
    ) -> None:
        weight, bias = fold_bn(convolution, norm)
        super().__init__(weight, bias, weight_quantizer, output_quantizer, relu)
        assert isinstance(convolution.padding, tuple)
        self.stride = convolution.stride
        self.padding = convolution.padding
        self.groups = convolution.groups

    def lay_out(self, weight: Tensor) -> Tensor:
        return weight.contiguous(memory_format=torch.channels_last)

    @property
    def pads(self) -> bool:
        return any(self.padding)

    def operate(self, x: Tensor, weight: Tensor) -> Tensor:
        stride = self.stride
        if max(x.shape[2:]) == 1:
            # of one place in, one comes out at any stride; at another than 1 oneDNN's bfloat16 gradient of
            # the weight is, where that reaches beyond the place, whatever lay in memory (oneDNN 3.12)
            stride = (1, 1)
        reads_single_places = weight.shape[2:] == (1, 1) and not self.pads
        if reads_single_places and max(stride) > 1 and weight.shape[1] < SAFE_CHANNELS:
            x, stride = x[:, :, :: stride[0], :: stride[1]], (1, 1)
        return F.conv2d(x, weight, self.bias, stride, self.padding, 1, self.groups)


class QuantLinear(QuantLayer):
    """A fully connected layer."""

    def __init__(self, linear: nn.Linear, weight_quantizer: FakeQuantize | IntegerWeight) -> None:
        super().__init__(linear.weight, linear.bias, weight_quantizer)

    def operate(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight, self.bias)


def rectify_and_quantize(x: Tensor, quantizer: nn.Module) -> Tensor:
    """ReLU, in place, unless the quantizer behind it does the same, and that quantizer."""
    if not (isinstance(quantizer, FakeQuantize) and quantizer.rectifies):
        x = F.relu_(x)
    out: Tensor = quantizer(x)
    return out


def layers(module: nn.Module) -> list[tuple[str, QuantLayer]]:
    """Named quantized layers inside a module, in order (itself with name '')."""
    return [(name, m) for name, m in module.named_modules() if isinstance(m, QuantLayer)]


def calibrate_weights(module: nn.Module) -> None:
    """Set the range of every weight quantizer from its weight.

    Raises:
        ValueError: as :meth:`QuantLayer.weight_to_observe`; the message names the layer.
    """
    found: dict[str, FakeQuantize] = {}

    def asked() -> Iterator[Asked]:
        for name, layer in layers(module):
            with naming(name):
                found[name], observer, samples = layer.weight_to_observe()
            yield name, observer, samples

    for name, bounds in search_together(asked()).items():
        found[name].set_range(*bounds)


def harden(module: nn.Module) -> None:
    """Settle everything learned: weights become integers, activation qparams become fixed."""
    for _, layer in layers(module):
        layer.harden_weight()
    _make_quantizers(module, FixedFakeQuantize)


def soften(module: nn.Module) -> None:
    """Undo :func:`harden`: weights, all step sizes and biases can be learned on, from where they are."""
    _make_quantizers(module, LSQFakeQuantize)  # of activations: weights are integers yet
    for _, layer in layers(module):
        assert isinstance(layer.weight_quantizer, IntegerWeight)
        layer.weight_quantizer = layer.weight_quantizer.softened()


def _make_quantizers(module: nn.Module, kind: type[FakeQuantize]) -> None:
    """Put quantizers of a kind, with the same qparams, in the place of all inside a module."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, FakeQuantize):
                setattr(parent, name, child.of_kind(kind))
