"""The loops of `columns.py` as one kernel for a block, in Triton, for a GPU.

Rows of a weight do not meet in them. A program takes some, keeps their part of the block in registers,
and goes from column to column without a launch for each operation on one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from calibquant.quantization.columns import BLOCK, Limits

ROWS = 4
"""Rows of a weight that a program takes."""
TO_INTEGER = tl.constexpr(1.5 * 2**23)
"""What float32 numbers of up to 22 bits lose their fractions by being added to, half to even."""


def round_columns(block: Tensor, share: Tensor, limits: Limits) -> Tensor:
    """:func:`calibquant.quantization.columns.round_columns`."""
    errors = torch.empty_like(block, memory_format=torch.contiguous_format)
    with torch.cuda.device_of(block):  # kernels run on the current device
        _round_columns[_programs(block)](
            block, share, errors, *_of_rows(limits, block), block.shape[1],
            *block.stride(), *share.stride(), columns=block.shape[2], rows_each=ROWS, width=BLOCK,
        )  # fmt: skip
    return errors


def descend_columns(steps: Tensor, left: Tensor, slope: Tensor, second: Tensor, limits: Limits) -> None:
    """:func:`calibquant.quantization.columns.descend_columns`."""
    with torch.cuda.device_of(steps):
        _descend_columns[_programs(steps)](
            steps, left, slope.contiguous(), second, *_of_rows(limits, steps), steps.shape[1],
            *steps.stride(), *left.stride(), *second.stride(),
            columns=steps.shape[2], rows_each=ROWS, width=BLOCK,
        )  # fmt: skip


def _of_rows(limits: Limits, block: Tensor) -> list[Tensor]:
    return [x.expand(*block.shape[:2], 1).contiguous() for x in limits]


def _programs(block: Tensor) -> tuple[int, int]:
    return triton.cdiv(block.shape[1], ROWS), block.shape[0]


@triton.jit
def _nearest(value, low, high):
    """The integer in a range of integers that is nearest."""
    return (tl.minimum(tl.maximum(value, low), high) + TO_INTEGER) - TO_INTEGER


@triton.jit
def _column(block, here):
    """The one column that a mask names."""
    return tl.sum(tl.where(here, block, 0.0), axis=1)


@triton.jit
def _rows(scale, low, high, rows, rows_each: tl.constexpr):
    """A program's group, its rows in that and in all, and their limits."""
    group = tl.program_id(1)
    row = tl.program_id(0) * rows_each + tl.arange(0, rows_each)
    place = group * rows + row
    step = tl.load(scale + place, row < rows, 1.0)
    least = tl.load(low + place, row < rows, 0.0)
    most = tl.load(high + place, row < rows, 0.0)
    return group, row, place, step, least, most


@triton.jit
def _round_columns(
    block, share, errors, scale, low, high, rows,
    block_group, block_row, block_column, share_group, share_row, share_column,
    columns: tl.constexpr, rows_each: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    group, row, limit, step, least, most = _rows(scale, low, high, rows, rows_each)
    column = tl.arange(0, width)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = block + group * block_group + row[:, None] * block_row + column[None, :] * block_column
    values = tl.load(at, inside, 0.0)
    found = tl.zeros_like(values)
    for place in range(columns):
        shares = share + group * share_group + place * share_row
        here = (column == place)[None, :]
        value = _column(values, here)
        error = (value - _nearest(value / step, least, most) * step) / tl.load(
            shares + place * share_column
        )
        found = tl.where(here, error[:, None], found)
        later = (column > place) & (column < columns)
        values -= error[:, None] * tl.load(shares + column * share_column, later, 0.0)[None, :]
    tl.store(at, values, inside)
    tl.store(errors + limit[:, None] * columns + column[None, :], found, inside)


@triton.jit
def _descend_columns(
    steps, left, slope, second, scale, low, high, rows,
    steps_group, steps_row, steps_column, left_group, left_row, left_column,
    second_group, second_row, second_column,
    columns: tl.constexpr, rows_each: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    group, row, limit, step, least, most = _rows(scale, low, high, rows, rows_each)
    column = tl.arange(0, width)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = steps + group * steps_group + row[:, None] * steps_row + column[None, :] * steps_column
    beside = left + group * left_group + row[:, None] * left_row + column[None, :] * left_column
    before = tl.load(at, inside, 0.0)
    pulls = tl.load(slope + limit[:, None] * columns + column[None, :], inside, 0.0)
    now = before
    for place in range(columns):
        moments = second + group * second_group + place * second_row
        here = (column == place)[None, :]
        value = _column(now, here)
        pull = _column(pulls, here) / tl.load(moments + place * second_column)
        found = _nearest((value * step + pull) / step, least, most)
        now = tl.where(here, found[:, None], now)
        of_others = tl.load(moments + column * second_column, column < columns, 0.0)
        pulls -= ((found - value) * step)[:, None] * of_others[None, :]
    tl.store(at, now, inside)
    tl.store(beside, tl.load(beside, inside, 0.0) - (now - before) * step[:, None], inside)
