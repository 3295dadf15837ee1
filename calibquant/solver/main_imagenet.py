"""Quantize a pretrained ResNet to low bits, without labels, and save it.

python ./calibquant/solver/main_imagenet.py --config ./exp/w4a4/rs101/config.yaml
"""

import argparse
import logging
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the package is two folders up
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from easydict import EasyDict
from torch import nn
from tqdm import tqdm

from calibquant.model.quant_resnet import QuantResNet
from calibquant.solver.checkpoint import MODEL_ROOT, save_checkpoint
from calibquant.solver.config import config_name, load_config
from calibquant.solver.fast import choose_engine
from calibquant.solver.files import require_writable
from calibquant.solver.imagenet_util import (
    Calibration,
    Score,
    evaluate,
    load_calibration,
    validation_loader,
)
from calibquant.solver.learn import bfloat16_pays
from calibquant.solver.pipeline import (
    calibrate,
    fix_randomness,
    float_model,
    parameters_in_float32_mb,
    quantize_model,
    recon_settings,
)
from calibquant.solver.recon import reconstruct
from calibquant.solver.report import recorded_for_report, write_report
from calibquant.solver.resume import RunState, identity, run_state
from calibquant.solver.run_log import RunLog, peak_memory, start_run, versions
from calibquant.solver.script import choose_device, config_parser, run_script

logger = logging.getLogger("calibquant")


def main() -> None:
    args = parse_arguments()
    config = load_config(args.config)
    with run_state(args.config, args.fresh) as state, start_run("train_log", config) as run:
        try:
            quantize(config, choose_device(args.device), run, state)
        except KeyboardInterrupt:
            logger.info("interrupted; finished units are kept, the same command continues with them")
            raise
        write_report(run.folder)


def quantize(config: EasyDict, device: torch.device, run: RunLog, state: RunState) -> Path:
    """The whole job; returns the saved file's path."""
    fix_randomness(config.process.seed, config.process.deterministic)
    require_writable(MODEL_ROOT / config_name(config))
    with run.stage("load"):
        model = float_model(config)
        validation = validation_loader(config)
        calibration = load_calibration(config)
        state.require_same(identity(config, model, calibration.sha256, device))
        model.to(device)
    run.record(calibration=calibration.manifest())
    logger.info("calibration: %d images, sha256 %s", len(calibration.files), calibration.sha256)

    def score(key: str, words: str, network: nn.Module) -> None:
        with run.stage(f"evaluate_{key}"):
            kept = state.score(key)
            skip = config.data.skip_unreadable
            found = Score(**kept) if kept else evaluate(network, validation, device, skip)
        state.keep_score(key, found.as_dict())
        logger.info("%s:%s (%d images, %d skipped)", words, found, found.images, found.skipped)
        run.record(**{key: found.as_dict()})

    score("float", "float", model)
    with run.stage("calibrate"):
        quantized = quantize_model(model, config)
        calibrate(quantized, calibration.images, config.data.batch_size)
    score("range_only", "ranges only", quantized)

    with recorded_for_report(run.folder, quantized, calibration, config), run.stage("reconstruct"):
        reconstruct_and_report(quantized, calibration, config, run, state)

    with run.stage("save"):
        path = save_checkpoint(quantized, config, story(config, calibration))
    size, full = path.stat().st_size / 1e6, parameters_in_float32_mb(model)
    logger.info("saved %s: %.2f MB (float32: %.2f MB)", path, size, full)
    run.record(checkpoint=str(path), checkpoint_mb=size, float32_mb=full)
    score("quantized", "quantized", quantized)
    state.forget()
    return path


def reconstruct_and_report(
    model: QuantResNet, calibration: Calibration, config: EasyDict, run: RunLog, state: RunState
) -> None:
    """Reconstruct unit by unit, logging each and keeping the metrics up to date."""
    settings, seed = recon_settings(config), config.process.seed
    device = next(model.buffers()).device
    engine = choose_engine(settings.compile, device)
    if settings.precision == "bf16" and not bfloat16_pays(device):
        logger.warning("quant.recon.precision is bf16, which is slower than float32 here: using float32")
    results = []
    for result in reconstruct(
        model, calibration.images, settings, seed, progress_bar, state, engine=engine
    ):
        logger.info(
            "unit %-12s error %.5g -> %.5g, %.1f s, %.2f %% rounded away, %.2f %% unconverged",
            result.name,
            result.error_before,
            result.error_after,
            result.seconds,
            100 * result.rounded_away,
            100 * result.unconverged,
        )
        if result.reverted:
            logger.warning("unit %s: learning made it no better, kept as calibrated", result.name)
        results.append(asdict(result) | peak_memory())
        run.record(units=results)


def progress_bar(name: str, steps: int) -> Iterable[int]:
    """A bar on a terminal, nothing in a log."""
    bar: Iterable[int] = tqdm(range(steps), desc=name, leave=False, disable=None, unit="step")
    return bar


def story(config: EasyDict, calibration: Calibration) -> dict[str, object]:
    """What a checkpoint says of how it came to be."""
    return {
        "seed": config.process.seed,
        "versions": versions(),
        "calibration": calibration.manifest(),
    }


def parse_arguments() -> argparse.Namespace:
    parser = config_parser(__doc__)
    parser.add_argument("--fresh", action="store_true", help="start anew, whatever an unfinished run left")
    return parser.parse_args()


if __name__ == "__main__":
    run_script(main)
