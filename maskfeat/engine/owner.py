"""One run at a time owns an OUTPUT_DIR, by a lock that ends with its process."""

import errno
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from maskfeat.errors import UserFileError, naming

try:
    import fcntl
except ImportError:  # not a POSIX system: nothing is locked
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

LOCK = "run.lock"
"""File in OUTPUT_DIR whose lock its owner holds; it says who that is, or was. It is never deleted."""

WIDTH = 400
"""Characters of the line in it: of one length, so that a longer one is overwritten as a whole."""

WAIT, WAIT_FOR_A_MACHINE = 5.0, 120.0
"""Seconds for which a lock is waited for: a process that was killed may take some to go, and a file server some to
notice that a machine is gone."""


@contextmanager
def owned(folder: Path, name: str = "OUTPUT_DIR") -> Iterator[None]:
    """Own a folder inside the block; `name` is the key or option that gives it, for messages.

    The lock is one of POSIX (`fcntl.lockf`), which network file systems keep for all machines, and which the kernel
    releases when this process ends, however it does. It belongs to this process alone, not to those that it forks, and
    would be lost if the file were opened a second time here and closed.

    Raises:
        UserFileError: another run owns it, or the file cannot be made.
    """
    with naming(f"{name} {folder} cannot be written"):
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _take(file, folder, name)
        with suppress(OSError):  # a full disk: others are then told of no name
            os.pwrite(file, f"{_me():<{WIDTH}}\n".encode(), 0)
        yield
    finally:
        os.close(file)


def owner_of(folder: Path) -> str:
    """Return which process owns a folder now; "" = none, or not known. Nothing is written.

    Not for a process that owns the folder itself: it would lose its lock.
    """
    if fcntl is None:
        return ""
    try:
        file = os.open(folder / LOCK, os.O_RDWR)
    except OSError:
        return ""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return _owner(file) if error.errno in (errno.EACCES, errno.EAGAIN) else ""
    finally:
        os.close(file)
    return ""


def _owner(file: int) -> str:
    """Return what an open lock file says of its owner."""
    return os.pread(file, 1000, 0).decode(errors="replace").strip() or "unknown"


def _me() -> str:
    """Return which process this is: its machine, its number, since when, and the Slurm job that it belongs to."""
    job = os.environ.get("SLURM_JOB_ID")
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return f"{socket.gethostname()}, process {os.getpid()}, since {since}" + (f", Slurm job {job}" if job else "")


def _take(file: int, folder: Path, name: str) -> None:
    """Wait a little for the lock of an open file."""
    began: float | None = None
    while not _lock(file, folder, name):
        owner = _owner(file)
        here = owner.startswith(f"{socket.gethostname()},")
        limit = WAIT if here else WAIT_FOR_A_MACHINE
        if began is None:
            began = time.monotonic()
            logger.warning("%s %s is in use by another run (%s): waiting %g s for its end", name, folder, owner, limit)
        if time.monotonic() - began > limit:
            gone = "" if here else f" If that machine is gone, delete {folder / LOCK}."
            raise UserFileError(
                f"{name} {folder} is in use by another run ({owner}): wait for it, stop it, or give another "
                f"{name}.{gone}"
            )
        time.sleep(0.1)


def _lock(file: int, folder: Path, name: str) -> bool:
    """Return whether the lock was taken, also where the file system knows no locks."""
    if fcntl is None:
        return True
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        logger.warning(
            "%s %s cannot be locked (%s): see to it that no second run uses it", name, folder, error.strerror
        )
    return True
