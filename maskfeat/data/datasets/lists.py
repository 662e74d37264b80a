"""Lists of images or videos as people have them: any usual separator, with or without labels, in any folder."""

import os
import re
from collections.abc import Sequence
from typing import Any

from maskfeat.data.datasets.sample_list import NO_LABEL, SampleList, read_multi_label_list, read_sample_list
from maskfeat.errors import UserError
from maskfeat.file_io import NotReadable, open_regular_file

LISTS = (".csv", ".tsv", ".txt")
SEPARATORS = (" ", ",", "\t", ";")
"""Of path and label in a list, in the order in which they are tried."""
_TRIED = 100
_PLAIN = re.compile(r"[\w.()+=@&!#~/-]+")


def quoted(path: str) -> str:
    """Return a path in double quotes, as a list holds one that has separators or quotes in it."""
    return '"' + path.replace('"', '""') + '"'


def listed(path: str) -> str:
    """Return a path as a line of a list begins with it: in double quotes, unless it is of letters, digits and marks
    that no reader of lists takes for anything else."""
    return path if _PLAIN.fullmatch(path) else quoted(path)


def check_some_exist(samples: Sequence[tuple[str, Any]], csv_path: str, prefix: str, folder: str) -> None:
    """Look for files spread over a list until one is found.

    Args:
        samples: [(path, label)], see `read_sample_list`.
        csv_path: the list.
        prefix: DATA.PATH_PREFIX.
        folder: DATA.PATH_TO_DATA_DIR, for advice.

    Raises:
        UserError: there is none of _TRIED files; names the first of them and DATA.PATH_PREFIX.
    """
    tried = [path for path, _ in samples[:: max(len(samples) // _TRIED, 1)][:_TRIED]]
    if any(map(os.path.exists, tried)):
        return
    first = tried[0]
    try:
        open_regular_file(first).close()
        cause = "no such file"  # it has appeared in the meantime
    except NotReadable as error:
        cause = str(error)
    base = "" if os.path.isabs(first) else f", from the working folder {os.getcwd()}"
    listed = os.path.relpath(first, prefix) if prefix else first
    others = [] if os.path.isabs(listed) else [folder, os.path.dirname(os.path.normpath(prefix))]
    there = [other for other in others if other != prefix and os.path.exists(os.path.join(other, listed))]
    raise UserError(
        f"no file of {csv_path} was found ({len(tried)} were looked for): {first}: {cause}{base}. DATA.PATH_PREFIX, "
        f"the folder that the paths of the list are relative to, is {prefix!r}"
        + (f"; they are there with DATA.PATH_PREFIX {there[0]!r}" if there else "")
    )


def read_any_list(path: str, prefix: str, key: str, there: bool = True, several: bool = False) -> SampleList:
    """Read a list, with the first separator that all of its lines can be read with.

    Args:
        path: the list, see `read_sample_list`.
        prefix: folder that its paths are relative to; "" = that of the list, or the working folder.
        key: what names the prefix, for messages.
        there: False = accept a list of which no file is there.
        several: a line may have several labels, separated by commas, see `read_multi_label_list`.

    Returns:
        [(path, label)]; the label is NO_LABEL where the list has none, or where a line has several.

    Raises:
        UserError: it cannot be read, or no file of it is there.
    """
    first: UserError | None = None
    for separator in SEPARATORS:
        try:
            found = _read(path, separator, prefix, several)
        except UserError as error:
            first = first or error
            if not os.path.isfile(path) and "://" not in path:
                break
            continue
        if not prefix:
            return _from_a_folder(found, path, key, there)
        if there:
            check_some_exist(found, path, prefix, os.path.dirname(path))
        return found
    assert first is not None
    raise first


def _read(path: str, separator: str, prefix: str, several: bool) -> SampleList:
    if not several:
        return read_sample_list(path, separator, prefix, labelled=False)
    found = read_multi_label_list(path, separator, prefix, labelled=False)
    return [(name, labels[0] if len(labels) == 1 else NO_LABEL) for name, labels in found]


def _from_a_folder(found: SampleList, path: str, key: str, there: bool) -> SampleList:
    """Return a list with its relative paths completed by the folder of the list, unless they are there as they are."""
    tried = [name for name, _ in found[:: max(len(found) // _TRIED, 1)][:_TRIED] if not os.path.isabs(name)]
    folder = os.path.dirname(path)
    for base in dict.fromkeys((folder, "")):
        if not tried or any(os.path.exists(os.path.join(base, name)) for name in tried):
            return [(os.path.join(base, name), label) for name, label in found]
    if not there:
        return [(os.path.join(folder, name), label) for name, label in found]
    raise UserError(
        f"no file of {path} was found ({len(tried)} were looked for, such as {tried[0]!r}), neither from its folder "
        f"nor from the working folder {os.getcwd()}: {key} names the folder that paths are relative to"
    )
