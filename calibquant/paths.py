"""Paths as a config may write them."""

import os
from pathlib import Path

from calibquant.errors import UserError


def expand(path: str) -> Path:
    """A path with ``~`` and ``${VARIABLE}`` replaced, so that a config names no machine's folders.

    Raises:
        UserError: a variable that the path names is not set.
    """
    expanded = os.path.expandvars(path)
    if "$" in expanded and expanded == path:
        raise UserError(f"path {path}: names an environment variable that is not set")
    return Path(expanded).expanduser()
