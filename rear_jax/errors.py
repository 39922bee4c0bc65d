"""The one exception that a user is meant to read, and those that libraries raise on files that are broken."""

import struct
import zlib

UNREADABLE = (  # a file that is not what it says; zip files and pictures have errors of their own besides
    OSError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    EOFError,
    MemoryError,
    SyntaxError,
    struct.error,
    zlib.error,
)


def one_line(text: str) -> str:
    """A library's text for a message: white space becomes single blanks, other control characters are escaped."""
    return _printable(" ".join(text.split()))


def _printable(text: str) -> str:
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)


class RearError(Exception):
    """Something the user can mend: its message is one line that names the thing and the remedy.

    `main` prints it without a traceback and exits with status 1; every other exception is a bug of ours. What cannot be
    printed, of names and contents of files, is escaped.
    """

    def __init__(self, message: str):
        super().__init__(_printable(message))
