"""How much the tests of this folder do, and where they note the figures they reach.

MASKFEAT_SOAK=1 (tools/soak.sh) asks for the full sizes, MASKFEAT_RELIABILITY names a file that collects the figures.
"""

import os
from pathlib import Path

SOAK = os.environ.get("MASKFEAT_SOAK") == "1"


def size(quick: int, full: int) -> int:
    """How often to try: `quick` in CI, `full` in a soak."""
    return full if SOAK else quick


def note(promise: int, figure: str) -> None:
    """Note what was reached for a promise (its number in docs/reliability.md): one line."""
    line = f"{promise:2d}  {figure}\n"
    print(line, end="")
    collected = os.environ.get("MASKFEAT_RELIABILITY")
    if collected:
        with Path(collected).open("a", encoding="utf-8") as file:
            file.write(line)
