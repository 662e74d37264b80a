"""Write the config reference from the functions that declare the keys: `python docs/config_reference.py`.

A key is declared by `cfg.SECTION.KEY = default  # text`; comment lines directly above it belong to it, too. "ours" in
such a comment marks a key that PySlowFast does not have, "All ours" in the docstring of the function a whole section.
Types, choices, ranges and lengths come from maskfeat/config. The page is docs/config.md; tests/test_docs.py compares
the committed one with a fresh one.
"""

import inspect
import io
import re
import sys
import textwrap
import tokenize
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
PAGE = REPO / "docs" / "config.md"
sys.path.insert(0, str(REPO))

from yacs.config import CfgNode  # noqa: E402

from maskfeat import registry  # noqa: E402
from maskfeat.config import defaults  # noqa: E402
from maskfeat.config.schema import schema  # noqa: E402
from maskfeat.registry import Range  # noqa: E402

Declaration = Callable[[CfgNode], object]

_HEAD = """# Config reference

Every key with its type, its default and the values that it may have. Give a key in a YAML file or on the command
line, as `KEY VALUE` or `KEY=VALUE`: `TRAIN.BATCH_SIZE 64`. The command line wins over the YAML, the YAML over its
`_BASE_`, and that over the defaults here. Lists are quoted on a command line: `"[8, 7, 7]"`. An unknown key stops the
run, and the message names the nearest one. Values that do not fit together stop it before any work.

In a path, `~`, `$VARIABLE` and `${VARIABLE}` are expanded (`$$` is a dollar sign); a variable that is not set stops
the run. Addresses such as `https://` are left as they are.

Overrides and options may stand in any order, with or without PySlowFast's `--opts`. Of several files behind `--cfg`
each is a run of its own, one after another, as in PySlowFast: the overrides hold for all, all are checked before the
first starts, and a run that fails is the last.

Names and defaults are those of PySlowFast, so that its YAML files mean the same here. † marks keys that PySlowFast
does not have. Keys of its other models and tools are accepted and have no effect; a warning says how many there are.
Those that would change results there accept one value, the one that is computed here.

This page is made by `python docs/config_reference.py`.
"""

_KINDS = {
    "precision": "bool or str",
    "inflation": "bool or str",
    "recomputation": "bool or str",
    "list[source]": "list of [path, weight]",
}
_OURS = re.compile(r"^ours(?:(, [\w ]+): |: |$)")


@dataclass
class Declared:
    """A key as its declaration names it."""

    key: str
    text: str
    ours: bool


@dataclass
class Section:
    """The keys below one name, such as TRAIN; "" holds those without a section."""

    name: str
    about: str = ""
    keys: list[Declared] = field(default_factory=list)


def declared_keys(declare: Declaration) -> list[Declared]:
    """Return the keys that a function declares, in order, with the comments beside and above them."""
    source = textwrap.dedent(inspect.getsource(declare))
    all_ours = "All ours" in (inspect.getdoc(declare) or "")
    found: list[Declared] = []
    above: list[str] = []
    statement: list[tokenize.TokenInfo] = []
    comments: list[str] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            (comments if statement else above).append(token.string.lstrip("# ").rstrip())
        elif token.type == tokenize.NEWLINE:
            code = "".join(part.string for part in statement)
            match = re.match(r"cfg\.([A-Z][\w.]*)=(?!CfgNode\()", code)
            if match:
                text = " ".join([*above, *comments])
                found.append(_declared(match[1], text, all_ours))
            above, comments, statement = [], [], []
        elif token.type == tokenize.NL:
            if not statement and not token.line.strip():
                above = []
        elif token.type not in (tokenize.INDENT, tokenize.DEDENT):
            statement.append(token)
    return found


def _declared(key: str, text: str, all_ours: bool) -> Declared:
    """Take the mark "ours" off the text of a key."""
    match = _OURS.match(text)
    if match:
        about = match[1].removeprefix(", ") if match[1] else ""
        text = f"{about}: {text[match.end() :]}" if about else text[match.end() :]
    return Declared(key, text, all_ours or match is not None)


def sections_of(declarations: Sequence[Declaration]) -> list[Section]:
    """Return all sections in the order of their first key, keys of one section together."""
    sections: dict[str, Section] = {}
    for declare in declarations:
        about = re.sub(r"\s*\bAll ours\.\s*", "", inspect.getdoc(declare) or "")
        for key in declared_keys(declare):
            name = key.key.rpartition(".")[0]
            section = sections.setdefault(name, Section(name, about))
            section.keys.append(key)
    return list(sections.values())


def shown(value: object) -> str:
    """Return a value as one would write it in a YAML file."""
    if isinstance(value, list | tuple):
        return "[" + ", ".join(shown(item) for item in value) + "]"
    if value == "":
        return '""'
    if value == " ":
        return '" "'
    return str(value)


def kind_of(key: str, value: object, kinds: Mapping[str, str]) -> str:
    """Return the type of a key: that of `kinds`, or that of its default."""
    kind = kinds.get(key, type(value).__name__)
    return _KINDS.get(kind, kind)


def allowed_values(
    key: str,
    choices: Mapping[str, tuple[object, ...]],
    ranges: Mapping[str, Range],
    lengths: Mapping[str, tuple[int, ...]],
) -> str:
    """Return what is allowed beyond the type, in words; "" where nothing is said."""
    parts = []
    if key in choices:
        only = "only " if len(choices[key]) == 1 else ""
        parts.append(only + ", ".join(f"`{shown(choice)}`" for choice in choices[key]))
    if key in lengths:
        parts.append(" or ".join(str(length) for length in lengths[key]) + " numbers")
    if key in ranges:
        parts.append(ranges[key].words)
    return "; ".join(parts)


def render(
    declarations: Sequence[Declaration],
    kinds: Mapping[str, str],
    choices: Mapping[str, tuple[object, ...]],
    ranges: Mapping[str, Range],
    lengths: Mapping[str, tuple[int, ...]],
) -> str:
    """Return the whole page.

    Args:
        declarations: functions that write keys with their defaults into a config, called in this order.
        kinds: key -> type, where the default does not show it.
        choices, ranges, lengths: key -> the values, the range and the number of items that are allowed.
    """
    cfg = CfgNode()
    for declare in declarations:
        declare(cfg)
    parts = [_HEAD]
    for section in sections_of(declarations):
        lines = [f"## {section.name or 'Keys without a section'}", ""]
        if section.about:
            lines += [section.about, ""]
        lines += ["| key | default | type, values | meaning |", "|---|---|---|---|"]
        for declared in section.keys:
            value: Any = cfg
            for name in declared.key.split("."):
                value = value[name]
            allowed = allowed_values(declared.key, choices, ranges, lengths)
            cells = (
                f"`{declared.key}`" + (" †" if declared.ours else ""),
                f"`{shown(value)}`",
                "; ".join(filter(None, [kind_of(declared.key, value, kinds), allowed])),
                declared.text,
            )
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def declarations() -> list[Declaration]:
    """Return the functions that declare keys: those of maskfeat/config/defaults.py in the order in which they stand
    there, then those of objectives, backbones and data sets.
    """
    shared = [value for name, value in vars(defaults).items() if name.startswith("_") and inspect.isfunction(value)]
    found = [function for function in shared if list(inspect.signature(function).parameters) == ["cfg"]]
    own = [spec.keys for spec in registry.load().specs if spec.keys is not None]
    return [*found, *dict.fromkeys(own)]


def page() -> str:
    """Return the page for all keys that the program knows."""
    rules = schema().rules
    return render(declarations(), rules.kinds, rules.choices, rules.ranges, rules.lengths)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
