"""The project's own recipes: where they are, and how `--cfg` and `_BASE_` find one by its name."""

import os
from pathlib import Path

from maskfeat.errors import UserError
from maskfeat.file_io import expand_path, local_path
from maskfeat.text import likeness

_PACKAGE = Path(__file__).resolve().parents[1]

INSTALLED = (_PACKAGE / "configs").is_dir()
"""Whether this is an installed package, which holds the recipes as its data, and not a checkout."""

CONFIG_ROOT = (_PACKAGE if INSTALLED else _PACKAGE.parent) / "configs"
"""The folder of the recipes. Any YAML may build on them, and their inert keys are not warned about."""

_BASES = "_base_"  # folders of YAMLs that are only built upon


def recipe_names() -> list[str]:
    """Return the names that `--cfg` accepts: paths below `CONFIG_ROOT` without `.yaml`, sorted."""
    paths = [path.relative_to(CONFIG_ROOT) for path in CONFIG_ROOT.rglob("*.yaml")]
    return sorted(path.with_suffix("").as_posix() for path in paths if _BASES not in path.parts)


def shipped_file(name: str | os.PathLike[str]) -> Path | None:
    """Return the YAML of this name in `CONFIG_ROOT`, or None.

    Args:
        name: a relative path below `CONFIG_ROOT`, with or without `.yaml` and with or without a leading `configs/`.
    """
    text = Path(name).as_posix().removeprefix("configs/")
    for candidate in (text, f"{text}.yaml"):
        path = CONFIG_ROOT / candidate
        if os.path.isfile(path) and path.resolve().is_relative_to(CONFIG_ROOT):
            return path.resolve()
    return None


def find_recipe(name: str | os.PathLike[str]) -> Path:
    """Return the YAML file that `--cfg` names.

    Args:
        name: the path of a YAML file, local or with a scheme that has a handler (`file_io.path_manager`), or the name
            of a recipe, such as `masked_ssl/in1k_VIT_B_MaskFeat_PT`. A file that exists at this path comes before a
            recipe of the same name.

    Raises:
        UserError: there is neither a file nor a recipe; the message lists the nearest recipes.
    """
    try:
        path = local_path(expand_path(os.fspath(name)))
    except UserError as error:
        raise UserError(f"config file {os.fspath(name)}: {error}") from None
    if os.path.isfile(path):
        return Path(path)
    shipped = shipped_file(name)
    if shipped is None:
        raise UserError(
            f"config file {os.fspath(name)} does not exist (or is not a file), and no recipe has this name; --cfg "
            f"takes the path of a YAML file or the name of a recipe; the nearest names are {', '.join(_nearest(name))}"
        )
    return shipped


def _nearest(name: str | os.PathLike[str]) -> list[str]:
    """Three recipes whose name, or the last part of it, is most like what was given."""
    given = os.fspath(name).removesuffix(".yaml").lower()[-200:]

    def nearness(recipe: str) -> float:
        return max(likeness(given, recipe), likeness(given.rpartition("/")[2], recipe.rpartition("/")[2]))

    return sorted(recipe_names(), key=nearness, reverse=True)[:3]
