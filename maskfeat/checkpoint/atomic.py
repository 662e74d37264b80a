"""Files that outlast a machine that fails: their bytes and names brought to the disk, and sums that tell of damage."""

import hashlib
import os
from pathlib import Path
from typing import BinaryIO

_BLOCK = 1 << 22


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def fsync_file(file: BinaryIO) -> None:
    """Bring what was written to an open file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def write_and_fsync(path: Path, content: bytes) -> None:
    """Write a file and bring it to the disk."""
    with open(path, "wb") as file:
        file.write(content)
        fsync_file(file)


def fsync_dir(folder: Path) -> None:
    """Names of files are on the disk only when their folder is."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
