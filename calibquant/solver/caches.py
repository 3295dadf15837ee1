"""Cached activations: where they live, how much they take, and how a step gets its rows.

Activations of all calibration images are what reconstruction holds in memory. They live on the
working device, or in host memory, or, where that is too small as well, in memory-mapped files.
"""

import os
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from calibquant.model.quant_resnet import Unit

CACHE_TYPES = {"fp16": torch.float16, "fp32": torch.float32}
FP16_MAX = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class UnitData:
    """What a unit learns from, for all calibration images, ``[N, ...]`` each.

    Attributes:
        quantized, full: its inputs in the quantized and in the float network.
        target: the float unit's output.
    """

    quantized: list[Tensor]
    full: list[Tensor]
    target: Tensor

    def part(self, rows: slice) -> "UnitData":
        """That of some images, in the same memory; inputs that are one tensor stay one."""
        parts = {id(x): x[rows] for x in (*self.quantized, *self.full)}
        quantized, full = ([parts[id(x)] for x in xs] for xs in (self.quantized, self.full))
        return UnitData(quantized, full, self.target[rows])


class Store:
    """Makes the tensors that hold activations of all images, on one device.

    Args:
        device: where they live.
        dtype: of their elements; float16 only for tensors whose values fit.
        pinned: page-locked host memory, for copies to a GPU that do not wait. For few and small tensors:
            each takes a power of two of bytes, and torch keeps them.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, pinned: bool = False) -> None:
        self.device, self.dtype, self.pinned = device, dtype, pinned

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor, channels last where it has channels and places."""
        flat = self._allocate(torch.Size(shape).numel(), dtype)
        if len(shape) != 4:
            return flat.view(shape)
        n, c, h, w = shape
        return flat.view(n, h, w, c).permute(0, 3, 1, 2)

    def _allocate(self, count: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(count, dtype=dtype, device=self.device, pin_memory=self.pinned)


class FileStore(Store):
    """Tensors in memory-mapped files of a folder, unlinked at once: their space goes back with them."""

    def __init__(self, dtype: torch.dtype, folder: Path) -> None:
        super().__init__(torch.device("cpu"), dtype)
        self.folder = folder

    def _allocate(self, count: int, dtype: torch.dtype) -> Tensor:
        with tempfile.NamedTemporaryFile(dir=self.folder, prefix=".activations_", suffix=".tmp") as file:
            file.truncate(count * dtype.itemsize)
            if sys.platform == "linux":  # else a disk that is full later ends the process by a signal
                os.posix_fallocate(file.fileno(), 0, count * dtype.itemsize)
            return torch.from_file(file.name, shared=True, size=count, dtype=dtype)


class Activations:
    """Named activations of all calibration images, ``[N, ...]`` each, of both networks."""

    def __init__(self, images: Tensor) -> None:
        self.full = {"x": images}
        self.quantized = {"x": images}

    def read(self, unit: Unit) -> tuple[list[Tensor], list[Tensor]]:
        """The unit's inputs: ``(quantized, full precision)``."""
        return [self.quantized[n] for n in unit.reads], [self.full[n] for n in unit.reads]

    def place(self, unit: Unit, like: Tensor) -> Tensor | None:
        """The quantized input that the unit's output may be written over, row by row, if there is one."""
        old = self.quantized.get(unit.writes) if unit.writes in unit.reads else None
        shared = old is self.full.get(unit.writes)
        fits = old is not None and old.shape == like.shape and old.dtype == like.dtype
        return old if fits and not shared else None

    def write(self, unit: Unit, quantized: Tensor, full: Tensor, still_read: set[str]) -> None:
        """Store the unit's output and free whatever no later unit reads."""
        self.quantized[unit.writes], self.full[unit.writes] = quantized, full
        for name in self.full.keys() - still_read:
            del self.quantized[name], self.full[name]


def live_names(units: list[Unit]) -> set[str]:
    """Names whose present value some later unit reads."""
    live: set[str] = set()
    for unit in reversed(units):
        live = (live - {unit.writes}) | set(unit.reads)
    return live


@torch.no_grad()
def run_batched(
    function: Callable[..., Tensor],
    inputs: list[Tensor],
    batch: int,
    device: torch.device,
    store: Store,
    over: Tensor | None = None,
) -> Tensor:
    """Output of a function for all images, batch by batch, in the store or over one of its inputs.

    Values beyond float16's range make the whole output float32.
    """
    count, result = len(inputs[0]), over
    for start in range(0, count, batch):
        rows = slice(start, start + batch)
        # to the device and back as they are kept: half the bytes, and converted there
        out = function(*(x[rows].to(device, non_blocking=True).float() for x in inputs))
        if result is None:
            result = store.empty((count, *out.shape[1:]), store.dtype)
        if result.dtype == torch.float16 and bool(out.abs().max() > FP16_MAX):
            wide = store.empty(tuple(result.shape), torch.float32)
            wide[:start] = result[:start]
            result = wide
        result[rows] = out.to(result.dtype)
    assert result is not None
    return result


@dataclass
class Batches:
    """A step's inputs and target as tensors that stay in place, on the working device.

    Attributes:
        quantized, full, target: as in :class:`UnitData`; a step takes :meth:`rows` of each.
        order: image indices ``[steps, batch]``.
    """

    quantized: list[Tensor]
    full: list[Tensor]
    target: Tensor
    order: Tensor

    @property
    def batch_size(self) -> int:
        return self.order.shape[1]

    def rows(self, counter: Tensor) -> Tensor:
        """Row indices ``[batch]`` of the step whose number ``counter`` holds."""
        return self.order.index_select(0, counter).view(-1)

    def stage(self, step: int) -> None:
        """Have a step's rows on the device before it runs."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


@dataclass
class StagedBatches(Batches):
    """Batches of caches that live elsewhere: a thread gathers the next one while a step runs.

    Attributes:
        places: the tensors of quantized, full and target, each once.
        source: the caches that they get their rows from.
        staging: for each of them two buffers in host memory, in turn.
        ready: when a buffer may be filled again; empty without a GPU.
    """

    places: list[Tensor] = field(default_factory=list)
    source: list[Tensor] = field(default_factory=list)
    staging: list[list[Tensor]] = field(default_factory=list)
    ready: list[torch.cuda.Event] = field(default_factory=list)

    def __enter__(self) -> Self:
        # a new thread's GPU is the first, of which it would take memory, whichever it works for
        own = partial(torch.cuda.set_device, self.target.device) if self.ready else None
        self.pool = ThreadPoolExecutor(1, initializer=own)
        self.host_order = self.order.cpu()
        self.next: Future[list[Tensor]] = self.pool.submit(self._gather, 0)
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(cancel_futures=True)

    def rows(self, counter: Tensor) -> Tensor:
        return torch.arange(self.batch_size, device=self.target.device)

    def stage(self, step: int) -> None:
        gathered = self.next.result()
        for place, rows in zip(self.places, gathered, strict=True):
            place.copy_(rows, non_blocking=True)
        if self.ready:
            self.ready[step % 2].record(torch.cuda.current_stream(self.target.device))
        self.next = self.pool.submit(self._gather, min(step + 1, len(self.host_order) - 1))

    def _gather(self, step: int) -> list[Tensor]:
        if self.ready:  # the copy that last used these buffers
            self.ready[step % 2].synchronize()
        rows, buffers = self.host_order[step], self.staging[step % 2]
        for source, buffer in zip(self.source, buffers, strict=True):
            torch.index_select(source, 0, rows, out=buffer)
        return buffers


def batches_of(data: UnitData, order: Tensor, device: torch.device) -> Batches:
    """Batches of a unit's data: the caches themselves where they live on the device, else staged ones."""
    if data.target.device.type == device.type:
        return Batches(data.quantized, data.full, data.target, order)
    return staged_batches(data, order, device)


def staged_batches(data: UnitData, order: Tensor, device: torch.device) -> StagedBatches:
    """Batches of caches on another device: places on the device and twice as many to gather into."""
    on_gpu, cpu = device.type == "cuda", torch.device("cpu")
    shared = [q is f for q, f in zip(data.quantized, data.full, strict=True)]
    others = [f for f, same in zip(data.full, shared, strict=True) if not same]
    source = [*data.quantized, *others, data.target]

    def buffers(where: torch.device, pinned: bool) -> list[Tensor]:
        stores = [Store(where, x.dtype, pinned) for x in source]
        return [
            s.empty((order.shape[1], *x.shape[1:]), x.dtype) for s, x in zip(stores, source, strict=True)
        ]

    places = buffers(device, pinned=False)
    quantized, free = places[: len(shared)], iter(places[len(shared) :])
    full = [q if same else next(free) for q, same in zip(quantized, shared, strict=True)]
    staging = [buffers(cpu, pinned=on_gpu) for _ in range(2)]
    ready = [torch.cuda.Event() for _ in range(2)] if on_gpu else []
    return StagedBatches(quantized, full, places[-1], order, places, source, staging, ready)
