"""Files that a config, a list or a command line names: local regular files, and paths with a scheme such as s3://."""

import os
import re
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from string import Template
from typing import BinaryIO

from iopath.common.file_io import PathManager

from maskfeat.errors import UserError, UserFileError

path_manager = PathManager()
"""Resolves paths with a scheme. It has no handler of its own: a plugin registers them, for example
`path_manager.register_handler(S3PathHandler())`."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


class NotReadable(UserFileError):
    """A path that is not a regular file with content, or that may not be read; its text is the cause alone."""


def local_path(path: str | os.PathLike[str]) -> str:
    """Return where a file is on this machine; a path with a scheme is first fetched by the handler of that scheme.

    Args:
        path: a local path, which is returned unchanged, or one such as s3://bucket/file.pyth.

    Raises:
        UserError: no handler is registered for the scheme.
    """
    given = os.fspath(path)
    scheme = _SCHEME.match(given)
    if scheme is None:
        return given
    local = path_manager.get_local_path(given)
    if local == given:  # the answer of iopath's handler of local files, to which other paths fall back
        raise UserError(
            f"{given} cannot be read: no handler is registered for {scheme[1]}://. Register one with "
            "maskfeat.file_io.path_manager.register_handler, or give a local path"
        )
    return str(local)


def expand_path(path: str) -> str:
    """Return a path with ~, ~user, $VARIABLE and ${VARIABLE} replaced as a shell does; $$ stands for a dollar sign.

    An address (with a scheme, such as https://) is returned unchanged: a config of someone else must not send what the
    environment holds to a server.

    Raises:
        UserError: no such user or variable; its text is the cause and how to mend it.
    """
    if _SCHEME.match(path):
        return path
    home = os.path.expanduser(path)
    if path.startswith("~") and home == path:
        raise UserError(f"there is no home folder of {path.partition('/')[0]}; a folder of that name is ./{path}")
    try:
        return Template(home).substitute(os.environ)
    except KeyError as error:
        raise UserError(
            f"the environment variable {error.args[0]} is not set: export it, or write $$ for a dollar sign"
        ) from None
    except ValueError:
        raise UserError("a $ must be followed by the name of an environment variable; $$ is a dollar sign") from None


def unexpanded_path(path: str) -> str:
    """Return the text that `expand_path` turns into this path again."""
    return path if _SCHEME.match(path) else path.replace("$", "$$")


def make_parent(path: Path) -> None:
    """Make the folder of a file that is to be written. A file in its place is left to the one who writes, whose error
    says "Not a directory", where that of making the folder is "File exists"."""
    if not path.parent.exists():
        path.parent.mkdir(parents=True, exist_ok=True)


def is_cut_short(path: Path) -> bool:
    """Whether a file does not end with a line end, as where its writer was killed, or the disk was full.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


def replace_text(path: Path, text: str) -> None:
    """Write a text file as `replace_bytes` does, in UTF-8."""
    replace_bytes(path, text.encode("utf-8"))


def replace_bytes(path: Path, content: bytes) -> None:
    """Write a file so that its readers see either all of it or what it held before. The disk is not waited for.

    Raises:
        OSError: it cannot be written; the file holds what it held before.
    """
    with draft_of(path) as draft:
        draft.write_bytes(content)


@contextmanager
def draft_of(path: Path) -> Iterator[Path]:
    """Yield where to write a file that is to appear at `path` when the block ends, or not at all if it fails."""
    # Not named by the process: containers that share a folder may have equal numbers.
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        yield draft
        draft.replace(path)
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)


def open_regular_file(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a local, regular, non-empty file for reading; symbolic links are followed.

    Pipes, sockets and devices are refused (a reader would hang on them or never reach their end). Only the file system
    is asked: a path that looks like a URL is a file that does not exist.

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
