"""The file of weights that `load_model` and the commands name: a path, an address, or a published name."""

import os
from pathlib import Path
from typing import Any, NamedTuple

from yacs.config import CfgNode

from maskfeat.analysis.published import PUBLISHED
from maskfeat.checkpoint.download import fetch, is_url
from maskfeat.checkpoint.files import read_verified_checkpoint
from maskfeat.checkpoint.reading import is_torchvision_name
from maskfeat.errors import UserError
from maskfeat.text import nearest


class Source(NamedTuple):
    """A file of weights.

    Attributes:
        path: of the file.
        content: of it, see `checkpoint.files.open_checkpoint`.
        cfg: what it is: what the caller gave, or the config of a published name; None = see the file.
        published: whether a published name was given.
    """

    path: str
    content: dict[str, Any]
    cfg: CfgNode | None
    published: bool


def read_source(source: str | Path, cfg: CfgNode | None = None) -> Source:
    """Read what `load_model` names.

    Args:
        source: as `load_model`.
        cfg: what the caller says that it is.

    Raises:
        UserError: there is no such file and no such name, or the file cannot be fetched or read.
    """
    given = os.fspath(source)
    exists = os.path.exists(given)
    entry = None if exists else PUBLISHED.get(given)
    if entry is not None:
        path = entry.path()
        return Source(path, read_verified_checkpoint(path), entry.config() if cfg is None else cfg, True)
    if not exists and "://" not in given and not is_torchvision_name(given):
        if os.sep in given or os.path.splitext(given)[1]:
            raise UserError(f"there is no file {given}")
        raise UserError(
            f"there is no file {given}, and nothing is published under this name; the nearest is "
            f"{nearest(given, PUBLISHED)!r} (maskfeat.list_models() lists all)"
        )
    newest = max(Path(given).glob("checkpoints/*.pyth"), key=os.path.getmtime, default=None) if exists else None
    if newest is not None:
        raise UserError(f"{given} is a folder, a file of weights is expected; the newest in it is {newest}")
    path = str(fetch(given)) if is_url(given) else given
    return Source(path, read_verified_checkpoint(path), cfg, False)
