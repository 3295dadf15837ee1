"""The composition root: from a checked config to networks, ranges and scores.

Here, and only here, config, model, quantization and data meet; the scripts call these verbs in order.
"""

import logging
import os
import random

import numpy as np
import torch
from easydict import EasyDict
from torch import Tensor, nn

from calibquant.errors import UserError
from calibquant.model.load import build_model, load_weights
from calibquant.model.quant_layer import calibrate_weights
from calibquant.model.quant_resnet import End, Override, QuantResNet, QuantSpec
from calibquant.model.resnet import ResNet
from calibquant.quantization.affine import SCALE_EPS
from calibquant.quantization.fake_quant import QUANTIZERS, AdaRoundFakeQuantize, QuantizerConfig
from calibquant.quantization.state import calibrating, quantizers
from calibquant.solver.equalize import EqualizeSettings, equalize, settle_ranges, shift_to_floors
from calibquant.solver.learn import DistilSettings, Progress, ReconSettings, plain_steps

logger = logging.getLogger("calibquant")


def fix_randomness(seed: int, deterministic: bool) -> None:
    """Seed the global generators; the parts that draw numbers have generators of their own.

    Args:
        deterministic: on CUDA, only algorithms that give the same bits each time. A CPU always does.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = False
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True)


def float_model(config: EasyDict) -> ResNet:
    """The pretrained float network, on the CPU in evaluation mode.

    Raises:
        UserError: its weights are missing, unsafe or of another architecture.
    """
    model = build_model(config.model.type, dict(config.model.kwargs))
    load_weights(model, config.model.type, config.model.path)
    return model


def float_model_on_meta(config: EasyDict) -> ResNet:
    """The network's structure alone: shapes without any memory."""
    with torch.device("meta"):
        return build_model(config.model.type, dict(config.model.kwargs))


def quant_spec(config: EasyDict) -> QuantSpec:
    """What the config says of quantizers and bit-widths."""
    quant = config.quant
    return QuantSpec(
        QuantizerConfig(**quant.w_qconfig),
        QuantizerConfig(**quant.a_qconfig),
        frozenset(End(end) for end in quant.ends_8bit),
        tuple(Override(**override) for override in quant.overrides),
    )


def quantize_model(model: ResNet, config: EasyDict) -> QuantResNet:
    """Fold batch norm and wrap the float network in quantizers, on its device, ranges not yet set."""
    device = next(model.parameters()).device
    with torch.no_grad():
        quantized = QuantResNet(model, quant_spec(config)).to(device).eval()
    if config.quant.equalize.iters:
        settle_ranges(quantized, config.quant.equalize.scope)
    return quantized


def calibrate(
    model: QuantResNet, images: Tensor, config: EasyDict, progress: Progress = plain_steps
) -> None:
    """Set every range: of activations from all calibration images, of weights from the weights.

    Before, channels are shifted, and between the two they are scaled, as `quant.equalize` says.

    Raises:
        UserError: weights or activations hold NaN or infinity.
    """
    device, batch_size = next(model.buffers()).device, config.data.batch_size
    try:
        if config.quant.equalize.shift:
            logger.info("shifted %d channels", shift_to_floors(model, images, batch_size))
        with calibrating(model):
            for batch in images.split(batch_size):
                model(batch.to(device, non_blocking=True))
        equalize_channels(model, images, config, progress)
        calibrate_weights(model)
    except ValueError as error:
        raise UserError(f"calibration: {error}") from error
    report_dead_channels(model)


def equalize_channels(model: QuantResNet, images: Tensor, config: EasyDict, progress: Progress) -> None:
    """Scale channels so that one step size serves them better, and say what it gained."""
    settings = EqualizeSettings(**config.quant.equalize)
    if not settings.iters:
        return
    batch, stages = config.quant.recon.batch_size, 0
    for name, before, after in equalize(model, images, settings, batch, config.process.seed, progress):
        logger.info("equalized %s: error %.5g -> %.5g", name, before, after)
        stages += 1
    if not stages:
        logger.warning(
            "quant.equalize.iters: changes nothing with quant.w_qconfig.ch_axis %d and "
            "quant.a_qconfig.ch_axis %d, but with 0 and -1",
            config.quant.w_qconfig.ch_axis,
            config.quant.a_qconfig.ch_axis,
        )


def report_dead_channels(model: QuantResNet) -> None:
    """Name weights and activations that were zero throughout, or nearly: their scale is only a floor."""
    for name, quantizer in quantizers(model):
        dead = int((quantizer.scale <= SCALE_EPS).sum())
        if dead:
            words = "%s: %d of %d channels are zero throughout, or too small for the least step size, %g"
            logger.warning(words, name, dead, quantizer.scale.numel(), SCALE_EPS)


def report_idle(config: EasyDict) -> None:
    """Name what is set of how weights' rounding is learned where it is not learned."""
    recon, kind = config.quant.recon, config.quant.w_qconfig.quantizer
    adaptive = QUANTIZERS[kind] is AdaRoundFakeQuantize
    reason = f"quant.w_qconfig.quantizer {kind}" if not adaptive else "quant.recon.round_mode nearest"
    if not adaptive and recon.round_mode == "straight_through":
        logger.warning("quant.recon.round_mode: changes nothing with %s", reason)
    if recon.weight_scale_lr and (not adaptive or recon.round_mode == "nearest"):
        logger.warning("quant.recon.weight_scale_lr: changes nothing with %s", reason)


def recon_settings(config: EasyDict, images: int | None = None, processes: int = 1) -> ReconSettings:
    """`quant.recon` and `quant.distil` as reconstruction takes them.

    Args:
        images: of the calibration set; a step takes at most all of them.
        processes: each takes its share of a step's images.

    Raises:
        UserError: images are to be held out, and not every process has two.
    """
    held_out = config.quant.recon.held_out
    if images and processes > 1 and held_out and images < 2 * processes:
        raise UserError(
            f"quant.recon.held_out is {held_out:g}, allowed with {processes} processes and {images} "
            "calibration images is 0: a process has only one"
        )
    report_idle(config)
    values = dict(config.quant.recon)
    values["batch_size"] = min(values["batch_size"], images or values["batch_size"]) // processes
    values["b_range"], values["merge"] = tuple(values["b_range"]), tuple(values["merge"])
    distil = DistilSettings(**dict(config.quant.distil) | {"after": tuple(config.quant.distil.after)})
    return ReconSettings(**values, distil=distil)


def parameters_in_float32_mb(model: nn.Module) -> float:
    """Size of a float network's weights and biases on disk in MB (10^6 bytes)."""
    return sum(p.numel() for p in model.parameters()) * 4 / 1e6
