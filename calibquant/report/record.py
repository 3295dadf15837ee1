"""What a run measures for its report beside what it logs anyway: activation histograms and thumbnails.

All of it is bounded: a few calibration images are sent through the network once more, an activation
becomes `BINS` counts, and of the calibration set at most `THUMBNAILS` small pictures are kept.
"""

import base64
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from calibquant.errors import printable
from calibquant.model.quant_resnet import QuantResNet
from calibquant.quantization.affine import PER_TENSOR
from calibquant.quantization.fake_quant import FakeQuantize, Role
from calibquant.quantization.observer import Histogram, as_rows
from calibquant.quantization.state import full_precision, quantizers, watching

HISTOGRAM_IMAGES = 32
"""Calibration images whose activations are counted."""
BINS = 96
THUMBNAILS, SIDE = 200, 80
"""Pictures of the calibration set, and the length of their longer side in pixels."""


@dataclass(frozen=True)
class Range:
    """A quantizer's clipping range, the widest of its channels, and the share of values outside of it.

    ``clipped`` is None where channels have ranges of their own, which one histogram cannot tell apart.
    """

    low: float
    high: float
    clipped: float | None


class ActivationCounts:
    """Histogram of what one activation quantizer is given, zeros apart."""

    def __init__(self, device: torch.device) -> None:
        self.histogram = Histogram(1, device)
        self.elements = 0
        self.low, self.high = 0.0, 0.0

    def add(self, x: Tensor) -> None:
        """Count a batch."""
        rows = as_rows(x.detach(), PER_TENSOR)
        low, high = rows.min(), rows.max()
        self.histogram.add(rows, torch.maximum(-low, high)[None])
        self.elements += rows.numel()
        self.low, self.high = min(self.low, float(low)), max(self.high, float(high))

    def below(self, edges: NDArray[np.float64]) -> NDArray[np.float64]:
        """How many values other than zero lie below each edge, to within one of 2^15 bins."""
        counts = self.histogram.counts[0].double().cpu().numpy()
        places = (np.arange(len(counts) + 1) - len(counts) // 2) * float(self.histogram.width)
        total = np.concatenate([[0.0], np.cumsum(counts)])
        if places[0] == places[-1]:  # zeros alone
            return np.zeros_like(edges)
        inside: NDArray[np.float64] = np.interp(edges, places, total)
        return inside

    def as_dict(self) -> dict[str, Any]:
        """`BINS` equal bins from the smallest to the largest value."""
        edges = np.linspace(self.low, self.high, BINS + 1)
        counts = np.diff(self.below(edges)).round().astype(int).tolist()
        zeros = self.elements - int(self.histogram.counts.sum())
        return {
            "low": self.low,
            "high": self.high,
            "elements": self.elements,
            "zeros": zeros,
            "counts": counts,
        }


def activation_quantizers(model: QuantResNet) -> list[tuple[str, FakeQuantize]]:
    """The activation quantizers in dataflow order, each named as the layer that it follows."""
    return [
        (unit.name, quantizer)
        for unit in model.units("layer")
        for _, quantizer in quantizers(unit.module, Role.ACTIVATION)
    ]


def count_activations(model: QuantResNet, images: Tensor, batch_size: int) -> list[ActivationCounts]:
    """What each activation quantizer is given by a few of the images, in full precision.

    Args:
        images: ``[N, 3, H, W]``, on any device; `HISTOGRAM_IMAGES` of them are used, evenly spread.
    """
    device = next(model.buffers()).device
    found = [(quantizer, ActivationCounts(device)) for _, quantizer in activation_quantizers(model)]
    viewers = {quantizer: counts.add for quantizer, counts in found}
    with watching(viewers), full_precision(model), torch.no_grad():
        for batch in images[spread(len(images), HISTOGRAM_IMAGES)].split(batch_size):
            model(batch.to(device))
    return [counts for _, counts in found]


def clipping_range(quantizer: FakeQuantize, counts: ActivationCounts) -> Range:
    """The range that a quantizer clips to as it is now."""
    scale, zero_point = quantizer.hard_qparams()
    low = float(((quantizer.quant_min - zero_point) * scale).min())
    high = float(((quantizer.quant_max - zero_point) * scale).max())
    if scale.numel() > 1 or not counts.elements:
        return Range(low, high, None)
    below_low, below_high = counts.below(np.array([low, high]))
    inside = below_high - below_low
    return Range(low, high, max(0.0, float(int(counts.histogram.counts.sum()) - inside) / counts.elements))


def spread(count: int, wanted: int) -> list[int]:
    """At most ``wanted`` indices below ``count``, evenly spread and rising."""
    wanted = min(count, wanted)
    return [place * count // wanted for place in range(wanted)]


def thumbnails(
    images: Tensor, names: list[str], mean: list[float], std: list[float]
) -> list[dict[str, str]]:
    """Small JPEGs in base64 of at most `THUMBNAILS` images, as the network is given them, with their names.

    Args:
        images: ``[N, 3, H, W]``, normalised by ``mean`` and ``std``.
    """
    shift, gain = (torch.tensor(values)[:, None, None] for values in (mean, std))
    found = []
    for index in spread(len(images), THUMBNAILS):
        pixels = (images[index].cpu() * gain + shift).mul(255).round().clamp(0, 255).to(torch.uint8)
        picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
        picture.thumbnail((SIDE, SIDE))
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=80, optimize=True)
        jpeg = base64.b64encode(file.getvalue()).decode("ascii")
        found.append({"file": printable(names[index], 200), "jpeg": jpeg})
    return found
