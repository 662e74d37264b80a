"""Images in parquet files as the Hugging Face Hub has them: columns image (bytes, path) and label.

A parquet file is compressed by row groups, and a row cannot be read without its group. The last few groups are kept, so
that samples in order cost one reading of each; a shuffled sample costs a whole group.
"""

import io
import os
from functools import lru_cache
from typing import Any, BinaryIO

from maskfeat.data.shards.files import Stamp, changed, max_open, stamp_of
from maskfeat.data.shards.tar_index import Entry, is_label
from maskfeat.errors import UserError, naming
from maskfeat.file_io import NotReadable

IMAGE, LABEL = "image", "label"
_GROUPS = 4
"""Row groups that a process keeps."""


def load_pyarrow() -> Any:
    """Import and return pyarrow.parquet.

    Raises:
        UserError: pyarrow is not installed.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("parquet files need pyarrow, which is not installed: pip install '.[parquet]'") from error
    return pyarrow.parquet


def index_parquet(path: str) -> tuple[list[Entry], dict[str, int]]:
    """Read the labels and the names of the images in a parquet file.

    Returns:
        Its rows in their order, named by their number and, where there is one, the name of the file.

    Raises:
        UserError: it is damaged, or has other columns.
    """
    arrow = load_pyarrow()
    try:
        with arrow.ParquetFile(path) as file:
            columns = _columns(path, file.schema_arrow)
            entries: list[Entry] = []
            for group in range(file.num_row_groups):
                rows = file.read_row_group(group, columns=columns, use_threads=False).to_pylist() if columns else ()
                for row in range(file.metadata.row_group(group).num_rows):
                    found = rows[row] if rows else {}
                    entries.append(_entry(path, len(entries), group, row, found))
    except UserError:
        raise
    except (OSError, ValueError, TypeError, KeyError) as error:  # errors of pyarrow are ValueErrors or OSErrors
        raise UserError(f"{path} is damaged, cut short or not a parquet file: {str(error).splitlines()[0]}") from error
    return entries, {}


def _columns(path: str, schema: Any) -> list[str]:
    """Return the columns that the index is made of."""
    import pyarrow

    names = schema.names
    image = schema.field(IMAGE).type if IMAGE in names else pyarrow.null()
    fields = [image.field(n).name for n in range(image.num_fields)] if pyarrow.types.is_struct(image) else []
    is_bytes = pyarrow.types.is_binary, pyarrow.types.is_large_binary
    good = "bytes" in fields and any(kind(image.field("bytes").type) for kind in is_bytes)
    if not good or (LABEL in names and not pyarrow.types.is_integer(schema.field(LABEL).type)):
        said = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise UserError(
            f"{path} has the columns {said}; expected are {IMAGE} (a struct of bytes, and maybe path) and {LABEL} "
            "(whole numbers; pre-training needs none)"
        )
    return [*([f"{IMAGE}.path"] if "path" in fields else []), *([LABEL] if LABEL in names else [])]


def _entry(path: str, number: int, group: int, row: int, found: dict[str, Any]) -> Entry:
    name, label = (found.get(IMAGE) or {}).get("path"), found.get(LABEL)
    if not (label is None or is_label(label)):
        raise UserError(f"{path}: row {number} has the label {label}, which is no number of 0 or more")
    return Entry(f"{number}/{os.path.basename(name)}" if name else str(number), group, row, label)


@lru_cache(maxsize=max_open())
def _file(path: str, stamp: Stamp, process: int) -> Any:
    """Open a file, for one process: what pyarrow holds is not shared with forked ones."""
    with naming(f"{path} cannot be opened"):
        if stamp_of(path) != stamp:
            raise changed(path)
        return load_pyarrow().ParquetFile(path)


@lru_cache(maxsize=_GROUPS)
def _group(path: str, stamp: Stamp, group: int, process: int) -> Any:
    table = _file(path, stamp, process).read_row_group(group, columns=[f"{IMAGE}.bytes"], use_threads=False)
    return table.flatten().column(0)


def open_row(path: str, stamp: Stamp, place: tuple[int, int]) -> BinaryIO:
    """Open an image for reading, as a file of its own.

    Args:
        path, stamp: of the parquet file.
        place: row group, and row in it.

    Raises:
        NotReadable: there is no image, or its group cannot be read.
        UserError: the file is another one than when its index was made.
    """
    group, row = place
    try:
        found = _group(path, stamp, group, os.getpid())[row]
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise NotReadable(f"its row group cannot be read: {str(error).splitlines()[0]}") from error
    content = found.as_py()
    if not content:
        raise NotReadable("the row has no image")
    return io.BytesIO(content)
