"""One run of an ablation, and the runs that a folder keeps, each as a value per val image."""

import json
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from easydict import EasyDict
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.ablation_plan import Point
from benchmarks.ablation_statistics import Values, fitted_temperature
from calibquant.errors import UserError
from calibquant.solver.cache_plan import choose_store
from calibquant.solver.checkpoint import checksum
from calibquant.solver.fast import choose_engine
from calibquant.solver.files import write_bytes
from calibquant.solver.image_reader import Reader
from calibquant.solver.imagenet_util import (
    Sample,
    batches,
    evaluation_transform,
    make_loader,
    names_and_sizes,
    report_unreadable,
    validation_loader,
)
from calibquant.solver.main_imagenet import progress_bar
from calibquant.solver.pipeline import (
    calibrate,
    fix_randomness,
    quantize_model,
    recon_settings,
)
from calibquant.solver.probe import Reference
from calibquant.solver.recon import reconstruct
from calibquant.solver.run_log import versions

METRICS = ("top1", "agreement", "kl", "expected_drop")
"""What is measured of each image: see :func:`image_metrics`."""

STAGES = ("range_only", "reconstructed")
"""When a run's network is scored."""

Outcome = dict[str, Values]
"""By metric, a value per image that is scored, ``[images]``, those of the val folder first."""


@dataclass(frozen=True)
class Result:
    """What a run left.

    Attributes:
        images: those scored, by name; the val folder's first.
        val_images: how many these are.
        float_top1: of the float network, per image 0 or 100.
        reverted: units that learning made no better, kept as before it.
        seconds: by stage.
        range_only, reconstructed: the network before and after reconstruction.
    """

    images: list[str]
    val_images: int
    float_top1: Values
    reverted: int
    seconds: dict[str, float]
    range_only: Outcome
    reconstructed: Outcome

    def of(self, images: Collection[str]) -> "Result":
        """The same of these images alone, in the run's order."""
        places = [place for place, name in enumerate(self.images) if name in images]
        range_only, reconstructed = (
            {metric: values[places] for metric, values in outcome.items()}
            for outcome in (self.range_only, self.reconstructed)
        )
        return replace(
            self,
            images=[self.images[place] for place in places],
            val_images=sum(place < self.val_images for place in places),
            float_top1=self.float_top1[places],
            range_only=range_only,
            reconstructed=reconstructed,
        )

    def on_val(self) -> "Result":
        """The same of the val folder's images alone."""
        return self.of(set(self.images[: self.val_images]))


class Scorer:
    """The float network and the images to score, which runs share.

    Args:
        config: checked; of it only what no variant may change is read.
        model: the float network, on the device.
        others: images to score beside those of the val folder, after them.
    """

    def __init__(
        self, config: EasyDict, model: nn.Module, device: torch.device, others: Sequence[Sample] = ()
    ) -> None:
        self.config, self.model, self.device = config, model, device
        self.loaders = [validation_loader(config, device)]
        if others:
            transform = evaluation_transform(config.data)
            self.loaders.append(make_loader(list(others), transform, config, device))

    @cached_property
    def identity(self) -> str:
        """Tells weights and images apart, the latter by their names and sizes."""
        samples = chain.from_iterable(loader.dataset.samples for loader in self.loaders)
        return checksum({"weights": dict(self.model.state_dict()), "val": names_and_sizes(samples)})

    @cached_property
    def truth(self) -> "Truth":
        """The float network's. Found when first needed.

        Raises:
            UserError: no image of the val folder can be read, or a logit is no number.
        """
        read = [list(self._run(self.model, loader)) for loader in self.loaders]
        if not read[0]:
            raise UserError("val folder: no image in it can be read")
        paths, logits, targets = zip(*chain.from_iterable(read), strict=True)
        Reference(list(logits)).compare(logits)
        names = ["/".join(path.parts[-3:]) for path in paths]
        return Truth(names, len(read[0]), torch.cat(logits), torch.cat(targets))

    def outcome(self, network: nn.Module) -> Outcome:
        """Each image's metrics of a network against the float one."""
        truth = self.truth
        known = zip(truth.logits.split(1), truth.targets.split(1), strict=True)
        found = chain.from_iterable(self._run(network, loader) for loader in self.loaders)
        images = [
            image_metrics(expected, logits, target, truth.temperature)
            for (expected, target), (_, logits, _) in zip(known, found, strict=True)
        ]
        return {metric: np.array([image[metric] for image in images], float) for metric in METRICS}

    @torch.no_grad()
    def _run(self, network: nn.Module, loader: DataLoader[Any]) -> Iterator[tuple[Path, Tensor, Tensor]]:
        """Path, logits ``[1, classes]`` and class ``[1]`` of each readable image, on the CPU."""
        samples = iter(loader.dataset.samples)
        for batch in batches(loader, "evaluate"):
            skipped = {one.path for one in report_unreadable(batch, self.config.data.skip_unreadable)}
            here = islice(samples, len(batch.targets) + len(skipped))
            paths = [path for path, _ in here if path not in skipped]
            if paths:
                logits = network(batch.images.to(self.device, non_blocking=True)).cpu()
                yield from zip(paths, logits.split(1), batch.targets.clone().split(1), strict=True)


@dataclass(frozen=True)
class Truth:
    """What networks are held against.

    Attributes:
        images: those that can be read, by name; the val folder's first.
        val_images: how many these are.
        logits: the float network's, ``[images, classes]``.
        targets: classes, ``[images]``.
    """

    images: list[str]
    val_images: int
    logits: Tensor
    targets: Tensor

    @property
    def top1(self) -> Values:
        """Of the float network, per image 0 or 100."""
        return 100 * (self.logits.argmax(1) == self.targets).double().numpy()

    @cached_property
    def temperature(self) -> float:
        """See :func:`fitted_temperature`."""
        return fitted_temperature(self.logits, self.targets)


def image_metrics(expected: Tensor, found: Tensor, target: Tensor, temperature: float) -> dict[str, float]:
    """What quantization costs on one image: :class:`Cost`'s metrics, in percent 0 or 100, and another.

    ``expected_drop`` is the drop of top-1, in points, that the float network's probabilities foresee: that
    of the class it predicts less that of the class predicted here, 0 where these are the same. It has less
    noise than the drop: of an image whose prediction changes a label says 100, 0 or -100.

    Args:
        expected, found: logits ``[1, classes]`` of the float network and of the other, which may have
            diverged: KL then is NaN.
        target: class ``[1]``.
        temperature: of the float network's probabilities, see :func:`fitted_temperature`.
    """
    chances = 100 * (expected.double() / temperature).softmax(1)[0]
    drop = chances[expected.argmax()] - chances[found.argmax()]
    return asdict(Reference([expected], [target]).cost([found])) | {"expected_drop": float(drop)}


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Keep the seconds that a stage takes."""
    began = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - began


def execute(point: Point, scorer: Scorer, folder: Path) -> Result:
    """Quantize, calibrate, reconstruct and score, as ``main_imagenet.py`` does, without saving the network.

    Args:
        folder: for cached activations that fit nowhere else.
    """
    config, seconds = point.config, dict[str, float]()
    fix_randomness(config.process.seed, config.process.deterministic)
    images, truth = calibration_images(point), scorer.truth
    with timed(seconds, "calibrate"):
        network = quantize_model(scorer.model, config)
        calibrate(network, images, config)
    with timed(seconds, "evaluate_range_only"):
        range_only = scorer.outcome(network)
    settings = recon_settings(config, len(images))
    store, engine = choose_store(network, images, settings, folder), choose_engine(settings.compile)
    with timed(seconds, "reconstruct"):
        units = reconstruct(
            network, images, settings, config.process.seed, progress_bar, store=store, engine=engine
        )
        reverted = sum(unit.reverted for unit in units)
    with timed(seconds, "evaluate"):
        reconstructed = scorer.outcome(network)
    return Result(truth.images, truth.val_images, truth.top1, reverted, seconds, range_only, reconstructed)


def calibration_images(point: Point) -> Tensor:
    """A run's calibration images ``[N, 3, H, W]``, on the CPU.

    Raises:
        UserError: one is unreadable (unless `data.skip_unreadable`), or all are.
    """
    reader = Reader(point.config, torch.device("cpu"), point.config.data.skip_unreadable)
    read = [images.clone() for images, _ in reader.read(point.images.paths, point.set)]  # see to_keep
    if not read:
        raise UserError(f"--sets {point.images.given}: no image of it can be read")
    return torch.cat(read)


def recall(path: Path) -> Result | None:
    """A run that a file keeps, None where there is none.

    Raises:
        UserError: the file is not what :func:`keep` writes.
    """
    if not path.exists():
        return None
    try:
        kept = json.loads(path.read_text())["result"]
        outcomes = {stage: {m: np.array(kept[stage][m], float) for m in METRICS} for stage in STAGES}
        return Result(**{**kept, **outcomes, "float_top1": np.array(kept["float_top1"], float)})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read as a run; remove it to run anew") from error


def keep(path: Path, point: Point, result: Result) -> None:
    """Write a run's file, whole or not at all."""
    about = {"run": str(point), "sha256": point.sha256, "versions": versions()}
    content = about | {"result": asdict(result)}
    write_bytes(path, json.dumps(content, default=np.ndarray.tolist).encode())
