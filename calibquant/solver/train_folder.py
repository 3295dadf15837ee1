"""Candidates in a train folder: which there are, which can be read, and what they do to a network."""

import hashlib
import logging
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from easydict import EasyDict
from tqdm import tqdm

from calibquant.errors import UserError, printable
from calibquant.solver.activation_statistics import channel_weights, image_moments
from calibquant.solver.checkpoint import checksum
from calibquant.solver.image_reader import Reader, as_they_are
from calibquant.solver.imagenet_util import (
    ResizeShorter,
    imagenet_wnids,
    images_inside,
    is_image,
    read_image,
    subfolders,
)
from calibquant.solver.pipeline import float_model
from calibquant.solver.script import one_line
from calibquant.solver.selection import Candidates, Pool, choose_random, class_of, spare

logger = logging.getLogger("calibquant")

RESIZE = ResizeShorter(256)
"""As configs usually read images: it refuses what calibration would refuse."""


def list_candidates(train: Path, classes: str) -> Candidates:
    """Images of each class folder, in an order that depends on names alone.

    Raises:
        UserError: the folder is missing, a class folder is no wnid where ``classes`` is ``imagenet``, or
            holds no image.
    """
    folders = subfolders(train, "train folder")
    if not folders:
        raise UserError(f"train folder {train}: holds no class folder, allowed is train/<class>/<image>")
    wnids = set(imagenet_wnids())
    candidates: Candidates = {}
    for folder in folders:
        if classes == "imagenet" and folder.name not in wnids:
            raise UserError(
                f"train folder {train}: class folder {folder.name} is none of ImageNet's 1,000 wnids "
                "(n01440764, n01443537, ...); --classes folders allows any name"
            )
        found = images_inside(folder)
        candidates[folder.name] = sorted(path.relative_to(train).as_posix() for path in found)
        if not candidates[folder.name]:
            raise UserError(f"train folder {train}: class folder {folder.name} holds no image")
    for path in sorted(train.iterdir()):
        if is_image(path) and not path.is_dir():
            logger.warning("%s: ignored, it is in no class folder", printable(str(path)))
    return candidates


def keep_readable(
    train: Path, candidates: Candidates, chosen: list[str], draw: random.Random, cover: bool = True
) -> dict[str, str]:
    """Decode every chosen image; one that cannot be read gives way to another of its class.

    Where its class has no other, any class steps in.

    Returns:
        SHA-256 of each image's file.

    Raises:
        UserError: a class that is to be covered has no readable image, or too few images are readable.
    """
    hashes: dict[str, str] = {}
    taken = set(chosen)
    for file in tqdm(chosen, desc="decode", leave=False, disable=None, unit="image"):
        while True:
            try:
                hashes[file] = hash_readable(train / file)
                break
            except ValueError as error:
                unreadable = file
                other = spare(unreadable, candidates, taken, draw)
                if other is None:
                    raise UserError(
                        f"image {file}: cannot be read, and no image is left to replace it; lower --num"
                    ) from error
                file = other
                taken.add(file)
                lost, instead = printable(str(train / unreadable)), printable(file)
                logger.warning("%s: cannot be read (%s), replaced by %s", lost, error, instead)
    check_covered(train, candidates, hashes, cover)
    return hashes


def hash_readable(path: Path) -> str:
    """SHA-256 of an image file that Pillow can decode, and that is not too long to be resized.

    Raises:
        ValueError: it cannot be read; the reason on one line.
    """
    try:
        if not path.is_file():
            raise ValueError("a broken link, or no regular file")
        RESIZE(read_image(path))
        content = path.read_bytes()
    except Exception as error:  # a decoder may raise anything on foreign bytes
        raise ValueError(one_line(error) or type(error).__name__) from error
    return hashlib.sha256(content).hexdigest()


def check_covered(train: Path, candidates: Candidates, files: Iterable[str], cover: bool) -> None:
    """Make sure that every class has an image, where classes are to be covered.

    Raises:
        UserError: one has none.
    """
    lost = candidates.keys() - {class_of(file) for file in files}
    if cover and lost:
        raise UserError(f"train folder {train}: no image of class folder {min(lost)} can be read")


@dataclass(frozen=True)
class PoolReader:
    """Runs candidates through a float network.

    Attributes:
        config: the network, and how it reads images.
        size: candidates to run, a random part of all where there are more.
    """

    config: EasyDict
    device: torch.device
    size: int = 8192

    def read(
        self, train: Path, candidates: Candidates, num: int, draw: random.Random, cover: bool = True
    ) -> Pool:
        """Candidates with what they do to the network; with ``cover`` some of every class.

        Raises:
            UserError: ``size`` or too few readable images for ``num``, a class without any, or a network
                that is not as it must be.
        """
        if self.size < num:
            raise UserError(f"--candidates is {self.size}, allowed is an integer of at least --num, {num}")
        size = min(self.size, sum(map(len, candidates.values())))
        files = sorted(choose_random(candidates, size, draw, cover))
        pool = self._run(train, candidates, files, draw)
        check_covered(train, candidates, pool.files, cover)
        if len(pool.files) < num:
            raise UserError(f"--num is {num}, but only {len(pool.files)} images of {train} can be read")
        return pool

    def _run(self, train: Path, candidates: Candidates, files: list[str], draw: random.Random) -> Pool:
        """What cannot be read gives way to another of its class, or of any where its class has no other."""
        model = float_model(self.config).to(self.device)
        weights, network = channel_weights(model), checksum(dict(model.state_dict()))
        moments = torch.empty(len(files), 2, len(weights))
        reader = Reader(as_they_are(self.config), self.device, skip=True)
        read: list[str] = []
        taken, waiting = set(files), files
        while waiting:
            for images, paths in reader.read([train / file for file in waiting], "run candidates"):
                try:
                    moments[len(read) : len(read) + len(paths)] = image_moments(model, images).cpu()
                except ValueError as error:
                    raise UserError(f"--config: {error}") from error
                read += [path.relative_to(train).as_posix() for path in paths]
            lost = [file for file in waiting if train / file in reader.unreadable]
            waiting = []
            for file in lost:
                other = spare(file, candidates, taken, draw)
                if other is not None:
                    logger.warning("%s: replaced by %s", printable(str(train / file)), printable(other))
                    taken.add(other)
                    waiting.append(other)
        return Pool(read, moments[: len(read)], weights, network)
