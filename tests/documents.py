"""What the documents say: fenced blocks and the commands in them."""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
DOCUMENTS = (
    "README.md",
    "INSTALL.md",
    "GETTING_STARTED.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "SECURITY.md",
    "docs/PERFORMANCE.md",
    "docs/RELIABILITY.md",
    "docs/EVIDENCE.md",
)

_FENCE = re.compile(r"(?:<!-- test: (?P<mark>\w+) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)

# What stands for these programs prints its arguments instead, each with a NUL after it, commands apart by "\1\0".
_RECORDED = ("python", "torchrun", "bash")
_RECORD = "".join(f"{name}() {{ printf '%s\\0' {name} \"$@\" $'\\1'; }}\n" for name in _RECORDED)


def read(name: str) -> str:
    """A document of the repository."""
    return (REPO / name).read_text(encoding="utf-8")


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
