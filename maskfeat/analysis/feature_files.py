"""Files of features: rows computed in parts, each a file of its own, and what they are assembled to.

The bytes of a file depend on its content alone. Parts are read one after another, so that a file may be larger than
memory. Shape legend: N rows, n rows of a part.
"""

import json
import math
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from maskfeat.batch import BadSample
from maskfeat.checkpoint.atomic import fsync_dir, fsync_file, write_and_fsync
from maskfeat.data.datasets.sample_list import NO_LABEL
from maskfeat.errors import UserError
from maskfeat.file_io import draft_of

_ROWS = "row"
_LINES = 10_000
_DATE = (1980, 1, 1, 0, 0, 0)


@dataclass
class Features:
    """What is written: which file each row is of, and the arrays.

    Attributes:
        parts: files of `write_part`, in the order of rows.
        paths: N paths.
        labels: (N,) int64, NO_LABEL where it is not known; None = of no row.
        classes: names of the classes by their numbers; None = not known.
        shapes: of a row of each array, by its name; all are float32.
    """

    parts: Sequence[Path]
    paths: Sequence[str]
    labels: np.ndarray | None
    classes: list[str] | None
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def chunks(self, name: str) -> Iterator[np.ndarray]:
        """Yield the rows of an array part by part: (n, ...) float32."""
        for part in self.parts:
            with safe_open(part, framework="np") as file:
                yield np.ascontiguousarray(file.get_tensor(name))


# ------------------------------------------------------------------------------------------------------------ parts


def write_part(path: Path, rows: np.ndarray, arrays: Mapping[str, np.ndarray], unreadable: Sequence[BadSample]) -> None:
    """Write a part, which is then there as a whole or not at all, also if the power fails.

    Args:
        rows: (n,) int64, which inputs were read.
        arrays: (n, ...) float32 each.
        unreadable: inputs that were not.
    """
    bad = json.dumps([[sample.index, sample.path, sample.cause] for sample in unreadable])
    draft = path.with_name(f"{path.name}.partial")
    write_and_fsync(draft, save({_ROWS: rows, **arrays}, {"unreadable": bad}))
    draft.replace(path)
    fsync_dir(path.parent)


def read_rows(path: Path) -> tuple[np.ndarray, list[BadSample]]:
    """Return which inputs a part holds, (n,) int64, and which could not be read.

    Raises:
        UserError: the file is damaged.
    """
    try:
        with safe_open(path, framework="np") as file:
            bad = [BadSample(*sample) for sample in json.loads(file.metadata()["unreadable"])]
            return file.get_tensor(_ROWS), bad
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}): delete it, and give the same command again") from error


# ---------------------------------------------------------------------------------------------------------- formats


def _write_npz(file: BinaryIO, features: Features) -> None:
    """Write what `np.load` reads: paths, labels and classes where they are known, and the arrays."""
    total = len(features.paths)
    with zipfile.ZipFile(file, "w") as archive:

        def entry(name: str, dtype: np.dtype[Any], shape: tuple[int, ...], chunks: Iterator[np.ndarray]) -> None:
            info = zipfile.ZipInfo(f"{name}.npy", _DATE)  # a fixed date: the same bytes whenever it is written
            info.create_system, info.external_attr = 3, 0o644 << 16
            text = dtype.kind == "U"
            info.compress_type = zipfile.ZIP_DEFLATED if text else zipfile.ZIP_STORED  # most bytes of texts are zeros
            head = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
            with archive.open(info, "w", force_zip64=True) as out:
                np.lib.format.write_array_header_1_0(out, head)
                for chunk in chunks:
                    out.write(chunk.astype(dtype, copy=False).tobytes())

        for name, texts in (("paths", features.paths), ("classes", features.classes)):
            if texts is not None:
                dtype = np.dtype(f"<U{max(map(len, texts))}")
                entry(name, dtype, (len(texts),), _texts(texts, dtype))
        if features.labels is not None:
            entry("labels", np.dtype("<i8"), (total,), iter([features.labels]))
        for name, shape in features.shapes.items():
            entry(name, np.dtype("<f4"), (total, *shape), features.chunks(name))


def _texts(texts: Sequence[str], dtype: np.dtype[Any]) -> Iterator[np.ndarray]:
    for first in range(0, len(texts), _LINES):
        yield np.asarray(texts[first : first + _LINES], dtype=dtype)


def _write_safetensors(file: BinaryIO, features: Features) -> None:
    """Write what `safetensors` reads: the arrays, labels, and `paths`: their bytes with a NUL between two of them.

    The library writes tensors that are in memory; the format is simple enough to be written as parts are read.
    """
    total, place = len(features.paths), 0
    paths = b"\0".join(map(os.fsencode, features.paths))
    head: dict[str, Any] = {}
    if features.classes is not None:
        head["__metadata__"] = {"classes": json.dumps(features.classes)}

    def declare(name: str, kind: str, shape: tuple[int, ...], size: int) -> None:
        nonlocal place
        head[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [place, place := place + size]}

    if features.labels is not None:
        declare("labels", "I64", (total,), 8 * total)
    for name, shape in features.shapes.items():
        declare(name, "F32", (total, *shape), 4 * total * math.prod(shape))
    declare("paths", "U8", (len(paths),), len(paths))
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
    file.write(len(text).to_bytes(8, "little") + text)
    if features.labels is not None:
        file.write(features.labels.astype("<i8").tobytes())
    for name in features.shapes:
        for chunk in features.chunks(name):
            file.write(chunk.astype("<f4", copy=False).tobytes())
    file.write(paths)


def _write_parquet(file: BinaryIO, features: Features) -> None:
    """Write a column for each array: its rows flattened, their shape in the metadata. A part is a group of rows."""
    arrow, parquet = _arrow()
    columns = [("path", arrow.string()), ("label", arrow.int64())]
    columns += [(name, arrow.list_(arrow.float32(), math.prod(shape))) for name, shape in features.shapes.items()]
    about = {"shapes": json.dumps(features.shapes), "classes": json.dumps(features.classes)}
    first = 0
    with parquet.ParquetWriter(file, arrow.schema(columns, metadata=about)) as writer:
        for chunks in zip(*map(features.chunks, features.shapes), strict=True):
            rows = slice(first, first := first + len(chunks[0]))
            known = np.full(len(chunks[0]), NO_LABEL) if features.labels is None else features.labels[rows]
            values = [
                arrow.array([os.fsencode(path).decode("utf-8", "replace") for path in features.paths[rows]]),
                arrow.array(known, mask=known == NO_LABEL),
                *(
                    arrow.FixedSizeListArray.from_arrays(arrow.array(chunk.reshape(-1)), math.prod(shape))
                    for chunk, shape in zip(chunks, features.shapes.values(), strict=True)
                ),
            ]
            writer.write_table(arrow.Table.from_arrays(values, schema=writer.schema), row_group_size=len(known) or 1)


def _arrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(".parquet needs pyarrow, which is not installed: pip install '.[parquet]'") from error
    return pyarrow, pyarrow.parquet


WRITERS: dict[str, Callable[[BinaryIO, Features], None]] = {
    ".npz": _write_npz,
    ".safetensors": _write_safetensors,
    ".parquet": _write_parquet,
}
"""By the ending of the file."""


def check_format(path: Path) -> None:
    """Check that a file of this ending can be written.

    Raises:
        UserError: the ending is unknown, or its library is not installed.
    """
    if path.suffix not in WRITERS:
        raise UserError(
            f"{path} ends with {path.suffix!r}: one of {', '.join(WRITERS)} is expected, which is the format"
        )
    if path.suffix == ".parquet":
        _arrow()


def write_features(path: Path, features: Features) -> None:
    """Write a file of features, in the format of its ending. Until it is complete, it is not there.

    Raises:
        OSError: it cannot be written.
    """
    with draft_of(path) as draft, draft.open("wb") as file:
        WRITERS[path.suffix](file, features)
        fsync_file(file)
    fsync_dir(path.parent)
