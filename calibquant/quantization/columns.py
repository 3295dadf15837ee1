"""Settling a weight's columns one after the other, the inner loops of `compensation.py`.

As they are written here, each operation on a column is a launch, which on a GPU takes far longer than the
arithmetic; `columns_triton.py` has the same loops as one kernel for a block of columns.

A block is ``[g, O, B]``: some of a weight's columns, for ``g`` groups of ``O`` output channels.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from calibquant.errors import printable

logger = logging.getLogger("calibquant")

BLOCK = 128
"""Columns of a block at most."""


class Limits(NamedTuple):
    """The step size, and the least and the most steps from zero; each ``[g, O, 1]`` or ``[1]``."""

    scale: Tensor
    low: Tensor
    high: Tensor

    def rounding(self) -> Callable[[Tensor], Tensor]:
        """Rounds column after column: what the limits alone decide is computed once."""
        inverse = 1.0 / self.scale
        return lambda column: (column * inverse).round_().clamp_(self.low, self.high)


@dataclass(frozen=True)
class Loops:
    """One implementation of :func:`round_columns` and :func:`descend_columns`."""

    round_columns: Callable[[Tensor, Tensor, Limits], Tensor]
    descend_columns: Callable[[Tensor, Tensor, Tensor, Tensor, Limits], None]


def round_columns(block: Tensor, share: Tensor, limits: Limits) -> Tensor:
    """Round one column after the other, each leaving its error to those behind it.

    Args:
        block: changed in place to what each column was when it was its turn.
        share: upper triangular: what columns take over from those before them, ``[g, B, B]``.

    Returns:
        Each column's error then, over its share in itself, ``[g, O, B]``.
    """
    errors, rounded = torch.empty_like(block), limits.rounding()
    for column in range(block.shape[2]):
        value = block[:, :, column, None]  # from here on it stays
        error = errors[:, :, column, None]
        torch.sub(value, rounded(value).mul_(limits.scale), out=error)
        error.div_(share[:, column, column, None, None])
        block[:, :, column + 1 :].sub_(error * share[:, None, column, column + 1 :])
    return errors


def descend_columns(steps: Tensor, left: Tensor, slope: Tensor, second: Tensor, limits: Limits) -> None:
    """Move one column after the other to the integers that are best for it as the others are then.

    Args:
        steps: a block's integers, changed in place.
        left: what is wanted beyond them, changed in place.
        slope: how the error falls as ``left`` is covered, half its gradient, ``[g, O, B]``; used up.
        second: moments of these columns' inputs, ``[g, B, B]``.
    """
    curvature, rounded = second.diagonal(dim1=1, dim2=2), limits.rounding()
    for column in range(slope.shape[2]):
        at = slice(column, column + 1)
        here = steps[:, :, at]
        pull = slope[:, :, at] / curvature[:, None, at]
        found = rounded((here * limits.scale).add_(pull))
        change = (found - here).mul_(limits.scale)
        here.copy_(found)
        left[:, :, at].sub_(change)
        slope.sub_(change * second[:, None, column])


WRITTEN = Loops(round_columns, descend_columns)


@cache
def loops_for(device: torch.device) -> Loops:
    """The fastest loops that work on a device; where they should and do not, a line says so."""
    if device.type != "cuda":
        return WRITTEN
    try:
        from calibquant.quantization import columns_triton

        fused = Loops(columns_triton.round_columns, columns_triton.descend_columns)
        require_same(fused, device)
    except Exception as error:  # whatever an import, a compiler or a driver may raise
        why = printable(f"{type(error).__name__}: {error}", 200)
        logger.warning("compensation goes column by column, several times slower: %s", why)
        return WRITTEN
    return fused


def require_same(loops: Loops, device: torch.device) -> None:
    """Compare loops with those that are written here, on a small weight.

    Raises:
        ArithmeticError: they give something else.
    """
    generator = torch.Generator().manual_seed(0)
    weight, inputs = (torch.randn(2, rows, 20, generator=generator).to(device) for rows in (5, 40))
    second = inputs.mT @ inputs
    share = torch.linalg.cholesky(second).mT
    scale = weight.abs().amax(2, keepdim=True) / 2
    limits = Limits(scale, torch.full_like(scale, -2), torch.full_like(scale, 1))
    results = []
    for each in (WRITTEN, loops):
        block, left, steps = weight.clone(), weight.clone(), torch.zeros_like(weight)
        errors = each.round_columns(block, share, limits)
        each.descend_columns(steps, left, left @ second, second, limits)
        results.append(torch.stack([block, errors, steps, left]))
    expected, found = results
    if not torch.allclose(found, expected, rtol=1e-3, atol=1e-3):
        raise ArithmeticError("its kernels give something else")
