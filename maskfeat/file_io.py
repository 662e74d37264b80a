"""Opening files that a list, a config or a command line names: regular files of the file system and nothing else."""

import os
import stat
from typing import BinaryIO


class NotReadable(OSError):
    """A name that is no regular file with something in it, or may not be read; its text is the cause alone."""


def open_regular_file(path: str | os.PathLike[str]) -> BinaryIO:
    """Opens a local, regular, non-empty file for reading; symbolic links are followed.

    Pipes, sockets and devices are refused (a reader would hang on them, or never come to their end), and nothing but
    the file system is asked, so that a name that looks like a URL is only a file that does not exist.

    Raises:
        NotReadable: the file is missing, empty, not regular, or may not be read.
    """
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise NotReadable("is a folder, not a file")
        if not stat.S_ISREG(status.st_mode):
            raise NotReadable("not a regular file")
        if status.st_size == 0:
            raise NotReadable("the file is empty")
        return open(path, "rb")
    except FileNotFoundError:
        raise NotReadable("no such file") from None
    except NotReadable:
        raise
    except OSError as error:
        raise NotReadable(f"cannot be opened: {error.strerror or error}") from error
    except ValueError as error:  # a NUL in the name
        raise NotReadable(f"cannot be opened: {error}") from error
