"""What every script shares: how it ends when something is wrong, and which device it runs on."""

import argparse
import errno
import logging
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

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
    logging.raiseExceptions = False  # a log that cannot be written prints no traceback of its own
    try:
        main()
    except UserError as error:
        _stop(one_line(error))
    except (MemoryError, RuntimeError) as error:
        if str(error).startswith("DataLoader worker"):  # torch raises it wherever the program is by then
            _stop(
                f"a data-loading process has ended ({one_line(error)[:300]}), most likely out of memory; "
                "lower data.num_workers or data.batch_size"
            )
        known = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not known and "can't allocate memory" not in str(error):
            raise
        _stop(f"out of memory: {one_line(error)[:300]}; {_SMALLER}")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        _stop(f"an output cannot be written: {one_line(error)}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


def config_parser(
    description: str | None, config_help: str = "YAML file, see exp/", device: bool = True
) -> argparse.ArgumentParser:
    """A parser with the options that every script on a config has: ``--config`` and mostly ``--device``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
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


_SMALLER = "lower data.batch_size, quant.recon.batch_size or quant.calibrate, or unset quant.recon.keep_gpu"


def _stop(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


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
