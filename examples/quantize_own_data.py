"""Quantize a ResNet with images of your own: no ImageNet, no YAML, under a minute on a CPU.

python ./examples/quantize_own_data.py

The data here are drawn: discs, squares and crosses on noise. Put your images in the place of `draw`, and in
the place of `build_model` and `train` your trained network: one of these, or torchvision's ResNet.
"""

import logging
import sys
import tempfile
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # finds calibquant where it is not installed

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import calibquant
from calibquant.model.load import build_model

SIDE = 32
CLASSES = ["disc", "square", "cross"]


def draw(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Normalised images ``[count, 3, SIDE, SIDE]`` and their classes ``[count]``."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(len(CLASSES), (count,), generator=generator)
    centre = torch.randint(10, SIDE - 10, (2, count, 1, 1), generator=generator)
    radius = torch.randint(5, 9, (count, 1, 1), generator=generator)
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    across, along = (x - centre[0]).abs(), (y - centre[1]).abs()
    disc = across**2 + along**2 <= radius**2
    square = torch.maximum(across, along) <= radius
    cross = square & (torch.minimum(across, along) <= 1)
    shapes = torch.stack([disc, square, cross])[classes, torch.arange(count)]
    colours = torch.rand(count, 3, 1, 1, generator=generator) + 0.5
    noise = torch.randn(count, 3, SIDE, SIDE, generator=generator)
    return shapes[:, None] * colours + 0.2 * noise, classes


def train(model: nn.Module, images: Tensor, classes: Tensor) -> None:
    """A short training, to have a network worth quantizing."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(12):
        for batch, targets in zip(images.split(64), classes.split(64), strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model(batch), targets).backward()
            optimizer.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, classes: Tensor) -> float:
    """Percent of images whose class is recognised."""
    return 100 * float((model(images).argmax(1) == classes).float().mean())


def main() -> None:
    logging.basicConfig(
        level=logging.INFO, stream=sys.stdout, format="%(message)s"
    )  # shows a line for each block
    torch.manual_seed(0)
    kwargs = {"num_classes": len(CLASSES), "base_width": 16}
    model = build_model("resnet18", kwargs)  # or torchvision.models.resnet18(...)
    train(model, *draw(1024, seed=1))
    held_out = draw(500, seed=2)
    print(f"float: {accuracy(model, *held_out):.1f} %")

    images, _ = draw(64, seed=3)  # no labels are needed; take about a thousand
    config = {
        "quant": {"recon": {"iters": 50, "batch_size": 16, "round_lr": 0.05}}
    }  # the default is 20,000
    quantized = calibquant.quantize(model, images, config)
    print(f"W4A4: {accuracy(quantized, *held_out):.1f} %")

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shapes_w4a4.pth"
        calibquant.save_quantized(quantized, path)
        loaded = calibquant.load_quantized(path)
        print(f"loaded: {accuracy(loaded, *held_out):.1f} %, {path.stat().st_size / 1e6:.1f} MB")
        try:
            onnx_path = path.with_suffix(".onnx")
            calibquant.export_onnx(loaded, onnx_path, CLASSES)
            print(f"ONNX: {onnx_path.stat().st_size / 1e6:.1f} MB")
        except calibquant.UserError as error:  # the package onnx is optional
            print(error)


if __name__ == "__main__":
    main()
