"""Convert a value to the type of its key, as yacs does, but never with a loss of information."""

import itertools
import math
import re
from ast import literal_eval
from collections.abc import Callable, Mapping

import numpy as np

from maskfeat.config.yaml_io import Entry
from maskfeat.errors import UserError

_MAX_LITERAL = 20_000
_WORDS = {
    "bool": "True or False",
    "int": "a whole number",
    "float": "a number",
    "number": "a number",
    "str": "text",
    "path": "a path",
    "precision": "False (off), True (fp16), bf16 or fp16",
    "inflation": "False, True (both center), center or average",
    "recomputation": "False, True or light",
}


_LEADING_ZERO = re.compile(r"[-+]?0[0-9_]+")


class _Mismatch(Exception):
    """A value does not have the expected kind; `coerce` turns this into a message."""


def is_kind(kind: str) -> bool:
    """Return whether values can be read as this kind."""
    kind = kind.removesuffix(" or None")
    while kind.startswith("list[") and kind.endswith("]"):
        kind = kind.removeprefix("list[").removesuffix("]")
    return kind in _SCALARS


def coerce(key: str, entry: Entry, kind: str, default: object) -> object:
    """Return the entry's value in the type of its key.

    Text that is a Python literal is decoded ("(3, 7, 7)", "None", "1e-8"), an int is accepted for a float, and a list
    for a tuple and the reverse. A float is never truncated to an int, and a number is never taken for True or False. A
    text key keeps the characters that were written, even if they look like a number or a date.

    Args:
        key: its full name.
        entry: the value as it was given.
        kind: such as "float", "list[int]", "list[int] or None".
        default: of the key; where it is a tuple, so is the result.

    Raises:
        UserError: the value is not of that type; names the key, the value and what was expected.
    """
    of_key = kind
    try:
        if kind in ("str", "path"):
            return _text(entry)
        value = decode(entry.value)
        if kind.endswith(" or None"):
            if value is None:
                return None
            kind = kind.removesuffix(" or None")
        result = _convert(value, kind)
    except _Mismatch as error:
        hint = " (a leading 0 means octal in YAML: leave it out)" if _has_leading_zero(entry.value) else ""
        raise UserError(
            f"{entry.where}: {key} must be {_describe(of_key)}; given {entry.value!r}{error}{hint}"
        ) from None
    return tuple(result) if isinstance(default, tuple) and isinstance(result, list) else result


def _has_leading_zero(value: object) -> bool:
    """Return whether a value is, or a list of it holds, a whole number with a leading 0."""
    if isinstance(value, list | tuple):
        return any(map(_has_leading_zero, value))
    return isinstance(value, str) and any(map(_LEADING_ZERO.fullmatch, re.split(r"[\[\](),\s]+", value)))


def decode(value: object) -> object:
    """Return the value of text that is a Python literal, with tuples as lists; anything else is returned unchanged."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, str) and len(value) <= _MAX_LITERAL:
        try:
            value = literal_eval(value.strip())
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            return value
    if isinstance(value, list | tuple):
        return [decode(item) if isinstance(item, list | tuple) else item for item in value]
    return value


def plain(value: object) -> object:
    """Return the decoded value of an inert key in a form that YAML can hold."""
    value = decode(value)
    if value is None or isinstance(value, bool | int | float | str | list):
        return value
    return str(value)


def _text(entry: Entry) -> str:
    value, text = entry.value, entry.text
    if value is None or text == "None":
        return ""  # an empty string is how this config says "none" where text is expected
    if isinstance(value, list | tuple | dict):
        raise _Mismatch("")
    text = str(value) if text is None else text
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        quoted = decode(text)
        return quoted if isinstance(quoted, str) else text
    return text


def _convert(value: object, kind: str) -> object:
    if kind.startswith("list["):
        return _list(value, kind.removeprefix("list[").removesuffix("]"))
    return _SCALARS[kind](value)


def _list(value: object, item: str) -> list[object]:
    if value is None or value == "":
        return []
    if item == "str" and isinstance(value, str):  # head.*  or  [head.*, norm.*]  as typed on a command line
        value = [part.strip().strip("'\"") for part in _unwrapped(value.strip()).split(",") if part.strip()]
    if not isinstance(value, list):
        raise _Mismatch("")
    return [_convert(v if item == "str" else decode(v), item) for v in value]


def _unwrapped(text: str) -> str:
    """Return a text without brackets around all of it, such as [head.*, norm.*]; those in *.rel_pos_[hw] stay."""
    while text[:1] in ("[", "("):
        depths = list(itertools.accumulate((mark in "[(") - (mark in ")]") for mark in text))
        if 0 in depths[:-1]:
            break
        text = text[1 : -1 if depths[-1] == 0 else None].strip()
    return text


def _bool(value: object) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    raise _Mismatch("")


def _int(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise _Mismatch(" (a float is not rounded)" if isinstance(value, float) else "")


def _float(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _Mismatch("")
    if not math.isfinite(value):
        raise _Mismatch(" (not finite)")
    return float(value)


def _number(value: object) -> int | float:
    return value if isinstance(value, int) and not isinstance(value, bool) else _float(value)


def _str(value: object) -> str:
    if not isinstance(value, str):
        raise _Mismatch("")
    return value


def _bool_or_word(value: object, words: Mapping[str, bool | str]) -> bool | str:
    if isinstance(value, bool):
        return value
    known = {"false": False, "true": True, **words}
    if isinstance(value, str) and value.strip().lower() in known:
        return known[value.strip().lower()]
    raise _Mismatch("")


def _precision(value: object) -> bool | str:
    return _bool_or_word(value, {"off": False, "bf16": "bf16", "fp16": "fp16"})


def _inflation(value: object) -> bool | str:
    return _bool_or_word(value, {"center": "center", "average": "average"})


def _recomputation(value: object) -> bool | str:
    return _bool_or_word(value, {"light": "light"})


def _source(value: object) -> list[object]:
    if not isinstance(value, list) or len(value) != 2:
        raise _Mismatch("")
    return [_str(value[0]), _float(decode(value[1]))]


_SCALARS: dict[str, Callable[[object], object]] = {
    "bool": _bool,
    "int": _int,
    "float": _float,
    "number": _number,
    "str": _str,
    "path": _str,
    "precision": _precision,
    "inflation": _inflation,
    "recomputation": _recomputation,
    "source": _source,
}


def _describe(kind: str) -> str:
    if kind.endswith(" or None"):
        return f"{_describe(kind.removesuffix(' or None'))} or None"
    if kind.startswith("list["):
        inner = kind.removeprefix("list[").removesuffix("]")
        words = {"int": "whole numbers", "float": "numbers", "number": "numbers", "str": "names", "path": "paths"}
        words["source"] = """pairs of a path and a weight, such as [["/data/a", 2], ["/data/b", 1]]"""
        if inner.startswith("list["):
            return "a list of " + _describe(inner).replace("a list of", "lists of", 1)
        return f"a list of {words[inner] if inner in words else f'values, each {_WORDS[inner]}'}"
    return _WORDS[kind]
