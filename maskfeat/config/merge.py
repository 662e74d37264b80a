"""Merge entries into a config, strictly: every key must be known, every value have the type of its key."""

import difflib
import os
from collections.abc import Mapping, Sequence

from yacs.config import CfgNode

from maskfeat.config.coerce import coerce, plain
from maskfeat.config.defaults import INERT_KEYS, INERT_SECTIONS
from maskfeat.config.schema import Schema, is_inert
from maskfeat.config.yaml_io import Entry
from maskfeat.errors import UserError


def merge_entries(cfg: CfgNode, entries: Mapping[str, Entry], schema: Schema) -> list[str]:
    """Write entries into `cfg` and return the inert keys among them that do not come from a shipped recipe.

    Args:
        cfg: changed in place.
        entries: full key -> value as given.
        schema: every effective key, its kind and its default.

    Raises:
        UserError: an unknown key (names the nearest known one), or a value of the wrong type.
    """
    known, kinds = schema.known, schema.rules.kinds
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


def override_entries(opts: Sequence[object]) -> dict[str, Entry]:
    """Return a flat list KEY VALUE KEY VALUE ... as entries. Values may be text or Python objects.

    Raises:
        UserError: an odd number of items, or a key that is not text.
    """
    if isinstance(opts, str):
        raise UserError(f"overrides must be a list [KEY, VALUE, ...]; given the text {opts!r}")
    if len(opts) % 2:
        hint = "; write KEY VALUE, not KEY=VALUE" if any("=" in str(o) for o in opts[::2]) else ""
        raise UserError(f"overrides must come in pairs KEY VALUE; given {len(opts)} items: {list(opts)!r}{hint}")
    entries = {}
    for key, value in zip(opts[::2], opts[1::2], strict=True):
        if not isinstance(key, str):
            raise UserError(f"overrides must come in pairs KEY VALUE; {key!r} is not a key")
        value = os.fspath(value) if isinstance(value, os.PathLike) else value
        entries[key] = Entry(value, value if isinstance(value, str) else None, "command line")
    return entries


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
    folded = key.upper()

    def likeness(name: str) -> tuple[float, float]:
        whole = difflib.SequenceMatcher(None, folded, name.upper()).ratio()
        same_name = folded.rsplit(".", 1)[-1] == name.upper().rsplit(".", 1)[-1]
        return max(whole, 0.8 * same_name), whole  # the right name in a wrong section is near, too

    nearest = max(names, key=likeness)
    return f"{entry.where}: unknown config key {key}; did you mean {nearest}?"
