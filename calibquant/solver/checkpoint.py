"""The saved quantized network: integers packed at their bit-width, qparams, biases and its own story.

A file is a dict of tensors and plain values, so ``torch.load(weights_only=True)`` reads it and nothing
in it can run. Before that its container is checked (:mod:`archive`), afterwards its shapes and grids
against the network that its config describes, before anything is allocated. A checksum covers the content.
"""

import hashlib
import json
import logging
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from easydict import EasyDict
from torch import Tensor, nn

from calibquant.errors import UserError, printable
from calibquant.model.archive import check_content, check_pickles, check_zip, is_zip
from calibquant.model.load import safe_load
from calibquant.model.quant_layer import QuantLayer, layers
from calibquant.model.quant_resnet import QuantResNet
from calibquant.paths import is_dir, is_file, why_no_file
from calibquant.quantization.affine import PER_TENSOR, quant_bounds
from calibquant.quantization.fake_quant import FakeQuantize, IntegerWeight
from calibquant.quantization.packing import pack_bits, unpack_bits
from calibquant.quantization.state import quantizers
from calibquant.solver.config import (
    bits_name,
    check_config,
    config_name,
    first_difference,
    lookup,
    plain,
    shown,
)
from calibquant.solver.files import write_atomically
from calibquant.solver.pipeline import float_model_on_meta, quantize_model

logger = logging.getLogger("calibquant")

FORMAT, VERSION = "calibquant", 1
MODEL_ROOT = Path("model_quantized")

STRUCTURE = (
    "model.type",
    "model.kwargs",
    "quant.w_qconfig.bit",
    "quant.a_qconfig.bit",
    "quant.w_qconfig.symmetric",
    "quant.a_qconfig.symmetric",
    "quant.w_qconfig.ch_axis",
    "quant.a_qconfig.ch_axis",
    "quant.ends_8bit",
    "quant.overrides",
)
"""Config keys that say what the saved network is; a config that contradicts them is refused."""
INPUT = ("data.mean", "data.std", "data.input_size", "data.test_resize")
"""Config keys that say how images reach it; a config with others is warned of."""


def save_checkpoint(
    model: QuantResNet, config: EasyDict, metadata: dict[str, Any], root: Path = MODEL_ROOT
) -> Path:
    """Save a hardened model under a name that no other file has.

    Returns:
        ``<root>/<config name>/<type>_<bits name>_<random digits>.pth``.

    Raises:
        UserError: the file cannot be written.
    """
    content = checkpoint_content(model, config, metadata)
    stem = f"{config.model.type}_{bits_name(config)}"
    while True:
        path = root / config_name(config) / f"{stem}_{10_000 + secrets.randbelow(90_000)}.pth"
        if write_atomically(path, lambda file: torch.save(content, file), overwrite=False):
            return path


def checkpoint_content(model: QuantResNet, config: EasyDict, metadata: dict[str, Any]) -> dict[str, Any]:
    """All that a saved file holds, for ``torch.save``.

    Raises:
        ValueError: the model is not hardened.
    """
    content = {
        "format": FORMAT,
        "version": VERSION,
        "config": plain(config),
        "metadata": metadata,
        "layers": {name: _pack_layer(layer) for name, layer in layers(model)},
        "activations": {name: _pack_activation(q) for name, q in quantizers(model)},
    }
    return content | {"checksum": checksum(content)}


def _pack_layer(layer: QuantLayer) -> dict[str, Any]:
    integers = layer.weight_quantizer
    if not isinstance(integers, IntegerWeight):
        raise ValueError("only a hardened model can be saved")
    return {
        "weight": pack_bits(integers.codes, integers.bits),
        "shape": list(integers.codes.shape),
        "bits": integers.bits,
        "scale": bare(integers.scale),
        "zero_point": bare(integers.zero_point.to(torch.int16)),
        "bias": bare(layer.bias),
    }


def _pack_activation(quantizer: FakeQuantize) -> dict[str, Any]:
    scale, zero_point = quantizer.hard_qparams()
    return {
        "bits": quantizer.bits,
        "scale": bare(scale),
        "zero_point": bare(zero_point.to(torch.int16)),
    }


def bare(tensor: Tensor) -> Tensor:
    """A tensor on the CPU without what torch.compile notes on it, which no safe reader would take."""
    return tensor.detach().cpu()


def checksum(content: dict[str, Any]) -> str:
    """SHA-256 over all values and tensors of a checkpoint, whatever order they are stored in."""
    digest = hashlib.sha256()

    def feed(value: Any, path: str) -> None:
        if isinstance(value, dict):
            for key in sorted(value, key=str):
                feed(value[key], f"{path}/{key}")
        elif isinstance(value, Tensor):
            digest.update(f"{path}:{value.dtype}{list(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update(f"{path}={json.dumps(value)}".encode())

    feed({key: value for key, value in content.items() if key != "checksum"}, "")
    return digest.hexdigest()


def find_checkpoint(name: str, config: EasyDict, root: Path = MODEL_ROOT) -> Path:
    """A path as given, or a bare name in the config's folder under ``model_quantized/``.

    Raises:
        UserError: there is no such file in either place.
    """
    given, inside = Path(name), root / config_name(config) / name
    if is_file(given):
        return given
    if given.name == name and is_file(inside):
        return inside
    both = given.name == name and not is_dir(given)
    places = f", neither as a path nor as {inside}" if both else ""
    raise UserError(f"--quantized_model_path {name}: {why_no_file(given)}{places}")


def load_checkpoint(path: Path) -> tuple[QuantResNet, EasyDict, dict[str, Any]]:
    """Rebuild the quantized network from its file alone.

    Returns:
        ``(model, config, metadata)``; the model is on the CPU, in evaluation mode.

    Raises:
        UserError: the file is truncated, foreign, damaged, of another version, or not what it claims.
    """
    where = f"quantized model {path}"
    return network_of(_read(path, where), where)


def network_of(content: dict[str, Any], where: str) -> tuple[QuantResNet, EasyDict, dict[str, Any]]:
    """The network that a file's content describes, its config and its metadata.

    Args:
        where: what an error's line begins with.

    Raises:
        UserError: it is damaged or not what it claims.
    """
    try:
        if checksum(content) != content.get("checksum"):
            raise UserError(f"{where}: its content does not match its checksum, the file is damaged")
        config = check_config(content["config"], where)
        model = quantize_model(float_model_on_meta(config), config)
        _fill(model, content["layers"], layers(model), _fill_layer)
        _fill(model, content["activations"], quantizers(model), _fill_activation)
        metadata = dict(content["metadata"])
        json.dumps(metadata)  # plain values alone
    except UserError:
        raise
    except Exception as error:  # whatever a wrong kind of value, at any place, makes the code above raise
        raise UserError(f"{where}: is not what it claims to be: {printable(str(error), 200)}") from error
    return model.eval(), config, metadata


def _read(path: Path, where: str) -> dict[str, Any]:
    """A file's content: plain values and tensors, no larger than the file, of this format and version.

    Raises:
        UserError: it is none.
    """
    try:
        path.stat()
    except OSError as error:
        raise UserError(f"{where}: {error.strerror}") from error
    try:
        if not is_zip(path):
            raise ValueError("it is no zip")
        check_zip(path)
        check_pickles(path)
    except Exception as error:  # zipfile and pickletools raise almost anything on foreign bytes
        reason = printable(str(error), 150) or type(error).__name__
        raise UserError(f"{where}: refused, truncated, damaged or foreign: {reason}") from error
    content = safe_load(path, "quantized model", checked=True)
    if type(content) is not dict or content.get("format") != FORMAT:
        raise UserError(f"{where}: is no CalibQuant file")
    version = content.get("version")
    if type(version) is not int or version != VERSION:
        if type(version) is not int or abs(version) > 10**9:
            raise UserError(f"{where}: has a format version that is no version, allowed is {VERSION}")
        age = "newer" if version > VERSION else "older"
        raise UserError(f"{where}: has format version {version}, allowed is {VERSION}; it is {age}")
    try:
        check_content(content, 2 * path.stat().st_size)
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: is not what it claims to be: {error}") from error
    return content


def _fill(
    model: QuantResNet,
    saved: dict[str, Any],
    expected: list[tuple[str, Any]],
    fill: Callable[[nn.Module, str, Any, dict[str, Any]], None],
) -> None:
    if saved.keys() != {name for name, _ in expected}:
        raise ValueError("its layers are not those of its config's network")
    for name, module in expected:
        parent = model.get_submodule(name.rpartition(".")[0])
        fill(parent, name, module, saved[name])


def _fill_layer(parent: nn.Module, name: str, layer: QuantLayer, saved: dict[str, Any]) -> None:
    expected = layer.weight_quantizer
    assert isinstance(expected, FakeQuantize)
    if tuple(saved["shape"]) != tuple(layer.weight.shape) or saved["bits"] != expected.bits:
        raise ValueError(f"{name}: shape {saved['shape']} at {saved['bits']} bits is not the network's")
    count = 1 if expected.ch_axis == PER_TENSOR else layer.weight.shape[expected.ch_axis]
    scale, zero_point = _checked_qparams(name, saved, expected, count)
    codes = unpack_bits(saved["weight"], expected.bits, layer.weight.numel()).view(layer.weight.shape)
    bias = saved["bias"].detach()  # a file may say of a tensor that it takes gradients
    if bias.dtype != torch.float32 or bias.shape != layer.bias.shape:
        raise ValueError(f"{name}: bias is {list(bias.shape)} of {bias.dtype}, not what the network has")
    if not bool(torch.isfinite(bias).all()):
        raise ValueError(f"{name}: bias holds NaN or infinity")
    layer.bias = bias
    layer.set_integer_weight(
        IntegerWeight(codes, scale, zero_point, expected.bits, expected.symmetric, expected.ch_axis)
    )


def _fill_activation(parent: nn.Module, name: str, expected: FakeQuantize, saved: dict[str, Any]) -> None:
    if saved["bits"] != expected.bits:
        raise ValueError(f"{name}: {saved['bits']} bits are not its config's {expected.bits}")
    fixed = expected.hardened()
    channels = layers(parent)[0][1].bias.shape  # of the layer whose output this quantizes
    count = 1 if expected.ch_axis == PER_TENSOR else channels[0]
    fixed.scale, fixed.zero_point = _checked_qparams(name, saved, expected, count)
    setattr(parent, name.rpartition(".")[2], fixed)


def _checked_qparams(
    name: str, saved: dict[str, Any], quantizer: FakeQuantize, count: int
) -> tuple[Tensor, Tensor]:
    if saved["scale"].dtype != torch.float32 or saved["zero_point"].dtype != torch.int16:
        raise ValueError(f"{name}: scales and zero-points are not float32 and int16")
    scale, zero_point = saved["scale"].detach(), saved["zero_point"].float()
    low, high = quant_bounds(quantizer.bits, quantizer.symmetric)
    if scale.shape != (count,) or zero_point.shape != (count,):
        raise ValueError(f"{name}: {scale.numel()} scales, allowed are {count}")
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise ValueError(f"{name}: a scale is not above zero")
    if not bool(((zero_point >= low) & (zero_point <= high)).all()):
        raise ValueError(f"{name}: a zero-point lies outside {low} to {high}")
    return scale, zero_point


def require_agreement(config: EasyDict, saved: EasyDict, path: Path) -> None:
    """Refuse a config that contradicts the file about what the network is, and warn of other inputs.

    Raises:
        UserError: naming the first key that differs, with both values.
    """
    for key in STRUCTURE:
        wanted, found = (_unordered(lookup(each, key)) for each in (config, saved))
        if wanted != found:
            name, *values = first_difference(wanted, found, key)
            raise UserError(
                f"config says {name} {shown(values[0])}, but quantized model {path} has {shown(values[1])}"
            )
    for key in INPUT:
        wanted, found = lookup(config, key), lookup(saved, key)
        if wanted != found:
            logger.warning("%s is %s, quantized model %s was made with %s", key, wanted, path, found)


def _unordered(value: Any) -> Any:
    """A list of names sorted, whose order means nothing; that of overrides does."""
    names = isinstance(value, list) and all(isinstance(item, str) for item in value)
    return sorted(value) if names else value
