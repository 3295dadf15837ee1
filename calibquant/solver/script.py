"""What every script shares: how it ends when something is wrong, and which device it runs on."""

import argparse
import errno
import gc
import io
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from calibquant.errors import UserError, printable
from calibquant.solver.memory import keep_freed_memory

logger = logging.getLogger("calibquant")


def one_line(error: BaseException) -> str:
    """An exception's message on one printable line of at most 1000 characters."""
    return printable(str(error))


def run_script(main: Callable[[], None]) -> NoReturn:
    """Run a script's main and exit: 0, or 2 with one line for what a user can change, or 130 for Ctrl-C."""
    signal.signal(signal.SIGTERM, _interrupt)
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # see quiet_start.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
    logging.raiseExceptions = False  # a log that cannot be written prints no traceback of its own
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed before the start
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # whatever a terminal or a file cannot show
    gc.freeze()  # what is imported stays: looking through it took a third of a second after each unit
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        _heed_no_more()
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # whoever read the output has gone, as `head` does
        _heed_no_more()
        _forget_output()
        sys.exit(1)
    except Exception as error:
        words = for_user(error)
        if words is None:
            raise
        _heed_no_more()
        print(f"error: {words}", file=sys.stderr)
        if isinstance(error, OSError):
            _forget_output()
        sys.exit(2)
    _heed_no_more()
    sys.exit(0)


def _heed_no_more() -> None:
    """Let a signal end the interpreter's own end, too, at once, where Python would show a traceback."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def _forget_output() -> None:
    """Let what cannot be printed go nowhere, so that the interpreter does not try once more at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def for_user(error: Exception) -> str | None:
    """One line on what a user can change; None for anything else, which is a defect of ours."""
    words = one_line(error)
    if isinstance(error, UserError):
        return words
    few_files = isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)
    if few_files or (isinstance(error, RuntimeError) and str(error).startswith("Too many open files")):
        # torch says the latter of what data-loading processes hand over
        return f"too many files are open ({words[:300]}); lower data.num_workers, or raise ulimit -n"
    if isinstance(error, OSError):
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            return f"an output cannot be written: {words}"
        closed = error.errno in (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP)
        return f"{printable(str(error.filename))}: {error.strerror}" if closed and error.filename else None
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop"):  # of pathlib
        return words
    if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker"):
        # torch raises it wherever the program is by then
        return (
            f"a data-loading process has ended ({words[:300]}), most likely out of memory, or of shared "
            "memory (/dev/shm), or with too long a TMPDIR; "
            "lower data.num_workers (0: none) or data.batch_size"
        )
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    if known or (isinstance(error, RuntimeError) and any(sign in str(error) for sign in _NO_MEMORY)):
        return f"out of memory: {words[:300]}; {_SMALLER}"
    return None


class Parser(argparse.ArgumentParser):
    """Shows a description as it is written, and says in one line what is wrong with an argument."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"formatter_class": argparse.RawTextHelpFormatter} | settings)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {printable(message)}\n")


def config_parser(
    description: str | None, config_help: str = "YAML file, see exp/", device: bool = True
) -> argparse.ArgumentParser:
    """A parser with the options that every script on a config has: ``--config`` and mostly ``--device``."""
    parser = Parser(description=description)
    parser.add_argument("--config", required=True, help=config_help)
    if device:
        parser.add_argument("--device", choices=("cuda", "cpu"), help="default: CUDA where there is one")
    return parser


def add_saved_model(parser: argparse.ArgumentParser) -> None:
    """Add the option that names a saved network: ``--quantized_model_path``."""
    parser.add_argument(
        "--quantized_model_path",
        required=True,
        help="a path, or a bare name in the config's folder under model_quantized/",
    )


_NO_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""In errors of torch that are of no kind of their own: of the CPU, of page-locked memory, of a graph."""
_SMALLER = "lower data.batch_size, quant.recon.batch_size or quant.calibrate, or unset quant.recon.keep_gpu"


def _interrupt(_signal: int, _frame: object) -> None:
    """End on SIGTERM, which schedulers send, as on Ctrl-C."""
    raise KeyboardInterrupt


def choose_device(wanted: str | None) -> torch.device:
    """The device of the whole run: what was asked for, else CUDA where there is one, else the CPU.

    Raises:
        UserError: CUDA was asked for and there is none.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is available; allowed is cpu")
    if wanted is None and not torch.cuda.is_available():
        logger.info("no CUDA device: running on the CPU")
    name = wanted or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cpu":
        keep_freed_memory()
    return torch.device(name)
