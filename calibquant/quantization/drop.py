"""QDrop's random mixing of quantized and float elements (Wei et al. 2022)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BYTE = 8


def chance_as_bits(drop_prob: float) -> tuple[int, int]:
    """``(bits, threshold)``: so many random bits are below the threshold with that chance, in 1/256."""
    bits, threshold = BYTE, round(drop_prob * 2**BYTE)
    while bits and threshold % 2 == 0:
        bits, threshold = bits - 1, threshold // 2
    return bits, threshold


@dataclass(frozen=True)
class Drop:
    """Which elements stay quantized: those whose random number is below a threshold.

    Attributes:
        draws: random numbers, uint8, shaped and laid out as what is quantized; drawn anew for each step.
    """

    threshold: int
    draws: Tensor

    def mask(self) -> Tensor:
        """Which elements stay quantized this time."""
        # compiled code compares whole vectors of int32, but single bytes
        draws = self.draws.int() if torch.compiler.is_compiling() else self.draws
        return draws < self.threshold


class Draws:
    """Random numbers for several tensors, allocated once; drawing is what dropping costs on a CPU.

    Eight elements share one 64-bit draw, and a chance of one half takes one bit of each byte only, so
    that the others serve seven more refills. On a GPU, where drawing is cheap and a captured step
    cannot count, every refill draws whole bytes.

    Args:
        likes: dense tensors whose shapes and layouts the numbers take.
        drop_prob: chance that an element stays *quantized*, as QDrop names it, in steps of 1/256.
        generator: on the tensors' device.
    """

    def __init__(self, likes: Sequence[Tensor], drop_prob: float, generator: torch.Generator) -> None:
        self.generator, device = generator, generator.device
        self.bits, threshold = chance_as_bits(drop_prob)
        if device.type != "cpu" and self.bits:
            self.bits, threshold = BYTE, threshold << (BYTE - self.bits)
        self.uses = BYTE // max(1, self.bits)
        self.used = 0
        lanes = (2**self.bits - 1) * 0x0101010101010101
        self.lanes = lanes if lanes < 2**63 else lanes - 2**64  # as a signed number
        sizes = [(like.numel() + BYTE - 1) // BYTE for like in likes]
        self.drawn = torch.empty(sum(sizes), dtype=torch.int64, device=device)
        self.words = self.drawn if self.bits == BYTE else torch.empty_like(self.drawn)
        self.drops = []
        for part, like in zip(self.words.split(sizes), likes, strict=True):
            draws = part.view(torch.uint8)[: like.numel()].as_strided(like.shape, like.stride())
            self.drops.append(Drop(threshold, draws))

    def refill(self) -> None:
        """Have numbers that were never used before."""
        use = self.used % self.uses
        if use == 0:
            self.drawn.random_(torch.iinfo(torch.int64).min, None, generator=self.generator)
        if self.words is not self.drawn:
            torch.bitwise_right_shift(self.drawn, self.bits * use, out=self.words)
            self.words.bitwise_and_(self.lanes)
        self.used += 1
