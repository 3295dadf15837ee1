"""Integer codes packed at their bit-width: 4-bit weights take half a byte each, 3-bit ones 3/8."""

import numpy as np
import torch
from torch import Tensor


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes below ``2**bits`` into bytes, most significant bit first.

    Args:
        codes: uint8, any shape; flattened in row-major order.
        bits: 1 to 8.

    Returns:
        uint8 of ``ceil(codes.numel() * bits / 8)`` bytes.

    Raises:
        ValueError: a code does not fit in ``bits``.
    """
    flat = codes.detach().cpu().contiguous().view(-1).numpy()
    if flat.size and int(flat.max()) >= 2**bits:
        raise ValueError(f"code {int(flat.max())} does not fit in {bits} bits")
    planes = np.unpackbits(flat[:, None], axis=1)[:, 8 - bits :]
    return torch.from_numpy(np.packbits(planes))


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """Undo :func:`pack_bits`: the first ``count`` codes, uint8, one-dimensional.

    Raises:
        ValueError: the number of bytes is not what ``count`` codes of ``bits`` take.
    """
    if packed.numel() != (count * bits + 7) // 8:
        raise ValueError(
            f"{packed.numel()} bytes cannot hold {count} codes of {bits} bits, "
            f"which take {(count * bits + 7) // 8}"
        )
    planes = np.unpackbits(packed.cpu().contiguous().numpy(), count=count * bits)
    padded = np.zeros((count, 8), dtype=np.uint8)
    padded[:, 8 - bits :] = planes.reshape(count, bits)
    return torch.from_numpy(np.packbits(padded, axis=1)[:, 0])
