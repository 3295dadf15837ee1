"""Files that are whole or absent: written beside their place, synced, then moved there."""

import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from calibquant.errors import UserError


def write_atomically(path: Path, write: Callable[[BinaryIO], None], overwrite: bool = True) -> bool:
    """Write a file so that no one ever sees half of it.

    Args:
        write: writes the content to an open binary file.
        overwrite: replace a file that exists; else leave it alone.

    Returns:
        False where the file existed and ``overwrite`` is false.

    Raises:
        UserError: the file cannot be written (folder read-only, disk full).
    """
    temporary = path.parent / f".{path.name}.{secrets.token_hex(8)}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if overwrite:
            temporary.replace(path)
        else:
            os.link(temporary, path)  # fails where the name is taken, unlike a rename
        _sync_folder(path.parent)
    except FileExistsError:
        return False
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _sync_folder(folder: Path) -> None:
    """Make a rename durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically, readable by a person."""
    data = (json.dumps(content, indent=2, allow_nan=True) + "\n").encode()
    write_atomically(path, lambda file: (file.write(data), None)[1])
