"""Imagenette, ten of ImageNet's 1,000 classes: real images to quantize on where ImageNet is not at hand.

python ./calibquant/solver/imagenette.py
"""

import logging
import sys
import tempfile
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the package is two folders up
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    import calibquant.quiet_start  # noqa: F401

import torchvision

from calibquant.errors import UserError
from calibquant.solver.script import Parser, one_line, run_script
from calibquant.solver.select_calibration import select_calibration

logger = logging.getLogger("calibquant")


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--root", type=Path, default=Path("imagenet"), help="default: imagenet")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    prepare_imagenette(args.root)


def prepare_imagenette(root: Path, num: int = 1024) -> Path:
    """Make ``root/imagenette2/{train,val,sel}``, whatever of it is there already; returns the folder.

    Raises:
        UserError: the download failed, what is there is incomplete, or the folder cannot be written.
    """
    folder = root / "imagenette2"
    if not folder.exists():
        download(root)
    missing = [name for name in ("train", "val") if not (folder / name).is_dir()]
    if missing:
        raise UserError(f"{folder}: incomplete, it holds no {missing[0]}; remove it and run this again")
    logger.info("%s: train and val are there", folder)
    calibration = folder / "sel"
    if calibration.exists():
        logger.info("%s: is there already", calibration)
    else:
        try:
            select_calibration(folder / "train", calibration, num=num)
        except UserError:
            if not calibration.exists():
                raise
            logger.info("%s: another run was first", calibration)  # and sets appear whole
    return folder


def download(root: Path) -> None:
    """Download and extract Imagenette (1.5 GB) aside, then move it to ``root/imagenette2``.

    An interrupted extraction thus never looks like the whole. Each run has a folder of its own, so that
    none touches what another extracts; whichever is first has its tree kept.

    Raises:
        UserError: it failed.
    """
    folder = root / "imagenette2"
    logger.info("downloading Imagenette, about 1.5 GB, to %s", root)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=".imagenette2-", dir=root, ignore_cleanup_errors=True
        ) as aside:
            torchvision.datasets.Imagenette(aside, split="train", size="full", download=True)
            move(Path(aside) / folder.name, folder)
    except Exception as error:  # network, archive and disk each raise their own
        reason = one_line(error) or type(error).__name__
        raise UserError(f"Imagenette could not be downloaded to {root}: {reason}") from error


def move(tree: Path, folder: Path) -> None:
    """Move a tree into place, unless another run was first."""
    try:
        tree.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        logger.info("%s: another run was first", folder)


if __name__ == "__main__":
    run_script(main)
