"""Paths as a config or a command line may write them."""

import os
import re
from pathlib import Path

from calibquant.errors import UserError


def expand(path: str, what: str) -> Path:
    """A path with ``~`` and ``${VARIABLE}`` replaced, so that a config names no machine's folders.

    Args:
        what: names the path in an error's line.

    Raises:
        UserError: a variable that the path names is not set.
    """
    missing = [name for name in re.findall(r"\$\{?(\w+)", path) if name not in os.environ]
    if missing and os.path.lexists(path):  # its name has a $
        return Path(path)
    if missing:
        raise UserError(f"{what} {path}: the environment variable {missing[0]} is not set")
    try:
        return Path(os.path.expandvars(path)).expanduser()
    except RuntimeError as error:  # ~ of a user who has no home
        raise UserError(f"{what} {path}: {error}") from error


def is_dir(path: Path) -> bool:
    """Whether there is such a folder; unlike Path.is_dir, false for names too long or out of reach."""
    return os.path.isdir(path)  # noqa: PTH112


def is_file(path: Path) -> bool:
    """Whether there is such a file; unlike Path.is_file, false for names too long or out of reach."""
    return os.path.isfile(path)  # noqa: PTH113


def why_no_file(path: Path) -> str:
    """What keeps a path from being that of a regular file, in words."""
    if is_dir(path):
        return "is a folder"
    return "is no regular file" if os.path.exists(path) else "no such file"  # noqa: PTH110
