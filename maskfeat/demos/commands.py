"""The commands that the demos show: those that a user of this installation would type."""

import shlex
from collections.abc import Sequence

from maskfeat.config.recipes import INSTALLED


def program(command: str, script: str) -> list[str]:
    """Return how a program is started: a sub-command of `maskfeat`, or a script of tools/ in a checkout."""
    return ["maskfeat", command] if INSTALLED else ["python", f"tools/{script}"]


def train_command(recipe: str, opts: Sequence[str]) -> str:
    """Return the command that runs a recipe.

    Args:
        recipe: a path below configs/, such as "quickstart/images_pt.yaml".
        opts: KEY VALUE overrides.
    """
    name = recipe.removesuffix(".yaml") if INSTALLED else f"configs/{recipe}"
    return shlex.join([*program("train", "run_net.py"), "--cfg", name, *opts])
