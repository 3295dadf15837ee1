"""A run's report as one HTML file, and several runs side by side.

python -m calibquant.solver.report train_log/resnet101_imagenet_w4_a4/20260101-120000-12345
python -m calibquant.solver.report RUN RUN ... [--output compare.html]

Every run of main_imagenet.py makes its report; the first command makes it again from the run's folder,
the second compares runs.
"""

import argparse
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: the package is two folders up
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    import calibquant.quiet_start  # noqa: F401

from easydict import EasyDict

from calibquant.errors import UserError
from calibquant.model.quant_resnet import QuantResNet
from calibquant.paths import is_file
from calibquant.report.record import (
    HISTOGRAM_IMAGES,
    ActivationCounts,
    activation_quantizers,
    clipping_range,
    count_activations,
    thumbnails,
)
from calibquant.report.run_data import read_run
from calibquant.solver.files import require_matplotlib, write_bytes, write_json
from calibquant.solver.imagenet_util import Calibration
from calibquant.solver.script import Parser, one_line, run_script

logger = logging.getLogger("calibquant")


def main() -> None:
    args = parse_arguments()
    if args.output is not None and not args.output.endswith(".html"):
        raise UserError(f"--output {args.output}: allowed is the name of a file that ends in .html")
    folders = [Path(run).parent if is_file(Path(run)) else Path(run) for run in args.runs]
    if len(folders) == 1:
        print(make_report(folders[0], args.output))
    else:
        print(make_comparison(folders, args.output))


def make_report(folder: Path, output: str | None = None) -> Path:
    """Write a run's report from its files, by default as `report.html` beside them.

    Raises:
        UserError: they cannot be read, the page cannot be written, or matplotlib is missing.
    """
    require_matplotlib()
    from calibquant.report.page import run_page

    return _write(run_page(read_run(folder)), Path(output) if output else folder / "report.html")


def make_comparison(folders: list[Path], output: str | None = None) -> Path:
    """Write a page that compares runs, by default `compare.html` in the current folder.

    Raises:
        UserError: as for :func:`make_report`.
    """
    require_matplotlib()
    from calibquant.report.compare import compare_page

    return _write(compare_page([read_run(folder) for folder in folders]), Path(output or "compare.html"))


def _write(page: str, path: Path) -> Path:
    content = page.encode("utf-8", errors="backslashreplace")
    write_bytes(path, content)
    return path


def write_report(folder: Path) -> None:
    """Make a run's report; where that fails, one warning, since the run itself is well."""
    try:
        logger.info("report: %s", make_report(folder))
    except Exception as error:  # nothing about a picture is worth a run
        logger.warning(_AGAIN, one_line(error)[:300] or type(error).__name__, folder)
    except KeyboardInterrupt:
        logger.warning(_AGAIN, "interrupted, the run itself is complete", folder)
        raise


_AGAIN = "report: could not be made: %s; python -m calibquant.solver.report %s tries again"


@contextmanager
def recorded_for_report(
    folder: Path, model: QuantResNet, calibration: Calibration, config: EasyDict
) -> Iterator[None]:
    """Around the reconstruction of a calibrated model: keep its activations' histograms, their ranges
    before and after, and pictures of the calibration set, in the run's `report.json`.

    What cannot be kept is one warning; the model and the run are left as they are.
    """
    content: dict[str, Any] = {"images": min(len(calibration.images), HISTOGRAM_IMAGES)}
    counts: list[ActivationCounts] = []
    try:
        data = config.data
        content["thumbnails"] = thumbnails(calibration.images, calibration.files, data.mean, data.std)
        counts = count_activations(model, calibration.images, data.batch_size)
        content["activations"] = _describe(model, counts)
        write_json(folder / "report.json", content)
    except Exception as error:
        logger.warning("report: activations and pictures could not be kept: %s", one_line(error)[:300])
        counts = []
    del calibration  # many images, which nobody may need while units learn
    yield
    if counts:
        try:
            for entry, learned in zip(content["activations"], _ranges(model, counts), strict=True):
                entry["learned"] = learned
            write_json(folder / "report.json", content)
        except Exception as error:
            logger.warning("report: learned ranges could not be kept: %s", one_line(error)[:300])


def _describe(model: QuantResNet, counts: list[ActivationCounts]) -> list[dict[str, Any]]:
    """What `report.json` says of each activation quantizer of a calibrated model."""
    found = zip(activation_quantizers(model), counts, _ranges(model, counts), strict=True)
    return [
        {"name": name, "bits": quantizer.bits, "channels": quantizer.scale.numel()}
        | count.as_dict()
        | {"calibrated": calibrated}
        for (name, quantizer), count, calibrated in found
    ]


def _ranges(model: QuantResNet, counts: list[ActivationCounts]) -> list[dict[str, Any]]:
    pairs = zip(activation_quantizers(model), counts, strict=True)
    return [asdict(clipping_range(quantizer, count)) for (_, quantizer), count in pairs]


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folder of a run, with its metrics.json")
    parser.add_argument(
        "--output", help="file to write (default: RUN/report.html, or ./compare.html for several runs)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    run_script(main)
