"""What ``select_calibration.py --score`` does: find sets, run their images, rank the sets, show a table."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from easydict import EasyDict
from torch import Tensor

from calibquant.errors import UserError, printable
from calibquant.model.quant_layer import calibrate_weights
from calibquant.paths import is_file
from calibquant.solver.calibration_score import float_reference, ranges_cost, statistics_distances
from calibquant.solver.image_reader import Reader, as_they_are
from calibquant.solver.imagenet_util import content_hash, list_samples, subfolders
from calibquant.solver.pipeline import float_model, quantize_model
from calibquant.solver.probe import Cost

SCORES = ("statistics", "ranges")
"""What sets can be ranked by."""
MAX_LIST_BYTES = 2**28
"""Of a text file that lists images; one of all ImageNet takes 40 MB."""


@dataclass(frozen=True)
class ImageSet:
    """Images of a calibration set, and their names in it, in the order in which calibration reads them."""

    given: str
    paths: list[Path]
    names: list[str]


@dataclass(frozen=True)
class SetScore:
    """What a set scores; None for what was not asked for.

    Attributes:
        sha256: as `metrics.json` has it of a run on the whole set.
        statistics: :func:`statistics_distance`.
        ranges: :func:`ranges_cost`.
    """

    set: str
    images: int
    sha256: str
    statistics: float | None = None
    ranges: Cost | None = None

    def value(self, score: str) -> float:
        """The number to rank by: lower is better."""
        value = self.statistics if score == "statistics" else self.ranges.kl if self.ranges else None
        assert value is not None
        return value


def find_set(given: Path, train: Path, option: str = "--score") -> ImageSet:
    """A calibration set: a folder as configs read it, or a text file of images, one a line.

    Args:
        train: folder that the lines of a text file are relative to.
        option: what it was given by.

    Raises:
        UserError: it is missing or empty, or a line names no file or one a second time.
    """
    what = f"{option}: calibration folder"
    if not is_file(given):
        classes = [folder.name for folder in subfolders(given, what)]
        paths = [path for path, _ in list_samples(given, classes, what)]
        return ImageSet(str(given), paths, [str(path.relative_to(given)) for path in paths])
    names = sorted(_read_lines(given, option), key=lambda name: Path(name).parts)  # as a folder's are
    seen: set[Path] = set()
    for name in names:
        image = _resolved(train / name) if is_file(train / name) else None  # a path has many spellings
        if image is None or image in seen:
            reason = "listed twice" if image else f"no file in {train}"
            raise UserError(f"{option} {given}: {printable(name, 200)} is {reason}")
        seen.add(image)
    return ImageSet(str(given), [train / name for name in names], names)


def _resolved(path: Path) -> Path:
    """A path without links; unlike Path.resolve, no error for a link that loops: it is unreadable."""
    return Path(os.path.realpath(path))


def _read_lines(path: Path, option: str) -> list[str]:
    try:
        if path.stat().st_size > MAX_LIST_BYTES:
            raise ValueError("it is too large")
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
        if not any(lines):
            raise ValueError("it is empty")
    except (OSError, ValueError) as error:
        raise UserError(f"{option} {path}: cannot be read as a list of images: {error}") from error
    return [line for line in lines if line]


def rank_sets(
    sets: list[ImageSet],
    config: EasyDict,
    device: torch.device,
    by: list[str],
    reference: ImageSet | None = None,
) -> list[SetScore]:
    """Scores of sets for the config's network, the best first.

    Args:
        by: of :data:`SCORES`; the first of them ranks.
        reference: images for which outputs are compared (``ranges``), None for those of all sets.

    Raises:
        UserError: an image is unreadable (unless `data.skip_unreadable`), a set has no readable one, or
            the network's weights are not as they must be.
    """
    reader = Reader(as_they_are(config), device, skip=config.data.skip_unreadable)
    # a set of links and the train folder that it links to share their images
    sets = [ImageSet(one.given, list(map(_resolved, one.paths)), one.names) for one in sets]
    union = list(dict.fromkeys(path for one in sets for path in one.paths))
    scorers: dict[str, Callable[[], list[Any]]] = {
        "statistics": lambda: score_statistics(sets, union, reader),
        "ranges": lambda: score_ranges(sets, reference.paths if reference else union, reader),
    }
    found = {score: scorers[score]() for score in by}
    scores = []
    for number, one in enumerate(sets):
        values = {score: values[number] for score, values in found.items()}
        read = {
            name: path for name, path in zip(one.names, one.paths, strict=True) if reader.could_read(path)
        }
        digest = content_hash(list(read.values()), list(read))
        scores.append(SetScore(one.given, len(read), digest, **values))
    return sorted(scores, key=lambda score: score.value(by[0]))


def score_statistics(sets: list[ImageSet], union: list[Path], reader: Reader) -> list[float]:
    """Distance of each set's activation statistics from batch norm's running ones."""
    held = [Counter(one.paths) for one in sets]  # an image linked twice counts twice, as in a run

    def members() -> Iterator[tuple[Tensor, Tensor]]:
        for images, paths in reader.read(union, "statistics"):
            yield images, torch.tensor([[some[path] for path in paths] for some in held])
        _require_readable(sets, reader)

    try:
        return statistics_distances(float_model(reader.config).to(reader.device), members())
    except ValueError as error:
        raise UserError(f"--score: {error}") from error


def score_ranges(sets: list[ImageSet], measured: list[Path], reader: Reader) -> list[Cost]:
    """Cost of the quantized network with ranges from each set."""
    model = quantize_model(float_model(reader.config).to(reader.device), reader.config)

    def images(paths: list[Path], description: str) -> Iterator[Tensor]:
        yield from (images for images, _ in reader.read(paths, description))

    costs = []
    try:
        calibrate_weights(model)
        reference = float_reference(model, images(measured, "float outputs"))
        if not reference.logits:
            raise UserError("--reference: no image of it can be read")
        for one in sets:
            calibration = images(one.paths, f"ranges of {one.given}")
            costs.append(ranges_cost(model, calibration, images(measured, "outputs"), reference))
    except ValueError as error:
        _require_readable(sets, reader)
        raise UserError(f"calibration: {error}") from error
    return costs


def _require_readable(sets: list[ImageSet], reader: Reader) -> None:
    for one in sets:
        if not any(map(reader.could_read, one.paths)):
            raise UserError(f"--score {one.given}: no image of it can be read")


def table(scores: list[SetScore]) -> list[str]:
    """Lines of the table, a set each, in the order given."""
    width = max(len(score.set) for score in [*scores, SetScore("set", 0, "")])
    titles = ["statistics"] if scores[0].statistics is not None else []
    titles += ["KL", "same %"] if scores[0].ranges is not None else []
    lines = [f"{'set':{width}}{'images':>8}{''.join(f'{title:>12}' for title in titles)}  sha256"]
    for score in scores:
        cells = [] if score.statistics is None else [f"{score.statistics:.5f}"]
        cells += [] if score.ranges is None else [f"{score.ranges.kl:.5f}", f"{score.ranges.agreement:.2f}"]
        numbers = "".join(f"{cell:>12}" for cell in cells)
        lines.append(f"{score.set:{width}}{score.images:>8}{numbers}  {score.sha256[:12]}")
    return lines


def as_json(scores: list[SetScore], by: list[str], config: EasyDict) -> dict[str, Any]:
    """What ``--json`` writes."""
    return {"model": config.model.type, "by": by, "sets": [asdict(score) for score in scores]}
