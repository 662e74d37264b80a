"""Lists of videos or images: text files with a line of `path label`, `path frames label` or `path` for each of them.

The format is CSV with the delimiter DATA.PATH_LABEL_SEPARATOR: a path that contains the delimiter may stand in double
quotes, in which a double quote is doubled. Without quotes, the label is what follows the last delimiter. How many
columns a list has is decided from all of its lines, and what can be read in two ways is refused.
"""

import csv
import io
import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from maskfeat.data.datasets.label_sets import LABELS, LabelSet, is_number, read_labels
from maskfeat.data.names import IMAGES, VIDEOS
from maskfeat.errors import UserError
from maskfeat.file_io import NotReadable, local_path, open_regular_file

SampleList = list[tuple[str, int]]

MAX_LINE = 16_384
"""Largest number of characters in a line; the longest path on Linux has 4,096 bytes."""
NO_LABEL = -1
"""Label of samples whose list has none."""

_DELIMITERS = (",", "\t", ";", " ")
_VIDEO, _IMAGE = (
    re.compile(rf"(?:{'|'.join(map(re.escape, suffixes))})(?![a-z0-9])", re.IGNORECASE) for suffixes in (VIDEOS, IMAGES)
)
_UNDECODED = re.compile("[\ud800-\udfff]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_QUOTES = "\"'`\u2018\u2019\u201c\u201d\u201e\u00ab\u00bb"
_PATH_NAMES = {
    *("path", "paths", "file_path", "filepath", "video_path", "videopath", "clip_path", "relative_path", "rel_path"),
    *("video", "videos", "video_name", "clip", "file", "file_name", "filename", "name"),
}
_LABEL_NAMES = {
    *("label", "labels", "label_id", "label_idx", "label_index", "target", "category", "y"),
    *("class", "class_id", "classid", "class_idx", "class_index"),
}


class _Line(NamedTuple):
    """A line that is not empty: its number in the file, from 1, and its text."""

    number: int
    text: str


class _Row(NamedTuple):
    """A line as `path label` and, where that is possible, as `path frames label`.

    Attributes:
        path: what stands before the label, or the whole line if it has none.
        label: digits, or "" without a label.
        short: the path if a number of frames stands between it and the label; "" if none does.
        quoted: whether `path` and `short` are fields of a line with quotes, so that they can be nothing else.
    """

    line: _Line
    path: str
    label: str = ""
    short: str = ""
    quoted: bool = False


def read_sample_list(
    csv_path: str | os.PathLike[str], separator: str = " ", prefix: str = "", labelled: bool = True
) -> SampleList:
    r"""Read a list of videos or images.

    Args:
        csv_path: the list, a local path or one whose scheme has a handler (`file_io.path_manager`). Empty lines are
            skipped. The first line may name the columns: `path`, `label` and any others.
        separator: DATA.PATH_LABEL_SEPARATOR; \t stands for a tab.
        prefix: DATA.PATH_PREFIX, the folder that paths are relative to.
        labelled: False = a list of paths alone is accepted, too.

    Returns:
        [(path, label)] in the order of the file; the label is NO_LABEL where the list has none.

    Raises:
        UserError: the list does not exist or is empty, its scheme has no handler, a line cannot be parsed or can be
            read in two ways, or a path is a URL or leaves `prefix`.
    """
    return _Reader(os.fspath(csv_path), separator, prefix, labelled).read()


def read_multi_label_list(
    csv_path: str | os.PathLike[str], separator: str = " ", prefix: str = "", labelled: bool = True
) -> list[tuple[str, LabelSet]]:
    """Read a list of samples with one or more labels each, separated by commas: `path 3,17`; see `read_sample_list`.

    Returns:
        [(path, labels)]; without labels, they are (NO_LABEL,).
    """
    return _Reader(os.fspath(csv_path), separator, prefix, labelled, several=True).read()


class _Reader:
    """Reads one list; the arguments are those of `read_sample_list`."""

    def __init__(self, csv_path: str, separator: str, prefix: str, labelled: bool, several: bool = False) -> None:
        self.csv_path, self.prefix, self.labelled, self.several = csv_path, prefix, labelled, several
        self.base = os.path.join(prefix, "") if prefix else ""
        self.delimiter = _unescaped(separator)
        if not self.delimiter or any(mark in self.delimiter for mark in '"\r\n'):
            raise UserError(
                f"DATA.PATH_LABEL_SEPARATOR must be at least one character, without quotes; given {separator!r}"
            )
        # The path of a video, and something after it that is not part of its name.
        mark = re.escape(self.delimiter)
        self.more = re.compile(rf"{_VIDEO.pattern}\s*(?:[,;\t]|{mark})", re.IGNORECASE)
        self.more_of_images = re.compile(rf"{_IMAGE.pattern}\s*(?:[,;\t]|{mark})", re.IGNORECASE)
        # A line that can be read in one way only: names of letters, digits and common marks, a suffix, a label.
        name = r"(?!\.)[\w.()+=@&!#~ -]+"
        path = rf"(?! |\d+{mark}){'' if prefix else '/?'}{name}(?:/{name})*(?<=\w){_VIDEO.pattern}"
        self.plain = re.compile(rf"({path})(?:{mark}([0-9]+))?{mark}({LABELS[several]})", re.IGNORECASE)

    def read(self) -> list[tuple[str, Any]]:
        lines = list(self._lines())
        header = self._header(lines[0]) if lines else None
        lines = lines[1:] if header else lines
        if not lines:
            raise UserError(f"the list {self.csv_path} is empty: a line is {self._format}")
        if plain := self._plain_list(lines, header):
            return plain
        named = [self._named_row(line, *header) for line in lines] if header else None
        rows = named or self._same_columns([self._row(line) for line in lines])
        return [(self._path(row), self._label(row)) for row in rows]

    def _lines(self) -> Iterator[_Line]:
        """Yield the lines that are not empty, none longer than a path and a label can be."""
        try:
            file = io.TextIOWrapper(
                open_regular_file(local_path(self.csv_path)), encoding="utf-8-sig", errors="surrogateescape"
            )
        except NotReadable as error:
            raise UserError(
                f"the list {self.csv_path} cannot be read ({error}): "
                "DATA.PATH_TO_DATA_DIR must hold train.csv, val.csv and test.csv"
            ) from error
        fillers = self.delimiter + '"'
        with file:
            for number, text in enumerate(iter(partial(file.readline, MAX_LINE + 1), ""), 1):
                if len(text) > MAX_LINE:
                    raise UserError(
                        f"the list {self.csv_path} has a line of more than {MAX_LINE} characters: line {number}"
                    )
                if not text.isascii() and _UNDECODED.search(text):
                    raise UserError(f"the list {self.csv_path} is not UTF-8 text (line {number}): save it as CSV UTF-8")
                text = text.rstrip()
                if text and (text[0] not in fillers or text.strip().strip(fillers)):
                    yield _Line(number, text)

    def _plain_list(self, lines: list[_Line], header: tuple[list[str], int, int | None] | None) -> list[Any] | None:
        """Return the videos of a list of plain lines, in half the time; None if one line is not plain."""
        if self.delimiter not in _DELIMITERS or (header and (len(header[0]) != 2 or header[1])):
            return None
        read: Callable[[str], int | LabelSet] = partial(read_labels, several=True) if self.several else int
        videos, with_frames = [], 0
        for _, text in lines:
            found = self.plain.fullmatch(text)
            if found is None or (self.delimiter in found[1] and self.more.search(found[1])):
                return None
            with_frames += found[2] is not None
            videos.append((self.base + found[1], read(found[3])))
        return videos if with_frames in (0, 0 if header else len(lines)) else None

    # ------------------------------------------------------------------ a list with names of columns

    def _header(self, line: _Line) -> tuple[list[str], int, int | None] | None:
        """Return the names of the columns and the places of path and label; None if the line names no path."""
        try:
            first, *rest = [field.lower() for field in self._fields(line)]
        except UserError:
            return None
        names = [first, *(name for name in rest if name or not self.delimiter.isspace())]
        paths = [place for place, name in enumerate(names) if name in _PATH_NAMES]
        labels = [place for place, name in enumerate(names) if name in _LABEL_NAMES]
        if not paths or not (labels or len(names) == 1) or any(map(is_number, names)):
            return None  # in the first line of a list of paths, any words may stand
        if len(paths) > 1 or len(labels) > 1:
            raise self._refused(line, "names more than one column that may be the path or the label")
        if self.labelled and not labels:
            raise self._refused(line, "names no column 'label'")
        return names, paths[0], labels[0] if labels else None

    def _named_row(self, line: _Line, names: list[str], path: int, label: int | None) -> _Row:
        fields = self._fields(line)
        if self.delimiter.isspace():
            fields = [fields[0], *filter(None, fields[1:])]
        after = len(names) - path - 1
        numbers = fields[:path] + fields[len(fields) - after :]
        if len(fields) > len(names) and '"' not in line.text and all(map(is_number, numbers)):
            inner = line.text.split(self.delimiter, path)[-1]  # a path that contains the delimiter
            inner = inner.rsplit(self.delimiter, after)[0] if after else inner
            fields = [*fields[:path], inner.strip(), *fields[len(fields) - after :]]
        if len(fields) != len(names):
            raise self._refused(line, f"has {len(fields)} columns, and the first line names {len(names)}")
        if label is not None and not is_number(fields[label], self.several):
            raise self._refused(line, f"has the label {fields[label]!r}, which is not a number of 0 or more")
        return _Row(line, fields[path], "" if label is None else fields[label], quoted='"' in line.text)

    # ------------------------------------------------------------------ a list without

    def _row(self, line: _Line) -> _Row:
        text = line.text.strip()
        if '"' in text and (text[0] == '"' or self.delimiter + '"' in text):
            first, *rest = self._fields(line)
            numbers = [field for field in rest if field] if self.delimiter.isspace() else rest
            if len(numbers) > 2 or not all(is_number(number, self.several) for number in numbers):
                raise self._refused(line)
            return _Row(line, first, numbers[-1] if numbers else "", first if len(numbers) == 2 else "", True)
        path, _, label = text.rpartition(self.delimiter)
        path, label = path.strip(), label.strip()
        if not path or not is_number(label, self.several):
            return _Row(line, text)
        short, _, frames = path.rpartition(self.delimiter)
        return _Row(line, path, label, short.strip() if is_number(frames.strip()) else "")

    def _same_columns(self, rows: list[_Row]) -> list[_Row]:
        """Return the rows with the columns that all of them have."""
        if not any(row.label for row in rows):
            return self._paths_alone(rows)
        three = [row for row in rows if row.short]
        if any(row.quoted or _ends_as(_VIDEO, row.short) for row in three):
            odd = next((row for row in rows if not row.short), None)
            if odd is not None:
                why = f"lacks the column of frames that line {three[0].line.number} has"
                raise self._refused(odd.line, why if odd.label else "")
            return [row._replace(path=row.short) for row in rows]
        odd = next((row for row in rows if not row.label), None)
        if odd is not None:
            raise self._refused(odd.line)
        if len(three) == len(rows):
            raise self._refused(
                rows[0].line,
                "may have two or three columns (path, frames, label), as all lines of the list: put the paths into "
                "double quotes",
            )
        self._check_numbering(rows)
        return rows

    def _paths_alone(self, rows: list[_Row]) -> list[_Row]:
        if self.labelled:
            raise self._refused(rows[0].line)
        for row in rows:
            glued = any(delimiter in row.path for delimiter in _DELIMITERS) or _VIDEO.search(row.path)
            image = _ends_as(_IMAGE, row.path) and not self.more_of_images.search(row.path)
            if not row.quoted and glued and not image and not _ends_as(_VIDEO, row.path):
                raise self._refused(row.line)
        self._check_numbering(rows)
        return rows

    def _check_numbering(self, rows: list[_Row]) -> None:
        """Refuse a first column of row numbers, which pandas writes by default, where it would become part of paths."""
        found = []
        for row in rows:
            number, delimiter, _ = row.path.partition(self.delimiter)
            if row.quoted or not delimiter or not number.isdecimal():
                return
            found.append(int(number))
        if len(found) > 1:
            found.sort()
            if (
                not rows[0].label
                or not self.delimiter.isspace()
                or found == list(range(found[0], found[0] + len(rows)))
            ):
                raise self._refused(
                    rows[0].line,
                    "starts with a number, of the row or a label, as all lines of the list: remove that column "
                    "(pandas: index=False), or put the paths into double quotes",
                )

    # ------------------------------------------------------------------ fields

    def _fields(self, line: _Line) -> list[str]:
        """Return the fields of a line; the first one is as it stands in quotes, the others are stripped."""
        mark = self.delimiter if len(self.delimiter) == 1 else "\x1f"  # csv takes one character
        text = line.text.lstrip(" ") if line.text.lstrip().startswith('"') else line.text
        if mark != self.delimiter and mark in text:
            raise self._refused(line)
        try:
            (fields,) = csv.reader(
                [text.replace(self.delimiter, mark)], delimiter=mark, strict=True, skipinitialspace=mark != " "
            )
        except csv.Error as error:
            raise self._refused(line, f"has quotes that are not those of a CSV file ({error})") from error
        fields = [field.replace(mark, self.delimiter) for field in fields]
        return [fields[0] if text.startswith('"') else fields[0].strip(), *(field.strip() for field in fields[1:])]

    def _label(self, row: _Row) -> int | LabelSet:
        if not row.label:
            return (NO_LABEL,) if self.several else NO_LABEL
        try:
            return read_labels(row.label, self.several)
        except ValueError as error:
            raise UserError(f"{self._where(row.line)}: {error}") from None

    def _path(self, row: _Row) -> str:
        path, prefix = row.path, self.prefix
        if not path.strip():
            raise self._refused(row.line, "has no path")
        if path[0] in _QUOTES and path[-1] in _QUOTES and len(path) > 1:
            raise self._refused(
                row.line, "has a path in quotes that are not read as quotes: use none, or one double quote on each side"
            )
        if "://" in path or "\0" in path:
            raise UserError(f"{self._where(row.line)}: {path!r} is not a local file: download it first")
        if not row.quoted and (path[-1] in ",;" or (not path.isprintable() and _CONTROL.search(path))):
            raise self._refused(row.line)
        if not row.quoted and (self.delimiter in path or "," in path or ";" in path) and self.more.search(path):
            raise self._refused(row.line, "has more than a path and a label: put a path like that into double quotes")
        absolute = path[0] == os.sep
        if prefix and absolute:
            raise UserError(
                f"{self._where(row.line)}: {path!r} is absolute although DATA.PATH_PREFIX is {prefix!r}; "
                "make one of them empty"
            )
        if not absolute and (path[0] == "." or "/." in path or "//" in path):
            path = os.path.normpath(path)
            if path.split(os.sep)[0] == os.pardir:
                raise UserError(
                    f"{self._where(row.line)}: {row.path!r} leaves DATA.PATH_PREFIX {prefix!r}, which is not allowed"
                )
        # Without any `..`, which after a symbolic link would point elsewhere than it seems to.
        return self.base + path

    # ------------------------------------------------------------------ messages

    @property
    def _format(self) -> str:
        pair = f"'path{self.delimiter}label' with a label of 0 or more"
        if self.several:
            pair = f"'path{self.delimiter}label,label' with labels of 0 or more"
        return pair if self.labelled else f"{pair}, or a path alone"

    def _where(self, line: _Line) -> str:
        return f"{self.csv_path}, line {line.number}"

    def _refused(self, line: _Line, why: str = "") -> UserError:
        """Return the error that names a line, what is wrong with it, and the key."""
        text = line.text.strip()
        shown = text if len(text) <= 300 else f"{text[:300]}..."
        delimiters = _DELIMITERS[1:] if self.several else _DELIMITERS  # a comma separates the labels
        fitting = [d for d in delimiters if d != self.delimiter and _fits(text, d, self.several)]
        advice = f"; {fitting[0]!r} would fit this line" if fitting else ""
        why = f"{why} (a line is {self._format})" if why else f"is not {self._format}"
        return UserError(
            f"{self._where(line)}: {shown!r} {why}; DATA.PATH_LABEL_SEPARATOR is {self.delimiter!r}{advice}"
        )


def _unescaped(separator: str) -> str:
    r"""Return a separator that was given as an escape, such as \t from a shell, as the character that it stands for."""
    if not separator.startswith("\\"):
        return separator
    try:
        return separator.encode("ascii").decode("unicode_escape")
    except UnicodeError:
        return separator


def _ends_as(suffix: re.Pattern[str], path: str) -> bool:
    return any(match.end() == len(path) for match in suffix.finditer(path))


def _fits(text: str, delimiter: str, several: bool) -> bool:
    """Whether a line is a path and a label, or names such columns, with another delimiter."""
    fields = [field.strip().strip('"').lower() for field in text.split(delimiter)]
    return len(fields) > 1 and (is_number(fields[-1], several) or bool(_PATH_NAMES.intersection(fields)))
