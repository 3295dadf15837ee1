"""The one exception a user may meet: a single clear line, and exit code 2."""


class UserError(Exception):
    """Something the user gave is wrong.

    The message is one line that names the thing, its value and what is allowed; a script prints it
    and exits with code 2.
    """


def printable(text: str, limit: int = 1000) -> str:
    """Text on one line of at most ``limit`` characters; control characters are written as escapes."""
    words = " ".join(text.split())
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in words[:limit])
    return line if len(line) <= limit and len(words) <= limit else line[: limit - 3] + "..."
