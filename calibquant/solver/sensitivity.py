"""What each unit (or layer) of a network costs when it alone is quantized; and bit-widths for a budget.

python ./calibquant/solver/sensitivity.py --config ./exp/w4a4/rs101/config.yaml --bits w2a4,w3a4,w4a4
python ./calibquant/solver/sensitivity.py --config ./exp/w4a4/rs101/config.yaml --bits w2a4,w3a4,w4a4 \\
    --budget 3.0                  # writes mixed.yaml, which main_imagenet.py runs

Without labels: calibration images suffice. What `quant.ends_8bit` and `quant.overrides` of the config
settle stays as it is. Ranges are calibrated, nothing is reconstructed.
"""

import argparse
import copy
import logging
import math
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: the package is two folders up
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    import calibquant.quiet_start  # noqa: F401

import torch
import yaml
from easydict import EasyDict
from torch import Tensor
from tqdm import tqdm

from calibquant.errors import UserError
from calibquant.solver.bit_budget import (
    assignment_overrides,
    best_assignment,
    fewest_bits_per_weight,
)
from calibquant.solver.config import check_config, load_config, plain
from calibquant.solver.files import PICTURES, require_matplotlib, write_bytes
from calibquant.solver.imagenet_util import (
    batches,
    drawn,
    evaluation_transform,
    load_calibration,
    make_loader,
    report_unreadable,
    validation_samples,
)
from calibquant.solver.pipeline import (
    fix_randomness,
    float_model,
    float_model_on_meta,
    quant_spec,
    quantize_model,
)
from calibquant.solver.probe import Bits, Measurement, Probe
from calibquant.solver.run_log import RunLog, start_run
from calibquant.solver.script import choose_device, config_parser, run_script
from calibquant.solver.sensitivity_report import plot_sensitivity, ranking, table

logger = logging.getLogger("calibquant")

LOG_ROOT = "train_log/sensitivity"


@dataclass(frozen=True)
class Plan:
    """What is to be measured, as the command line says."""

    candidates: list[Bits]
    granularity: str
    images: int
    val: int
    budget: float | None
    plot: str


def main() -> None:
    args = parse_arguments()
    config = load_config(args.config)
    plan = check_arguments(args, config)
    if plan.plot != "none":
        # before hours of work
        require_matplotlib(
            "the plot needs matplotlib: pip install -r requirements.txt, or give --plot none"
        )
    with start_run(LOG_ROOT, config) as run:
        analyse(config, plan, choose_device(args.device), run)


def analyse(config: EasyDict, plan: Plan, device: torch.device, run: RunLog) -> None:
    """The whole job: measure, report, and with a budget write a mixed-precision config."""
    fix_randomness(config.process.seed, config.process.deterministic)
    with run.stage("load"):
        probe = make_probe(config, plan, device, run)
    with run.stage("measure"):
        measurements = measure(probe, plan.candidates, run)
        uniform = {b: probe.network_cost(dict.fromkeys(probe.names, b)) for b in plan.candidates}
        ranked = ranking(measurements)
        for line in table(ranked, measurements, uniform):
            logger.info("%s", line)
    run.record(all_at_once={str(bits): asdict(cost) for bits, cost in uniform.items()})
    if plan.budget is not None:
        keep_budget(probe, measurements, config, plan, run)
    if plan.plot != "none":  # last: the config is worth more, and takes less room
        picture = run.folder / f"sensitivity.{plan.plot}"
        plot_sensitivity(
            picture, ranked, measurements, f"{config.model.type}, one {plan.granularity} at a time"
        )
        logger.info("plot: %s", picture)


def make_probe(config: EasyDict, plan: Plan, device: torch.device, run: RunLog) -> Probe:
    """The network on the device, and the images to calibrate and to measure with."""
    model = quantize_model(float_model(config).to(device), config)
    special = dict(model.special_bits(quant_spec(config)))
    few = copy.deepcopy(config)
    few.quant.calibrate = plan.images
    calibration = load_calibration(few, "--images")
    run.record(calibration=calibration.manifest())
    size = config.data.batch_size
    images = list(calibration.images.to(device).split(size))
    count = len(calibration.images)
    if not plan.val:
        logger.info("ranges and costs from %d calibration images", count)
        return Probe(model, plan.granularity, special, images)
    measured, targets = load_labelled(config, plan.val)
    logger.info("ranges from %d calibration images, costs from %d of val", count, len(measured))
    labelled = list(measured.to(device).split(size)), list(targets.to(device).split(size))
    return Probe(model, plan.granularity, special, images, *labelled)


def load_labelled(config: EasyDict, count: int) -> tuple[Tensor, Tensor]:
    """Random images of ``val/``, ``[n, 3, H, W]``, and their classes ``[n]``; all where there are fewer.

    Raises:
        UserError: folder or classes are not as they must be, or an image is unreadable.
    """
    samples = validation_samples(config)
    chosen = drawn(len(samples), count, config.process.seed)
    loader = make_loader([samples[index] for index in chosen], evaluation_transform(config.data), config)
    images, targets = [], []
    for batch in batches(loader, "read val"):
        report_unreadable(batch, config.data.skip_unreadable)
        kept = batch.to_keep()
        images += [kept.images] if len(kept.images) else []
        targets.append(kept.targets)
    if not images:
        raise UserError("val folder: no image in it can be read")
    return torch.cat(images), torch.cat(targets)


def measure(probe: Probe, candidates: list[Bits], run: RunLog) -> list[Measurement]:
    """All measurements, with progress on a terminal; `metrics.json` always holds those made so far."""
    found: list[Measurement] = []
    units = len(probe.units)
    total = len(candidates) * units * (units + 1) // 2
    with tqdm(total=total, desc="measure", leave=False, disable=None, unit="unit") as bar:
        for measurement in probe.sweep(candidates):
            found.append(measurement)
            bar.update(measurement.work)
            if len(found) % len(candidates) == 0:
                run.record(sensitivity=[asdict(m) | {"bits": str(m.bits)} for m in found])
    return found


def keep_budget(
    probe: Probe, measurements: list[Measurement], config: EasyDict, plan: Plan, run: RunLog
) -> None:
    """Choose bits within the budget, measure the whole network with them, and write its config.

    Raises:
        UserError: the config cannot be written.
    """
    assert plan.budget is not None
    chosen = best_assignment(measurements, plan.budget)
    average = sum(m.weight_bits for m in chosen) / sum(m.weights for m in chosen)
    predicted = sum(m.cost.kl for m in chosen)
    usual = Bits(config.quant.w_qconfig.bit, config.quant.a_qconfig.bit)
    assignment = {m.unit: m.bits for m in chosen}
    whole = {name: Bits(b.weight, b.activation or usual.activation) for name, b in assignment.items()}
    cost = probe.network_cost(whole)
    alone = (
        "" if whole == assignment else f"of weights alone, activations then at {usual.activation} bits, "
    )
    words = (
        f"{average:.3f} bits per weight (budget {plan.budget:g}), KL {cost.kl:.4f} ({alone}"
        f"sum {predicted:.4f})"
    )
    logger.info("chosen: %s, same class %.2f %%", words, cost.agreement)
    overrides = assignment_overrides(probe, assignment, usual)
    for override in overrides:
        logger.info("  %s", override)
    path = run.folder / "mixed.yaml"
    write_config(path, config, overrides, words)
    logger.info("python ./calibquant/solver/main_imagenet.py --config %s", path)
    found = {
        "bits_per_weight": average,
        "predicted_kl": predicted,
        "cost": asdict(cost),
        "config": str(path),
    }
    run.record(budget=found | {"assignment": {name: str(bits) for name, bits in assignment.items()}})


def write_config(path: Path, config: EasyDict, overrides: list[dict[str, Any]], words: str) -> None:
    """Write the config with overrides before its own, which go on to win.

    Raises:
        UserError: the file cannot be written.
    """
    mixed = plain(config)
    mixed["quant"]["overrides"] = overrides + mixed["quant"]["overrides"]
    check_config(mixed, str(path))
    head = (
        f"# python ./calibquant/solver/main_imagenet.py --config {path}\n"
        f"# Chosen by sensitivity.py: {words} with ranges alone.\n"
    )
    text = head + yaml.safe_dump(mixed, sort_keys=False, indent=4, width=100)
    write_bytes(path, text.encode())


def check_arguments(args: argparse.Namespace, config: EasyDict) -> Plan:
    """What is to be measured.

    Raises:
        UserError: an option is wrong; one line names it and what is allowed.
    """
    quant = config.quant
    usual = f"w{quant.w_qconfig.bit}a{quant.a_qconfig.bit}"
    candidates = parse_bits(usual if args.bits is None else args.bits)
    for option, value, least in (("--images", args.images, 1), ("--val", args.val, 0)):
        if value < least:
            raise UserError(f"{option} is {value}, allowed is an integer of at least {least}")
    if args.budget is not None:
        require_possible(args.budget, config, candidates)
    return Plan(
        candidates,
        args.granularity or quant.recon.granularity,
        args.images,
        args.val,
        args.budget,
        args.plot,
    )


def require_possible(budget: float, config: EasyDict, candidates: list[Bits]) -> None:
    """Refuse a budget that cannot be kept, before anything is measured.

    Raises:
        UserError: it is none, too small, or the bits to try say too little.
    """
    with_activations = {bits.activation is not None for bits in candidates}
    if any(bits.weight is None for bits in candidates) or len(with_activations) > 1:
        raise UserError(
            f"--bits is {','.join(map(str, candidates))}, allowed with --budget are bits of weights in "
            "each, and of activations in each or in none"
        )
    model = quantize_model(float_model_on_meta(config), config)
    special = dict(model.special_bits(quant_spec(config)))
    fewest = math.ceil(1000 * fewest_bits_per_weight(model, special, candidates)) / 1000
    if not fewest <= budget <= 8:
        raise UserError(
            f"--budget is {budget:g}, allowed is a number from {fewest:g}, the fewest bits per weight "
            "that --bits, quant.ends_8bit and quant.overrides leave, to 8"
        )


def parse_bits(written: str) -> list[Bits]:
    """Bit-widths as ``--bits`` writes them, each once.

    Raises:
        UserError: one is no such thing.
    """
    candidates = []
    for part in written.split(","):
        match = re.fullmatch(r"(?:w([2-8]))?(?:a([2-8]))?", part.strip())
        if match is None or not part.strip():
            raise UserError(
                f"--bits is {written!r:.80}, allowed is a list such as w2a4,w4a4 of 2 to 8 bits; "
                "w4 alone leaves activations float, a4 alone weights"
            )
        candidates.append(Bits(*(int(bits) if bits else None for bits in match.groups())))
    return list(dict.fromkeys(candidates))


def parse_arguments() -> argparse.Namespace:
    parser = config_parser(__doc__)
    parser.add_argument("--bits", help="bit-widths to try, such as w2a4,w4a4 (default: the config's)")
    parser.add_argument(
        "--granularity",
        choices=("block", "layer"),
        help="what is quantized at a time (default: quant.recon.granularity)",
    )
    parser.add_argument("--images", type=int, default=64, help="calibration images to use (default: 64)")
    parser.add_argument(
        "--val",
        type=int,
        default=0,
        metavar="N",
        help="measure on N labelled images of val/ instead, with top-1",
    )
    parser.add_argument("--budget", type=float, help="bits per weight, on average over all weights")
    parser.add_argument(
        "--plot", choices=(*PICTURES, "none"), default="png", help="kind of the picture (default: png)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    run_script(main)
