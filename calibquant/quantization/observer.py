"""Observers: from the tensors that pass by to a clipping range.

A base class keeps the statistics; a subclass says how a range follows from them, in one method.
Statistics are a running minimum and maximum and, where a search needs it, a streaming histogram, so
that a search sees all calibration batches in bounded memory. An observer lives only while ranges are
being calibrated.
"""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from calibquant.quantization.affine import PER_TENSOR, as_stored
from calibquant.quantization.range_search import (
    AT_ONCE,
    Grid,
    Samples,
    golden_section_search,
    grid_search,
)


def as_rows(x: Tensor, ch_axis: int) -> Tensor:
    """View ``x`` as ``[rows, n]``, in any order: one row per tensor, or one per index of ``ch_axis``."""
    if ch_axis == PER_TENSOR:
        return (x if x.is_contiguous() else as_stored(x)).reshape(1, -1)
    return x.movedim(ch_axis, 0).reshape(x.shape[ch_axis], -1)


class Histogram:
    """Streaming histogram of ``[rows, n]`` tensors on a symmetric axis whose bins double at need.

    Zeros are left out: every grid holds zero exactly, so they cost nothing at any range.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.bins = 2**15 if rows == 1 else 2**12
        self.counts = torch.zeros(rows, self.bins, dtype=torch.int64, device=device)
        self.width = torch.zeros(rows, dtype=torch.float32, device=device)

    def add(self, rows: Tensor, reach: Tensor) -> None:
        """Count a batch whose largest magnitude in each row is ``reach``, ``[rows]``."""
        half = self.bins // 2
        first = (reach / half).clamp(min=torch.finfo(torch.float32).tiny) * (reach > 0)
        self.width = torch.where(self.width == 0, first, self.width)
        while bool((narrow := reach > self.width * half).any()):
            self._double(narrow)
        per_bin = 1.0 / self.width.clamp(min=torch.finfo(torch.float32).tiny)
        for row, values in enumerate(rows):
            bins = (values * per_bin[row]).floor_().to(torch.int32).add_(half)
            self.counts[row] += torch.bincount(bins.clamp_(0, self.bins - 1), minlength=self.bins)
            zeros = (values == 0).sum(dtype=torch.int32)  # in int64 it takes twice as long
            self.counts[row, half] -= zeros

    def _double(self, which: Tensor) -> None:
        """Merge neighbouring bins of the given rows: exact, since bin 2k and 2k+1 become bin k."""
        half, quarter = self.bins // 2, self.bins // 4
        merged = torch.zeros_like(self.counts)
        merged[:, half - quarter : half + quarter] = self.counts.view(-1, half, 2).sum(2)
        self.counts = torch.where(which[:, None], merged, self.counts)
        self.width = torch.where(which, self.width * 2, self.width)

    def samples(self, min_val: Tensor, max_val: Tensor) -> Samples:
        """Bin centres and counts, without the bins that are empty in every row."""
        centres = torch.arange(self.bins, device=self.counts.device) - (self.bins // 2 - 0.5)
        used = self.counts.sum(0) > 0
        values = centres[used] * self.width[:, None]
        return Samples(values, self.counts[:, used].to(values.dtype), min_val, max_val)


class Observer(ABC):
    """Watches tensors; :meth:`clipping_range` is what should not be clipped away.

    Args:
        grid: the integer grid that the range will be mapped to.
        ch_axis: the channel axis, or -1 for one range per tensor.
    """

    searches = True
    """Whether the range depends on the values and not only on their minimum and maximum."""

    def __init__(self, grid: Grid, ch_axis: int = PER_TENSOR) -> None:
        self.grid = grid
        self.ch_axis = ch_axis
        self.min_val: Tensor | None = None
        self.max_val: Tensor | None = None
        self.histogram: Histogram | None = None

    @abstractmethod
    def search(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """Clipping range ``(min_val, max_val)``, each ``[rows]``, for the values seen."""

    def whole(self, x: Tensor) -> Samples:
        """The samples of one tensor that is wholly at hand, such as a weight.

        Raises:
            ValueError: it holds NaN or infinity.
        """
        rows = as_rows(x.detach(), self.ch_axis)
        return Samples(rows, None, *_finite_range(rows))

    def observe(self, x: Tensor) -> None:
        """Take one batch into the statistics."""
        rows = as_rows(x.detach(), self.ch_axis)
        low, high = _finite_range(rows)
        if self.min_val is None or self.max_val is None:
            self.min_val, self.max_val = low, high
            self.histogram = Histogram(rows.shape[0], x.device) if self.searches else None
        else:
            self.min_val = torch.minimum(self.min_val, low)
            self.max_val = torch.maximum(self.max_val, high)
        if self.histogram is not None:
            self.histogram.add(rows, torch.maximum(-low, high))

    def samples(self) -> Samples:
        """The samples of all batches observed.

        Raises:
            ValueError: nothing was observed.
        """
        if self.min_val is None or self.max_val is None:
            raise ValueError("an observer saw no data: ranges need at least one batch")
        if self.histogram is not None:
            return self.histogram.samples(self.min_val, self.max_val)
        empty = self.min_val.new_zeros(self.min_val.numel(), 0)
        return Samples(empty, None, self.min_val, self.max_val)

    def clipping_range(self) -> tuple[Tensor, Tensor]:
        """Clipping range for all batches observed, each ``[rows]``.

        Raises:
            ValueError: nothing was observed.
        """
        return self.search(self.samples())


def _finite_range(rows: Tensor) -> tuple[Tensor, Tensor]:
    if len(rows) == 1:  # which takes a tenth of the time of the same by rows
        low, high = (end.view(1) for end in torch.aminmax(rows))
    else:
        low, high = torch.aminmax(rows, dim=1)
    if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
        raise ValueError("a tensor to be quantized holds NaN or infinity")
    return low, high


class MinMaxObserver(Observer):
    """The range is from the least to the greatest value seen."""

    searches = False

    def search(self, samples: Samples) -> tuple[Tensor, Tensor]:
        return samples.min_val, samples.max_val


class MSEObserver(Observer):
    """The range of least L2.4 error on the published grid of widths and zero-points."""

    def search(self, samples: Samples) -> tuple[Tensor, Tensor]:
        return grid_search(samples, self.grid)


class MSEFastObserver(Observer):
    """The range of least L2.4 error by golden-section search over its width."""

    def search(self, samples: Samples) -> tuple[Tensor, Tensor]:
        return golden_section_search(samples, self.grid)


class AveragingObserver(Observer):
    """Finds a range for each batch and averages them, weighted by the batch's images."""

    def __init__(self, grid: Grid, ch_axis: int = PER_TENSOR) -> None:
        super().__init__(grid, ch_axis)
        self.images = 0
        self.sum_low: Tensor | float = 0.0
        self.sum_high: Tensor | float = 0.0

    def observe(self, x: Tensor) -> None:
        self.min_val = self.max_val = self.histogram = None
        super().observe(x)
        low, high = super().clipping_range()
        self.images += x.shape[0]
        self.sum_low, self.sum_high = self.sum_low + low * len(x), self.sum_high + high * len(x)

    def clipping_range(self) -> tuple[Tensor, Tensor]:
        if self.images == 0:
            raise ValueError("an observer saw no data: ranges need at least one batch")
        return torch.as_tensor(self.sum_low) / self.images, torch.as_tensor(self.sum_high) / self.images


class AvgMinMaxObserver(AveragingObserver, MinMaxObserver):
    """The mean over batches of their minimum and maximum."""


class AvgMSEObserver(AveragingObserver, MSEObserver):
    """The mean over batches of their grid-searched ranges."""


class AvgMSEFastObserver(AveragingObserver, MSEFastObserver):
    """The mean over batches of their golden-section ranges."""


Asked = tuple[str, Observer, Samples]
"""A name, and the samples whose range is to be found by an observer's search."""


def clipping_ranges(observers: Mapping[str, Observer]) -> dict[str, tuple[Tensor, Tensor]]:
    """Each observer's clipping range for all batches observed, by its name.

    Raises:
        ValueError: one of them observed nothing; the message names it.
    """
    averages: dict[str, tuple[Tensor, Tensor]] = {}

    def asked() -> Iterator[Asked]:
        for name, observer in observers.items():
            with naming(name):
                if isinstance(observer, AveragingObserver):
                    averages[name] = observer.clipping_range()
                    continue
                samples = observer.samples()
            yield name, observer, samples

    return search_together(asked()) | averages


def search_together(asked: Iterable[Asked]) -> dict[str, tuple[Tensor, Tensor]]:
    """Ranges by name: the same as each search alone, in fewer and larger ones.

    A search is hundreds of small operations, which on a GPU take the same time for one row and for many.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}
    waiting: defaultdict[object, list[Asked]] = defaultdict(list)
    for one in asked:
        _, observer, samples = one
        alike = waiting[type(observer), observer.grid, samples.joins_with]
        alike.append(one)
        if sum(samples.values.numel() for _, _, samples in alike) >= AT_ONCE:
            found |= _joined_search(alike)
            alike.clear()
    for alike in waiting.values():
        found |= _joined_search(alike)
    return found


def _joined_search(alike: list[Asked]) -> dict[str, tuple[Tensor, Tensor]]:
    """One search for the samples of observers of one kind and grid."""
    if not alike:
        return {}
    names, observers, parts = zip(*alike, strict=True)
    ends = observers[0].search(Samples.joined(parts))
    rows = [len(part.values) for part in parts]
    return dict(zip(names, zip(*(end.split(rows) for end in ends), strict=True), strict=True))


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Inside, a ValueError is of what has this name, and its message says so."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


OBSERVERS: dict[str, type[Observer]] = {
    cls.__name__: cls
    for cls in (
        MinMaxObserver,
        AvgMinMaxObserver,
        MSEObserver,
        AvgMSEObserver,
        MSEFastObserver,
        AvgMSEFastObserver,
    )
}
