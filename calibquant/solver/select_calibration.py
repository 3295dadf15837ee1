"""Pick calibration images from a train folder: list candidates, choose by a strategy, write the set.

python ./calibquant/solver/select_calibration.py --train ./imagenet/train
python ./calibquant/solver/select_calibration.py --train ./imagenet/train --strategy bn_statistics \\
    --config ./exp/w4a4/rs101/config.yaml

Or rank sets for a network, without labels and without reconstructing:

python ./calibquant/solver/select_calibration.py --score SET SET ... --config ./exp/w4a4/rs101/config.yaml
"""

import argparse
import logging
import os
import random
import secrets
import shutil
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the package is two folders up
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    import calibquant.quiet_start  # noqa: F401

from easydict import EasyDict

from calibquant.errors import UserError
from calibquant.paths import expand, is_file
from calibquant.solver.config import load_config
from calibquant.solver.files import require_no_folder, require_writable, write_json
from calibquant.solver.rank_sets import SCORES, as_json, find_set, rank_sets, table
from calibquant.solver.script import Parser, choose_device, run_script
from calibquant.solver.selection import POOL_STRATEGIES, STRATEGIES, Candidates, class_of
from calibquant.solver.train_folder import PoolReader, keep_readable, list_candidates

logger = logging.getLogger("calibquant")

OF_MAKING = "num", "seed", "strategy", "cover_classes", "classes", "out", "copy", "link", "candidates"
"""Options that say how a set is made."""
OF_A_POOL = "candidates", "device"
"""Options of strategies that run the float network."""
OF_RANKING = "by", "reference", "json"
"""Options that say how sets are ranked."""
MANIFEST = "manifest.json"
"""In a set's folder, beside the class folders."""


def main() -> None:
    args = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    config = load_config(args.config) if args.config else None
    if args.score is not None:
        score(args, config)
        return
    if args.train is None:
        raise UserError("--train is missing, allowed is a folder that holds <class>/<image>")
    pool_reader = None
    if args.strategy in POOL_STRATEGIES and config is not None:
        pool_reader = PoolReader(config, choose_device(args.device), args.candidates)
    elif config is not None:
        logger.info("--config: not needed, --strategy %s runs no network", args.strategy)
    select_calibration(
        args.train,
        args.out,
        args.num,
        args.seed,
        args.strategy,
        args.classes,
        args.copy,
        args.cover_classes,
        pool_reader,
    )


def score(args: argparse.Namespace, config: EasyDict | None) -> None:
    """Rank given sets, and print the ranking.

    Raises:
        UserError: there is no config, or a set is missing or unreadable.
    """
    if config is None:
        raise UserError("--config is missing, --score needs it: sets are ranked for a network")
    if args.reference and "ranges" not in args.by:
        raise UserError("--reference does nothing without --by ranges")
    if args.json:
        require_no_folder("--json", args.json)
        if not args.json.name.endswith(".json"):  # it replaces what is there: no config, no list of images
            raise UserError(f"--json is {args.json}, allowed is a name that ends in .json")
        require_writable(args.json.parent)
    train = args.train or expand(config.data.path, "data.path") / "train"
    sets = [find_set(given, train) for given in args.score]
    reference = find_set(args.reference, train, "--reference") if args.reference else None
    scores = rank_sets(sets, config, choose_device(args.device), args.by, reference)
    for line in table(scores):
        logger.info("%s", line)
    if args.json:
        write_json(args.json, as_json(scores, args.by, config))


def select_calibration(
    train: Path,
    out: Path | None = None,
    num: int = 1024,
    seed: int = 1,
    strategy: str = "random",
    classes: str = "imagenet",
    copy: bool = False,
    cover: bool = True,
    pool_reader: PoolReader | None = None,
) -> Path:
    """Build a calibration set from a train folder and return its folder.

    Args:
        train: ImageFolder tree.
        out: the set's folder; None is ``sel_<num>_<classes>classes`` beside the train folder (``sel_<num>``
            where classes need not be covered), to which ``sel`` is then linked where that name is free.
        num: images in the set.
        seed: the same seed and files give the same set.
        strategy: a name of :data:`STRATEGIES` or :data:`POOL_STRATEGIES`.
        classes: ``imagenet`` allows only wnids as class folders, ``folders`` any name.
        copy: copy the images instead of linking to them.
        cover: every class at least once.
        pool_reader: runs the candidates of one of :data:`POOL_STRATEGIES` through the network.

    Raises:
        UserError: the train folder is not as it must be, holds too few images, the set exists, or there is
            no config for a strategy that needs one.
    """
    if strategy in POOL_STRATEGIES and pool_reader is None:
        raise UserError(f"--config is missing, --strategy {strategy} needs it: it runs the float network")
    train = _physical(train)
    candidates = list_candidates(train, classes)
    _check_size(train, candidates, num, seed, cover)
    covering = f"_{len(candidates)}classes" if cover else ""
    folder = _physical(out or train.parent / f"sel_{num}{covering}")
    _check_place(folder, train)

    draw = random.Random(seed)
    measured: dict[str, object] = {}
    if pool_reader is not None and strategy in POOL_STRATEGIES:
        pool = pool_reader.read(train, candidates, num, draw, cover)
        chosen = POOL_STRATEGIES[strategy](pool, num, draw, cover)
        measured = {
            "model": pool_reader.config.model.type,
            "float_weights": pool.network,
            "candidates": len(pool.files),
            "statistics_distance": pool.distance(chosen),
        }
    else:
        chosen = STRATEGIES[strategy](candidates, num, draw, cover)
    hashes = keep_readable(train, candidates, chosen, draw, cover)
    manifest = {
        "num": num,
        "seed": seed,
        "strategy": strategy,
        "classes": len({class_of(file) for file in hashes}),
        **measured,
        "train": train.name,
        "files": [{"file": file, "sha256": hashes[file]} for file in sorted(hashes)],
    }
    write_set(folder, train, manifest, copy)
    logger.info("%s: %d images of %d classes", folder, num, manifest["classes"])
    if out is None:
        link_default(folder)
    return folder


def _physical(path: Path) -> Path:
    """Absolute path whose parent holds no symbolic link, so that ``..`` in a relative link means one up."""
    return path.resolve() if path.name in ("", "..") else path.parent.resolve() / path.name


def _check_size(train: Path, candidates: Candidates, num: int, seed: int, cover: bool) -> None:
    total = sum(map(len, candidates.values()))
    if cover and num < len(candidates):
        raise UserError(
            f"--num is {num}, allowed is at least one image for each of {len(candidates)} classes "
            "(--no-cover_classes leaves some out)"
        )
    if num < 1:
        raise UserError(f"--num is {num}, allowed is an integer of at least 1")
    if num > total:
        raise UserError(f"--num is {num}, allowed is at most {total}, the images of {train}")
    if MANIFEST in candidates:
        raise UserError(f"train folder {train}: class folder {MANIFEST}, allowed is another name")
    if seed < 0:
        raise UserError(f"--seed is {seed}, allowed is an integer of at least 0")


def _check_place(folder: Path, train: Path) -> None:
    if os.path.lexists(folder):
        raise UserError(f"{folder}: exists already; remove it, or give another folder with --out")
    if folder.is_relative_to(train) or folder.is_relative_to(train.resolve()):  # it may be a link itself
        raise UserError(f"--out {folder}: allowed is a folder outside of the train folder")
    if is_file(folder.parent):
        raise UserError(f"--out {folder}: cannot be written: Not a directory")
    require_writable(folder.parent)


def write_set(folder: Path, train: Path, manifest: dict[str, object], copy: bool) -> None:
    """Link or copy the manifest's files into a folder that appears whole or not at all.

    Raises:
        UserError: it cannot be written, or the folder has come to exist.
    """
    files = manifest["files"]
    assert isinstance(files, list)
    building = folder.parent / f".{folder.name}.{secrets.token_hex(8)}.tmp"  # as deep: same relative links
    try:
        building.mkdir(parents=True)
        for entry in files:
            source, place = train / entry["file"], building / entry["file"]
            place.parent.mkdir(parents=True, exist_ok=True)
            if copy:
                shutil.copyfile(source, place)
            else:
                place.symlink_to(os.path.relpath(source, place.parent))
        write_json(building / MANIFEST, manifest)
        building.rename(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def link_default(folder: Path) -> None:
    """Make ``sel``, which configs read by default, a link to a set beside it, where the name is free."""
    default = folder.parent / "sel"
    try:
        default.symlink_to(folder.name)
        logger.info("%s -> %s: linked, configs read it by default", default, folder.name)
    except OSError as error:
        reason = "exists already" if isinstance(error, FileExistsError) else error.strerror
        logger.info("%s: left alone, %s; set data.calibration: %s", default, reason, folder.name)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--train", type=Path, help="folder that holds <class>/<image>")
    parser.add_argument("--num", type=int, default=1024, help="images in the set (default: 1024)")
    parser.add_argument("--seed", type=int, default=1, help="another seed, another set (default: 1)")
    parser.add_argument(
        "--strategy",
        choices=[*STRATEGIES, *POOL_STRATEGIES],
        default="random",
        help="random: one image of every class, the rest at random (default);\n"
        "class_balanced: classes as even as possible;\n"
        "bn_statistics: activations with nearly the mean and variance that batch norm kept from\n"
        "training; needs --config;\n"
        "clustering: an image for each of --num clusters of alike activations; needs --config",
    )
    parser.add_argument(
        "--cover_classes",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="every class at least once (default), or fewer images than classes if need be",
    )
    parser.add_argument(
        "--classes",
        choices=("imagenet", "folders"),
        default="imagenet",
        help="imagenet: class folders are ImageNet wnids (default); folders: any names",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="the set's folder (default: beside train, sel_<num>_<classes>classes,\n"
        "or sel_<num> where classes need not be covered)",
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--copy", action="store_true", help="copy the images")
    how.add_argument("--link", action="store_true", help="link to the images, relatively (default)")
    add_network_arguments(parser)
    add_score_arguments(parser)
    args = parser.parse_args()
    if args.score:
        require_defaults(parser, args, OF_MAKING, "none with --score, which makes no set")
    else:
        require_defaults(parser, args, OF_RANKING, "only with --score")
        if args.strategy not in POOL_STRATEGIES:
            require_defaults(
                parser, args, OF_A_POOL, f"only with --strategy {' or '.join(POOL_STRATEGIES)}"
            )
    return args


def require_defaults(
    parser: argparse.ArgumentParser, args: argparse.Namespace, names: tuple[str, ...], allowed: str
) -> None:
    """Refuse options that would do nothing.

    Raises:
        UserError: naming the option.
    """
    for name in names:
        value = getattr(args, name)
        if value != parser.get_default(name):
            shown = " ".join(value) if isinstance(value, list) else value
            raise UserError(f"--{name} is {shown}, allowed is {allowed}")


def add_network_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of what runs the float network."""
    group = parser.add_argument_group("for bn_statistics, clustering and --score")
    group.add_argument(
        "--config", help="YAML file of the network, see exp/; data.* says how it reads images"
    )
    group.add_argument("--device", choices=("cuda", "cpu"), help="default: CUDA where there is one")
    group.add_argument(
        "--candidates",
        type=int,
        default=PoolReader.size,
        metavar="N",
        help="images to choose among, a random part of --train (default: 8192: each has to run through\n"
        "the network, and 8192 take 6 GB of memory for ResNet-101, 3.5 GB of it for what is kept of\n"
        "them, which for all of ImageNet would be 540 GB)",
    )


def add_score_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``--score``."""
    group = parser.add_argument_group("to rank sets instead of making one")
    group.add_argument(
        "--score",
        nargs="+",
        type=Path,
        metavar="SET",
        help="calibration folders, or text files of images, one a line, relative to --train\n"
        "(default: train/ in data.path)",
    )
    group.add_argument(
        "--by",
        nargs="+",
        choices=SCORES,
        default=["statistics"],
        help="statistics: distance of activations' mean and variance from batch norm's (default);\n"
        "ranges: KL of the quantized network's outputs from the float one's, with ranges from the set;\n"
        "of both the first ranks",
    )
    group.add_argument(
        "--reference",
        type=Path,
        metavar="SET",
        help="images on which ranges compares outputs (default: those of all sets)",
    )
    group.add_argument("--json", type=Path, metavar="FILE.json", help="write the ranking as JSON, too")


if __name__ == "__main__":
    run_script(main)
