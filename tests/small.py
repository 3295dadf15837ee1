"""Small networks and image trees that several tests share."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from easydict import EasyDict
from PIL import Image

from calibquant.model.quant_resnet import QuantResNet
from calibquant.model.resnet import ResNet
from calibquant.solver.config import check_config, plain
from calibquant.solver.imagenet_util import imagenet_wnids
from calibquant.solver.pipeline import calibrate, float_model_on_meta, quantize_model

SOON_CALIBRATED = {f"quant__{each}_qconfig__observer": "MinMaxObserver" for each in "wa"}
"""Changes of a config for runs that are about what comes after their ranges are set."""


def small_config(**changes: Any) -> EasyDict:
    """A checked config of a narrow ResNet-18 for small images; ``changes`` are dotted paths with ``__``."""
    raw: dict[str, Any] = {
        "model": {
            "type": "resnet18",
            "kwargs": {"num_classes": 1000, "small_images": True, "base_width": 4},
        },
        "data": {"batch_size": 8, "num_workers": 0, "input_size": 16, "test_resize": 16},
        "quant": {
            "calibrate": 12,
            "recon": {"batch_size": 8, "iters": 6, "round_lr": 0.01},
        },
    }
    for dotted, value in changes.items():
        *sections, name = dotted.split("__")
        target = raw
        for section in sections:
            target = target.setdefault(section, {})
        target[name] = value
    return check_config(raw)


def random_float_model(config: EasyDict, seed: int = 0) -> ResNet:
    """A float network with random weights and random batch-norm statistics."""
    torch.manual_seed(seed)
    model = float_model_on_meta(config).to_empty(device="cpu")
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.reset_parameters()
        elif isinstance(module, torch.nn.BatchNorm2d):
            module.reset_parameters()
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.2)
    return model.eval()


_CALIBRATED: dict[tuple[str, bytes], tuple[QuantResNet, torch.Tensor]] = {}
"""Networks by what they were calibrated with, and where torch's random numbers stood afterwards."""


def calibrated_model(config: EasyDict, images: torch.Tensor) -> QuantResNet:
    """The random network, quantized and calibrated on the images, which takes seconds the first time."""
    settings = plain(config)
    settings["quant"]["recon"] = {"batch_size": config.quant.recon.batch_size}  # all that ranges depend on
    key = (json.dumps(settings, sort_keys=True), images.numpy().tobytes())
    if key not in _CALIBRATED:
        model = quantize_model(random_float_model(config), config)
        calibrate(model, images, config)
        _CALIBRATED[key] = model, torch.get_rng_state()
    model, state = _CALIBRATED[key]
    torch.set_rng_state(state)
    return copy.deepcopy(model)


def write_images(root: Path, classes: list[str], per_class: int, size: int = 20, seed: int = 0) -> None:
    """Random JPEGs in an ImageFolder tree."""
    draw = np.random.default_rng(seed)
    for name in classes:
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(per_class):
            pixels = draw.integers(0, 256, (size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{name}_{number}.JPEG")


def some_wnids(count: int) -> list[str]:
    return imagenet_wnids()[:: 1000 // count][:count]
