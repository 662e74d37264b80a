"""The file of weights that `load_model` and the commands name: a path, an address, or a published name."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from torchvision.models import get_weight
from yacs.config import CfgNode

from maskfeat.analysis.foreign import SHOWN
from maskfeat.analysis.published import PUBLISHED, shown_by
from maskfeat.checkpoint.download import fetch, is_url
from maskfeat.checkpoint.files import read_verified_checkpoint
from maskfeat.checkpoint.reading import CLASSES, KIND, is_torchvision_name, model_state
from maskfeat.errors import UserError
from maskfeat.text import nearest

HUB_WEIGHTS, HUB_CONFIG = "model.safetensors", "config.json"
_MOST_WORDS = 1 << 24


class Source(NamedTuple):
    """A file of weights.

    Attributes:
        path: of the file.
        content: of it, see `checkpoint.files.open_checkpoint`.
        cfg: what it is: what the caller gave, or the config of a published name; None = see the file.
        about: what is said of it where a published name was given; "" = it was not.
    """

    path: str
    content: dict[str, Any]
    cfg: CfgNode | None
    about: str


def read_source(source: str | Path, cfg: CfgNode | None = None) -> Source:
    """Read what `load_model` names.

    Args:
        source: as `load_model`.
        cfg: what the caller says that it is.

    Raises:
        UserError: there is no such file and no such name, or the file cannot be fetched or read.
    """
    given = os.path.expanduser(os.fspath(source))
    exists = os.path.exists(given)
    entry = None if exists else PUBLISHED.get(given)
    if entry is not None:
        path = entry.path()
        return Source(path, read_verified_checkpoint(path), entry.config() if cfg is None else cfg, entry.about)
    if not exists and "://" not in given and not is_torchvision_name(given):
        if os.sep in given or os.path.splitext(given)[1]:
            raise UserError(f"there is no file {given}")
        raise UserError(
            f"there is no file {given}, and nothing is published under this name; the nearest is "
            f"{nearest(given, PUBLISHED)!r} (maskfeat.list_models() lists all)"
        )
    if (words := hub_words(Path(given))) is not None:
        state = model_state(read_verified_checkpoint(Path(given) / HUB_WEIGHTS))
        return Source(given, words | {"model_state": state}, cfg, "")
    newest = max(Path(given).glob("checkpoints/*.pyth"), key=os.path.getmtime, default=None) if exists else None
    if newest is not None:
        raise UserError(f"{given} is a folder, a file of weights is expected; the newest in it is {newest}")
    path = str(fetch(given)) if is_url(given) else given
    content = read_verified_checkpoint(path)
    if not exists and is_torchvision_name(given):
        content = {"model_state": model_state(content), SHOWN: shown_by(get_weight(given))}
    return Source(path, content, cfg, "")


def hub_words(folder: Path) -> dict[str, Any] | None:
    """Return config, kind and classes of a folder that `export --to hf` wrote, as a checkpoint has them; None for
    anything else.
    """
    words = folder / HUB_CONFIG
    if not (folder / HUB_WEIGHTS).is_file() or not words.is_file() or words.stat().st_size > _MOST_WORDS:
        return None
    try:
        said = json.loads(words.read_bytes())
    except (ValueError, RecursionError):
        return None
    if not isinstance(said, dict) or not isinstance(said.get("cfg"), str):
        return None
    return {name: said.get(name) for name in ("cfg", KIND, CLASSES)}
