"""Variants of a config against each other, on the same network and val images: tables and JSON.

python ./benchmarks/ablation.py --config ./exp/w4a4/rs50_msra/config.yaml --bits w4a4 w2a4 \\
    --variants qdrop ours ours,quant.equalize.iters=100 --sets random_1.txt bn.txt --seeds 1005 1 2 \\
    --steps 200 --images 256 --input_size 128 --out ./benchmarks/results/ablation.json

Every combination of bits, variant, set and seed is a run: ranges, reconstruction, and the val images by
both networks. What --work holds already is not run again, so that the command can be interrupted and
continued. The code is not told apart: give another --work after changing it.
"""

import argparse
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: the repository is a folder up
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import calibquant.quiet_start  # noqa: F401

import torch
from easydict import EasyDict

from benchmarks.ablation_plan import (
    Edits,
    Point,
    bits_of,
    changes,
    edited,
    find_sets,
    parse_bits,
    parse_variant,
    plan,
    resized,
    unique,
    unused,
)
from benchmarks.ablation_report import (
    as_json,
    compare,
    markdown,
    means,
    on_val,
    plot_sets,
    read_scores,
    require_format,
    set_effects,
)
from benchmarks.ablation_runs import Result, Scorer, execute, keep, recall
from benchmarks.speed import machine
from calibquant.errors import UserError
from calibquant.solver.config import check_config, load_config, plain
from calibquant.solver.files import require_no_folder, require_writable, write_json
from calibquant.solver.pipeline import float_model
from calibquant.solver.run_log import versions
from calibquant.solver.script import choose_device, config_parser, run_script


def main() -> None:
    args = arguments()
    config, points = prepare(args)
    scores = read_scores(args.scores, points) if args.scores else {}
    outputs = {name: path for name, path in (("--out", args.out), ("--plot", args.plot)) if path}
    for option, path in outputs.items():
        require_no_folder(option, path)
    for folder in (args.work, *(path.parent for path in outputs.values())):
        require_writable(folder)
    device = choose_device(args.device)
    finished = run_all(points, scorers(config, points, device, args.unused), args.work)
    comparisons, effects = compare(finished), set_effects(finished, scores)
    of_val = compare(on_val(finished)) if args.unused else []
    if args.out:
        about = {
            "command": " ".join(["python", *sys.argv]),
            "date": f"{datetime.now(UTC):%Y-%m-%d}",
            "machine": machine(device),
            "versions": versions(),
            "config": plain(config),
            "variants": {point.variant: changes(point.config, config) for point in points},
        }
        write_json(args.out, about | as_json(finished, comparisons, of_val, effects, scores))
    if args.plot:
        plot_sets(args.plot, effects)
    print(markdown(finished, comparisons, of_val, effects))


def prepare(args: argparse.Namespace) -> tuple[EasyDict, list[Point]]:
    """The config with what the options override, and every run; before anything takes long.

    Raises:
        UserError: an option, a variant or a set is not as it must be.
    """
    given = load_config(args.config)
    shared = overrides(args, given)
    raw = edited(plain(given), shared)
    config = check_config(raw, f"config {args.config} with the options given")
    bits = {name: parse_bits(name) for name in unique(args.bits or [bits_of(config)], "--bits")}
    variants = [parse_variant(text) for text in args.variants]
    unique([variant.name for variant in variants], "--variants")
    seeds = unique(args.seeds or [config.process.seed], "--seeds")
    sets = find_sets(args.sets, config.data)
    if args.plot:
        require_format(args.plot)
        if len(sets) < 2 and len(seeds) < 2:
            raise UserError("--plot shows what sets change, allowed are two and more of --sets or --seeds")
    return config, list(plan(raw, bits, variants, sets, seeds, shared))


def overrides(args: argparse.Namespace, config: EasyDict) -> Edits:
    """What the options set for all runs."""
    options = {
        "quant.recon.iters": args.steps,
        "quant.recon.batch_size": args.batch_size,
        "quant.calibrate": args.images,
    }
    given = {key: value for key, value in options.items() if value is not None}
    return {**given, **resized(config.data, args.input_size)}


def scorers(config: EasyDict, points: list[Point], device: torch.device, and_unused: bool) -> list[Scorer]:
    """Each run's: runs share one, and with unused images those of the same set and seed do.

    Raises:
        UserError: see :func:`unused`.
    """
    model = float_model(config).to(device)
    draws = [(point.set, point.seed) if and_unused else () for point in points]
    shared = {}
    for draw in dict.fromkeys(draws):
        alike = [point for point, its in zip(points, draws, strict=True) if its == draw]
        others = unused(config.data, alike) if and_unused else []
        shared[draw] = Scorer(config, model, device, others)
    return [shared[draw] for draw in draws]


def run_all(points: list[Point], by: list[Scorer], work: Path) -> list[tuple[Point, Result]]:
    """Each run's result: from the folder, or else run now and kept there."""
    finished = []
    for number, (point, scorer) in enumerate(zip(points, by, strict=True), start=1):
        path = work / f"{point.key(scorer.identity)}.json"
        result, how = recall(path), "kept"
        if result is None:
            result, how = execute(point, scorer, work), "done"
            keep(path, point, result)
        finished.append((point, result))
        print(f"{number} of {len(points)} {how}: {point}: {line(result)}", flush=True)
    return finished


def line(result: Result) -> str:
    """A run's result in a few words."""
    found: dict[str, Any] = means(result.reconstructed)
    words = f"top-1 {found['top1']:.2f} % (float {result.float_top1.mean():.2f} %), "
    words += f"agreement {found['agreement']:.2f} %, KL {found['kl']:.4f}, "
    return words + f"{sum(result.seconds.values()):.0f} s"


def arguments() -> argparse.Namespace:
    parser = config_parser(__doc__)
    parser.add_argument("--bits", nargs="+", metavar="wXaY", help="default: the config's own")
    parser.add_argument(
        "--variants",
        nargs="+",
        required=True,
        metavar="VARIANT",
        help="ours (the config as it is), qdrop, NAME=YAML (its quant section), or one of these or a NAME\n"
        "of your own with ,KEY=VALUE behind it; the others are held against the first",
    )
    parser.add_argument(
        "--sets",
        nargs="+",
        default=[],
        metavar="SET",
        help="calibration sets: folders, or text files of images of the train folder, one a line;\n"
        "default: the config's own",
    )
    parser.add_argument("--seeds", nargs="+", type=int, help="default: the config's own")
    parser.add_argument(
        "--unused",
        action="store_true",
        help="score the images of the train folder that a set (or the draw of a seed) leaves,\n"
        "too, and tell both",
    )
    parser.add_argument("--steps", type=int, help="quant.recon.iters of all runs")
    parser.add_argument("--images", type=int, help="quant.calibrate of all runs")
    parser.add_argument("--batch_size", type=int, help="quant.recon.batch_size of all runs")
    parser.add_argument("--input_size", type=int, help="data.input_size; data.test_resize in proportion")
    parser.add_argument(
        "--scores", type=Path, help="what select_calibration.py --score --json wrote of the sets"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("train_log/ablation"), help="folder that keeps runs"
    )
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    parser.add_argument(
        "--plot",
        type=Path,
        help="PNG or SVG file: what each set gives, or of one set each seed, a column per variant",
    )
    return parser.parse_args()


if __name__ == "__main__":
    run_script(main)
