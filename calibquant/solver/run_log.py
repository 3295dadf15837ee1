"""What a run leaves behind: a folder of its own with a log and `metrics.json`."""

import logging
import platform
import resource
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from easydict import EasyDict

import calibquant
from calibquant.errors import UserError
from calibquant.solver.config import config_name, plain
from calibquant.solver.files import write_json
from calibquant.solver.script import one_line

logger = logging.getLogger("calibquant")


def versions() -> dict[str, str]:
    """Versions of everything that could change a result."""
    found = {"calibquant": calibquant.__version__, "python": platform.python_version()}
    for package in ("torch", "torchvision", "numpy", "scipy", "PyYAML", "easydict"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # such as a folder on PYTHONPATH
            found[package] = "unknown"
    return found | {"torch": str(torch.__version__)}  # with its build, such as +cu130


class RunLog:
    """A run's folder; `metrics.json` is rewritten, whole, whenever something new is known."""

    def __init__(self, folder: Path, config: EasyDict) -> None:
        self.folder = folder
        self.metrics: dict[str, Any] = {
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "seed": config.process.seed,
            "seconds": {},
            "config": plain(config),
            "versions": versions(),
        }

    def record(self, **values: Any) -> None:
        """Add values to `metrics.json`."""
        self.metrics.update(values)
        self.metrics.update(peak_memory())
        write_json(self.folder / "metrics.json", self.metrics)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage; its seconds go to the log and to `metrics.json`."""
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        self.metrics["seconds"][name] = seconds
        logger.info("%s: %.1f s", name, seconds)
        self.record()


@contextmanager
def start_run(root: str, config: EasyDict) -> Iterator[RunLog]:
    """Make ``<root>/<config name>/<UTC time>-<digits>/``, log into it and to the terminal.

    Raises:
        UserError: the folder cannot be made.
    """
    name = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.randbelow(10**5):05d}"
    folder = Path(root) / config_name(config) / name
    try:
        folder.mkdir(parents=True)
        to_file = logging.FileHandler(
            folder / "calibquant.log", encoding="utf-8", errors="backslashreplace"
        )
    except OSError as error:
        raise UserError(f"log folder {folder}: cannot be made: {error.strerror or error}") from error
    to_file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    to_terminal = logging.StreamHandler(sys.stdout)
    to_terminal.setLevel(logging.INFO)  # config and versions are for the file
    logger.setLevel(logging.DEBUG)
    for handler in (to_file, to_terminal):
        logger.addHandler(handler)
    try:
        logger.info("log: %s", folder / "calibquant.log")
        logger.debug("config: %s", plain(config))
        logger.debug("versions: %s", versions())
        yield RunLog(folder, config)
    except BaseException as error:
        logger.debug("%s: %s", type(error).__name__, one_line(error))
        raise
    finally:
        for handler in (to_file, to_terminal):
            logger.removeHandler(handler)
        with suppress(OSError):  # on a full disk; what ended the run is the better message
            to_file.close()


def peak_memory() -> dict[str, float]:
    """Peak memory in GiB: of the process, and as `peak_memory_gib` what it took of a GPU if it has one."""
    unit = 1 if sys.platform == "darwin" else 1024
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    device = torch.cuda.max_memory_reserved() / 2**30 if on_gpu else host
    return {"peak_memory_gib": device, "peak_host_memory_gib": host}
