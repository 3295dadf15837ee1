"""Rounding in which weights make up for each other's errors, as pure functions.

Weights that read correlated inputs can stand in for one another. Rounded one column after the other, each
leaves its error, as far as the inputs' second moments allow, to the columns that are not rounded yet
(Optimal Brain Compression, Frantar and Alistarh, NeurIPS 2022; in a fixed order and by one Cholesky factor:
GPTQ, Frantar et al., ICLR 2023). What is rounded is the weight that fits best to the inputs that the layer
really gets, those of the quantized network (asymmetric calibration: GPTAQ, Li et al., ICML 2025). Step
sizes and grid points are then improved in turn (:func:`descent`).

Everything is by groups: ``g`` is 1 but for grouped convolutions. A weight is ``[g, O, K]``, with ``O``
output channels and ``K`` inputs to each; ``b`` stands for an input in the quantized network, and ``y`` for
what the layer should give for it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from calibquant.quantization.affine import quantize_affine
from calibquant.quantization.columns import BLOCK, Limits, loops_for

MOST = 2.0
"""Largest factor, and its inverse the smallest, by which a step size changes at once."""


@dataclass(frozen=True)
class Moments:
    """Of a layer's inputs ``b``, and of what its weight ``W`` gives too little.

    Attributes:
        second: ``E[b b^T]``, ``[g, K, K]``.
        missing: ``E[(y - W b) b^T]``, ``[g, O, K]``.
    """

    second: Tensor
    missing: Tensor


@dataclass(frozen=True)
class WeightGrid:
    """Where a weight's values may lie.

    Attributes:
        scale, zero_point: ``[g, O, 1]``, or ``[1]`` for all.
    """

    scale: Tensor
    zero_point: Tensor
    quant_min: int
    quant_max: int

    def steps(self, weight: Tensor) -> Tensor:
        """How many steps from zero the grid point nearest to each weight is."""
        codes = quantize_affine(weight, self.scale, self.zero_point, self.quant_min, self.quant_max)
        return codes - self.zero_point

    def limits(self) -> Limits:
        """What the loops over columns need of it."""
        return Limits(self.scale, self.quant_min - self.zero_point, self.quant_max - self.zero_point)


def added_error(weight: Tensor, other: Tensor, moments: Moments) -> float:
    """Expected squared error of ``V b`` against ``y``, less what it is with ``V = W``.

    Args:
        weight, other: ``W`` and ``V``, ``[g, O, K]``.
    """
    change = weight - other
    return float(((change @ moments.second + 2 * moments.missing) * change).sum())


def compensated_steps(weight: Tensor, moments: Moments, damping: float, grid: WeightGrid) -> Tensor | None:
    """Round a weight, fitted to the inputs, column by column; columns go by falling second moment.

    Args:
        weight: ``[g, O, K]``.
        damping: added to the second moments' diagonal, over its mean; above 0. It keeps weights from
            taking over more than the moments of a sample can tell.

    Returns:
        How many steps from zero each weight is then, ``[g, O, K]``; or None where the moments cannot be
        factored: they hold NaN, or the damping is too small for them.
    """
    order = moments.second.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True)
    factor, failed = torch.linalg.cholesky_ex(damped(both_ways(moments.second, order), damping))
    if bool(failed.any()):
        return None
    left = columns(weight, order) + regression(columns(moments.missing, order), factor)
    share, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
    if bool(failed.any()):
        return None
    loops, limits = loops_for(left.device), grid.limits()
    for start in range(0, left.shape[2], BLOCK):
        block = slice(start, start + BLOCK)
        errors = loops.round_columns(left[:, :, block], share[:, block, block], limits)
        left[:, :, block.stop :].sub_(errors @ share[:, block, block.stop :])
    return grid.steps(columns(left, order.argsort(dim=1)))


def regression(missing: Tensor, factor: Tensor) -> Tensor:
    """The change of the weight that gives most nearly from ``b`` what is missing.

    Minimises ``E|y - (W + D) b|^2 + d |D|^2`` over ``D``: a ridge regression.

    Args:
        missing: ``E[(y - W b) b^T]``, ``[g, O, K]``.
        factor: lower Cholesky factor of ``E[b b^T] + d I``.
    """
    return torch.cholesky_solve(missing.mT, factor).mT


def fitted(weight: Tensor, moments: Moments, damping: float) -> tuple[Tensor, Tensor] | None:
    """The weight that :func:`compensated_steps` rounds, unrounded, and the second moments that it goes by.

    The expected error of any ``V`` is, but for a constant, that of ``V`` against this weight.

    Returns:
        ``[g, O, K]`` and ``[g, K, K]``, or None where the moments cannot be factored.
    """
    second = damped(moments.second, damping)
    factor, failed = torch.linalg.cholesky_ex(second)
    if bool(failed.any()):
        return None
    return weight + regression(moments.missing, factor), second


def descent(
    weight: Tensor, second: Tensor, grid: WeightGrid, steps: Tensor
) -> Iterator[tuple[WeightGrid, Tensor]]:
    """Better step sizes, then better grid points, over and over; neither ever makes the error larger.

    Step sizes are those of least squares for the grid points as they are. Then each weight goes to the grid
    point that is best for it as the others are (coordinate descent, as CDQuant does after GPTQ; Nair and
    Suggala 2024).

    Args:
        weight, second: as :func:`fitted` gives them, ``[g, O, K]`` and ``[g, K, K]``.
        steps: how many steps from zero each weight is at first, ``[g, O, K]``.

    Yields:
        The grid, and each weight's steps from zero on it.
    """
    order = second.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True)
    back = order.argsort(dim=1)
    weight, steps = columns(weight, order), columns(steps, order)
    second = both_ways(second, order)
    while True:
        grid = replace(grid, scale=best_scale(weight, second, grid, steps))
        steps = better_steps(weight, second, grid, steps)
        yield grid, columns(steps, back)


def best_scale(weight: Tensor, second: Tensor, grid: WeightGrid, steps: Tensor) -> Tensor:
    """The step sizes, shaped as the grid's, with which the grid points give ``weight`` most nearly."""
    seen = steps @ second
    product, square = ((x * seen).sum(2, keepdim=True) for x in (weight, steps))
    if grid.scale.numel() == 1:
        product, square = product.sum().view(1), square.sum().view(1)
    scale = torch.where((product > 0) & (square > 0), product / square, grid.scale)
    return torch.clamp(scale, grid.scale / MOST, grid.scale * MOST)


def better_steps(weight: Tensor, second: Tensor, grid: WeightGrid, steps: Tensor) -> Tensor:
    """Each weight in turn at the grid point that is best for it as the others are then."""
    loops, limits = loops_for(weight.device), grid.limits()
    steps, left = steps.clone(), weight - steps * grid.scale
    for start in range(0, weight.shape[2], BLOCK):
        block = slice(start, start + BLOCK)
        slope, inside = left @ second[:, :, block], second[:, block, block]
        loops.descend_columns(steps[:, :, block], left[:, :, block], slope, inside, limits)
    return steps.add_(0.0)  # no zero is negative


def wanted_steps(weight: Tensor, second: Tensor, grid: WeightGrid, steps: Tensor) -> Tensor:
    """How many steps from zero each weight would be, were it alone not rounded, ``[g, O, K]``."""
    slope = (weight - steps * grid.scale) @ second
    return steps + slope / second.diagonal(dim1=1, dim2=2)[:, None] / grid.scale


def columns(x: Tensor, order: Tensor) -> Tensor:
    """``x [g, O, K]`` with the columns of each group in an order of theirs, ``[g, K]``."""
    return x.gather(2, order[:, None].expand_as(x))


def both_ways(x: Tensor, order: Tensor) -> Tensor:
    """``x [g, K, K]`` with rows and columns of each group in an order of theirs, ``[g, K]``."""
    return columns(columns(x, order).mT, order).mT


def damped(second: Tensor, damping: float) -> Tensor:
    """Second moments with ``damping`` times their diagonal's mean added to the diagonal.

    Where inputs are zero throughout, there are no moments at all: columns then stand for themselves.
    """
    mean = second.diagonal(dim1=1, dim2=2).mean(1)
    added = torch.where(mean == 0, torch.ones_like(mean), damping * mean)
    return second + torch.diag_embed(added[:, None].expand(second.shape[:2]))
