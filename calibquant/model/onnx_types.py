"""ONNX's integer types: which opset has which width, and how codes lie in their bytes.

Names of types only, so that nothing here needs the package onnx.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Storage:
    """An ONNX integer type: its width, the opset that has it, and the names of its two kinds."""

    bits: int
    opset: int
    unsigned: str
    signed: str


STORAGES = (
    Storage(2, 25, "UINT2", "INT2"),
    Storage(4, 21, "UINT4", "INT4"),
    Storage(8, 13, "UINT8", "INT8"),
)


def storage_of(bits: int, opset: int) -> Storage:
    """The narrowest type of an opset that holds codes of so many bits."""
    return next(storage for storage in STORAGES if storage.bits >= bits and storage.opset <= opset)


def pack_little_endian(values: Tensor, bits: int) -> np.ndarray:
    """Integers of 2, 4 or 8 bits in bytes, two's complement, the first in the lowest bits, as ONNX has it.

    Not :func:`pack_bits`, which puts the first into the highest bits and packs 3 bits tightly too.
    """
    flat = values.detach().cpu().reshape(-1).to(torch.int16).numpy() & (2**bits - 1)
    per_byte = 8 // bits
    padded = np.zeros(-(-flat.size // per_byte) * per_byte, dtype=np.uint8)
    padded[: flat.size] = flat
    shifts = np.arange(per_byte, dtype=np.uint8) * np.uint8(bits)
    packed: np.ndarray = np.bitwise_or.reduce(padded.reshape(-1, per_byte) << shifts, axis=1)
    return packed
