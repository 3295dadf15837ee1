"""A run's files as a report needs them.

They may be of an older version, of a run that was killed, or edited by hand: whatever is missing or odd
becomes NaN or nothing, is cut to a sane length, and the rest is shown all the same.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibquant.errors import UserError, printable

MAX_BYTES = 2**26
"""Of a file that is read; those of a ResNet-152 by layers have under 2 MB."""
MAX_UNITS, MAX_POINTS, MAX_SETTINGS = 400, 200, 500
"""Units or activations, points of a curve, and keys of a config that are shown."""
SCORES = {"float": "float", "range_only": "ranges only", "quantized": "quantized"}
"""Keys of `metrics.json` that hold an accuracy, and what they are called."""


@dataclass(frozen=True)
class Score:
    """Accuracy in percent over a number of images; ``skipped`` more were unreadable."""

    top1: float
    top5: float
    images: float
    skipped: float


@dataclass(frozen=True)
class UnitRow:
    """One unit: its errors, shares in [0, 1], peak memory so far in GiB, and its losses.

    ``trace`` holds ``(step, reconstruction, rounding)``. Where it is of units that learned on by the
    network's output (``distilled``), errors are divergences.
    """

    name: str
    before: float
    after: float
    held_out_before: float
    held_out_after: float
    seconds: float
    moved: float
    unconverged: float
    memory: float
    reverted: bool
    distilled: bool
    trace: list[tuple[float, float, float]]


@dataclass(frozen=True)
class RangeRow:
    """A clipping range and the share of values outside of it."""

    low: float
    high: float
    clipped: float


@dataclass(frozen=True)
class ActivationRow:
    """An activation's histogram: ``counts`` without zeros in equal bins from ``low`` to ``high``."""

    name: str
    bits: int
    channels: int
    low: float
    high: float
    elements: float
    zeros: float
    counts: list[float]
    calibrated: RangeRow | None
    learned: RangeRow | None


@dataclass(frozen=True)
class Run:
    """Everything that is known of a run; see :func:`read_run`.

    Attributes:
        compensated: learning began at the grid points that compensation chose.
        soft: roundings were learned under a regulariser, as in AdaRound.
        damage: why its `report.json` could not be read, empty where it could or there is none.
    """

    name: str
    network: str
    command: str
    scores: dict[str, Score]
    checkpoint: str
    checkpoint_mb: float
    float32_mb: float
    seconds: dict[str, float]
    memory: dict[str, float]
    units: list[UnitRow]
    compensated: bool
    soft: bool
    iters: float
    distil_iters: float
    warm_up: float
    b_range: list[float]
    histogram_images: float
    activations: list[ActivationRow]
    thumbnails: list[tuple[str, str]]
    calibration: dict[str, Any]
    settings: list[tuple[str, str]]
    versions: list[tuple[str, str]]
    damage: str


def read_run(folder: Path) -> Run:
    """Read a run's `metrics.json`, and `report.json` if it is there and whole.

    Raises:
        UserError: there is no `metrics.json`, or it holds no mapping.
    """
    metrics = read_mapping(folder / "metrics.json")
    extra, damage = {}, ""
    if (folder / "report.json").exists():
        try:
            extra = read_mapping(folder / "report.json")
        except UserError as error:
            damage = printable(str(error), 300)
    config, recon = mapping(metrics, "config"), mapping(metrics, "config", "quant", "recon")
    command = metrics.get("command")
    words = command if isinstance(command, list) else [command]
    return Run(
        name=printable(folder.resolve().name, 80),
        network=printable(folder.resolve().parent.name, 120),
        command=printable(" ".join(str(word) for word in words[:50] if word), 500),
        scores={key: score(metrics[key]) for key in SCORES if isinstance(metrics.get(key), dict)},
        checkpoint=text(metrics.get("checkpoint"), 300),
        checkpoint_mb=number(metrics.get("checkpoint_mb")),
        float32_mb=number(metrics.get("float32_mb")),
        seconds={printable(k, 40): number(v) for k, v in [*mapping(metrics, "seconds").items()][:40]},
        memory={key: number(metrics.get(key)) for key in ("peak_memory_gib", "peak_host_memory_gib")},
        units=[unit_row(entry) for entry in mappings(metrics.get("units"))],
        compensated=recon.get("compensate") is True,
        soft=recon.get("round_mode", "learned_hard_sigmoid") == "learned_hard_sigmoid",
        iters=number(recon.get("iters")),
        distil_iters=number(mapping(config, "quant", "distil").get("iters")),
        warm_up=number(recon.get("warm_up")),
        b_range=numbers(recon.get("b_range"), 2),
        histogram_images=number(extra.get("images")),
        activations=[activation_row(entry) for entry in mappings(extra.get("activations"))],
        thumbnails=[*pictures(extra.get("thumbnails"))],
        calibration=mapping(metrics, "calibration"),
        settings=[*flat(config)][:MAX_SETTINGS],
        versions=[*flat(mapping(metrics, "versions"))][:MAX_SETTINGS],
        damage=damage,
    )


def read_mapping(path: Path) -> dict[str, Any]:
    """A JSON file that holds a mapping.

    Raises:
        UserError: it is missing, too long or something else.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"longer than {MAX_BYTES} bytes, the most that is allowed")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or printable(str(error), 200)
        raise UserError(f"{path}: cannot be read: {reason}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no mapping, as a run's files do")
    return content


def mapping(content: Any, *keys: str) -> dict[str, Any]:
    """The mapping at nested keys, or an empty one."""
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content if isinstance(content, dict) else {}


def mappings(content: Any) -> list[dict[str, Any]]:
    """Those entries of a list that are mappings, `MAX_UNITS` at most."""
    entries = content if isinstance(content, list) else []
    return [entry for entry in entries[:MAX_UNITS] if isinstance(entry, dict)]


def number(value: Any) -> float:
    """A number, or NaN for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def numbers(value: Any, most: int) -> list[float]:
    return [number(entry) for entry in value[:most]] if isinstance(value, list) else []


def text(value: Any, limit: int = 60) -> str:
    """A text on one printable line, empty for anything else."""
    return printable(value[: 10 * limit], limit) if isinstance(value, str) else ""


def score(entry: dict[str, Any]) -> Score:
    return Score(*(number(entry.get(key)) for key in ("top1", "top5", "images", "skipped")))


def unit_row(entry: dict[str, Any]) -> UnitRow:
    points = [
        (number(point.get("step")), number(point.get("reconstruction")), number(point.get("rounding")))
        for point in mappings(entry.get("trace"))[:MAX_POINTS]
    ]
    return UnitRow(
        name=text(entry.get("name")) or "?",
        before=number(entry.get("error_before")),
        after=number(entry.get("error_after")),
        held_out_before=number(entry.get("held_out_before")),
        held_out_after=number(entry.get("held_out_after")),
        seconds=number(entry.get("seconds")),
        moved=number(entry.get("moved", entry.get("rounded_away"))),  # as it was called before
        unconverged=number(entry.get("unconverged")),
        memory=number(entry.get("peak_memory_gib")),
        reverted=entry.get("reverted") is True,
        distilled=entry.get("distilled") is True,
        trace=points,
    )


def activation_row(entry: dict[str, Any]) -> ActivationRow:
    bits, channels = number(entry.get("bits")), number(entry.get("channels"))
    low, high, elements, zeros = (number(entry.get(key)) for key in ("low", "high", "elements", "zeros"))
    return ActivationRow(
        text(entry.get("name")) or "?",
        int(bits) if 1 <= bits <= 32 else 0,
        int(channels) if 1 <= channels < 10**6 else 1,
        low,
        high,
        elements,
        zeros,
        [count if count > 0 else 0.0 for count in numbers(entry.get("counts"), 1000)],
        range_row(entry.get("calibrated")),
        range_row(entry.get("learned")),
    )


def range_row(entry: Any) -> RangeRow | None:
    """A clipping range, None where it is missing or not finite."""
    if not isinstance(entry, dict):
        return None
    found = RangeRow(*(number(entry.get(key)) for key in ("low", "high", "clipped")))
    return found if math.isfinite(found.low) and math.isfinite(found.high) else None


def pictures(content: Any) -> Iterator[tuple[str, str]]:
    """``(file name, JPEG in base64)`` of what are such pictures and nothing else."""
    for entry in mappings(content):
        jpeg = entry.get("jpeg")
        if isinstance(jpeg, str) and len(jpeg) < 50_000 and re.fullmatch(r"/9j/[A-Za-z0-9+/]+={0,2}", jpeg):
            yield text(entry.get("file"), 200), jpeg


def flat(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys and values as text of a nested mapping."""
    for key, value in content.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict) and prefix.count(".") < 8:
            yield from flat(value, path + ".")
        else:
            yield printable(path, 100), printable(_shown(value), 300)


def _shown(value: Any) -> str:
    try:
        return (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))[:2000]
    except (ValueError, RecursionError):  # nested too deeply
        return "?"
