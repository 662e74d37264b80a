"""Read YAML text into flat entries (full key -> value, text, location), and follow the `_BASE_` chain.

Only plain YAML is read: no tag constructs an object. Size, depth, aliases and the number of values are limited, so that
an untrusted file can neither run code nor hang the program.
"""

import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from maskfeat.config.recipes import CONFIG_ROOT, find_recipe, shipped_file
from maskfeat.errors import UserError
from maskfeat.file_io import expand_path

logger = logging.getLogger("maskfeat.config")

BASE_KEY = "_BASE_"

WRITTEN = "# The resolved config of a run, written by maskfeat.\n"
"""The first line of a config that the program wrote itself: the user was told of its inert keys when it ran."""

MAX_BYTES = 1_000_000
MAX_EVENTS = 10_000
MAX_ALIASES = 100
MAX_DEPTH = 20
MAX_BASES = 10
MAX_SCALAR = 4096
"""Characters of a single value."""
MAX_NUMBER = 64
"""Characters of a number: YAML reads 1:1:1:... to the base of 60, in time that grows with its square."""

_PLAIN = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str")}
_OTHER_BASE = re.compile(r"[-+]?0[0-9_]+|[-+]?[0-9_.]+(:[0-9_.]+)+")
"""Numbers that YAML reads to the base of 8 or 60 although they look decimal: 010, 1:30. They are kept as text."""

_NUMBERS = {f"tag:yaml.org,2002:{name}" for name in ("int", "float")}
_NAMES = {"tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:value"}  # a date, or "=": text in a config
_MERGE = "tag:yaml.org,2002:merge"


@dataclass(frozen=True)
class Entry:
    """A single value as it was given.

    Attributes:
        value: plain Python (None, bool, int, float, str, list, dict), or any object given in code.
        text: the characters of a scalar, before YAML turned them into a number or a date; None for a list.
        where: file and line, or "command line", for messages.
        shipped: whether it comes from one of the project's own YAML files, or from one that a run wrote.
    """

    value: object
    text: str | None
    where: str
    shipped: bool = False


Tree = dict[str, "Tree | Entry"]


def read_chain(path: str | os.PathLike[str]) -> list[dict[str, Entry]]:
    """Return the entries of a YAML and of its `_BASE_` files, the outermost base first.

    `_BASE_` is a path relative to its file, or the name of a recipe. It must stay in the folder of
    the YAML that the user named (or below it), or in the project's own configs/ folder.

    Raises:
        UserError: a file is missing, too large or not a mapping; `_BASE_` leaves them or is a cycle.
    """
    first = find_recipe(path).resolve()
    roots = (first.parent, CONFIG_ROOT)
    layers: list[dict[str, Entry]] = []
    seen: list[Path] = []
    current: Path | None = first
    while current is not None:
        if current in seen:
            names = " -> ".join(p.name for p in [*seen, current])
            raise UserError(f"{path}: {BASE_KEY} is a cycle: {names}; remove it from one of these files")
        if len(seen) > MAX_BASES:
            raise UserError(f"{path}: more than {MAX_BASES} files in the {BASE_KEY} chain")
        seen.append(current)
        entries = read_entries(current)
        base = entries.pop(BASE_KEY, None)
        layers.append(entries)
        current = None if base is None else _base_path(base, current, roots)
    return layers[::-1]


def _base_path(base: Entry, file: Path, roots: tuple[Path, ...]) -> Path:
    rule = (
        f"{base.where}: {BASE_KEY} must be a path, relative to this file, to a YAML in the folder (or below "
        f"it) of the YAML that was named, or in the project's configs/ folder"
    )
    if not isinstance(base.value, str) or not base.value or "://" in base.value:
        raise UserError(f"{rule}; given {base.value!r}")
    try:
        name = expand_path(base.value)
    except UserError as error:
        raise UserError(f"{base.where}: {BASE_KEY} {base.value!r}: {error}") from None
    try:
        found = (file.parent / name).resolve()
        if not found.is_file():
            found = shipped_file(name) or found
    except (OSError, ValueError) as error:
        raise UserError(f"{rule}; given {base.value[:200]!r}") from error
    if not any(found.is_relative_to(root) for root in roots):
        raise UserError(f"{rule}; given {base.value!r}, which lies outside")
    if not found.is_file():
        raise UserError(f"{base.where}: {BASE_KEY} {base.value!r} does not exist")
    return found


def read_entries(path: Path) -> dict[str, Entry]:
    """Return the values of one YAML by their full keys, in the order of the file.

    A duplicate key is logged as a warning with both lines; the last one wins, as in every YAML loader.

    Raises:
        UserError: the file is too large, not UTF-8 text, not YAML, or not a mapping of sections.
    """
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"config file {path} is not UTF-8 text: {error}") from error
    return parse_entries(text, path)


def parse_entries(text: str, path: Path) -> dict[str, Entry]:
    """Return the entries of YAML text, as `read_entries` does; `path` is used in messages.

    Raises:
        UserError: the text is too large, not YAML, not a mapping of sections, or has a tag that is not plain YAML.
    """
    if len(text) > MAX_BYTES:
        raise UserError(f"config file {path} has more than {MAX_BYTES} characters; it is no config")
    try:
        _check_size(text, path)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise UserError(f"config file {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if node is None:
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"config file {path} must hold sections and keys (a YAML mapping); it holds a {_word(node)}")
    shipped = path.is_relative_to(CONFIG_ROOT) or text.startswith(WRITTEN)
    return _flatten(_Reader(path, shipped).mapping(node, ""), path)


def _check_size(text: str, path: Path) -> None:
    depth = aliases = 0
    for count, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        aliases += isinstance(event, yaml.AliasEvent)
        if isinstance(event, yaml.ScalarEvent) and len(event.value) > MAX_SCALAR:
            raise UserError(f"config file {path} is too large: a value has at most {MAX_SCALAR} characters")
        if depth > MAX_DEPTH or aliases > MAX_ALIASES or count > MAX_EVENTS:
            raise UserError(
                f"config file {path} is too large: at most {MAX_EVENTS} values, {MAX_ALIASES} aliases and "
                f"{MAX_DEPTH} levels"
            )


class _Reader:
    """Convert the YAML nodes of one file to a tree of entries, and count them, since aliases repeat nodes."""

    def __init__(self, path: Path, shipped: bool) -> None:
        self.path, self.shipped = path, shipped
        self.scalars = yaml.SafeLoader("")
        self.count = 0

    def where(self, node: yaml.Node) -> str:
        return f"{self.path} line {node.start_mark.line + 1}"

    def check(self, node: yaml.Node, depth: int = 0) -> None:
        self.count += 1
        if self.count > MAX_EVENTS or depth > MAX_DEPTH:
            raise UserError(f"{self.where(node)}: aliases make this file too large or refer to themselves")

    def mapping(self, node: yaml.MappingNode, prefix: str, depth: int = 0) -> Tree:
        self.check(node, depth)
        if node.tag != "tag:yaml.org,2002:map":
            raise UserError(f"{self.where(node)}: tag {node.tag!r} is not allowed in a config")
        tree: Tree = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _MERGE:
                for key, value in self.merged(value_node, prefix, depth).items():
                    tree.setdefault(key, value)
                continue
            key = self.key(key_node)
            line = key_node.start_mark.line + 1
            if key in lines:
                logger.warning(
                    "%s: key %s is written twice, on lines %d and %d; the last one wins",
                    self.path,
                    prefix + key,
                    lines[key],
                    line,
                )
            lines[key] = line
            if isinstance(value_node, yaml.MappingNode):
                tree[key] = self.mapping(value_node, f"{prefix}{key}.", depth + 1)
            else:
                tree[key] = self.leaf(value_node, key_node, depth + 1)
        return tree

    def merged(self, node: yaml.Node, prefix: str, depth: int) -> Tree:
        """Return the keys of `<<: *name` or `<<: [*name, ...]`, the first mapping first."""
        nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
        tree: Tree = {}
        for part in nodes:
            if not isinstance(part, yaml.MappingNode):
                raise UserError(f"{self.where(node)}: '<<' takes a mapping")
            for key, value in self.mapping(part, prefix, depth + 1).items():
                tree.setdefault(key, value)
        return tree

    def key(self, node: yaml.Node) -> str:
        if not isinstance(node, yaml.ScalarNode):
            raise UserError(f"{self.where(node)}: a key must be a name, not a {_word(node)}")
        return str(node.value)

    def leaf(self, node: yaml.Node, key_node: yaml.Node, depth: int) -> Entry:
        text = node.value if isinstance(node, yaml.ScalarNode) else None
        return Entry(self.plain(node, depth), text, self.where(key_node), self.shipped)

    def plain(self, node: yaml.Node, depth: int) -> object:
        """Return the node as None, bool, int, float, str, list or dict."""
        self.check(node, depth)
        if isinstance(node, yaml.ScalarNode):
            if node.tag in _NUMBERS and len(node.value) > MAX_NUMBER:
                raise UserError(f"{self.where(node)}: a number has {MAX_NUMBER} characters at most")
            if node.tag in _NAMES or (node.tag in _NUMBERS and _OTHER_BASE.fullmatch(node.value)):
                return str(node.value)
            if node.tag in _PLAIN:
                try:
                    return self.scalars.construct_object(node)
                except (ValueError, yaml.YAMLError) as error:
                    raise UserError(f"{self.where(node)}: cannot read {node.value!r}: {error}") from error
        elif isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
            return [self.plain(item, depth + 1) for item in node.value]
        elif isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
            return {self.key(k): self.plain(v, depth + 1) for k, v in node.value}
        raise UserError(f"{self.where(node)}: tag {node.tag!r} is not allowed in a config")


def _flatten(tree: Tree, path: Path) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for key, entry in _leaves(tree, ""):
        if key in entries:  # once as `A: {B: 1}` and once as `A.B: 1`
            logger.warning(
                "%s: key %s is written twice, at %s and %s; the last one wins",
                path,
                key,
                entries[key].where,
                entry.where,
            )
        entries[key] = entry
    return entries


def _leaves(tree: Mapping[str, "Tree | Entry"], prefix: str) -> Iterator[tuple[str, Entry]]:
    for key, value in tree.items():
        if isinstance(value, Entry):
            yield prefix + key, value
        else:
            yield from _leaves(value, f"{prefix}{key}.")


def _word(node: yaml.Node) -> str:
    return (
        "list" if isinstance(node, yaml.SequenceNode) else "section" if isinstance(node, yaml.MappingNode) else "value"
    )
