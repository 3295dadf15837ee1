"""Where the cached activations of a run go: an estimate before it starts, against what the machine has."""

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from calibquant.errors import UserError
from calibquant.model.quant_layer import QuantLayer, layers
from calibquant.model.quant_resnet import QuantResNet
from calibquant.quantization.state import quantizer_inputs
from calibquant.solver.augment import rows_of
from calibquant.solver.caches import CACHE_TYPES, FileStore, Store, live_names
from calibquant.solver.compensate import groups_of, number_of_rows
from calibquant.solver.distil import learns_after
from calibquant.solver.learn import ReconSettings
from calibquant.solver.memory import return_freed_memory

logger = logging.getLogger("calibquant")

SPARE = 0.9
"""Share of what is free that a run may take."""
TENSORS_PER_SITE = 4
"""Tensors of a step for each quantizer and each input: value, output, gradient, one in passing."""
TENSORS_TO_KEEP = 5
"""Tensors that a step through the whole network keeps for its gradients, for each quantizer: 4 of a
ResNet-50 all of whose units learn (measured)."""
NUMBERS_OF_A_WEIGHT = 7
"""That learning holds for each: what it learns, its gradient, Adam's two, two kept, one in passing."""
MOMENTS = 24
"""Matrices as large as a layer's second moments that compensation holds with them.

About 14 at once; up to 21 were measured, with what is freed and not used again."""
CGROUP, GROUPS_OF_THIS_PROCESS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
"""Where Linux tells the limits of control groups, and which of them this process is in."""


@dataclass(frozen=True)
class Need:
    """Bytes that reconstruction will take at its most demanding unit.

    Attributes:
        caches: activations of all images.
        rows: what stands between a unit's layers for the images that compensation looks at, in memory even
            where the caches are files.
        moments: of a layer's inputs, and what compensation makes of them, on the working device.
        compensation: both together; freed before the unit's first step.
        step: one optimisation step, on the working device.
    """

    caches: int
    rows: int
    moments: int
    compensation: int
    step: int


@dataclass(frozen=True)
class Room:
    """Bytes that are free: on the working device, in host memory, and on disk."""

    device: int
    host: int
    disk: int


@torch.no_grad()
def estimate(model: QuantResNet, image: Tensor, count: int, settings: ReconSettings) -> Need:
    """What reconstruction will take, from the shapes that one image has on its way.

    Args:
        image: ``[1, 3, H, W]`` on the model's device.
        count: number of calibration images.
    """
    size = CACHE_TYPES[settings.cache].itemsize
    here = {"x": image}
    stored = {"x": image.numel() * image.element_size()}  # of both networks: the images are shared
    caches = rows = moments = compensation = step = whole = learned = together = 0
    shown = stored["x"] if settings.distil.after else 0  # kept to the end
    units = model.units(settings.granularity, settings.merge)
    for index, unit in enumerate(units):
        inputs = [here[name] for name in unit.reads]
        sites = quantizer_inputs(unit.module, inputs)
        elements = sum(x.numel() for x in (*inputs, *sites))
        own = NUMBERS_OF_A_WEIGHT * 4 * sum(layer.weight.numel() for _, layer in layers(unit.module))
        step = max(step, TENSORS_PER_SITE * 4 * settings.batch_size * elements + own)
        learned += own
        if learns_after(unit, settings.distil):
            together = learned
        whole += sum(x.numel() for x in sites)
        out = unit.module(*inputs)
        target = out.numel() * size
        over = unit.writes in unit.reads and out.shape == here[unit.writes].shape and index > 0
        again = 0 if index == 0 else shown  # the stem's input are the images themselves
        caches = max(caches, count * (again + sum(stored.values()) + target + (0 if over else target)))
        if settings.compensate:  # inputs, and what stands between a unit's layers, of both networks
            seen = number_of_rows(count, out[0, 0].numel())
            between = seen * 2 * size * (elements + out.numel())
            largest = max(moments_of(layer) for _, layer in layers(unit.module))
            rows, moments = max(rows, between), max(moments, largest)
            compensation = max(compensation, between + largest)
        here[unit.writes], stored[unit.writes] = out, 2 * target
        still_read = live_names(units[index + 1 :])
        stored = {name: bytes_ for name, bytes_ in stored.items() if name in still_read}
    if settings.distil.after:
        step = max(step, TENSORS_TO_KEEP * 4 * settings.batch_size * whole + together)
    return Need(caches, rows, moments, compensation, step)


def moments_of(layer: QuantLayer) -> int:
    """Bytes that compensation takes for a layer's second moments and what it makes of them."""
    return MOMENTS * 4 * groups_of(layer) * layer.weight[0].numel() ** 2


def room(device: torch.device, folder: Path) -> Room:
    """What is free now on a device, in host memory (its control group's limit counts) and in a folder."""
    host = _host_memory()
    on_device = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host
    return Room(on_device, host, shutil.disk_usage(folder).free)


def choose_store(
    model: QuantResNet,
    images: Tensor,
    settings: ReconSettings,
    folder: Path,
    processes: int = 1,
    free: Callable[[torch.device, Path], Room] = room,
) -> Store:
    """The fastest place that holds the caches: the device, host memory, or files in a folder.

    Args:
        images: calibration images ``[N, 3, H, W]``.
        folder: for memory-mapped files, should they be needed.
        processes: that share the host.
        free: tells what is free.

    Raises:
        UserError: a step does not fit on the device, or the caches fit nowhere.
    """
    device, dtype = next(model.buffers()).device, CACHE_TYPES[settings.cache]
    count = rows_of(len(images), settings).count
    need = estimate(model, images[:1].to(device), count, settings)
    return_freed_memory()
    found = free(device, folder)
    have = Room(found.device, found.host // processes, found.disk // processes)
    on_gpu, cpu = device.type == "cuda", torch.device("cpu")
    in_turn = max(need.compensation, need.step)
    beside = need.rows if on_gpu else in_turn  # in host memory, wherever the caches are
    logger.info(
        "memory: activations %s, compensation %s, then a step %s",
        *map(_size, (need.caches, need.compensation, need.step)),
    )
    if need.step > SPARE * have.device:
        raise UserError(
            f"a step of quant.recon.batch_size {settings.batch_size} needs about {_size(need.step)}, "
            f"{_size(have.device)} are free on {device}; lower quant.recon.batch_size"
        )
    if need.moments > SPARE * have.device:
        raise UserError(
            f"quant.recon.compensate needs about {_size(need.moments)} for moments of a layer's inputs, "
            f"{_size(have.device)} are free on {device}; allowed there is false"
        )
    if on_gpu and settings.keep_gpu:
        if need.caches + in_turn <= SPARE * have.device:
            return Store(device, dtype)
        logger.warning("%s are free on the GPU: activations stay in host memory", _size(have.device))
    if need.caches + beside <= SPARE * have.host:
        return Store(cpu, dtype)
    which = f"{count} images (quant.calibrate x quant.recon.views)"
    if need.caches <= SPARE * have.disk:
        copies = 1 if count == len(images) else 2  # as the store lays them out, and with their views
        staying = copies * count * images[0].nbytes + beside
        if staying > SPARE * have.host:
            raise UserError(
                f"{which} need about {_size(staying)} of host memory themselves, wherever activations are; "
                f"free are {_size(have.host)}; lower one of these"
            )
        logger.warning(
            "%s are free in host memory: activations go to files in %s, which is slower",
            _size(have.host),
            folder,
        )
        return FileStore(dtype, folder)
    raise UserError(
        f"activations of {which} need about {_size(need.caches)}; "
        f"free are {_size(have.device)} on {device}, {_size(have.host)} of host memory and "
        f"{_size(have.disk)} on disk; lower one of these"
    )


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"


def _host_memory() -> int:
    """Free host memory in bytes, as far as Linux tells; elsewhere practically unlimited.

    Of this process's control group and of those above it each may have a limit.
    """
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return 2**50
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    free = int(lines["MemAvailable"].split()[0]) * 1024
    for root, controller, limit, used, prefix in (
        (CGROUP, "", "memory.max", "memory.current", ""),
        (CGROUP / "memory", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ):
        for group in _groups(root, controller):
            words = [
                path.read_text().strip() if path.exists() else "" for path in (group / limit, group / used)
            ]
            if words[0].isdigit() and words[1].isdigit():
                taken = max(0, int(words[1]) - _page_cache(group / "memory.stat", prefix))
                free = min(free, max(0, int(words[0]) - taken))
    return free


def _groups(root: Path, controller: str) -> list[Path]:
    """This process's control group in a hierarchy, and all above it.

    Args:
        root: where the hierarchy is mounted.
        controller: one that version 1's hierarchy has; empty for version 2's only one.
    """
    path = "/"
    if GROUPS_OF_THIS_PROCESS.exists():
        for line in GROUPS_OF_THIS_PROCESS.read_text().splitlines():  # cgroups(7)
            _, controllers, where = line.split(":", 2)
            if controller in controllers.split(","):
                path = where
    group = root / path.strip("/")
    return [group, *(above for above in group.parents if above.is_relative_to(root))]


def _page_cache(stat: Path, prefix: str) -> int:
    """Bytes of files that were read: they count as used, but make way for whatever needs memory."""
    lines = stat.read_text().splitlines() if stat.exists() else []
    numbers = dict(line.split(maxsplit=1) for line in lines)
    return sum(int(numbers.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
