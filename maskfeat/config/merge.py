"""Merge entries into a config, strictly: every key must be known, every value have the type of its key."""

import os
import re
from collections.abc import Mapping, Sequence
from functools import cache

from yacs.config import CfgNode

from maskfeat.config.coerce import coerce, plain
from maskfeat.config.defaults import INERT_KEYS, INERT_SECTIONS
from maskfeat.config.schema import Schema, is_inert, schema
from maskfeat.config.yaml_io import Entry
from maskfeat.errors import UserError
from maskfeat.file_io import expand_path
from maskfeat.registry import lookup
from maskfeat.text import likeness

_KEY = re.compile(r"[A-Za-z_]\w*(\.\w+)*", re.ASCII)
_NOTHING = object()


def merge_entries(cfg: CfgNode, entries: Mapping[str, Entry], allowed: Schema) -> list[str]:
    """Write entries into `cfg` and return the inert keys among them that do not come from a shipped recipe.

    Args:
        cfg: changed in place.
        entries: full key -> value as given.
        allowed: every effective key, its kind and its default.

    Raises:
        UserError: an unknown key (names the nearest known one), or a value of the wrong type.
    """
    known, kinds = allowed.known, allowed.rules.kinds
    sections = {key.rsplit(".", 1)[0] for key in known if "." in key} | set(INERT_SECTIONS)
    inert = []
    for key, entry in entries.items():
        if key in known:
            _set(cfg, key, coerce(key, entry, kinds[key], known[key]), entry)
        elif key in sections:
            if entry.value is not None:  # a section with nothing below it (all commented out) is fine
                raise UserError(f"{entry.where}: {key} is a section and takes keys below it; given {entry.value!r}")
        elif is_inert(key):
            _set(cfg, key, plain(entry.value), entry)
            if not entry.shipped:
                inert.append(key)
        else:
            raise UserError(_unknown(key, entry, known))
    return inert


def expand_paths(cfg: CfgNode, layers: Sequence[Mapping[str, Entry]], allowed: Schema) -> None:
    """Expand ~ and $VARIABLE in the paths of `cfg` that these layers gave. Values that were overridden are not seen.

    Raises:
        UserError: an unknown user or variable; names the key.
    """
    given = {key: entry for entries in layers for key, entry in entries.items()}
    for key, entry in given.items():
        kind, value = allowed.rules.kinds.get(key), lookup(cfg, key)
        try:
            if kind == "path":
                _set(cfg, key, expand_path(value), entry)
            elif kind == "list[source]":
                _set(cfg, key, [[expand_path(path), weight] for path, weight in value], entry)
        except UserError as error:
            raise UserError(f"{entry.where}: {key} {value!r}: {error}") from None


def is_override(word: str) -> bool:
    """Return whether a word of a command line is KEY or KEY=VALUE."""
    return _KEY.fullmatch(word.partition("=")[0]) is not None


def override_entries(opts: Sequence[object]) -> dict[str, Entry]:
    """Return overrides as entries: KEY VALUE, or KEY=VALUE in one text. Values may be text or Python objects.

    Raises:
        UserError: a word that is no key, or a key without a value; names it.
    """
    if isinstance(opts, str):
        raise UserError(f"overrides must be a list [KEY, VALUE, ...]; given the text {opts!r}")
    entries: dict[str, Entry] = {}
    words = iter(opts)
    after = ""
    for word in words:
        if not isinstance(word, str) or not is_override(word):
            raise UserError(
                f"overrides are KEY VALUE or KEY=VALUE, and {word!r}{after} is not a key; a value with spaces is quoted"
            )
        key, equals, text = word.partition("=")
        value: object = text if equals else next(words, _NOTHING)
        if value is _NOTHING or (not equals and isinstance(value, str) and value in _keys()):
            follows = "" if value is _NOTHING else f": the next word is the key {value}"
            raise UserError(f"overrides are KEY VALUE or KEY=VALUE, and {key} has no value{follows}")
        value = os.fspath(value) if isinstance(value, os.PathLike) else value
        entries.pop(key, None)  # the last one wins, and stands where it is given
        entries[key] = Entry(value, value if isinstance(value, str) else None, "command line")
        after = f" (after {key} {value})"
    return entries


@cache
def _keys() -> frozenset[str]:
    return frozenset(schema().known)


def _set(cfg: CfgNode, key: str, value: object, entry: Entry) -> None:
    *path, name = key.split(".")
    node = cfg
    for part in path:
        if part not in node:
            node[part] = CfgNode()
        node = node[part]
        if not isinstance(node, CfgNode):
            raise UserError(f"{entry.where}: {key} lies below {part}, which already has a value")
    if isinstance(node.get(name), CfgNode):
        raise UserError(f"{entry.where}: {key} is a section and takes keys below it; given the value {value!r}")
    node[name] = value


def _unknown(key: str, entry: Entry, known: Mapping[str, object]) -> str:
    names = [*known, *(name for name in INERT_KEYS if "*" not in name)]
    last = key.upper().rsplit(".", 1)[-1]

    def nearness(name: str) -> tuple[float, float]:
        whole = likeness(key, name)
        same_name = last == name.upper().rsplit(".", 1)[-1]
        return max(whole, 0.8 * same_name), whole  # the right name in a wrong section is near, too

    return f"{entry.where}: unknown config key {key}; did you mean {max(names, key=nearness)}?"
