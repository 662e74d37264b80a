"""Durable writes (fsync of files and folders) and SHA-256 checksums."""

import errno
import hashlib
import os
import shutil
from pathlib import Path
from typing import BinaryIO

_BLOCK = 1 << 22


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as a hexadecimal string."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def fsync_file(file: BinaryIO) -> None:
    """Flush an open file to disk."""
    file.flush()
    os.fsync(file.fileno())


def write_and_fsync(path: Path, content: bytes) -> None:
    """Write a file and flush it to disk."""
    with open(path, "wb") as file:
        file.write(content)
        fsync_file(file)


def fsync_dir(folder: Path) -> None:
    """Flush a folder to disk: only then are new or renamed files in it durable under their names.

    Some network and FUSE file systems refuse this for folders. The files are then as durable as they make them, and
    no write has failed.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def replace_folder(draft: Path, folder: Path) -> None:
    """Give a complete folder its name, in place of an earlier one, and flush both to disk."""
    fsync_dir(draft)
    old = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
    os.rename(draft, folder)
    fsync_dir(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
