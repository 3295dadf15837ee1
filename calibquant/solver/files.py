"""Files that are whole or absent: written beside their place, synced, then moved there."""

import errno
import json
import os
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from calibquant.errors import UserError
from calibquant.paths import is_dir, is_file, why_no_file

PICTURES = ("png", "svg")
"""Formats of pictures that are written."""


def write_atomically(path: Path, write: Callable[[BinaryIO], None], overwrite: bool = True) -> bool:
    """Write a file so that no one ever sees half of it.

    Args:
        write: writes the content to an open binary file.
        overwrite: replace a file that exists; else leave it alone.

    Returns:
        False where the file existed and ``overwrite`` is false.

    Raises:
        UserError: the file cannot be written (folder read-only, a file in a folder's place, disk full), or
            what has its name is no file, such as a device or a pipe.
    """
    taken = os.path.exists(path) and not is_file(path)  # noqa: PTH110, as paths.is_file says
    if taken and (overwrite or not is_dir(path)):
        raise UserError(f"{path}: cannot be written: it {why_no_file(path)}")
    temporary = path.parent / f".{path.name}.{secrets.token_hex(8)}.tmp"
    try:
        make_folder(path.parent)
        try:
            named = _write_unnamed((path, temporary), write)
            if named == path:
                _sync_folder(path.parent)
                return True
            if named is None:
                with temporary.open("xb") as file:
                    _write_synced(file, write)
            return _put_in_place(temporary, path, overwrite)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:
        # torch.save hides a full disk behind a RuntimeError of its own
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise UserError(f"{path}: cannot be written: {cause.strerror or cause}") from error


def _write_synced(file: BinaryIO, write: Callable[[BinaryIO], None]) -> None:
    write(file)
    file.flush()
    os.fsync(file.fileno())


def _write_unnamed(names: Sequence[Path], write: Callable[[BinaryIO], None]) -> Path | None:
    """Write a file that gets its name only when it is complete, so that a kill leaves no half behind.

    Args:
        names: in one folder; it gets the first of them that is free.

    Returns:
        The name; None where the system or the file system knows no unnamed files, and nothing was written.
    """
    if not hasattr(os, "O_TMPFILE"):
        return None
    try:
        handle = os.open(names[0].parent, os.O_TMPFILE | os.O_RDWR, 0o666)
    except OSError:
        return None
    with os.fdopen(handle, "w+b") as file:
        _write_synced(file, write)
        for name in names:
            try:  # src_dir_fd makes os.link follow the link in /proc, see open(2)
                os.link(f"/proc/self/fd/{handle}", name, src_dir_fd=handle)
                return name
            except FileExistsError:
                continue
            except OSError:
                break
    return None


def _put_in_place(temporary: Path, path: Path, overwrite: bool) -> bool:
    """Give a finished file its name; False where that is taken and ``overwrite`` is false."""
    try:
        if overwrite:
            temporary.replace(path)
        else:
            _link(temporary, path)
    except FileExistsError:
        return False
    _sync_folder(path.parent)
    return True


def _link(source: Path, target: Path) -> None:
    """Give a file a second name, or move it there; unlike a rename, fails where the name is taken."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        target.touch(exist_ok=False)  # a file system without links, such as exFAT
        source.replace(target)


def make_folder(folder: Path) -> None:
    """Make a folder and all above it, where they are not there yet.

    Raises:
        OSError: that is not possible; a NotADirectoryError where a file is in the way.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from error


def require_no_folder(option: str, path: Path) -> None:
    """Refuse a folder in the place of a file that is to be written.

    Raises:
        UserError: naming the option.
    """
    if is_dir(path):
        raise UserError(f"{option} {path}: is a folder, allowed is the name of a file")


def remove_temporaries(folder: Path) -> None:
    """Remove what a process killed while it gave a file a taken name has left in a folder."""
    for path in folder.glob(".*.tmp"):
        with suppress(OSError):
            path.unlink()


def require_writable(folder: Path) -> None:
    """Make a folder and try to write into it, so that hours of work do not end in a refusal.

    Raises:
        UserError: the folder cannot be made or takes no file.
    """
    trial = folder / f".{secrets.token_hex(8)}.tmp"
    try:
        make_folder(folder)
        trial.touch(exist_ok=False)
        trial.unlink()
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from error


def _sync_folder(folder: Path) -> None:
    """Make a rename durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file atomically."""
    write_atomically(path, lambda file: (file.write(content), None)[1])


def require_matplotlib(missing: str = "matplotlib is not installed: pip install matplotlib") -> None:
    """Make sure that pictures can be drawn. What draws is imported after this: a run goes on without it.

    Args:
        missing: said where it is not installed.

    Raises:
        UserError: it is not, or MPLBACKEND is none of its backends.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise UserError(missing) from error
    except ValueError as error:
        raise UserError(f"MPLBACKEND: matplotlib cannot be imported: {error}") from error


def write_picture(path: Path, figure: Any) -> None:
    """Write a matplotlib figure, as the name's end says one of :data:`PICTURES`, atomically."""
    write_atomically(path, lambda file: figure.savefig(file, format=path.suffix[1:], dpi=150))


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically, readable by a person."""
    write_bytes(path, (json.dumps(content, indent=2, allow_nan=True) + "\n").encode())
