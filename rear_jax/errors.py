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


class RearError(Exception):
    """Something the user can mend: its message is one line that names the thing and the remedy.

    `main` prints it without a traceback and exits with status 1; every other exception is a bug of ours. Characters
    that a terminal does not print, as names in files may have them, are escaped.
    """

    def __init__(self, message: object = ""):
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(message)))
