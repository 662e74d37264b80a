"""Verify and read the files of a sharded checkpoint without running anything they contain.

PyTorch's own reader unpickles `.metadata` without restrictions. Here an unpickler restricted to a dozen classes reads
it. Tensors are read by `torch.load(weights_only=True)`, and only from files that are listed in `SHA256SUMS`.
"""

import io
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from maskfeat.checkpoint.atomic import sha256
from maskfeat.checkpoint.limits import check_pickle
from maskfeat.errors import UserError

SUMS, METADATA, PLAIN = "SHA256SUMS", ".metadata", "plain.json"

TensorMetadata = dict[str, TensorStorageMetadata]

_OF_THE_SYSTEM = re.compile(r"\.nfs[0-9a-f]+|\.DS_Store|\._.*|@eaDir")
"""Files that file servers and desktops put beside others; none of them is read."""
_LINE = re.compile(r"([0-9a-f]{64})  ([A-Za-z0-9_.-]+)")


def verify(folder: str | Path, names: Iterable[str] | None = None) -> None:
    """Verify that the files in `folder` are those listed in SHA256SUMS, and the checksums of `names`; None = of all.

    Raises:
        UserError: naming the file that is missing, damaged or not listed.
    """
    folder = Path(folder)
    sums = sums_of(folder)
    there = {path.name for path in folder.iterdir() if not _OF_THE_SYSTEM.fullmatch(path.name)}
    unlisted = sorted(there - {*sums, SUMS})
    if unlisted:
        raise UserError(f"{folder / unlisted[0]} is not listed in {SUMS}: one of the two is damaged")
    for name in sums if names is None else names:
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise UserError(f"{path} is missing: the checkpoint is incomplete")
        if sha256(path) != sums[name]:
            raise UserError(f"{path} is damaged: its SHA-256 differs from the one in {SUMS}")


def sums_of(folder: Path) -> dict[str, str]:
    """Read SHA256SUMS: SHA-256 by file name.

    Raises:
        UserError: it is missing or damaged.
    """
    path = folder / SUMS
    if path.is_symlink() or not path.is_file():
        raise UserError(f"{path} is missing: {folder} is not a complete sharded checkpoint")
    lines = path.read_bytes().decode("ascii", "replace").split("\n")
    found = [_LINE.fullmatch(line) for line in lines[:-1]]
    sums = {match[2]: match[1] for match in found if match}
    if lines[-1] or len(sums) != len(found) or not {METADATA, PLAIN} <= set(sums):
        raise UserError(f"{path} is damaged: it is not a list of SHA-256 sums with {METADATA} and {PLAIN}")
    return sums


_CLASSES = {
    "torch.distributed.checkpoint.metadata": (
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size",),
}


class _Unpickler(pickle.Unpickler):
    """Construct only the classes of a checkpoint's metadata."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _CLASSES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not part of a checkpoint's metadata")


def tensors_of(folder: Path) -> TensorMetadata:
    """Read size, dtype and shards of the tensors in a checkpoint, by name.

    Raises:
        UserError: if the metadata is missing or damaged, or refers to more than tensors in files of the folder.
    """
    return {name: value for name, value in _metadata(folder).state_dict_metadata.items() if _is_tensor(value)}


def _metadata(folder: Path) -> Metadata:
    path = folder / METADATA
    verify(folder, [METADATA])
    content = path.read_bytes()
    try:
        check_pickle(content)
        metadata = _Unpickler(io.BytesIO(content)).load()
    # What an unpickler raises on a malicious file.
    except (
        pickle.UnpicklingError,
        EOFError,
        LookupError,
        AttributeError,
        TypeError,
        ValueError,
        RuntimeError,
    ) as error:
        raise UserError(f"{path} holds more than the metadata of tensors and is not loaded: {error}") from error
    sums = sums_of(folder)
    tensors = getattr(metadata, "state_dict_metadata", None)
    shards = getattr(metadata, "storage_data", None)
    if (
        not isinstance(metadata, Metadata)
        or not (isinstance(tensors, dict) and all(map(_is_tensor, tensors.values())))
        or not (isinstance(shards, dict) and all(_is_inside(shard, sums) for shard in shards.values()))
    ):
        raise UserError(f"{path} refers to more than tensors in the files listed in {SUMS} and is not loaded")
    declared = sum(value.size.numel() * value.properties.dtype.itemsize for value in tensors.values())
    held = sum((folder / name).stat().st_size for name in sums)
    if declared > held:
        raise UserError(f"{path} declares tensors of {declared} bytes, but its files hold {held}: it is not loaded")
    return metadata


def _is_tensor(value: object) -> TypeGuard[TensorStorageMetadata]:
    if not isinstance(value, TensorStorageMetadata):
        return False
    size, properties = getattr(value, "size", None), getattr(value, "properties", None)
    return (
        isinstance(size, torch.Size)
        and min(size, default=0) >= 0
        and isinstance(getattr(properties, "dtype", None), torch.dtype)
    )


def _is_inside(shard: object, sums: Mapping[str, str]) -> bool:
    """Return whether a shard is stored, without transforms, in one of the files listed in SHA256SUMS."""
    name = getattr(shard, "relative_path", None)
    return isinstance(name, str) and name in sums and not getattr(shard, "transform_descriptors", None)


class Reader(dcp.FileSystemReader):
    """PyTorch's reader with restricted unpickling of the metadata."""

    def read_metadata(self, *args: Any, **_: Any) -> Metadata:
        """Read the metadata with the restricted unpickler."""
        return _metadata(Path(self.path))
