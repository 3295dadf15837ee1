"""How the rounding of a weight is learned: modules that own one learned number for each weight.

`SoftRounding` moves each weight between the two grid points beside it (AdaRound, Nagel et al. 2020).
`StraightThroughRounding` learns the weight itself, through the rounding as if it were not there (Bengio
et al. 2013), so that it may go on to any grid point, as it may in FlexRound (Lee et al. 2023).
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from calibquant.quantization.affine import (
    fake_quantize_affine,
    initial_rounding_logits,
    rectified_sigmoid,
    round_from_floor,
    rounding_regularizer,
)

CONVERGED = 0.01
"""A soft rounding this near to 0 or 1 counts as decided."""
BEYOND = 0.4
"""Where the weights beyond the grid wait, in steps outside of it: within the half step that has a slope."""
REACH = 0.45
"""Largest distance, in steps, from a grid point at which a weight that was given it waits."""
UNDECIDED = 0.3
"""Share of that distance that soft rounding keeps, so that it still finds a slope there: on units of a real
ResNet-50 0.2 to 0.5 gave about the same, 1 at 2 bits left no gain."""
NEAREST, FARTHEST = 0.02, 0.15
"""Bounds of the distance that soft rounding keeps."""


class Rounding(nn.Module, ABC):
    """Base: one learned number for each weight, and the grid that the weight is rounded to.

    Args:
        weight: where to begin; a subclass makes of it what is learned.
        scale, zero_point: broadcast over the weight; zero_point holds integers.
        quant_min, quant_max: bounds of the integer codes.

    Attributes:
        learned: the learned numbers, shaped as the weight.
        rate_falls: whether the learning rate falls along a cosine, or stays.
    """

    learned: nn.Parameter
    rate_falls: ClassVar[bool]

    def __init__(
        self, weight: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int
    ) -> None:
        super().__init__()
        self.bounds = quant_min, quant_max

    @staticmethod
    @abstractmethod
    def waiting(before: Tensor, after: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
        """Where to begin with weights that have been given grid points already, if these are to stay first.

        Nearest rounding of what is returned gives the grid points. All in steps from zero.

        Args:
            before: the weights themselves, of any distance from their grid points.
            after: their grid points.
            lowest, highest: ends of the grid; broadcast over the weights.
        """

    @abstractmethod
    def rounded(self, scale: Tensor, zero_point: Tensor) -> Tensor:
        """The weight as learning uses it, differentiable in what is learned and in ``scale``."""

    @abstractmethod
    def codes(self, zero_point: Tensor) -> Tensor:
        """The integer codes, as floats, that the weight has got."""

    @property
    def fan_in(self) -> int:
        """How many weights an output has."""
        return self.learned[0].numel()

    def penalty(self, exponent: Tensor) -> Tensor:
        """What is added to the loss, so that rounding is decided at the end; ``[]``."""
        return self.learned.new_zeros(())

    def undecided(self) -> int:
        """How many weights are not yet on a grid point."""
        return 0


class SoftRounding(Rounding):
    """How far up each weight is rounded, in [0, 1]: the rectified sigmoid of a logit (AdaRound, eq. 23).

    It begins where it reproduces the weight.
    """

    rate_falls = False
    floor: Tensor

    def __init__(
        self, weight: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int
    ) -> None:
        super().__init__(weight, scale, zero_point, quant_min, quant_max)
        self.register_buffer("floor", torch.floor(weight / scale), persistent=False)
        self.learned = nn.Parameter(initial_rounding_logits(weight, scale))

    @staticmethod
    def waiting(before: Tensor, after: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
        """Near the grid points, which soft values are taken from, but undecided, and inside the grid."""
        apart = UNDECIDED * (before - after)
        size = apart.abs().clamp(NEAREST, FARTHEST)
        up = (after <= lowest) | ((apart >= 0) & (after < highest))
        return after + torch.where(up, size, -size)

    def share(self) -> Tensor:
        """How far up each weight is rounded, in [0, 1]."""
        return rectified_sigmoid(self.learned)

    def rounded(self, scale: Tensor, zero_point: Tensor) -> Tensor:
        return round_from_floor(self.floor, self.share(), scale, zero_point, *self.bounds)

    def codes(self, zero_point: Tensor) -> Tensor:
        return (self.floor + (self.learned >= 0) + zero_point).clamp(*self.bounds)

    def penalty(self, exponent: Tensor) -> Tensor:
        return rounding_regularizer(self.share(), exponent)

    @torch.no_grad()
    def undecided(self) -> int:
        share = self.share()
        return int(((share > CONVERGED) & (share < 1 - CONVERGED)).sum())


class StraightThroughRounding(Rounding):
    """The weight itself, in steps: rounded in each forward pass, learned by the rounded one's gradient.

    It begins as it is; what lies beyond the grid waits beside it.
    """

    rate_falls = True

    def __init__(
        self, weight: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int
    ) -> None:
        super().__init__(weight, scale, zero_point, quant_min, quant_max)
        low, high = quant_min - zero_point - BEYOND, quant_max - zero_point + BEYOND
        self.learned = nn.Parameter(torch.clamp(weight / scale, low, high))

    @staticmethod
    def waiting(before: Tensor, after: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
        """Where they are: each is rounded all the same, and those far from their grid points go first."""
        return torch.clamp(before, after - REACH, after + REACH)

    def rounded(self, scale: Tensor, zero_point: Tensor) -> Tensor:
        step = torch.ones_like(zero_point)
        return fake_quantize_affine(self.learned, step, zero_point, *self.bounds) * scale

    def codes(self, zero_point: Tensor) -> Tensor:
        return (torch.round(self.learned) + zero_point).clamp(*self.bounds)


ROUNDINGS: dict[str, type[Rounding]] = {
    "learned_hard_sigmoid": SoftRounding,
    "straight_through": StraightThroughRounding,
}
"""By `quant.recon.round_mode`; the first name is QDrop's."""
