"""The processes of one run, as the rest of the code sees them: here there is only this one.

`distributed.py` has the same for several, on torch.distributed. Every method is called by all of them, in
the same order.
"""

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor, nn

from calibquant.errors import UserError

T = TypeVar("T")


class Peers:
    """Processes that work on the same network with different images.

    Attributes:
        rank, size: this process's number, from 0, and how many there are.
    """

    rank, size = 0, 1

    @property
    def leads(self) -> bool:
        """Whether this is the first process: the one that writes, and speaks."""
        return self.rank == 0

    def share(self, images: int, what: str) -> slice:
        """This process's part of so many images: every ``size``-th, so that all parts are alike.

        Raises:
            UserError: there are fewer images than processes.
        """
        if images < self.size:
            raise UserError(
                f"{self.size} processes, but {what} has {images} images; allowed is at most one each"
            )
        return slice(self.rank, None, self.size)

    def average(self, tensors: list[Tensor]) -> None:
        """Replace each tensor, in place, by its mean over all processes."""

    def mean(self, value: float, count: int) -> float:
        """The mean of a value over all processes, each weighted by its number of images."""
        return value

    def total(self, counts: list[int]) -> list[int]:
        """The sum of each count over all processes."""
        return counts

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first process makes, for all."""
        return make()

    def match(self, module: nn.Module) -> None:
        """Give a module the parameters and buffers that it has in the first process."""
