"""What an ablation runs: variants of a config, each at bit-widths, on calibration sets, with seeds."""

import copy
import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from easydict import EasyDict

from calibquant.errors import UserError, printable
from calibquant.paths import expand, is_file
from calibquant.solver.config import KEYS, check_config, load_config, lookup, plain
from calibquant.solver.imagenet_util import (
    Sample,
    class_names,
    content_hash,
    drawn,
    list_samples,
    require_classes,
)
from calibquant.solver.rank_sets import ImageSet, find_set
from calibquant.solver.resume import HARMLESS

logger = logging.getLogger("calibquant")

Edits = Mapping[str, Any]
"""New values by dotted path of the config."""

PRESETS: dict[str, Edits] = {
    "ours": {},
    "qdrop": {
        "quant.equalize.shift": False,
        "quant.equalize.iters": 0,
        "quant.equalize.scope": "network",
        "quant.recon.round_mode": "learned_hard_sigmoid",
        "quant.recon.drop_prob": 0.5,
        "quant.recon.granularity": "block",
        "quant.recon.compensate": False,
        "quant.recon.ranges": "float",
        "quant.recon.weight_scale_lr": 0.0,
        "quant.recon.merge": [],
        "quant.recon.views": 1,
        "quant.recon.held_out": 0.0,
        "quant.distil.after": [],
        "data.sharpness": [1, 1],
    },
}
"""Variants that need no edits: the config as it is, and what it has beyond QDrop (ICLR 2022) taken off.

Learning rates stay the config's; ``qdrop=exp/.../qdrop.yaml`` takes QDrop's own."""
OF_CALIBRATION_IMAGES = ("data.augment", "data.sharpness")
"""Keys outside of `quant` that say how calibration images, and they alone, are read."""


@dataclass(frozen=True)
class Variant:
    """A name, a `quant` section that takes the config's place (None: the config's own), and edits.

    Where the section is a file's, edits say how that file's calibration images are read, too.
    """

    name: str
    quant: Mapping[str, Any] | None
    edits: Edits


@dataclass(frozen=True)
class Point:
    """One run: what it is called in tables, and what determines its result.

    Attributes:
        config: checked; its seed and bits are the point's.
        images: the images that calibration takes of the set.
        sha256: hash of those images, as in a run's `metrics.json` if none is unreadable.
    """

    bits: str
    variant: str
    set: str
    seed: int
    config: EasyDict
    images: ImageSet
    sha256: str

    def __str__(self) -> str:
        return f"{self.bits} {self.variant} {self.set} seed {self.seed}"

    def key(self, scored: str) -> str:
        """Name of the run's file: a hash of config, images and of what is scored, but not of the code.

        Weights are part of what is scored.
        """
        config = plain(self.config)
        for path in HARMLESS:
            section, name = path.split(".")
            del config[section][name]
        written = json.dumps([config, self.sha256, scored], sort_keys=True)
        return hashlib.sha256(written.encode()).hexdigest()[:16]


def parse_variant(given: str) -> Variant:
    """A variant as ``--variants`` takes it: ``NAME``, ``NAME=YAML``, either with ``,KEY=VALUE`` behind it.

    Raises:
        UserError: it is none of these, the YAML is not as it must be, or a value is no YAML.
    """
    what = f"--variants {printable(given, 200)}"
    start, *pairs = re.split(r",(?=[\w.]+=)", given)
    name, equals, path = start.partition("=")
    if not re.fullmatch(r"[\w-]+", name):
        raise UserError(f"{what}: allowed is NAME or NAME=YAML, and then ,KEY=VALUE as often as you like")
    edits = {key: _value(text, what) for key, _, text in (pair.partition("=") for pair in pairs)}
    if equals:
        own = load_config(path)
        read = {key: lookup(own, key) for key in OF_CALIBRATION_IMAGES}
        return Variant(name, plain(own)["quant"], {**read, **edits})
    if name not in PRESETS and not edits:
        raise UserError(f"{what}: changes nothing; allowed without KEY=VALUE are {', '.join(PRESETS)}")
    edited_preset = name in PRESETS and bool(edits)
    return Variant(given if edited_preset else name, None, {**PRESETS.get(name, {}), **edits})


def _value(text: str, what: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # such as a date of month 13
        raise UserError(f"{what}: {printable(text, 80)} is no valid YAML value") from error


def parse_bits(given: str) -> Edits:
    """``w4a4`` as bits of weights and activations.

    Raises:
        UserError: it is not of that form.
    """
    found = re.fullmatch(r"w(\d)a(\d)", given)
    if not found:
        raise UserError(f"--bits {printable(given, 80)}: allowed is the form w4a4")
    return {"quant.w_qconfig.bit": int(found[1]), "quant.a_qconfig.bit": int(found[2])}


def bits_of(config: EasyDict) -> str:
    """A config's own bits in the form of ``--bits``."""
    return f"w{config.quant.w_qconfig.bit}a{config.quant.a_qconfig.bit}"


def edited(raw: Mapping[str, Any], edits: Edits) -> dict[str, Any]:
    """A nested config with new values at dotted paths; unchecked, and the given one stays as it is."""
    result: dict[str, Any] = copy.deepcopy(dict(raw))
    for path, value in edits.items():
        *sections, name = path.split(".")
        target = result
        for section in sections:
            if not isinstance(target.get(section), dict):
                target[section] = {}
            target = target[section]
        target[name] = value
    return result


def resized(data: EasyDict, size: int | None) -> Edits:
    """Edits for images of another size, with the margin around the crop in proportion."""
    if size is None:
        return {}
    return {
        "data.input_size": size,
        "data.test_resize": max(size, round(size * data.test_resize / data.input_size)),
    }


def variant_config(raw: Mapping[str, Any], variant: Variant, overrides: Edits, what: str) -> EasyDict:
    """The checked config of a variant; its edits win over the overrides that all variants share.

    Args:
        what: begins an error's line.

    Raises:
        UserError: a key is unknown, its value not allowed, or not a variant's to change.
    """
    start = raw if variant.quant is None else {**raw, "quant": variant.quant}
    config = check_config(edited(start, {**overrides, **variant.edits}), what)
    for path in variant.edits:
        if not path.startswith("quant.") and path not in OF_CALIBRATION_IMAGES:
            # others settle the float network, or the images that all are scored on
            allowed = f"quant.*, {' and '.join(OF_CALIBRATION_IMAGES)}"
            raise UserError(f"{what}: {path} must be the same for all, allowed are {allowed}")
    return config


def changes(config: EasyDict, base: EasyDict) -> dict[str, Any]:
    """Keys that a variant's config has unlike the base's, but for the bits and the seed, and its values."""
    keys = [key.path for key in KEYS if not key.path.endswith((".bit", "process.seed"))]
    return {path: lookup(config, path) for path in keys if lookup(config, path) != lookup(base, path)}


def find_sets(given: Sequence[str], data: EasyDict) -> dict[str, ImageSet]:
    """Calibration sets by the names that tables give them; without any the config's own.

    Raises:
        UserError: a set is missing or empty, or given twice.
    """
    root = expand(data.path, "data.path")
    if not given:
        own = root / expand(data.calibration, "data.calibration")
        return {data.calibration: find_set(own, root / "train", "--config")}
    short = [Path(one).stem if is_file(Path(one)) else Path(one).absolute().name for one in given]
    names = short if len(set(short)) == len(short) else unique(given, "--sets")
    sets = [find_set(Path(one), root / "train", "--sets") for one in given]
    return dict(zip(names, sets, strict=True))


def unique(values: Sequence[Any], option: str) -> list[Any]:
    """The values.

    Raises:
        UserError: one stands twice.
    """
    for value in values:
        if values.count(value) > 1:
            raise UserError(f"{option}: {printable(str(value), 200)} stands twice")
    return list(values)


def taken(one: ImageSet, count: int, seed: int) -> ImageSet:
    """The images that `quant.calibrate` takes of a set."""
    chosen = drawn(len(one.paths), count, seed)
    return ImageSet(one.given, [one.paths[i] for i in chosen], [one.names[i] for i in chosen])


def unused(data: EasyDict, points: Iterable[Point]) -> list[Sample]:
    """Images of the train folder that no run calibrates with, told by their names, with their classes.

    Raises:
        UserError: the folder is missing, its images are not in class folders, or all are used.
    """
    folder = expand(data.path, "data.path") / "train"
    seen = {path.name for point in points for path in point.images.paths}
    found = [
        sample
        for sample in list_samples(folder, class_names(data), "train folder")
        if sample[0].name not in seen
    ]
    where = f"--unused: train folder {folder}"
    if not found:
        raise UserError(f"{where}: runs calibrate with every image")
    require_classes(found, where)
    return found


def plan(
    raw: Mapping[str, Any],
    bits: Mapping[str, Edits],
    variants: Iterable[Variant],
    sets: Mapping[str, ImageSet],
    seeds: Iterable[int],
    overrides: Edits,
) -> Iterator[Point]:
    """Every run, such that an early end leaves whole comparisons: all variants of a set, then the next.

    Args:
        raw: the config's values, nested.
        overrides: edits that all runs share.

    Raises:
        UserError: see :func:`variant_config`; an image cannot be read.
    """
    digests: dict[tuple[Path, ...], str] = {}
    for seed, (name, whole), (width, widths), variant in product(
        seeds, sets.items(), bits.items(), list(variants)
    ):
        shared = {**overrides, **widths, "process.seed": seed}
        config = variant_config(raw, variant, shared, f"{width} {variant.name}")
        images = taken(whole, config.quant.calibrate, seed)
        same = tuple(images.paths)
        digests[same] = digests.get(same) or content_hash(images.paths, images.names)
        yield Point(width, variant.name, name, seed, config, images, digests[same])
