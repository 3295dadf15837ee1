"""The whole pipeline on a CPU in minutes: handwritten digits, a small ResNet, and a table of the results.

python ./calibquant/solver/quickstart.py prepare                            # images and a float network
python ./calibquant/solver/quickstart.py newest ./exp/quickstart/w4a4.yaml  # its newest quantized file
python ./calibquant/solver/quickstart.py table                              # the results

The digits are scikit-learn's 1,797 images of 8x8 pixels; everything is read through the ImageFolder tree
and the configs of ``exp/quickstart``, just as ImageNet is.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: the package is two folders up
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    import calibquant.quiet_start  # noqa: F401

import torch
from easydict import EasyDict
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from calibquant.errors import UserError
from calibquant.model.load import build_model
from calibquant.paths import is_dir
from calibquant.report.run_data import mapping, number, read_mapping
from calibquant.solver.config import config_name, load_config
from calibquant.solver.files import write_atomically
from calibquant.solver.imagenet_util import (
    class_names,
    evaluate,
    evaluation_transform,
    list_samples,
    make_loader,
    report_unreadable,
    validation_loader,
)
from calibquant.solver.pipeline import fix_randomness
from calibquant.solver.script import Parser, run_script

CONFIGS = Path(__file__).resolve().parents[2] / "exp" / "quickstart"
PIXELS = 16
"""Side of the images: the digits' own 8 pixels would shrink to one before the last stage."""
VAL_EVERY = 4
"""Every fourth image of a class is held out; writers follow one another, so each is in both parts."""
SEL_IMAGES = 256
EPOCHS, BATCH, PEAK_LR, WEIGHT_DECAY, SHIFT = 20, 64, 5e-3, 0.05, 2


def main() -> None:
    args = parse_arguments()
    if args.command == "prepare":
        prepare(Path(args.root))
    elif args.command == "newest":
        print(newest_run(Path(args.root), "train_log", load_config(args.config))["checkpoint"])
    elif not print_table(Path(args.root)):
        sys.exit(1)


# --- the images and the float network ---------------------------------------------------------------------


def prepare(root: Path) -> None:
    """Write the images and train the float network, each only where it is not there yet.

    Raises:
        UserError: see :func:`write_digits`, or a folder is where the network is to be.
    """
    images, weights = root / "digits", root / "resnet18_digits.pth"
    if is_dir(weights):
        raise UserError(f"{weights}: is a folder, allowed is a file or nothing; remove it")
    if images.is_dir():
        print(f"{images}: already there")
    else:
        counts = write_digits(images)
        print(f"{images}: " + ", ".join(f"{count} images in {part}" for part, count in counts.items()))
    if weights.is_file():
        print(f"{weights}: already there; remove it to train again")
        return
    config = load_config(CONFIGS / "w4a4.yaml")
    config.data.path = str(images)
    torch.set_num_threads(1)  # the same network whatever the cores; threads gain little on images so small
    model = train(config)
    write_atomically(weights, lambda file: torch.save(model.state_dict(), file))
    print(f"{weights}: {weights.stat().st_size / 1000:,.0f} kB")


def write_digits(folder: Path) -> dict[str, int]:
    """Write ``folder/{train,sel,val}/<digit>/<number>.png``, whole or not at all; `sel` is part of `train`.

    Returns:
        How many images each part holds.

    Raises:
        UserError: scikit-learn is not installed, or the folder cannot be written.
    """
    pictures, parts = load_digits()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
            tree = Path(temporary) / folder.name
            for part, members in parts.items():
                for number, digit in members:
                    path = tree / part / str(digit) / f"{number:04d}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    pictures[number].save(path)
            tree.rename(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from error
    return {part: len(members) for part, members in parts.items()}


def load_digits() -> tuple[list[Image.Image], dict[str, list[tuple[int, int]]]]:
    """scikit-learn's digits as grey pictures, and the ``(number, digit)`` pairs of each part.

    The parts depend on the order of the images alone, so they are the same everywhere.
    """
    try:
        from sklearn.datasets import load_digits as sklearn_digits
    except ImportError as error:
        raise UserError("the digits come with scikit-learn: pip install scikit-learn") from error
    digits = sklearn_digits()
    grey = (digits.images * (255 / 16)).round().astype("uint8")
    pictures = [
        Image.fromarray(pixels).resize((PIXELS, PIXELS), Image.Resampling.BILINEAR) for pixels in grey
    ]
    parts: dict[str, list[tuple[int, int]]] = {"train": [], "sel": [], "val": []}
    for digit in range(10):
        members = [(int(number), digit) for number in (digits.target == digit).nonzero()[0]]
        train = [pair for place, pair in enumerate(members) if place % VAL_EVERY]
        wanted = SEL_IMAGES // 10 + (digit < SEL_IMAGES % 10)
        parts["train"] += train
        parts["sel"] += [train[place * len(train) // wanted] for place in range(wanted)]
        parts["val"] += members[::VAL_EVERY]
    return pictures, parts


def train(config: EasyDict, epochs: int = EPOCHS) -> nn.Module:
    """The config's network trained on ``train/``; the same seed and threads give the same one."""
    started = time.perf_counter()
    fix_randomness(config.process.seed, deterministic=False)
    images, targets = read_training_images(config)
    model = build_model(config.model.type, dict(config.model.kwargs))
    steps = epochs * (len(images) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), PEAK_LR, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=steps)
    for epoch in range(epochs):
        model.train()
        losses = []
        order = torch.randperm(len(images))[: len(images) // BATCH * BATCH]  # no batch is too small for BN
        for rows in order.split(BATCH):
            loss = F.cross_entropy(model(shifted(images[rows])), targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        if (epoch + 1) % 5 == 0 or epoch + 1 == epochs:
            mean = sum(losses) / len(losses)
            seconds = time.perf_counter() - started
            print(f"epoch {epoch + 1:2d} of {epochs}: loss {mean:.4f}, {seconds:.0f} s", flush=True)
    score = evaluate(model.eval(), validation_loader(config), torch.device("cpu"))
    print(f"float network: top-1 {score.top1:.2f} % of {score.images} held-out images")
    return model


def read_training_images(config: EasyDict) -> tuple[Tensor, Tensor]:
    """All of ``train/`` as evaluation reads images: ``[N, 3, H, W]`` normalised, and classes ``[N]``."""
    samples = list_samples(Path(config.data.path) / "train", class_names(config.data), "train folder")
    batches = [batch.to_keep() for batch in make_loader(samples, evaluation_transform(config.data), config)]
    for batch in batches:
        report_unreadable(batch, skip=False)
    return torch.cat([batch.images for batch in batches]), torch.cat([batch.targets for batch in batches])


def shifted(images: Tensor) -> Tensor:
    """Each image moved by up to ``SHIFT`` pixels either way, filled with the background."""
    _, _, height, width = images.shape
    padded = F.pad(images, [SHIFT] * 4, value=float(images.min()))
    corners = torch.randint(0, 2 * SHIFT + 1, (len(images), 2)).tolist()
    return torch.stack(
        [
            image[:, top : top + height, left : left + width]
            for image, (top, left) in zip(padded, corners, strict=True)
        ]
    )


# --- the results ------------------------------------------------------------------------------------------


RESULTS = {
    "train_log": ("float", "range_only", "checkpoint", "quantized"),
    "test_log": ("quantized", "checkpoint"),
}
"""What a finished run has in its `metrics.json`."""


@dataclass(frozen=True)
class Row:
    """One config's results: top-1 in percent, sizes in kB (1,000 bytes)."""

    bits: str
    float_top1: float
    range_only: float
    reconstructed: float
    from_file: float
    file_kb: float
    float_kb: float


def newest_run(root: Path, log: str, config: EasyDict, file: str | None = None) -> dict[str, Any]:
    """The metrics of a config's newest run under ``root/log``, or of the newest about a quantized file.

    Args:
        log: ``train_log`` or ``test_log``.
        file: name of the quantized file, where only runs about it are meant.

    Raises:
        UserError: there is none, or it did not get as far as all of its results.
    """
    folder = root / log / config_name(config)
    for path in sorted(folder.glob("*/metrics.json"), reverse=True):  # a run's name starts with its time
        metrics = read_mapping(path)
        if file is not None and Path(str(metrics.get("checkpoint", ""))).name != file:
            continue
        missing = [key for key in RESULTS[log] if key not in metrics]
        if missing:
            raise UserError(
                f"{path}: this run did not finish, {missing[0]} is missing; see the log beside it"
            )
        return metrics
    raise UserError(f"{folder}: holds no run{f' of {file}' if file else ''}; `make quickstart` makes one")


def read_row(root: Path, name: str) -> Row:
    """Results of ``exp/quickstart/<name>.yaml`` under a folder that holds ``train_log`` and ``test_log``.

    Raises:
        UserError: the network was not quantized, not scored again, or its files are gone.
    """
    config = load_config(CONFIGS / f"{name}.yaml")
    run = newest_run(root, "train_log", config)
    file = Path(str(run["checkpoint"]))  # whatever an edited file holds
    again = newest_run(root, "test_log", config, file.name)
    return Row(
        bits=name.upper(),
        float_top1=top1(run, "float"),
        range_only=top1(run, "range_only"),
        reconstructed=top1(run, "quantized"),
        from_file=top1(again, "quantized"),
        file_kb=kilobytes(root / file),
        float_kb=kilobytes(root / str(mapping(run, "config", "model").get("path"))),
    )


def top1(metrics: dict[str, Any], key: str) -> float:
    """An accuracy of a run in percent, NaN where there is no number."""
    return number(mapping(metrics, key).get("top1"))


def kilobytes(path: Path) -> float:
    """Size of a file in kB."""
    try:
        return path.stat().st_size / 1000
    except (OSError, ValueError) as error:  # ValueError: of a name that no file has
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def print_table(root: Path) -> bool:
    """Print both configs' results and each claim that does not hold; true where all of them do."""
    w4a4, w2a4 = read_row(root, "w4a4"), read_row(root, "w2a4")
    print("\n".join(table([w4a4, w2a4])))
    broken = broken_claims(w4a4, w2a4)
    for claim in broken:
        print(f"does not hold: {claim}", file=sys.stderr)
    return not broken


def table(rows: Iterable[Row]) -> list[str]:
    """Lines of the table, in Markdown."""
    head = ["bits", "float", "ranges only", "reconstructed", "from the file", "file, kB", "float32, kB"]
    lines = [head, ["-" * len(title) for title in head]]
    for row in rows:
        accuracies = [row.float_top1, row.range_only, row.reconstructed, row.from_file]
        sizes = [row.file_kb, row.float_kb]
        lines.append([row.bits, *(f"{a:.2f}" for a in accuracies), *(f"{s:,.0f}" for s in sizes)])
    return [
        "| " + " | ".join(cell.ljust(len(title)) for cell, title in zip(line, head, strict=True)) + " |"
        for line in lines
    ]


def broken_claims(w4a4: Row, w2a4: Row) -> list[str]:
    """What the quickstart promises and these results do not keep, a sentence each."""
    claims = []
    for row, most in ((w4a4, 1.0), (w2a4, 5.0)):
        claims += [
            (
                row.float_top1 >= 97,
                f"{row.bits}: float top-1 is {row.float_top1:.2f}, expected at least 97",
            ),
            (
                row.reconstructed >= row.float_top1 - most,
                f"{row.bits}: reconstructed top-1 is {row.reconstructed:.2f}, "
                f"expected within {most:g} of float's {row.float_top1:.2f}",
            ),
            (
                abs(row.from_file - row.reconstructed) <= 0.25,  # one image, should the device differ
                f"{row.bits}: top-1 from the file is {row.from_file:.2f}, "
                f"expected the {row.reconstructed:.2f} from before it was saved",
            ),
        ]
    claims.append(
        (
            w2a4.reconstructed >= w2a4.range_only + 1,
            f"{w2a4.bits}: reconstructed top-1 is {w2a4.reconstructed:.2f}, "
            f"expected at least 1 above {w2a4.range_only:.2f} of ranges only",
        )
    )
    return [sentence for holds, sentence in claims if not holds]


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("prepare", help="write the images and train the float network")
    command.add_argument("--root", default="quickstart", help="folder to write (default: quickstart)")
    command = commands.add_parser("newest", help="print the quantized file of a config's newest run")
    command.add_argument("config", metavar="CONFIG", help="its YAML")
    command.add_argument("--root", default=".", help="folder with train_log/ (default: .)")
    command = commands.add_parser("table", help="print the results; exit 1 if they are not as promised")
    command.add_argument("--root", default=".", help="folder with train_log/ and test_log/ (default: .)")
    return parser.parse_args()


if __name__ == "__main__":
    run_script(main)
