"""A run's finished parts on disk, so that the same command continues where a killed run stopped.

Once ranges are calibrated the network is written, and after each unit its hardened state (whole, synced,
then renamed). What is carried from unit to unit is not: running the finished units again gives it back, bit
for bit on the same machine. A state belongs to a config file; what it was made from is kept with it, and a
difference is refused.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import torch
from easydict import EasyDict
from torch import nn

import calibquant
from calibquant.errors import UserError
from calibquant.model.load import safe_load
from calibquant.model.quant_layer import harden
from calibquant.model.quant_resnet import Unit
from calibquant.paths import is_file
from calibquant.solver.checkpoint import bare, checksum
from calibquant.solver.config import KEYS, first_difference, lookup, shown
from calibquant.solver.files import make_folder, remove_temporaries, write_atomically, write_json
from calibquant.solver.imagenet_util import Score
from calibquant.solver.learn import TracePoint
from calibquant.solver.recon import Memory, UnitResult
from calibquant.solver.run_log import versions

logger = logging.getLogger("calibquant")

STATE_ROOT = Path("train_log") / "unfinished"
IDENTITY = "identity.json"
"""Says of which run a state is; a state without one is of none."""
LOCK = "lock"
"""Is locked by the process that a state belongs to."""
ATTEMPTS = 20
"""At a state's folder, which a run that ends takes away."""
CALIBRATED = "calibrated.pth"
"""The network once its ranges are set."""
LOGS = "log.json"
"""Says where the run logs, or logged when it was killed."""
SAVED = "saved.json"
"""Says where the network was saved, once it is."""
WAYS_ON = "remove that file, for what it holds to be done again, or start anew with --fresh"
"""From a damaged file."""
LONGEST_NAME = 100
"""Of a unit, in the name of its state's file."""
HARMLESS = ("data.num_workers", "data.pin_memory", "model.path", "data.path", "data.calibration")
"""Keys that change how a result is computed, or where what is hashed itself lies, but not the result."""


def identity(
    config: EasyDict,
    model: nn.Module,
    calibration_sha256: str,
    validation: list[str],
    device: torch.device,
    processes: int = 1,
) -> dict[str, str]:
    """Everything that a run's result depends on, by name.

    Args:
        validation: names and sizes of the images that are scored.
    """
    paths = [key.path for key in KEYS if key.path not in HARMLESS]
    settings = {f"config {path}": json.dumps(lookup(config, path)) for path in paths}
    on_gpu = device.type == "cuda"
    return settings | {
        "float weights": checksum(dict(model.state_dict())),
        "calibration set": calibration_sha256,
        "val folder": checksum({"images": validation}),
        "code": _code_hash(),
        "versions": json.dumps(versions()),
        "device": torch.cuda.get_device_name(device)
        if on_gpu
        else f"cpu, {torch.get_num_threads()} threads",
        "processes": str(processes),
    }


def _code_hash() -> str:
    """Hash of the package's sources."""
    root = Path(calibquant.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


class RunState(Memory):
    """Finished units and scores of one config's unfinished run, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def require_same(self, now: dict[str, str]) -> None:
        """Begin with this identity, or go on only if it is the one the state was made with.

        A state without any unit is begun anew where it is another.

        Raises:
            UserError: naming what changed.
        """
        path = self.folder / IDENTITY
        if not path.exists():
            self.forget()  # what a run that was killed while it forgot may have left
            write_json(path, now)
            return
        before = _read_json(path)
        changed = sorted(key for key in now.keys() | before.keys() if now.get(key) != before.get(key))
        if changed and not any(self.folder.glob("unit_*")):
            self.forget()
            write_json(path, now)
            return
        if changed:
            words = "; ".join(_difference(key, before.get(key), now.get(key)) for key in changed[:3])
            raise UserError(
                f"an unfinished run of this config was made from something else: {words}"
                f"{' and more' if len(changed) > 3 else ''}; change it back, or start anew with --fresh"
            )
        done = len(list(self.folder.glob("unit_*.pth")))
        logger.info("continuing an unfinished run: %d units are done (%s)", done, self.folder)

    def logs_to(self, folder: Path) -> None:
        """Note where this run logs, and clear up where one that was killed did."""
        path = self.folder / LOGS
        with suppress(UserError):  # damaged, or there is none: nothing is known of an earlier one
            remove_temporaries(Path(str(_read_json(path).get("folder"))))
        write_json(path, {"folder": str(folder)})

    def score(self, key: str) -> Score | None:
        """An accuracy that the unfinished run had already measured.

        Raises:
            UserError: its file is damaged.
        """
        path = self.folder / f"score_{key}.json"
        if not path.exists():
            return None
        try:
            found = Score(**_read_json(path))
            if not all(isinstance(value, int | float) for value in found.as_dict().values()):
                raise TypeError("it holds what is no number")
        except TypeError as error:
            raise _damaged(path, error) from error
        return found

    def keep_score(self, key: str, score: Score) -> None:
        write_json(self.folder / f"score_{key}.json", score.as_dict())

    def saved(self, save: Callable[[], Path]) -> Path:
        """The file that the unfinished run had saved, if it is still there; else what is saved now."""
        note = self.folder / SAVED
        if note.exists():
            path = Path(str(_read_json(note).get("file")))
            if is_file(path):
                return path
        path = save()
        write_json(note, {"file": str(path)})
        return path

    def calibrated(self, model: nn.Module, calibrate: Callable[[], None]) -> None:
        """Put a network into the state that calibration gave it in the unfinished run, or calibrate it now.

        Raises:
            UserError: the state's file is damaged, or cannot be written.
        """
        path = self.folder / CALIBRATED
        if not path.exists():
            calibrate()
            _write(path, _state_of(model))
            return
        with _reading(path) as content:
            for name, tensor in model.state_dict(keep_vars=True).items():
                tensor.data = content[name].to(tensor.device)  # ranges may be of another shape by now
        logger.info("calibrated already, by the unfinished run")

    def recall(self, unit: Unit) -> UnitResult | None:
        """Put a finished unit into its final state.

        Raises:
            UserError: its file is damaged.
        """
        path = self._path(unit)
        if not path.exists():
            return None
        with _reading(path) as content:
            harden(unit.module)
            unit.module.load_state_dict(content["state"])
            result = content["result"]
            trace = [TracePoint(**point) for point in result.pop("trace")]
            return UnitResult(**result, trace=trace)

    def remember(self, unit: Unit, result: UnitResult) -> None:
        """Write a finished unit; afterwards it survives anything.

        Raises:
            UserError: it cannot be written.
        """
        _write(self._path(unit), {"state": _state_of(unit.module), "result": asdict(result)})

    def _path(self, unit: Unit) -> Path:
        name = unit.name
        if len(name) > LONGEST_NAME:  # of many units merged; a file's name has at most 255 characters
            name = f"{name[:LONGEST_NAME]}_{hashlib.sha256(name.encode()).hexdigest()[:12]}"
        return self.folder / f"unit_{name}.pth"

    def forget(self) -> None:
        """The run is finished: its state goes, and last what says of which run it is.

        Raises:
            UserError: a file cannot be removed.
        """
        try:
            for path in sorted(self.folder.iterdir(), key=lambda path: path.name == IDENTITY):
                if path.name not in (LOCK, LOGS):
                    path.unlink()
        except OSError as error:
            raise UserError(f"{error.filename}: cannot be removed: {error.strerror}") from error


@contextmanager
def run_state(config_path: str, fresh: bool, root: Path = STATE_ROOT) -> Iterator[RunState]:
    """The state of a config file's unfinished run, held by this process alone.

    Args:
        fresh: throw an unfinished run's state away.

    Raises:
        UserError: another process is running this config, or the folder cannot be made.
    """
    key = hashlib.sha256(os.fsencode(Path(config_path).resolve())).hexdigest()[:12]
    folder = root / key
    with _held(folder, config_path):
        state = RunState(folder)
        if fresh:
            state.forget()
        try:
            yield state
        finally:
            if not any(path.name.startswith(("unit_", "score_")) for path in folder.glob("*")):
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _held(folder: Path, config_path: str) -> Iterator[None]:
    """Inside, a state's folder is there, and this process alone has it."""
    for _ in range(ATTEMPTS):
        try:
            make_folder(folder)
            lock = (folder / LOCK).open("w")
        except FileNotFoundError:
            continue  # a run that ended just now took the folder away
        except OSError as error:
            raise UserError(f"{folder}: cannot be made: {error.strerror or error}") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                words = f"another run of it is in progress ({folder})"
                raise UserError(f"config {config_path}: {words}") from None
            except OSError as error:  # a file system without locks
                reason = error.strerror or error
                logger.warning("%s: cannot be locked (%s), run this config once at a time", folder, reason)
            os.register_at_fork(after_in_child=lock.close)  # a data-loading process may outlive this one
            if _is_open_at(folder / LOCK, lock):
                yield
                return
    raise UserError(f"{folder}: cannot be made: it is gone each time")


def _is_open_at(path: Path, file: IO[str]) -> bool:
    """Whether an open file is still what a path leads to."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _state_of(module: nn.Module) -> dict[str, Any]:
    return {key: bare(value) for key, value in module.state_dict().items()}


def _write(path: Path, content: dict[str, Any]) -> None:
    """Write tensors and plain values, with their checksum."""
    content = content | {"checksum": checksum(content)}
    write_atomically(path, lambda file: torch.save(content, file))


@contextmanager
def _reading(path: Path) -> Iterator[dict[str, Any]]:
    """Inside, what was written is put to use; whatever is wrong with it is one line.

    Raises:
        UserError: it is damaged.
    """
    try:
        content = safe_load(path, "state of an unfinished run")
    except UserError as error:
        raise UserError(f"{error}; {WAYS_ON}") from error
    try:
        if checksum(content) != content["checksum"]:
            raise ValueError("its checksum does not match")
        yield content
    except Exception as error:  # whatever a wrong value, at any place, makes the code above raise
        raise _damaged(path, error) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error
    if not isinstance(content, dict):
        raise _damaged(path, f"it is a {type(content).__name__}")
    return content


def _damaged(path: Path, reason: object) -> UserError:
    return UserError(f"state of an unfinished run {path}: damaged ({reason}); {WAYS_ON}")


def _difference(key: str, before: str | None, now: str | None) -> str:
    if key.startswith("config ") and before and now:
        with suppress(ValueError, TypeError):  # of an identity that was damaged
            name, *values = first_difference(json.loads(before), json.loads(now), key)
            return "{} was {}, is {}".format(name, *map(shown, values))
    readable = key.startswith("config ") or key in ("device", "processes")
    return f"{key} was {before}, is {now}" if readable else f"the {key} changed"
