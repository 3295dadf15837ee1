"""Which clipping range loses least: searches over the scale and zero-point, all rows at once.

The published search (QDrop's `MSEObserver`) tries 100 widths times every zero-point and re-quantizes
the tensor for each. Two facts make the same optimum cheap. For a fixed scale the lattice ``k * scale``
does not move with the zero-point, which only slides the window of allowed codes; the error is then
close to convex in the zero-point and a short descent finds its best value. And a histogram of a few
thousand bins stands for billions of activations.

A *row* is what gets one scale: a whole tensor or one channel. Tensors here are ``[rows, n]``.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from calibquant.quantization.affine import SCALE_EPS

NORM = 2.4
"""Exponent of the error, as the published searches use it."""
GRID_STEPS = 100
"""Widths that the published grid tries, up to the full range."""
GOLDEN = (5**0.5 - 1) / 2
AT_ONCE, IN_CACHE = 2**24, 2**17
"""Values that a search takes together: on a GPU, and on a CPU, where they then stay in a core's cache."""


@dataclass(frozen=True)
class Samples:
    """Values to be quantized, ``[rows, n]``, with how often each stands (None: once), and their range.

    ``min_val`` and ``max_val``, ``[rows]``, are exact even where ``values`` are bin centres.
    """

    values: Tensor
    counts: Tensor | None
    min_val: Tensor
    max_val: Tensor

    @property
    def joins_with(self) -> object:
        """Equal for samples whose rows may be joined: with counts, or of the same length."""
        return None if self.counts is not None else self.values.shape[1]

    @staticmethod
    def joined(parts: "Sequence[Samples]") -> "Samples":
        """The rows of all, one after the other; those that are shorter get values that count 0."""
        if len(parts) == 1:
            return parts[0]
        longest = max(part.values.shape[1] for part in parts)

        def filled(tensors: list[Tensor]) -> Tensor:
            return torch.cat([F.pad(x, (0, longest - x.shape[1])) for x in tensors])

        counts = [part.counts for part in parts if part.counts is not None]
        ends = (torch.cat([getattr(part, end) for part in parts]) for end in ("min_val", "max_val"))
        return Samples(filled([part.values for part in parts]), filled(counts) if counts else None, *ends)

    def row_slice(self, rows: slice) -> "Samples":
        counts = None if self.counts is None else self.counts[rows]
        return Samples(self.values[rows], counts, self.min_val[rows], self.max_val[rows])


@dataclass(frozen=True)
class Grid:
    """The integer grid of a quantizer."""

    quant_min: int
    quant_max: int
    symmetric: bool

    @property
    def levels(self) -> int:
        return self.quant_max - self.quant_min


def quantization_error(samples: Samples, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """Summed error ``|fake_quantize(x) - x|^2.4`` of each row at its scale and zero-point, ``[rows]``."""
    ratio = samples.values * (1.0 / scale)[:, None]
    codes = torch.round(ratio)
    torch.maximum(codes, (grid.quant_min - zero_point)[:, None], out=codes)
    torch.minimum(codes, (grid.quant_max - zero_point)[:, None], out=codes)
    error = codes.sub_(ratio).abs_().pow_(NORM)
    if samples.counts is not None:
        error.mul_(samples.counts)
    return error.sum(1).mul_(scale.pow(NORM))


def best_zero_point(
    samples: Samples, scale: Tensor, start: Tensor, lowest: Tensor, highest: Tensor, grid: Grid
) -> tuple[Tensor, Tensor]:
    """Descend from ``start`` to the zero-point in ``[lowest, highest]`` of least error.

    Returns:
        ``(zero_point, error)``, each ``[rows]``.
    """
    zero_point = torch.minimum(torch.maximum(start, lowest), highest)
    error = quantization_error(samples, scale, zero_point, grid)
    if bool((lowest == highest).all()):
        return zero_point, error
    stride = 1 if grid.levels < 32 else 16
    while stride >= 1:
        for direction in (-stride, stride):
            moving = torch.ones_like(zero_point, dtype=torch.bool)
            while bool(moving.any()):
                trial = torch.minimum(torch.maximum(zero_point + direction, lowest), highest)
                trial_error = quantization_error(samples, scale, trial, grid)
                moving &= trial_error < error
                zero_point = torch.where(moving, trial, zero_point)
                error = torch.where(moving, trial_error, error)
        stride //= 4
    return zero_point, error


def grid_search(samples: Samples, grid: Grid) -> tuple[Tensor, Tensor]:
    """Best clipping range of the published grid: width ``i / 100`` of the full range, any zero-point.

    Returns:
        ``(min_val, max_val)``, each ``[rows]``.
    """

    def search(chunk: Samples) -> tuple[Tensor, Tensor]:
        width, lowest, highest, zero_point = _search_space(chunk, grid)
        best_scale = (width / grid.levels).clamp(min=SCALE_EPS)
        best_zero, best_error = zero_point, torch.full_like(width, torch.inf)
        for step in range(GRID_STEPS, 0, -1):
            scale = torch.clamp(width * (step / GRID_STEPS) / grid.levels, min=SCALE_EPS)
            zero_point, error = best_zero_point(chunk, scale, zero_point, lowest, highest, grid)
            better = error < best_error
            best_scale = torch.where(better, scale, best_scale)
            best_zero = torch.where(better, zero_point, best_zero)
            best_error = torch.where(better, error, best_error)
        return _clipping_range(best_scale, best_zero, grid)

    return _by_chunks(samples, search)


def golden_section_search(samples: Samples, grid: Grid, tolerance: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Clipping range by a golden-section search over its width, the zero-point by descent at each.

    Kiefer (1953); what SciPy's bounded scalar minimiser does for one function, here for every row at
    once. ``tolerance`` is in units of the full range.

    Returns:
        ``(min_val, max_val)``, each ``[rows]``.
    """

    def search(chunk: Samples) -> tuple[Tensor, Tensor]:
        width, lowest, highest, start = _search_space(chunk, grid)

        def evaluate(fraction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            scale = torch.clamp(width * fraction / grid.levels, min=SCALE_EPS)
            return scale, *best_zero_point(chunk, scale, start, lowest, highest, grid)

        low, high = torch.zeros_like(width), torch.ones_like(width)
        left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
        error_left, error_right = evaluate(left)[2], evaluate(right)[2]
        remaining = 1.0
        while remaining > tolerance:
            remaining *= GOLDEN
            go_left = error_left < error_right
            low, high = torch.where(go_left, low, left), torch.where(go_left, right, high)
            probe = torch.where(go_left, high - GOLDEN * (high - low), low + GOLDEN * (high - low))
            error_probe = evaluate(probe)[2]
            left, right = torch.where(go_left, probe, right), torch.where(go_left, left, probe)
            error_left, error_right = (
                torch.where(go_left, error_probe, error_right),
                torch.where(go_left, error_left, error_probe),
            )
        scale, zero_point, error = evaluate((low + high) / 2)
        full_scale, full_zero, full_error = evaluate(torch.ones_like(width))
        clipped = error < full_error
        return _clipping_range(
            torch.where(clipped, scale, full_scale), torch.where(clipped, zero_point, full_zero), grid
        )

    return _by_chunks(samples, search)


def _search_space(samples: Samples, grid: Grid) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Full width of each row's range, the zero-points allowed, and the one that fits the full range."""
    below = torch.clamp(-samples.min_val, min=0.0)
    above = torch.clamp(samples.max_val, min=0.0)
    if grid.symmetric:
        zero = torch.zeros_like(below)
        return 2 * torch.maximum(below, above), zero, zero, zero
    width = below + above
    lowest = torch.where(above > 0, grid.quant_min, grid.quant_max).to(width)
    highest = torch.where(below > 0, grid.quant_max, grid.quant_min).to(width)
    highest = torch.maximum(lowest, highest)
    proportional = grid.quant_min + torch.round(grid.levels * below / width.clamp(min=SCALE_EPS))
    return width, lowest, highest, proportional


def _clipping_range(scale: Tensor, zero_point: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    if grid.symmetric:
        return -scale * grid.levels / 2, scale * grid.levels / 2
    return (grid.quant_min - zero_point) * scale, (grid.quant_max - zero_point) * scale


def _by_chunks(
    samples: Samples, search: Callable[[Samples], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Search rows in chunks, in bounded memory.

    On a CPU a chunk stays in a core's cache, and threads take whole chunks: threads that share each
    small operation spend their time waiting for one another.
    """
    on_cpu = samples.values.device.type == "cpu"
    rows, n = samples.values.shape
    step = max(1, (IN_CACHE if on_cpu else AT_ONCE) // max(1, n))
    chunks = [samples.row_slice(slice(i, i + step)) for i in range(0, rows, step)]
    if on_cpu and len(chunks) > 1:
        with _one_thread_each() as threads, ThreadPoolExecutor(threads) as pool:
            found = list(pool.map(search, chunks))
    else:
        found = [search(chunk) for chunk in chunks]
    return torch.cat([low for low, _ in found]), torch.cat([high for _, high in found])


@contextmanager
def _one_thread_each() -> Iterator[int]:
    """Inside, an operation runs on one thread; gives the number of threads there were."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)
