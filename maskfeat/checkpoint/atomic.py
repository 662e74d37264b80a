"""Durable writes (fsync of files and folders) and SHA-256 checksums."""

import hashlib
import os
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
    """Flush a folder to disk: only then are new or renamed files in it durable under their names."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
