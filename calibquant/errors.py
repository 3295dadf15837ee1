"""The one exception a user may meet: a single clear line, and exit code 2."""


class UserError(Exception):
    """Something the user gave is wrong.

    The message is one line that names the thing, its value and what is allowed; a script prints it
    and exits with code 2.
    """
