"""Image files read as calibration reads them, a batch in memory at a time, each batch with its files."""

import copy
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from easydict import EasyDict
from torch import Tensor

from calibquant.solver.imagenet_util import (
    batches,
    calibration_transform,
    make_loader,
    report_unreadable,
)

logger = logging.getLogger("calibquant")


def as_they_are(config: EasyDict) -> EasyDict:
    """The config with images as they are scored: for judging images, which chance must not change."""
    config = copy.deepcopy(config)
    config.data.sharpness, config.data.augment = [1, 1], "none"
    return config


@dataclass
class Reader:
    """Reads image files in batches as calibration does, and remembers those that cannot be read.

    Attributes:
        skip: name what cannot be read and go on, else stop.
    """

    config: EasyDict
    device: torch.device
    skip: bool
    unreadable: set[Path] = field(default_factory=set)

    def read(self, paths: list[Path], description: str) -> Iterator[tuple[Tensor, list[Path]]]:
        """Images ``[n, 3, H, W]`` on the device, and their files.

        Raises:
            UserError: an image is unreadable and ``skip`` is false.
        """
        data, place = self.config.data, 0
        samples = [(path, -1) for path in paths]
        loader = make_loader(samples, calibration_transform(data), self.config, self.device)
        for batch in batches(loader, description):
            self.unreadable |= {item.path for item in report_unreadable(batch, self.skip)}
            count = len(batch.images) + len(batch.unreadable)
            read = [path for path in paths[place : place + count] if self.could_read(path)]
            place += count
            if read:
                yield batch.images.to(self.device, non_blocking=True), read

    def could_read(self, path: Path) -> bool:
        """Whether a file that was to be read is an image."""
        return path not in self.unreadable
