"""Pick calibration images from a train folder: list candidates, choose by a strategy, write the set.

python ./calibquant/solver/select_calibration.py --train ./imagenet/train
"""

import argparse
import hashlib
import logging
import os
import random
import secrets
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the package is two folders up
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tqdm import tqdm

from calibquant.errors import UserError
from calibquant.solver.files import write_json
from calibquant.solver.imagenet_util import imagenet_wnids, is_image, read_image, subfolders
from calibquant.solver.script import one_line, run_script

logger = logging.getLogger("calibquant")

Candidates = dict[str, list[str]]
"""Class folder -> its images, sorted, as ``class/[subfolder/]file`` relative to the train folder."""

Strategy = Callable[[Candidates, int, random.Random], list[str]]
"""Chooses ``num`` of the candidates, at least one of each class."""


def main() -> None:
    args = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    select_calibration(args.train, args.out, args.num, args.seed, args.strategy, args.classes, args.copy)


def select_calibration(
    train: Path,
    out: Path | None = None,
    num: int = 1024,
    seed: int = 1,
    strategy: str = "random",
    classes: str = "imagenet",
    copy: bool = False,
) -> Path:
    """Build a calibration set from a train folder and return its folder.

    Args:
        train: ImageFolder tree.
        out: the set's folder; None is ``sel_<num>_<classes>classes`` beside the train folder, to which
            ``sel`` is then linked where that name is free.
        num: images in the set.
        seed: the same seed and files give the same set.
        strategy: a name of :data:`STRATEGIES`.
        classes: ``imagenet`` allows only wnids as class folders, ``folders`` any name.
        copy: copy the images instead of linking to them.

    Raises:
        UserError: the train folder is not as it must be, holds too few images, or the set exists.
    """
    train = _physical(train)
    candidates = list_candidates(train, classes)
    _check_size(train, candidates, num, seed)
    folder = _physical(out or train.parent / f"sel_{num}_{len(candidates)}classes")
    _check_place(folder, train)

    draw = random.Random(seed)
    chosen = STRATEGIES[strategy](candidates, num, draw)
    hashes = keep_readable(train, candidates, chosen, draw)
    manifest = {
        "num": num,
        "seed": seed,
        "strategy": strategy,
        "classes": len(candidates),
        "train": train.name,
        "files": [{"file": file, "sha256": hashes[file]} for file in sorted(hashes)],
    }
    write_set(folder, train, manifest, copy)
    logger.info("%s: %d images of %d classes", folder, num, len(candidates))
    if out is None:
        link_default(folder)
    return folder


def _physical(path: Path) -> Path:
    """Absolute path whose parent holds no symbolic link, so that ``..`` in a relative link means one up."""
    return path.resolve() if path.name in ("", "..") else path.parent.resolve() / path.name


def _check_size(train: Path, candidates: Candidates, num: int, seed: int) -> None:
    total = sum(map(len, candidates.values()))
    if num < len(candidates):
        raise UserError(
            f"--num is {num}, allowed is at least one image for each of {len(candidates)} classes"
        )
    if num > total:
        raise UserError(f"--num is {num}, allowed is at most {total}, the images of {train}")
    if seed < 0:
        raise UserError(f"--seed is {seed}, allowed is an integer of at least 0")


def _check_place(folder: Path, train: Path) -> None:
    if os.path.lexists(folder):
        raise UserError(f"{folder}: exists already; remove it, or give another folder with --out")
    if folder.is_relative_to(train):
        raise UserError(f"--out {folder}: allowed is a folder outside of the train folder")


def list_candidates(train: Path, classes: str) -> Candidates:
    """Images of each class folder, in an order that depends on names alone.

    Raises:
        UserError: the folder is missing, a class folder is no wnid where ``classes`` is ``imagenet``, or
            holds no image.
    """
    folders = subfolders(train, "train folder")
    if not folders:
        raise UserError(f"train folder {train}: holds no class folder, allowed is train/<class>/<image>")
    wnids = set(imagenet_wnids())
    candidates: Candidates = {}
    for folder in folders:
        if classes == "imagenet" and folder.name not in wnids:
            raise UserError(
                f"train folder {train}: class folder {folder.name} is none of ImageNet's 1,000 wnids "
                "(n01440764, n01443537, ...); --classes folders allows any name"
            )
        candidates[folder.name] = sorted(path.relative_to(train).as_posix() for path in _images(folder))
        if not candidates[folder.name]:
            raise UserError(f"train folder {train}: class folder {folder.name} holds no image")
    for path in sorted(train.iterdir()):
        if is_image(path) and not path.is_dir():
            logger.warning("%s: ignored, it is in no class folder", path)
    return candidates


def _images(folder: Path) -> list[Path]:
    """Image files at any depth. Walks by directory entries: no stat for each of 1.3 million files."""

    def fail(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from error

    images = []
    for inside, subfolders_inside, names in os.walk(folder, onerror=fail):
        for path in (Path(inside, name) for name in sorted(subfolders_inside)):
            if path.is_symlink():
                logger.warning("%s: ignored, a link to a folder", path)
        for path in (Path(inside, name) for name in sorted(names)):
            if is_image(path):
                images.append(path)
            else:
                logger.warning("%s: ignored, its name is not an image's", path)
    return images


def choose_random(candidates: Candidates, num: int, draw: random.Random) -> list[str]:
    """One image of every class, the rest from all images alike."""
    chosen = [draw.choice(images) for images in candidates.values()]
    rest = _without(candidates, set(chosen))
    return chosen + draw.sample(rest, num - len(chosen))


def choose_class_balanced(candidates: Candidates, num: int, draw: random.Random) -> list[str]:
    """As many images of each class as of any other, where classes are large enough."""
    shuffled = {name: draw.sample(images, len(images)) for name, images in candidates.items()}
    chosen: list[str] = []
    while len(chosen) < num:
        nonempty = [images for images in shuffled.values() if images]
        for images in draw.sample(nonempty, min(len(nonempty), num - len(chosen))):
            chosen.append(images.pop())
    return chosen


STRATEGIES: dict[str, Strategy] = {"random": choose_random, "class_balanced": choose_class_balanced}


def _without(candidates: Candidates, taken: set[str]) -> list[str]:
    return [file for images in candidates.values() for file in images if file not in taken]


def _class(file: str) -> str:
    return file.split("/", 1)[0]


def keep_readable(
    train: Path, candidates: Candidates, chosen: list[str], draw: random.Random
) -> dict[str, str]:
    """Decode every chosen image; one that cannot be read gives way to another of its class.

    Where its class has no other, any class steps in.

    Returns:
        SHA-256 of each image's file.

    Raises:
        UserError: a class has no readable image, or too few images are readable.
    """
    hashes: dict[str, str] = {}
    taken = set(chosen)
    for file in tqdm(chosen, desc="decode", leave=False, disable=None, unit="image"):
        while True:
            try:
                hashes[file] = hash_readable(train / file)
                break
            except ValueError as error:
                unreadable = file
                file = _replacement(unreadable, candidates, taken, draw)
                taken.add(file)
                logger.warning("%s: cannot be read (%s), replaced by %s", train / unreadable, error, file)
    lost = candidates.keys() - {_class(file) for file in hashes}
    if lost:
        raise UserError(f"train folder {train}: no image of class folder {min(lost)} can be read")
    return hashes


def _replacement(file: str, candidates: Candidates, taken: set[str], draw: random.Random) -> str:
    same_class = [other for other in candidates[_class(file)] if other not in taken]
    spare = same_class or _without(candidates, taken)
    if not spare:
        raise UserError(f"image {file}: cannot be read, and no image is left to replace it; lower --num")
    return draw.choice(spare)


def hash_readable(path: Path) -> str:
    """SHA-256 of an image file that Pillow can decode.

    Raises:
        ValueError: it cannot be read; the reason on one line.
    """
    try:
        if not path.is_file():
            raise ValueError("a broken link, or no regular file")
        read_image(path)
        content = path.read_bytes()
    except Exception as error:  # a decoder may raise anything on foreign bytes
        raise ValueError(one_line(error) or type(error).__name__) from error
    return hashlib.sha256(content).hexdigest()


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
        write_json(building / "manifest.json", manifest)
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--train", required=True, type=Path, help="folder that holds <class>/<image>")
    parser.add_argument("--num", type=int, default=1024, help="images in the set (default: 1024)")
    parser.add_argument("--seed", type=int, default=1, help="another seed, another set (default: 1)")
    parser.add_argument(
        "--strategy",
        choices=sorted(STRATEGIES),
        default="random",
        help="random: one image of every class, the rest at random (default);\n"
        "class_balanced: classes as even as possible",
    )
    parser.add_argument(
        "--classes",
        choices=("imagenet", "folders"),
        default="imagenet",
        help="imagenet: class folders are ImageNet wnids (default); folders: any names",
    )
    parser.add_argument(
        "--out", type=Path, help="the set's folder (default: sel_<num>_<classes>classes beside train)"
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--copy", action="store_true", help="copy the images")
    how.add_argument("--link", action="store_true", help="link to the images, relatively (default)")
    return parser.parse_args()


if __name__ == "__main__":
    run_script(main)
