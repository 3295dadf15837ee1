"""Quantizers: modules that own the qparams of one weight or activation and simulate its integers.

What varies is what can be learned: nothing (`FixedFakeQuantize`), the step size (`LSQFakeQuantize`,
Esser et al. 2020), step size and zero-point (`LSQPlusFakeQuantize`, Bhalgat et al. 2020), or where
each weight rounds to (`AdaRoundFakeQuantize`, Nagel et al. 2020; see :mod:`rounding`). `IntegerWeight`
is what a weight's quantizer becomes once that is settled. All arithmetic is in :mod:`affine`.
"""

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, nn

from calibquant.quantization.affine import (
    SCALE_EPS,
    broadcastable,
    choose_qparams_affine,
    dequantize_affine,
    fake_quantize_affine,
    fake_quantize_in_one_pass,
    integer_zero_point,
    lsq_grad_factor,
    quant_bounds,
    quantize_affine,
)
from calibquant.quantization.drop import Drop
from calibquant.quantization.observer import OBSERVERS, MinMaxObserver, Observer
from calibquant.quantization.range_search import Grid
from calibquant.quantization.rounding import Rounding, SoftRounding


class Role(Enum):
    """What a quantizer quantizes."""

    WEIGHT = "weight"
    ACTIVATION = "activation"


@dataclass(frozen=True)
class Settled:
    """Qparams that stay as they are for a while, and what follows from them.

    Attributes:
        scale, zero_point: as deployed; the zero-point int32.
        rectifies: nothing below zero is on the grid, so that a ReLU before it changes nothing.
    """

    scale: Tensor
    zero_point: Tensor
    rectifies: bool


class FakeQuantize(nn.Module):
    """Base: qparams, bounds and modes; a subclass says how a tensor is quantized.

    Args:
        bits: 2 to 8.
        symmetric: signed grid with a zero-point of 0, else unsigned with a learned or searched one.
        ch_axis: channel axis of per-channel qparams, -1 for per-tensor.
        observer: what finds the clipping range.
        role: weight or activation.

    ``scale`` and ``zero_point`` are ``[C]`` or ``[1]`` and NaN until ranges are calibrated.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(
        self,
        bits: int,
        symmetric: bool,
        ch_axis: int,
        observer: type[Observer],
        role: Role,
    ) -> None:
        super().__init__()
        self.symmetric = symmetric
        self.ch_axis = ch_axis
        self.observer_type = observer
        self.role = role
        self.set_bits(bits)
        self.enabled = True
        self.drop: Drop | None = None
        self.settled: Settled | None = None
        self._register_qparams()

    def _register_qparams(self) -> None:
        self.register_buffer("scale", torch.full((1,), torch.nan))
        self.register_buffer("zero_point", torch.zeros(1))

    def set_bits(self, bits: int) -> None:
        """Change the bit-width; ranges must be calibrated afterwards."""
        self.quant_min, self.quant_max = quant_bounds(bits, self.symmetric)
        self.bits = bits

    def make_observer(self) -> Observer:
        """A fresh observer for this quantizer's grid."""
        grid = Grid(self.quant_min, self.quant_max, self.symmetric)
        return self.observer_type(grid, self.ch_axis)

    def set_range(self, min_val: Tensor, max_val: Tensor) -> None:
        """Set the qparams from a clipping range, each ``[1]`` or ``[C]``."""
        scale, zero_point = choose_qparams_affine(
            min_val, max_val, self.quant_min, self.quant_max, self.symmetric
        )
        self.scale.data, self.zero_point.data = scale, zero_point

    def learned_qparams(self) -> list[nn.Parameter]:
        """The step sizes and zero-points that reconstruction may learn."""
        return [p for p in (self.scale, self.zero_point) if isinstance(p, nn.Parameter)]

    def qparams(self, ndim: int) -> tuple[Tensor, Tensor]:
        """``(scale, zero_point)`` shaped to broadcast over a tensor of ``ndim`` axes."""
        scale = torch.clamp(self.scale, min=SCALE_EPS)
        return self._broadcast(scale, self.zero_point, ndim)

    def _broadcast(self, scale: Tensor, zero_point: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
        return broadcastable(scale, ndim, self.ch_axis), broadcastable(zero_point, ndim, self.ch_axis)

    def settle(self) -> Settled:
        """The qparams as they are now, for scoring."""
        scale, zero_point = self.hard_qparams()
        rectifies = bool((zero_point == self.quant_min).all())
        return Settled(scale, zero_point.to(torch.int32), rectifies)

    @property
    def rectifies(self) -> bool:
        """Whether it is known that a ReLU before it changes nothing."""
        return self.enabled and self.settled is not None and self.settled.rectifies

    def quantize(self, x: Tensor) -> Tensor:
        """``x`` on the grid (but for what is dropped), differentiable in whatever is learned."""
        if self.settled and x.is_cuda and self.settled.scale.numel() == 1:
            return fake_quantize_in_one_pass(
                x, self.settled.scale, self.settled.zero_point, self.quant_min, self.quant_max
            )
        scale, zero_point = self.qparams(x.ndim)
        factor = lsq_grad_factor(x, self.scale, self.quant_max) if scale.requires_grad else 1.0
        mask = None if self.drop is None else self.drop.mask()
        return fake_quantize_affine(x, scale, zero_point, self.quant_min, self.quant_max, factor, mask)

    def codes(self, x: Tensor) -> Tensor:
        """Integer codes of ``x`` in ``[quant_min, quant_max]``, as floats."""
        scale, zero_point = self.hard_qparams(x.ndim)
        return quantize_affine(x, scale, zero_point, self.quant_min, self.quant_max)

    def hard_qparams(self, ndim: int | None = None) -> tuple[Tensor, Tensor]:
        """The qparams as they are deployed: detached, the zero-point an integer inside the grid.

        Shaped to broadcast over a tensor of ``ndim`` axes, or one-dimensional without it.
        """
        scale = torch.clamp(self.scale.detach(), min=SCALE_EPS)
        zero_point = integer_zero_point(self.zero_point.detach(), self.quant_min, self.quant_max)
        return (scale, zero_point) if ndim is None else self._broadcast(scale, zero_point, ndim)

    def forward(self, x: Tensor) -> Tensor:
        return self.quantize(x) if self.enabled else x

    def hardened(self) -> "FakeQuantize":
        """A fixed quantizer with the qparams as they are deployed."""
        return self.of_kind(FixedFakeQuantize)

    def of_kind(self, kind: "type[FakeQuantize]") -> "FakeQuantize":
        """A quantizer of the given kind, fixed or learnable, with the qparams as they are deployed."""
        other = kind(self.bits, self.symmetric, self.ch_axis, self.observer_type, self.role)
        for name, value in zip(("scale", "zero_point"), self.hard_qparams(), strict=True):
            learned = isinstance(getattr(other, name), nn.Parameter)
            setattr(other, name, nn.Parameter(value, requires_grad=False) if learned else value)
        return other

    def extra_repr(self) -> str:
        return f"bits={self.bits}, symmetric={self.symmetric}, ch_axis={self.ch_axis}"


class FixedFakeQuantize(FakeQuantize):
    """Range and step stay as calibrated; rounding is to nearest."""


class SharedRangeFakeQuantize(FixedFakeQuantize):
    """Its range serves readers outside of its unit: it stays where a unit's ranges are set again."""


class LSQFakeQuantize(FakeQuantize):
    """The step size is learned, the zero-point stays (Esser et al. 2020)."""

    def _register_qparams(self) -> None:
        self.scale = nn.Parameter(torch.full((1,), torch.nan), requires_grad=False)
        self.register_buffer("zero_point", torch.zeros(1))


class LSQPlusFakeQuantize(FakeQuantize):
    """Step size and, on an asymmetric grid, zero-point are learned (Bhalgat et al. 2020)."""

    def _register_qparams(self) -> None:
        self.scale = nn.Parameter(torch.full((1,), torch.nan), requires_grad=False)
        if self.symmetric:
            self.register_buffer("zero_point", torch.zeros(1))
        else:
            self.zero_point = nn.Parameter(torch.zeros(1), requires_grad=False)


class AdaRoundFakeQuantize(FakeQuantize):
    """Weights only: where each weight rounds to is learned (Nagel et al. 2020).

    Between :meth:`start_rounding` and the layer's hardening it has a :class:`Rounding`, which owns what is
    learned; outside of that rounding is to nearest.
    """

    rounding: Rounding | None

    def __init__(
        self, bits: int, symmetric: bool, ch_axis: int, observer: type[Observer], role: Role
    ) -> None:
        super().__init__(bits, symmetric, ch_axis, observer, role)
        self.rounding = None

    def start_rounding(self, weight: Tensor, kind: type[Rounding] = SoftRounding) -> Rounding:
        """Begin to learn a weight's rounding in a way of the given kind; return what is learned."""
        qparams = self.hard_qparams(weight.ndim)
        self.rounding = kind(weight, *qparams, self.quant_min, self.quant_max)
        return self.rounding

    def quantize(self, x: Tensor) -> Tensor:
        if self.rounding is None:
            return super().quantize(x)
        return self.rounding.rounded(*self.qparams(x.ndim))

    def codes(self, x: Tensor) -> Tensor:
        if self.rounding is None:
            return super().codes(x)
        return self.rounding.codes(self.hard_qparams(x.ndim)[1])


class IntegerWeight(nn.Module):
    """The integer codes of a hardened weight and the qparams that give their values.

    Args:
        codes: uint8, shaped as the weight, counted from the grid's lower bound.
        scale, zero_point: ``[C]`` or ``[1]``, float32; zero_point holds integers.
        bits, symmetric, ch_axis: as in :class:`FakeQuantize`.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        bits: int,
        symmetric: bool,
        ch_axis: int,
    ) -> None:
        super().__init__()
        self.bits, self.symmetric, self.ch_axis = bits, symmetric, ch_axis
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)

    @classmethod
    def harden(cls, quantizer: FakeQuantize, weight: Tensor) -> "IntegerWeight":
        """Settle a weight's integers: rounded as learned, or to nearest.

        Raises:
            ValueError: the quantizer's range was never calibrated.
        """
        scale, zero_point = quantizer.hard_qparams()
        if not bool(torch.isfinite(scale).all()):
            raise ValueError("a weight was hardened before its range was calibrated")
        codes = (quantizer.codes(weight) - quantizer.quant_min).to(torch.uint8)
        return cls(
            codes.contiguous(),
            scale,
            zero_point,
            quantizer.bits,
            quantizer.symmetric,
            quantizer.ch_axis,
        )

    def softened(self) -> AdaRoundFakeQuantize:
        """A quantizer with the same grid, for a weight whose values lie on it already."""
        quantizer = AdaRoundFakeQuantize(
            self.bits, self.symmetric, self.ch_axis, MinMaxObserver, Role.WEIGHT
        )
        quantizer.scale, quantizer.zero_point = self.scale.clone(), self.zero_point.clone()
        return quantizer

    def dequantize(self) -> Tensor:
        """The weight's real values, float32."""
        quant_min, _ = quant_bounds(self.bits, self.symmetric)
        scale = broadcastable(self.scale, self.codes.ndim, self.ch_axis)
        zero_point = broadcastable(self.zero_point, self.codes.ndim, self.ch_axis)
        return dequantize_affine(self.codes.float() + quant_min, scale, zero_point)

    def forward(self, weight: Tensor) -> Tensor:
        """The layer's weight already lies on the grid."""
        return weight


QUANTIZERS: dict[str, type[FakeQuantize]] = {
    cls.__name__: cls
    for cls in (FixedFakeQuantize, LSQFakeQuantize, LSQPlusFakeQuantize, AdaRoundFakeQuantize)
}


@dataclass(frozen=True)
class QuantizerConfig:
    """`quant.w_qconfig` or `quant.a_qconfig`: what to build for each weight or activation."""

    quantizer: str
    observer: str
    bit: int
    symmetric: bool
    ch_axis: int

    def build(self, role: Role) -> FakeQuantize:
        """A new quantizer of this kind."""
        return QUANTIZERS[self.quantizer](
            self.bit, self.symmetric, self.ch_axis, OBSERVERS[self.observer], role
        )
