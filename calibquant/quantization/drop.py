"""QDrop's random mixing of quantized and float elements (Wei et al. 2022)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Drop:
    """An element stays quantized with chance ``drop_prob``, in steps of 1/256.

    Attributes:
        drop_prob: QDrop's name for the chance that an element stays *quantized*.
        draws: random bytes, shaped and laid out as what is quantized, or ending with its rows.
    """

    drop_prob: float
    draws: Tensor

    def mask(self) -> Tensor:
        """Which elements stay quantized this time."""
        threshold = round(self.drop_prob * 256)
        if threshold > 255:  # beyond what a byte can be compared with
            return torch.ones_like(self.draws, dtype=torch.bool)
        # compiled code compares whole vectors of int32, but single bytes
        draws = self.draws.int() if torch.compiler.is_compiling() else self.draws
        return draws < threshold


class Draws:
    """Random bytes for several tensors, allocated once, so that each refill is one call.

    Eight elements share one 64-bit number: drawing is what dropping costs on a CPU.

    Args:
        likes: dense tensors whose shapes and layouts the bytes take.
        generator: on the tensors' device.
    """

    def __init__(self, likes: Sequence[Tensor], generator: torch.Generator) -> None:
        self.generator = generator
        sizes = [(like.numel() + 7) // 8 for like in likes]
        self.words = torch.empty(sum(sizes), dtype=torch.int64, device=generator.device)
        parts = self.words.split(sizes)
        self.bytes = [
            part.view(torch.uint8)[: like.numel()].as_strided(
                like.shape, like.stride(), part.storage_offset() * 8
            )
            for part, like in zip(parts, likes, strict=True)
        ]

    def refill(self) -> None:
        """Draw every byte anew."""
        self.words.random_(torch.iinfo(torch.int64).min, None, generator=self.generator)
