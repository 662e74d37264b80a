"""Errors that whoever runs the program can mend. Everything else that is raised is a bug, and keeps its traceback."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Raised on purpose, where the command, the config, the data or the machine is not as it must be.

    It is reported in one line, without a traceback. Its text says what was given, what was expected and which key mends
    it. A ValueError of Python, torch or another library is not one: it says nothing about what to mend.
    """


class UserFileError(UserError, OSError):
    """A file or folder that cannot be read or written."""


class NotFinite(UserError, FloatingPointError):
    """A weight, loss, gradient or score that is NaN or infinite; the text names it."""


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Raise an OSError of the block as a `UserFileError`: '`what`: cause'.

    Args:
        what: what could not be done with which file, or which key names it.
    """
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise UserFileError(f"{what}: {error.strerror or error}") from error


def about(what: object, error: UserError) -> UserError:
    """Return an error with what it is about, such as a file, before its text: a `NotFinite`, or else a `UserError`."""
    return (NotFinite if isinstance(error, NotFinite) else UserError)(f"{what}: {error}")
