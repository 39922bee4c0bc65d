"""The one exception that a user is meant to read."""


class RearError(Exception):
    """Something the user can mend: its message is one line that names the thing and the remedy.

    `main` prints it without a traceback and exits with status 1; every other exception is a bug of ours.
    """
