"""The files of a sharded checkpoint, read without running anything that they contain.

PyTorch's own reader would run what a `.metadata` holds. Here it is read by an unpickler that knows a dozen classes, the
tensors by `torch.load(weights_only=True)`, and only from files whose SHA-256 stands in the folder's `SHA256SUMS`.
"""

import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from maskfeat.checkpoint.atomic import sha256

SUMS, METADATA, PLAIN = "SHA256SUMS", ".metadata", "plain.json"

Places = dict[str, TensorStorageMetadata]

_LINE = re.compile(r"([0-9a-f]{64})  ([A-Za-z0-9_.-]+)")


def verify(folder: str | Path, names: Iterable[str] | None = None) -> None:
    """See that files are there and as they were written: `names`, or else all, and none beside them.

    Raises:
        ValueError: naming the file that is missing or damaged.
    """
    folder = Path(folder)
    sums = sums_of(folder)
    beside = sorted({path.name for path in folder.iterdir()} - {*sums, SUMS})
    if beside:
        raise ValueError(f"{folder / beside[0]} does not stand in {SUMS}: one of the two is damaged")
    for name in sums if names is None else names:
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise ValueError(f"{path} is missing: the checkpoint is not whole")
        if sha256(path) != sums[name]:
            raise ValueError(f"{path} is damaged: it is not what was written ({SUMS})")


def sums_of(folder: Path) -> dict[str, str]:
    """SHA-256 by file name."""
    path = folder / SUMS
    if path.is_symlink() or not path.is_file():
        raise ValueError(f"{path} is missing: {folder} is not a whole sharded checkpoint")
    lines = path.read_bytes().decode("ascii", "replace").split("\n")
    found = [_LINE.fullmatch(line) for line in lines[:-1]]
    sums = {match[2]: match[1] for match in found if match}
    if lines[-1] or len(sums) != len(found) or not {METADATA, PLAIN} <= set(sums):
        raise ValueError(f"{path} is damaged: it is not a list of SHA-256 sums with {METADATA} and {PLAIN}")
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
    """Knows the classes of a checkpoint's metadata, and no other."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _CLASSES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a checkpoint's metadata")


def tensors_of(folder: Path) -> Places:
    """Size, dtype and pieces of the tensors in a checkpoint, by name.

    Raises:
        ValueError: where its metadata is missing, damaged, or leads to more than tensors in files of the folder.
    """
    return {name: value for name, value in _metadata(folder).state_dict_metadata.items() if _is_tensor(value)}


def _metadata(folder: Path) -> Metadata:
    path = folder / METADATA
    verify(folder, [METADATA])
    try:
        with open(path, "rb") as file:
            metadata = _Unpickler(file).load()
    # What an unpickler raises on what was made to mislead it.
    except (
        pickle.UnpicklingError,
        EOFError,
        LookupError,
        AttributeError,
        TypeError,
        ValueError,
        RuntimeError,
    ) as error:
        raise ValueError(f"{path} holds more than the places of tensors, and is not loaded: {error}") from error
    sums = sums_of(folder)
    tensors = getattr(metadata, "state_dict_metadata", None)
    places = getattr(metadata, "storage_data", None)
    if (
        not isinstance(metadata, Metadata)
        or not (isinstance(tensors, dict) and all(map(_is_tensor, tensors.values())))
        or not (isinstance(places, dict) and all(_is_inside(place, sums) for place in places.values()))
    ):
        raise ValueError(f"{path} names more than tensors in the files of {SUMS}, and is not loaded")
    asked = sum(value.size.numel() * value.properties.dtype.itemsize for value in tensors.values())
    held = sum((folder / name).stat().st_size for name in sums)
    if asked > held:
        raise ValueError(f"{path} asks for tensors of {asked} bytes, its files hold {held}: it is not loaded")
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


def _is_inside(place: object, sums: Mapping[str, str]) -> bool:
    """Whether a piece lies, as it is, in one of the files that were verified."""
    name = getattr(place, "relative_path", None)
    return isinstance(name, str) and name in sums and not getattr(place, "transform_descriptors", None)


class Reader(dcp.FileSystemReader):
    """PyTorch's, without what runs code."""

    def read_metadata(self, *args: Any, **_: Any) -> Metadata:
        """PyTorch's own would run what the file contains."""
        return _metadata(Path(self.path))
