"""What the documents say: fenced blocks and the commands in them."""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
DOCUMENTS = tuple(str(path.relative_to(REPO)) for path in sorted([*REPO.glob("*.md"), *(REPO / "docs").rglob("*.md")]))

_SNIPPET = re.compile(r'^--8<-- "(?P<file>[^":]+)(?::(?P<section>\w+))?"$', re.M)
_FENCE = re.compile(r"(?:<!-- test: (?P<mark>\w+) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)

# What stands for these programs prints its arguments instead, each with a NUL after it, commands apart by "\1\0".
_RECORDED = ("python", "torchrun", "bash")
_RECORD = "".join(f"{name}() {{ printf '%s\\0' {name} \"$@\" $'\\1'; }}\n" for name in _RECORDED)


def read(name: str) -> str:
    """A document of the repository, with the sections of other documents that a page includes."""
    return _SNIPPET.sub(_included, (REPO / name).read_text(encoding="utf-8"))


def _included(snippet: re.Match[str]) -> str:
    """The text that stands for `--8<-- "FILE:section"` on the site."""
    text = (REPO / snippet["file"]).read_text(encoding="utf-8")
    if snippet["section"]:
        _, begin, text = text.partition(f"--8<-- [start:{snippet['section']}] -->\n")
        text, end, _ = text.partition(f"<!-- --8<-- [end:{snippet['section']}]")
        assert begin and end, f"{snippet['file']} has no section {snippet['section']}"
    assert "--8<-- " not in text.replace("--8<-- [", ""), "sections within sections are not looked into"
    return text.rstrip("\n")


def fenced_blocks(text: str, language: str = "bash") -> list[tuple[str, str]]:
    """(mark, text) of every fenced block in a language; the mark is "" without `<!-- test: mark -->` above it."""
    blocks = [(m["mark"] or "", m["text"], m["language"]) for m in _FENCE.finditer(text)]
    return [(mark, body) for mark, body, found in blocks if found == language]


def marked_block(text: str, mark: str, language: str = "bash") -> str:
    """The text of the one block in a language that has this mark."""
    (body,) = [body for found, body in fenced_blocks(text, language) if found == mark]
    return body


def recorded_commands(script: str, variables: Mapping[str, str]) -> list[list[str]]:
    """The argument lists with which a script would call `python` and `torchrun`, as bash itself expands them.

    Nothing else can be called: the search path is empty. Files that it writes are thrown away.
    """
    with tempfile.TemporaryDirectory() as scratch:
        done = subprocess.run(
            ["/bin/bash", "--noprofile", "--norc", "-eu", "-c", _RECORD + script],
            env={"PATH": "/nowhere", **variables},
            cwd=scratch,
            capture_output=True,
            text=True,
            timeout=20,
        )
    assert done.returncode == 0, f"{script}\n{done.stderr}"
    return [part.split("\0")[:-1] for part in done.stdout.split("\1\0")[:-1]]
