"""Which network the weights in a file belong to: by the config that the file carries, else by names and shapes."""

import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from yacs.config import CfgNode

from maskfeat.checkpoint.reading import model_state, saved_entries
from maskfeat.config import validate
from maskfeat.config.merge import merge_entries
from maskfeat.config.schema import is_inert, schema
from maskfeat.config.yaml_io import Entry
from maskfeat.errors import UserError
from maskfeat.registry import objective_spec

CLASSIFIER, PRETRAINED, BACKBONE = "classifier", "pre-trained", "backbone"
"""Kinds of files: a network that classifies, one with the head of its pre-training, and one with neither."""


class Recognised(NamedTuple):
    """The network of a file.

    Attributes:
        cfg: frozen; `build_objective` makes the network of it, and for the kind "backbone" `build_backbone` its part.
        writer: what wrote the file, in words.
        kind: "classifier", "pre-trained" or "backbone".
        recipe: the recipe that `cfg` is made of; "" where the file carries its own config or the caller gave one.
        notes: what neither config, names nor shapes show and is therefore assumed, one sentence each.
    """

    cfg: CfgNode
    writer: str
    kind: str
    recipe: str = ""
    notes: tuple[str, ...] = ()


def recognise(content: Mapping[str, Any], cfg: CfgNode | None = None) -> Recognised:
    """Return which network the weights in a file belong to.

    Args:
        content: of the file.
        cfg: what the caller says that it is; None = see the file.

    Raises:
        UserError: the file has no parameters, its own config is not valid here, or nobody knows the network; lists what
            was found.
    """
    model_state(content)
    entries = saved_entries(content)
    if cfg is not None:
        return Recognised(cfg, _writer(entries), _kind(cfg))
    if entries:
        own = _own_config(entries)
        return Recognised(own, _writer(entries), _kind(own))
    raise UserError("the file carries no config")


def _kind(cfg: CfgNode) -> str:
    return CLASSIFIER if objective_spec(cfg).classifies else PRETRAINED


def _writer(entries: Mapping[str, Entry]) -> str:
    if not entries:
        return "unknown"
    return "maskfeat" if "TRAIN.MICRO_BATCH_SIZE" in entries else "PySlowFast"


def _own_config(entries: Mapping[str, Entry]) -> CfgNode:
    """Return the config of these entries, without keys that this version does not know.

    Modules that a file names are not imported for its sake: who has imported a plugin may load its files.
    """
    plugins = entries["PLUGINS"].value if "PLUGINS" in entries else []
    names = [str(name) for name in (plugins if isinstance(plugins, list) else [plugins])]
    missing = [name for name in names if name not in sys.modules]
    if missing:
        raise UserError(
            f"the config in the file has PLUGINS {', '.join(missing)}, which a file may not import: import them first, "
            "or give the recipe (cfg, --cfg)"
        )
    allowed = schema(names)
    cfg = allowed.defaults
    merge_entries(cfg, {key: entry for key, entry in entries.items() if key in allowed.known or is_inert(key)}, allowed)
    try:
        validate(cfg)
    except UserError as error:
        raise UserError(f"the config in the file is not valid here, give the recipe (cfg, --cfg): {error}") from error
    cfg.freeze()
    return cfg
