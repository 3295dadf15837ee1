"""Quantize a pretrained ResNet to low bits, without labels, and save it.

python ./calibquant/solver/main_imagenet.py --config ./exp/w4a4/rs101/config.yaml
"""

import argparse
import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the package is two folders up
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    import calibquant.quiet_start  # noqa: F401

import torch
from easydict import EasyDict
from torch import nn
from tqdm import tqdm

from calibquant.solver.cache_plan import choose_store
from calibquant.solver.checkpoint import MODEL_ROOT, save_checkpoint
from calibquant.solver.config import config_name, load_config
from calibquant.solver.fast import choose_engine
from calibquant.solver.files import require_writable
from calibquant.solver.imagenet_util import (
    Calibration,
    evaluate,
    load_calibration,
    names_and_sizes,
    validation_loader,
    validation_samples,
)
from calibquant.solver.learn import bfloat16_pays, plain_steps
from calibquant.solver.peers import Peers
from calibquant.solver.pipeline import (
    calibrate,
    fix_randomness,
    float_model,
    parameters_in_float32_mb,
    quantize_model,
    recon_settings,
)
from calibquant.solver.recon import UnitResult, reconstruct
from calibquant.solver.report import recorded_for_report, write_report
from calibquant.solver.resume import RunState, identity, run_state
from calibquant.solver.run_log import RunLog, peak_memory, start_run, versions
from calibquant.solver.script import choose_device, config_parser, run_script

logger = logging.getLogger("calibquant")


def main() -> None:
    args = parse_arguments()
    config = load_config(args.config)
    with run_state(args.config, args.fresh) as state, start_run("train_log", config) as run:
        state.logs_to(run.folder)
        with interruptible(args.fresh):
            quantize(config, choose_device(args.device), run, state)
        write_report(run.folder)
        state.forget()  # only now: the same command would begin anew


@contextmanager
def interruptible(fresh: bool) -> Iterator[None]:
    """On the way out of an interrupted run, say that it can go on, and how.

    Args:
        fresh: the command threw an earlier run's state away, and would do so again.
    """
    try:
        yield
    except KeyboardInterrupt:
        command = "the same command without --fresh" if fresh else "the same command"
        logger.info("interrupted; scores and finished units are kept, %s continues with them", command)
        raise


def quantize(
    config: EasyDict, device: torch.device, run: RunLog, state: RunState, peers: Peers | None = None
) -> Path:
    """The whole job; returns the saved file's path.

    Args:
        peers: processes that do it together, each with its part of the images.
    """
    peers = peers or Peers()
    fix_randomness(config.process.seed, config.process.deterministic)
    peers.from_first(lambda: require_writable(MODEL_ROOT / config_name(config)))
    with run.stage("load"):
        model = peers.from_first(lambda: float_model(config))
        scored = validation_samples(config)
        validation = validation_loader(config, device, scored[peers.share(len(scored), "val")])
        calibration = load_calibration(config)
        images = calibration.sha256, names_and_sizes(scored)
        state.require_same(identity(config, model, *images, device, peers.size))
        quantized = quantize_model(model.to(device), config)
        settings = recon_settings(config, len(calibration.files), peers.size)
        store = choose_store(quantized, calibration.part(peers), settings, run.folder, peers.size)
    run.record(calibration=calibration.manifest(), processes=peers.size)
    logger.info("calibration: %d images, sha256 %s", len(calibration.files), calibration.sha256)
    if settings.precision == "bf16" and not bfloat16_pays(device):
        logger.warning("quant.recon.precision is bf16, which is slower than float32 here: using float32")

    def score(key: str, words: str, network: nn.Module) -> None:
        with run.stage(f"evaluate_{key}"):
            kept = state.score(key)
            skip = config.data.skip_unreadable
            found = kept or evaluate(network, validation, device, skip, peers)
            logger.info("%s:%s", words, found.in_full)
            state.keep_score(key, found)
        run.record(**{key: found.as_dict()})

    score("float", "float", model)
    with run.stage("calibrate"):
        if peers.leads:  # on all images: ranges are then those of a single process
            state.calibrated(
                quantized, lambda: calibrate(quantized, calibration.images, config, progress_bar)
            )
        peers.match(quantized)
    score("range_only", "ranges only", quantized)

    leads = peers.leads
    recorded = recorded_for_report(run.folder, quantized, calibration, config) if leads else nullcontext()
    with recorded, run.stage("reconstruct"):
        calibration = calibration.share(peers)  # from here on no process holds the others' images
        own, seed = calibration.images, config.process.seed
        progress, engine = progress_bar if leads else plain_steps, choose_engine(settings.compile)
        units = reconstruct(quantized, own, settings, seed, progress, state, store, engine, peers)
        report_units(units, run)

    def save() -> Path:
        path = state.saved(lambda: save_checkpoint(quantized, config, story(config, calibration, peers)))
        size, full = path.stat().st_size / 1e6, parameters_in_float32_mb(model)
        logger.info("saved %s: %.2f MB (float32: %.2f MB)", path, size, full)
        run.record(checkpoint=str(path), checkpoint_mb=size, float32_mb=full)
        return path

    with run.stage("save"):
        path = peers.from_first(save)
    score("quantized", "quantized", quantized)
    return path


def report_units(units: Iterable[UnitResult], run: RunLog) -> None:
    """Log each unit once it is done, and keep the metrics up to date."""
    results = []
    for result in units:
        logger.info(
            "unit %-12s %s %.5g -> %.5g, %.1f s, %.2f %% moved, %.2f %% unconverged",
            result.name,
            result.measure,
            result.error_before,
            result.error_after,
            result.seconds,
            100 * result.moved,
            100 * result.unconverged,
        )
        if result.held_out_before is not None:
            logger.info("  on images held out %.5g -> %.5g", result.held_out_before, result.held_out_after)
        if result.reverted:
            compensated = result.error_start < result.error_before
            kept = "as compensation left it" if compensated else "as before learning"
            logger.warning("unit %s: learning made it no better, kept %s", result.name, kept)
        results.append(asdict(result) | peak_memory())
        run.record(units=results)


def progress_bar(name: str, steps: int) -> Iterable[int]:
    """A bar on a terminal, nothing in a log."""
    bar: Iterable[int] = tqdm(range(steps), desc=name, leave=False, disable=None, unit="step")
    return bar


def story(config: EasyDict, calibration: Calibration, peers: Peers) -> dict[str, object]:
    """What a checkpoint says of how it came to be."""
    return {
        "seed": config.process.seed,
        "processes": peers.size,
        "versions": versions(),
        "calibration": calibration.manifest(),
    }


def parse_arguments(description: str | None = __doc__) -> argparse.Namespace:
    parser = config_parser(description)
    parser.add_argument("--fresh", action="store_true", help="start anew, whatever an unfinished run left")
    return parser.parse_args()


if __name__ == "__main__":
    run_script(main)
