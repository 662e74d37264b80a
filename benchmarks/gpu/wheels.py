"""Installs the packages that a bare machine lacks from a folder of wheels."""

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def required() -> list[str]:
    """Return the packages that setup.py requires, without versions."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    (listed,) = (
        node.value for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == "install_requires"
    )
    return [re.split(r"[<>=!~;\[ ]", text, maxsplit=1)[0] for text in ast.literal_eval(listed)]


def missing() -> list[str]:
    """Return those of `required` that are not installed in any version."""
    found = []
    for name in required():
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found.append(name)
    return found


def install_missing(folder: Path) -> dict[str, str]:
    """Install what is missing from a folder of wheels, without network; installed packages stay as they are.

    Returns:
        what became of each missing package: "installed", or the last line that pip said.
    """
    outcome = {}
    for name in missing():
        done = subprocess.run(
            [sys.executable, "-m", "pip", "install", "--no-index", "--find-links", str(folder), name],
            # Some systems guard their Python against pip; whoever gives --wheels wants it to be written to.
            env={**os.environ, "PIP_BREAK_SYSTEM_PACKAGES": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
            capture_output=True,
            text=True,
        )
        said = (done.stderr.strip() or done.stdout.strip() or "pip said nothing").splitlines()
        outcome[name] = "installed" if done.returncode == 0 else said[-1]
    return outcome
