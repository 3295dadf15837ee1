"""For use from Python: quantize a ResNet in memory with images in memory, save it, load it, export it.

The same steps as ``main_imagenet.py``, without its files and folders. ``import calibquant`` offers what is
public here by name.
"""

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from easydict import EasyDict
from torch import Tensor, nn

from calibquant.errors import UserError, printable
from calibquant.model.archive import MAX_PICKLE_BYTES, check_content
from calibquant.model.convert import describe_network, float_copy
from calibquant.model.quant_resnet import QuantResNet
from calibquant.quantization.state import quantizers
from calibquant.solver.checkpoint import checkpoint_content, checksum, load_checkpoint, network_of
from calibquant.solver.config import check_config, lookup, read_config, shown
from calibquant.solver.export_onnx import describe, require_onnx_name, write_onnx
from calibquant.solver.fast import choose_engine
from calibquant.solver.files import write_atomically
from calibquant.solver.pipeline import calibrate, quantize_model, recon_settings
from calibquant.solver.recon import reconstruct
from calibquant.solver.run_log import versions

logger = logging.getLogger("calibquant")

StrPath = str | os.PathLike[str]
PROBE_IMAGES = 4
"""On which the network that is quantized must agree with the one given."""


class QuantizedModel(nn.Module):
    """A quantized network, images ``[N, 3, H, W]`` to logits, with what it was made with.

    Attributes:
        network: the network itself.
        config: every setting, checked.
        metadata: seed, versions, and number and hash of the calibration images.
    """

    def __init__(self, network: QuantResNet, config: EasyDict, metadata: dict[str, Any]) -> None:
        super().__init__()
        self.network, self.config, self.metadata = network, config, metadata

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        return logits


def quantize(
    model: nn.Module,
    calibration_images: Tensor,
    config: dict[str, Any] | StrPath | None = None,
) -> QuantizedModel:
    """Quantize a trained ResNet: ranges from all images given, then block-wise reconstruction.

    Progress goes to the logger ``calibquant``, a line for each block. The model given is not changed; the
    work is done on its device.

    Args:
        model: calibquant's ResNet or torchvision's, trained.
        calibration_images: ``[N, 3, H, H]``, normalised as in training; about a thousand, without labels.
        config: nested keys of the README's configuration reference, as a dict or in a YAML file. What is
            left out has its default; `model` and `data.input_size` follow from the model and the images.
            `data.batch_size` is that of range calibration. `data.mean` and `data.std` change nothing here,
            but are written down with the result; other keys of `data`, `quant.calibrate` and
            `process.deterministic` mean nothing here.

    Returns:
        The quantized model, in evaluation mode.

    Raises:
        UserError: the config, the model or the images cannot be used; one line says why.
    """
    # learning needs gradients, wherever called
    with torch.inference_mode(False), torch.enable_grad(), _torchs_own_defaults():
        images = _checked_images(calibration_images)
        checked = _checked_config(config, model, images)
        _require_values(model)
        with torch.autocast(next(model.parameters()).device.type, enabled=False):
            network = _quantized(model, images, checked)
    metadata = {
        "seed": checked.process.seed,
        "versions": versions(),
        "calibration": {"count": len(images), "sha256": checksum({"images": images})},
    }
    return QuantizedModel(network, checked, metadata).eval()


@contextmanager
def _torchs_own_defaults() -> Iterator[None]:
    """Tensors are float32 and on the CPU where nothing else is said, as in the scripts; then as before."""
    dtype, elsewhere = torch.get_default_dtype(), torch.get_default_device().type != "cpu"
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu") if elsewhere else nullcontext():
            yield
    finally:
        torch.set_default_dtype(dtype)


def _quantized(model: nn.Module, images: Tensor, config: EasyDict) -> QuantResNet:
    """The network, calibrated and reconstructed."""
    network = quantize_model(float_copy(model, images[:PROBE_IMAGES]), config)
    calibrate(network, images, config)
    settings = recon_settings(config, len(images))
    engine = choose_engine(settings.compile)
    for result in reconstruct(network, images, settings, config.process.seed, engine=engine):
        errors = result.error_before, result.error_after
        logger.info("unit %s: %s %.5g -> %.5g", result.name, result.measure, *errors)
        if result.reverted:
            logger.warning("unit %s: learning made it no better, kept as it was before", result.name)
    return network


def save_quantized(model: QuantizedModel, path: StrPath) -> None:
    """Save a quantized model, integers packed at their bit-width; a file of that name is replaced.

    Raises:
        UserError: the file cannot be written, or the model is none of :func:`quantize`'s, or was changed.
    """
    content = _saved_content(model)
    where = _checked_path(path)
    write_atomically(where, lambda file: torch.save(content, file))


def load_quantized(path: StrPath) -> QuantizedModel:
    """Load what :func:`save_quantized` or ``main_imagenet.py`` saved: logits are bit-equal to before.

    Nothing in the file can execute, and the float weights are not needed.

    Returns:
        The quantized model, on the CPU, in evaluation mode.

    Raises:
        UserError: the file is missing, truncated, damaged, foreign or of another version.
    """
    return QuantizedModel(*load_checkpoint(_checked_path(path))).eval()


def export_onnx(
    model: QuantizedModel, path: StrPath, classes: Sequence[str] | None = None, opset: int | None = None
) -> None:
    """Write a quantized model as standard ONNX; a file of that name is replaced.

    Args:
        path: ends in ``.onnx``.
        classes: names of the outputs, in order.
        opset: default is the lowest that has a type for each bit-width.

    Raises:
        UserError: the package onnx is missing, an argument cannot be used, or the file cannot be written.
    """
    _saved_content(model)
    where = _checked_path(path)
    require_onnx_name("path", where)
    if opset is not None and not isinstance(opset, int):
        raise UserError(f"opset is {opset!r:.80}, allowed is an integer")
    names = None if classes is None else _checked_names(classes)
    write_onnx(model.network, where, describe(model.config, model.metadata, names), opset)


def _saved_content(model: nn.Module) -> dict[str, Any]:
    """What a file of a quantized model holds, which gives this very model when it is loaded.

    Raises:
        UserError: it is no quantized model, or was changed so that no file can hold it.
    """
    if not isinstance(model, QuantizedModel):
        raise UserError(
            f"the model is a {type(model).__name__}, allowed is what calibquant.quantize returns"
        )
    _require_values(model.network)
    for name, value in model.network.state_dict().items():
        if value.is_floating_point() and value.dtype != torch.float32:
            kind = str(value.dtype).removeprefix("torch.")
            raise UserError(f"the model's {name} is {kind}, allowed is float32; save or export it first")
    try:
        if type(model.metadata) is not dict:
            raise ValueError(f"it is a {type(model.metadata).__name__}")
        check_content(model.metadata, MAX_PICKLE_BYTES)
        json.dumps(model.metadata)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"the model's metadata cannot be saved: {printable(str(error), 200)}; "
            "allowed is a dict of texts, numbers, lists and dicts"
        ) from error
    try:
        content = checkpoint_content(model.network, model.config, model.metadata)
    except ValueError as error:
        raise UserError(f"the model cannot be saved: {error}") from error
    loaded = network_of(content, "the model")[0].state_dict()
    for name, value in model.network.state_dict().items():
        if name not in loaded or not torch.equal(value.cpu(), loaded[name]):
            raise UserError(
                f"the model's {name} was changed after it was quantized: files hold integers and step sizes"
            )
    off = [name for name, quantizer in quantizers(model.network) if not quantizer.enabled]
    if off:
        raise UserError(f"the model's {off[0]} is switched off, allowed is a model that quantizes")
    return content


def _require_values(model: nn.Module) -> None:
    for name, value in model.state_dict().items():
        if value.is_meta:
            raise UserError(f"the model's {name} is on the meta device, which holds no values")


def _checked_path(path: StrPath) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise UserError(f"path is a {type(path).__name__}, allowed is the name of a file")
    if "\0" in os.fspath(path):
        raise UserError(f"path is {os.fspath(path)!r:.200}, allowed is a name without NUL")
    return Path(path)


def _checked_names(classes: Sequence[str]) -> list[str]:
    """Names of the outputs, from a list, a tuple or an array of texts."""
    ordered = isinstance(classes, Iterable) and not isinstance(classes, str | Set | Mapping)
    names = list(classes) if ordered else []
    if not ordered or not all(isinstance(name, str) for name in names):
        raise UserError(f"classes is {shown(classes)}, allowed is a list of the outputs' names")
    return [str(name) for name in names]


def _checked_images(images: Tensor) -> Tensor:
    """The images in float32, fit for learning.

    Raises:
        UserError: they are no square, normalised images.
    """
    if not isinstance(images, Tensor):
        raise UserError(
            f"calibration_images is a {type(images).__name__}, allowed is a tensor [N, 3, H, H]"
        )
    shape, kind = list(images.shape), str(images.dtype).removeprefix("torch.")
    if images.is_meta or images.layout != torch.strided:
        words = "on the meta device" if images.is_meta else str(images.layout).removeprefix("torch.")
        raise UserError(f"calibration_images is {words}, allowed is a dense tensor with values")
    if images.ndim != 4 or shape[1] != 3 or shape[2] != shape[3] or 0 in shape:
        raise UserError(f"calibration_images is {shape}, allowed is [N, 3, H, H] of at least one image")
    if not images.is_floating_point():
        raise UserError(f"calibration_images is {kind}, allowed are normalised floating-point images")
    images = images.detach().float()
    return images.clone() if images.is_inference() else images


def _checked_config(config: Any, model: nn.Module, images: Tensor) -> EasyDict:
    """The config with defaults that follow from model and images.

    Raises:
        UserError: a key is unknown or bad, or contradicts the model or the images.
    """
    kind, kwargs = describe_network(model)
    side = images.shape[-1]
    given = {"model.type": kind, **{f"model.kwargs.{key}": value for key, value in kwargs.items()}}
    given["data.input_size"] = side
    defaults = {
        **given,
        "data.type": "own",
        "data.classes": "imagenet" if kwargs["num_classes"] == 1000 else "folders",
        "data.test_resize": side,
        "quant.calibrate": len(images),
    }
    from_file = isinstance(config, str | os.PathLike)
    where = f"config {config}" if from_file else "config"
    raw = read_config(Path(config)) if from_file else config
    checked = check_config({} if raw is None else raw, where, defaults)
    for key, value in given.items():
        if lookup(checked, key) != value:
            raise UserError(
                f"{where}: {key} is {lookup(checked, key)}, but what is given to quantize has {value}"
            )
    return checked
