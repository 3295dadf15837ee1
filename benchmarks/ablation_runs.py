"""One run of an ablation, and the runs that a folder keeps, each as a value per val image."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from easydict import EasyDict
from torch import Tensor, nn

from benchmarks.ablation_plan import Point
from benchmarks.ablation_statistics import Values
from calibquant.errors import UserError
from calibquant.solver.cache_plan import choose_store
from calibquant.solver.checkpoint import checksum
from calibquant.solver.fast import choose_engine
from calibquant.solver.files import write_bytes
from calibquant.solver.image_reader import Reader
from calibquant.solver.imagenet_util import batches, report_unreadable, validation_loader
from calibquant.solver.main_imagenet import progress_bar
from calibquant.solver.pipeline import (
    calibrate,
    fix_randomness,
    float_model,
    quantize_model,
    recon_settings,
)
from calibquant.solver.probe import Cost, Reference
from calibquant.solver.recon import reconstruct
from calibquant.solver.run_log import versions

METRICS = ("top1", "agreement", "kl")
"""What is measured of each image: see :class:`Cost`; per image, a percentage is 0 or 100."""

STAGES = ("range_only", "reconstructed")
"""When a run's network is scored."""

Outcome = dict[str, Values]
"""By metric, a value per val image, ``[images]``."""


@dataclass(frozen=True)
class Result:
    """What a run left.

    Attributes:
        float_top1: of the float network, in percent.
        reverted: units that learning made no better, kept as before it.
        seconds: by stage.
        range_only, reconstructed: the network before and after reconstruction.
    """

    float_top1: float
    reverted: int
    seconds: dict[str, float]
    range_only: Outcome
    reconstructed: Outcome


class Scorer:
    """The float network and the val images, which all runs share.

    Args:
        config: checked; of it only what no variant may change is read.
    """

    def __init__(self, config: EasyDict, device: torch.device) -> None:
        self.config, self.device = config, device
        self.model = float_model(config).to(device)
        self.loader = validation_loader(config)

    @cached_property
    def identity(self) -> str:
        """Tells weights and val images apart, the latter by their names."""
        names = [f"{path.parent.name}/{path.name}" for path, _ in self.loader.dataset.samples]
        return checksum({"weights": dict(self.model.state_dict()), "val": names})

    @cached_property
    def reference(self) -> Reference:
        """The float network's logits and the classes, an image an entry; found when first needed."""
        pairs = list(self._run(self.model))
        if not pairs:
            raise UserError("val folder: no image in it can be read")
        return Reference([logits for logits, _ in pairs], [target for _, target in pairs])

    @property
    def float_top1(self) -> float:
        top1 = self.reference.compare(self.reference.logits).top1
        assert top1 is not None
        return top1

    def outcome(self, network: nn.Module) -> Outcome:
        """Each val image's metrics of a network against the float one."""
        assert self.reference.targets is not None
        known = zip(self.reference.logits, self.reference.targets, strict=True)
        costs: list[Cost] = [
            Reference([logits], [target]).compare([found])
            for (logits, target), (found, _) in zip(known, self._run(network), strict=True)
        ]
        return {metric: np.array([asdict(cost)[metric] for cost in costs], float) for metric in METRICS}

    @torch.no_grad()
    def _run(self, network: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits ``[1, classes]`` and class ``[1]`` of each readable val image, on the CPU."""
        for batch in batches(self.loader, "evaluate"):
            report_unreadable(batch, self.config.data.skip_unreadable)
            if len(batch.images):
                logits = network(batch.images.to(self.device, non_blocking=True)).cpu()
                yield from zip(logits.split(1), batch.targets.split(1), strict=True)


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
    images, float_top1 = calibration_images(point), scorer.float_top1
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
    return Result(float_top1, reverted, seconds, range_only, reconstructed)


def calibration_images(point: Point) -> Tensor:
    """A run's calibration images ``[N, 3, H, W]``, on the CPU.

    Raises:
        UserError: one is unreadable (unless `data.skip_unreadable`), or all are.
    """
    reader = Reader(point.config, torch.device("cpu"), point.config.data.skip_unreadable)
    read = [images for images, _ in reader.read(point.images.paths, point.set)]
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
        outcomes = [{m: np.array(kept[stage][m], float) for m in METRICS} for stage in STAGES]
        return Result(kept["float_top1"], kept["reverted"], kept["seconds"], *outcomes)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read as a run; remove it to run anew") from error


def keep(path: Path, point: Point, result: Result) -> None:
    """Write a run's file, whole or not at all."""
    about = {"run": str(point), "sha256": point.sha256, "versions": versions()}
    content = about | {"result": asdict(result)}
    write_bytes(path, json.dumps(content, default=np.ndarray.tolist).encode())
