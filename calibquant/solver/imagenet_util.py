"""Data and evaluation: ImageFolder trees, classes by wnid, calibration images, top-1 and top-5.

Images are decoded by Pillow and transformed by torchvision, one that moves by its first frame and one of
16 bits by its upper 8. EXIF orientation is ignored, as everywhere with ImageNet. An unreadable image never
raises inside a loader: it travels as its name and the reason, so that whoever reads the batch can name it.
"""

import hashlib
import logging
import multiprocessing.queues
import os
import signal
import stat
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from easydict import EasyDict
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter
from torchvision import transforms
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from calibquant.errors import UserError, printable
from calibquant.paths import expand
from calibquant.quantization.state import settled
from calibquant.solver.peers import Peers

logger = logging.getLogger("calibquant")

CPU = torch.device("cpu")

Sample = tuple[Path, int]
"""An image file and its class index, -1 where its class does not matter."""

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What is decoded, whatever a file's name says. Pillow knows more; it hands EPS to Ghostscript."""
MAX_RESIZED_PIXELS = 2**27
"""Of an image after resizing its shorter side: one of a single row would become gigabytes."""
MAX_CLASSES_BYTES = 2**24
"""Of the file that lists class folders."""


@dataclass(frozen=True)
class Unreadable:
    """An image file that could not be decoded, and why."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Batch:
    """Images ``[n, 3, H, W]``, class indices ``[n]``, and the files of the batch that were unreadable."""

    images: Tensor
    targets: Tensor
    unreadable: list[Unreadable]

    def pin_memory(self) -> "Batch":
        return Batch(self.images.pin_memory(), self.targets.pin_memory(), self.unreadable)

    def to_keep(self) -> "Batch":
        """A copy in this process's own memory.

        What a data-loading process shares keeps a file open for each tensor, and a process may have only
        so many: 1,024 by the usual limit.
        """
        return Batch(self.images.clone(), self.targets.clone(), self.unreadable)


@dataclass(frozen=True)
class Score:
    """Accuracy in percent over ``images`` images; ``skipped`` more were unreadable."""

    top1: float
    top5: float
    images: int
    skipped: int = 0

    def as_dict(self) -> dict[str, float | int]:
        return asdict(self)

    def __str__(self) -> str:
        return f" * Acc@1 {self.top1:.3f} Acc@5 {self.top5:.3f}"

    @property
    def in_full(self) -> str:
        """The accuracy, and of how many images it is."""
        return f"{self} ({self.images} images, {self.skipped} skipped)"


@dataclass(frozen=True)
class Calibration:
    """Calibration images ``[N, 3, H, W]`` in memory, their files, and a hash of names and contents."""

    images: Tensor
    files: list[str]
    sha256: str
    skipped: int = 0

    def part(self, peers: Peers) -> Tensor:
        """One process's images, where all of them are in memory."""
        return self.images[peers.share(len(self.images), "the calibration set")]

    def share(self, peers: Peers) -> "Calibration":
        """The same set of which only one process's images are in memory."""
        return self if peers.size == 1 else replace(self, images=self.part(peers).clone())

    def manifest(self) -> dict[str, Any]:
        """What `metrics.json` and a checkpoint say of the calibration set."""
        return {"count": len(self.files), "sha256": self.sha256, "skipped": self.skipped}


def imagenet_wnids() -> list[str]:
    """The 1,000 class folders of ImageNet in index order."""
    return files("calibquant.solver").joinpath("imagenet_wnids.txt").read_text().split()


def class_names(data: EasyDict) -> list[str]:
    """Class folders in index order, as `data.classes` says.

    Raises:
        UserError: the file that lists them, or the val folder, is missing or lists one twice.
    """
    if data.classes == "imagenet":
        return imagenet_wnids()
    if data.classes == "folders":
        val = expand(data.path, "data.path") / "val"
        return [folder.name for folder in subfolders(val, "data.path: val folder")]
    path = expand(data.classes, "data.classes")
    try:
        if not path.is_file() or path.stat().st_size > MAX_CLASSES_BYTES:
            raise ValueError
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(
            f"data.classes {data.classes}: cannot be read; allowed are imagenet, folders or "
            "a text file that lists class folders"
        ) from error
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise UserError(f"data.classes {data.classes}: lists no class")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"data.classes {data.classes}: lists {printable(twice[0], 80)} twice")
    return names


def subfolders(folder: Path, what: str) -> list[Path]:
    """Sorted folders inside a folder, without hidden ones.

    Raises:
        UserError: the folder does not exist or cannot be read.
    """
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    except (OSError, ValueError) as error:  # ValueError: of a name that the locale cannot write
        raise UserError(f"{what} {folder}: {getattr(error, 'strerror', None) or error}") from error


def is_image(path: Path) -> bool:
    """Whether a file's name ends as torchvision's ImageFolder expects of an image."""
    return path.suffix.lower() in IMG_EXTENSIONS and not path.name.startswith(".")


def images_inside(folder: Path) -> list[Path]:
    """Image files at any depth, sorted; what else lies there is named in the log.

    Walks by directory entries: no stat for each of 1.3 million files. Links to folders are not followed.

    Raises:
        UserError: a folder inside cannot be read.
    """

    def fail(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from error

    images = []
    for inside, folders, names in os.walk(folder, onerror=fail):
        for path in (Path(inside, name) for name in list(folders)):
            if is_image(path):  # by its name: whoever reads it will say that it is none
                images.append(path)
                folders.remove(path.name)
            elif path.is_symlink():
                logger.warning("%s: ignored, a link to a folder", printable(str(path)))
        for path in (Path(inside, name) for name in names):
            if is_image(path):
                images.append(path)
            else:
                logger.warning("%s: ignored, its name is not an image's", printable(str(path)))
    return sorted(images)


def list_samples(folder: Path, classes: list[str], what: str) -> list[Sample]:
    """Image files of an ImageFolder tree in sorted order; the class is the folder's place in ``classes``.

    Raises:
        UserError: folder missing, no image in it, a class folder that is no class, or one that cannot be
            read.
    """
    index = {name: number for number, name in enumerate(classes)}
    samples: list[Sample] = []
    for class_folder in subfolders(folder, what):
        if class_folder.name not in index:
            raise UserError(
                f"{what} {folder}: class folder {class_folder.name} is none of the {len(classes)} classes "
                f"({classes[0]}, {classes[1] if len(classes) > 1 else ''} ...); see data.classes"
            )
        samples += [(path, index[class_folder.name]) for path in images_inside(class_folder)]
    samples += [(path, -1) for path in sorted(folder.iterdir()) if is_image(path) and not path.is_dir()]
    if not samples:
        raise UserError(f"{what} {folder}: holds no image ({', '.join(IMG_EXTENSIONS)})")
    return samples


def names_and_sizes(samples: Iterable[Sample]) -> list[str]:
    """What tells labelled images apart without reading them: class, folder, name and bytes of each."""

    def size(path: Path) -> int | None:
        try:
            return path.stat().st_size
        except OSError:  # unreadable, as whoever reads it will say
            return None

    return [f"{target} {path.parent.name}/{path.name} {size(path)}" for path, target in samples]


def require_classes(samples: list[Sample], where: str) -> None:
    """Refuse images, listed as :func:`list_samples` does, of which one has no class.

    Raises:
        UserError: naming it.
    """
    path, target = samples[-1]
    if target == -1:
        raise UserError(
            f"{where}: {path.name} is in no class folder, allowed is <class>/<image>, "
            "see imagenet/README.md"
        )


def evaluation_transform(data: EasyDict) -> Callable[[Image.Image], Tensor]:
    """Resize the shorter side, crop the centre, normalise: torchvision's usual evaluation."""
    return _compose([*_centre(data), *_to_normalized(data)])


def calibration_transform(data: EasyDict) -> Callable[[Image.Image], Tensor]:
    """How calibration images are read: as for evaluation, or as `data.augment` and `data.sharpness` say."""
    steps = _crop_flip(data) if data.augment == "crop_flip" else _centre(data)
    if data.sharpness != [1, 1]:
        steps = [*steps, RandomSharpness(*data.sharpness)]
    return _compose([*steps, *_to_normalized(data)])


def _centre(data: EasyDict) -> list[nn.Module]:
    return [ResizeShorter(data.test_resize), transforms.CenterCrop(data.input_size)]


def _crop_flip(data: EasyDict) -> list[nn.Module]:
    return [transforms.RandomResizedCrop(data.input_size), transforms.RandomHorizontalFlip()]


class RandomSharpness(nn.Module):
    """Changes an image's sharpness by a random factor: 1 keeps it, 0 blurs, above 1 sharpens.

    How sharp an image reaches a network depends on who scaled it, and with what filter. Ranges and weights
    fitted to images of one sharpness lose more on others.

    Args:
        low, high: bounds of the factor, whose logarithm is uniform between theirs.
    """

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.low, self.high = low, high

    def forward(self, image: Image.Image) -> Image.Image:
        factor = self.low * (self.high / self.low) ** float(torch.rand(()))
        sharpened: Image.Image = transforms.functional.adjust_sharpness(image, factor)
        return sharpened


class ResizeShorter(transforms.Resize):  # type: ignore[misc]
    """Torchvision's resizing of the shorter side, but for images so long that it would fill the memory.

    Raises:
        ValueError: the resized image would have more than 2^27 pixels.
    """

    def forward(self, image: Image.Image) -> Image.Image:
        pixels = self.size**2 * max(image.size) / min(image.size)
        if pixels > MAX_RESIZED_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are too long to be resized")
        resized: Image.Image = super().forward(image)
        return resized


def _compose(steps: list[nn.Module]) -> Callable[[Image.Image], Tensor]:
    composed: Callable[[Image.Image], Tensor] = transforms.Compose(steps)
    return composed


def _to_normalized(data: EasyDict) -> list[nn.Module]:
    return [transforms.ToTensor(), transforms.Normalize(data.mean, data.std)]


def read_image(path: Path) -> Image.Image:
    """An image, or the first frame of several, as 8-bit RGB.

    Raises:
        Exception: whatever Pillow raises on a damaged file; also for more pixels than Pillow deems safe
            (about 89 million), for what is no regular file, and for pixels whose range is unknown.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("it is no regular file")  # a pipe would be waited for without end
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's about metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path, formats=FORMATS) as image:
            return _to_rgb(image)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        pixels = np.asarray(image)  # of 16 bits, which Pillow's own conversion would clip to 8
        return Image.fromarray((pixels >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("pixels of 32 bits, whose range is unknown")
    return image.convert("RGB")


class ImageDataset(Dataset[tuple[Tensor | Unreadable, int]]):
    """Image files with their classes. Random transforms are seeded per image: workers change nothing."""

    def __init__(
        self, samples: list[Sample], transform: Callable[[Image.Image], Tensor], seed: int
    ) -> None:
        self.samples = samples
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor | Unreadable, int]:
        path, target = self.samples[index]
        try:
            image = read_image(path)
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(self.seed * 1_000_003 + index)
                return self.transform(image), target
        except Exception as error:  # a decoder may raise anything on foreign bytes
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            return Unreadable(path, printable(reason, 300)), target


def collate(items: list[tuple[Tensor | Unreadable, int]]) -> Batch:
    """Stack the readable images of a batch, and carry the names of the others."""
    readable = [(image, target) for image, target in items if isinstance(image, Tensor)]
    images = torch.stack([image for image, _ in readable]) if readable else torch.empty(0)
    targets = torch.tensor([target for _, target in readable], dtype=torch.int64)
    return Batch(images, targets, [image for image, _ in items if isinstance(image, Unreadable)])


def end_with_the_job(_worker: int) -> None:
    """In a data-loading process: a signal to the whole job ends it, with no report by the main process.

    So does a batch that cannot be handed over, for want of shared memory or with too long a TMPDIR. It
    would only be printed by the thread that hands over, and the main process would wait for it without end.
    """
    signal.signal(signal.SIGTERM, lambda _signal, _frame: os._exit(0))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # see signals_wait
    end = staticmethod(lambda _error, _batch: os._exit(1))
    multiprocessing.queues.Queue._on_queue_feeder_error = end  # type: ignore[attr-defined]


class ImageLoader(DataLoader[Any]):
    """Starts its processes undisturbed by Ctrl-C and SIGTERM, which wait so long.

    Raises:
        UserError: the system lets it start no process.
    """

    def __iter__(self) -> Any:
        with signals_wait():
            try:
                return super().__iter__()
            except OSError as error:
                # of what is half made, which would show a traceback of its own
                _MultiProcessingDataLoaderIter.__del__ = lambda _: None  # type: ignore[assignment]
                raise UserError(
                    f"a data-loading process cannot be started ({error.strerror or error}), for want of "
                    "processes, memory, shared memory (/dev/shm) or open files; "
                    "lower data.num_workers (0: none)"
                ) from error


@contextmanager
def signals_wait() -> Iterator[None]:
    """Inside, Ctrl-C and SIGTERM do nothing; one that came does at the end what it would have done.

    What Python raises while a process is forked, from what threads or logging do then, it prints and drops.
    """
    if threading.current_thread() is not threading.main_thread():  # where Python lets signals do nothing
        yield
        return
    came: list[int] = []
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        for each in before:
            signal.signal(each, lambda number, _frame: came.append(number))
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, signal.SIG_DFL if handler is None else handler)
        if came:
            signal.raise_signal(came[0])


def make_loader(
    samples: list[Sample],
    transform: Callable[[Image.Image], Tensor],
    config: EasyDict,
    device: torch.device = CPU,
) -> DataLoader[Any]:
    """Batches in order, the tail batch included.

    Args:
        device: where they will be used: for a GPU they may be page-locked (`data.pin_memory`).
    """
    data = config.data
    return ImageLoader(
        ImageDataset(samples, transform, config.process.seed),
        batch_size=data.batch_size,
        num_workers=min(data.num_workers, os.cpu_count() or 1),
        pin_memory=data.pin_memory and device.type == "cuda",
        collate_fn=collate,
        worker_init_fn=end_with_the_job,
        generator=torch.Generator().manual_seed(config.process.seed),
    )


def validation_samples(config: EasyDict) -> list[Sample]:
    """All images of ``val/``, with their classes.

    Raises:
        UserError: folder or classes are not as they must be.
    """
    classes = class_names(config.data)
    if config.model.kwargs.num_classes != len(classes):
        raise UserError(
            f"model.kwargs.num_classes is {config.model.kwargs.num_classes}, but data.classes "
            f"({config.data.classes}) lists {len(classes)} classes"
        )
    samples = list_samples(expand(config.data.path, "data.path") / "val", classes, "data.path: val folder")
    require_classes(samples, f"data.path: val folder {config.data.path}/val")
    return samples


def validation_loader(
    config: EasyDict, device: torch.device = CPU, samples: list[Sample] | None = None
) -> DataLoader[Any]:
    """Batches of images as they are scored.

    Args:
        device: see :func:`make_loader`.
        samples: None for all of ``val/``.

    Raises:
        UserError: see :func:`validation_samples`.
    """
    if samples is None:
        samples = validation_samples(config)
    return make_loader(samples, evaluation_transform(config.data), config, device)


def load_calibration(config: EasyDict, asked_by: str = "quant.calibrate") -> Calibration:
    """Read `quant.calibrate` images of the calibration folder into memory; labels are not used.

    Args:
        asked_by: what a user calls that number.

    Raises:
        UserError: folder missing or empty, a class folder that is no class, or an unreadable image
            (unless `data.skip_unreadable`).
    """
    data = config.data
    folder = expand(data.path, "data.path") / expand(data.calibration, "data.calibration")
    samples = list_samples(folder, class_names(data), "data.calibration: calibration folder")
    wanted = config.quant.calibrate
    if wanted < len(samples):
        samples = [samples[index] for index in drawn(len(samples), wanted, config.process.seed)]
    elif wanted > len(samples):
        logger.warning(
            "calibration folder %s holds %d images, fewer than %s, %d: all are used",
            folder,
            len(samples),
            asked_by,
            wanted,
        )
    images, unreadable = [], []
    for batch in make_loader(samples, calibration_transform(data), config):
        unreadable += report_unreadable(batch, data.skip_unreadable)
        images += [batch.to_keep().images] if len(batch.images) else []
    if not images:
        raise UserError(f"calibration folder {folder}: no image in it can be read")
    skipped = {item.path for item in unreadable}
    paths = [path for path, _ in samples if path not in skipped]
    names = [str(path.relative_to(folder)) for path in paths]
    return Calibration(torch.cat(images), names, content_hash(paths, names), len(skipped))


def drawn(total: int, wanted: int, seed: int) -> list[int]:
    """Random places among so many, in rising order: all where no more are wanted than there are."""
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    places: list[int] = order[:wanted].sort().values.tolist()
    return places


def content_hash(paths: list[Path], names: list[str]) -> str:
    """SHA-256 over contents and names of image files, in the order given.

    Raises:
        UserError: one cannot be read.
    """
    digest = hashlib.sha256()
    for path, name in zip(paths, names, strict=True):
        try:
            contents = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise UserError(f"image {path}: cannot be read ({error.strerror or error})") from error
        digest.update(os.fsencode(f"{contents}  {name}\n"))  # a name need not be UTF-8
    return digest.hexdigest()


def report_unreadable(batch: Batch, skip: bool) -> list[Unreadable]:
    """Name a batch's unreadable images in the log where they may be skipped.

    Raises:
        UserError: there is one and ``skip`` is false.
    """
    for item in batch.unreadable:
        if not skip:
            raise UserError(
                f"image {item.path}: cannot be read ({item.reason}); "
                "remove it or set data.skip_unreadable: true"
            )
        logger.warning("image %s: cannot be read (%s), skipped", printable(str(item.path)), item.reason)
    return batch.unreadable


def batches(loader: DataLoader[Any], description: str, silent: bool = False) -> Iterator[Batch]:
    """Batches with a progress bar on a terminal, silently elsewhere."""
    yield from tqdm(loader, desc=description, leave=False, disable=silent or None, unit="batch")


NO_NUMBERS = (
    "the network's logits hold NaN or infinity: weights, data.mean or data.std do not suit the images"
)
"""Said of a network that cannot be scored."""


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: DataLoader[Any],
    device: torch.device,
    skip_unreadable: bool = False,
    peers: Peers | None = None,
) -> Score:
    """Top-1 and top-5 accuracy in percent over all logits (top-5 of fewer classes: all of them).

    Args:
        peers: processes with the other parts of the images.

    Raises:
        UserError: an image is unreadable (unless ``skip_unreadable``), or none can be read, or a logit
            is no number.
    """
    hits = torch.zeros(3, dtype=torch.int64, device=device)
    peers, images, skipped = peers or Peers(), 0, 0
    with settled(model):
        for batch in batches(loader, "evaluate", silent=not peers.leads):
            skipped += len(report_unreadable(batch, skip_unreadable))
            if not len(batch.images):
                continue
            logits = model(batch.images.to(device, non_blocking=True))
            targets = batch.targets.to(device, non_blocking=True)
            ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]
            hits += torch.stack([ranked[:, 0].sum(), ranked.sum(), (~logits.isfinite()).sum()])
            images += len(targets)
    top1, top5, no_numbers, images, skipped = peers.total([*hits.tolist(), images, skipped])
    if not images:
        raise UserError("val folder: no image in it can be read")
    if no_numbers:
        raise UserError(NO_NUMBERS)
    return Score(100.0 * top1 / images, 100.0 * top5 / images, images, skipped)
