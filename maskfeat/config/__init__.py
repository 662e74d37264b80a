"""Load configs: defaults <- `_BASE_` files <- the YAML <- overrides, validated as a whole, then frozen."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from yacs.config import CfgNode

from maskfeat.config.coerce import coerce
from maskfeat.config.defaults import KINDS
from maskfeat.config.merge import expand_paths, merge_entries, override_entries
from maskfeat.config.recipes import find_recipe
from maskfeat.config.schema import Schema, get_defaults, schema
from maskfeat.config.validate import validate
from maskfeat.config.yaml_io import WRITTEN, Entry, read_chain
from maskfeat.errors import UserError, naming
from maskfeat.file_io import replace_text, unexpanded_path
from maskfeat.registry import lookup
from maskfeat.text import count, some

__all__ = ["dump_config", "get_defaults", "load_config", "save_config", "validate"]

logger = logging.getLogger("maskfeat.config")

_NAMED = 3  # keys without effect that the warning about them names


def load_config(
    path: str | Path | None, opts: Sequence[object] = (), started: Mapping[str, int] | None = None
) -> CfgNode:
    """Load a YAML and overrides into a frozen config.

    Args:
        path: the YAML file, or the name of a recipe (see `find_recipe`); None = the defaults.
        opts: KEY, VALUE, KEY, VALUE, ... as text (as from a command line) or as Python values.
        started: numbers of machines and processes by key, where a launcher (torchrun, srun) started them. They replace
            those of the YAML but not those of `opts`; a 0 (NUM_GPUS on the CPU) is kept.

    Returns:
        every effective key in its own type, and the inert keys that were given. Inert keys (of PySlowFast's other
        models) are listed in one warning, unless they come from one of the project's own recipes.

    Raises:
        UserError: a file, key or value is not valid, or values contradict one another. The message says what was
            given, what was expected, and which key to change.
    """
    layers = [] if path is None else read_chain(path)
    overrides = override_entries(opts)
    allowed = _schema([*layers, overrides])
    cfg = allowed.defaults
    inert: dict[str, None] = {}
    for entries in layers:
        inert.update(dict.fromkeys(merge_entries(cfg, entries, allowed)))
    counted = {key: Entry(value, None, "launch") for key, value in (started or {}).items() if cfg[key]}
    for entries in (counted, overrides):
        inert.update(dict.fromkeys(merge_entries(cfg, entries, allowed)))
    expand_paths(cfg, [*layers, overrides], allowed)
    if inert:
        _name_inert(list(inert))
    validate(cfg)
    cfg.freeze()
    return cfg


def _name_inert(keys: Sequence[str]) -> None:
    logger.warning(
        "%s of PySlowFast's other models and tools, without effect here: %s",
        count(len(keys), "key"),
        some(keys, _NAMED),
    )
    logger.debug("keys without effect: %s", ", ".join(keys))


def _schema(layers: Sequence[Mapping[str, Entry]]) -> Schema:
    """Return the keys that may be given, with those of PLUGINS in the last of these layers that has it."""
    given = [entries["PLUGINS"] for entries in layers if "PLUGINS" in entries]
    if not given:
        return schema()
    names = coerce("PLUGINS", given[-1], KINDS["PLUGINS"], [])
    assert isinstance(names, list)
    try:
        return schema(names)
    except UserError as error:
        raise UserError(f"{given[-1].where}: {error}") from error


def dump_config(cfg: CfgNode) -> str:
    """Return the whole config as YAML text, which `load_config` (and yacs) reads back to the same values."""
    written = cfg.clone()
    written.defrost()
    for key, kind in schema(cfg.PLUGINS).rules.kinds.items():
        *sections, name = key.split(".")
        node = lookup(written, ".".join(sections)) if sections else written
        if kind == "path":
            node[name] = unexpanded_path(node[name])
        elif kind == "list[source]":
            node[name] = [[unexpanded_path(path), weight] for path, weight in node[name]]
    return WRITTEN + str(written.dump(default_flow_style=None, sort_keys=True, width=100))


def save_config(path: str | Path | None, opts: Sequence[object], cfg: CfgNode, output_dir: str | Path) -> None:
    """Write `config_given.yaml` (the YAML as given, with the overrides as comments at its end) and `config.yaml` (the
    resolved config).

    Args:
        path: the YAML or the name of a recipe that was given, or None.
        opts: the overrides that were given.
        cfg: the config that `load_config` returned for them.
        output_dir: the folder; created if it does not exist.
    """
    folder = Path(output_dir)
    given = "" if not path else find_recipe(path).read_text(encoding="utf-8-sig")
    if given and not given.endswith("\n"):
        given += "\n"
    for key, entry in override_entries(opts).items():  # as JSON: one line, whatever the value holds
        given += f"# override: {json.dumps([key, entry.value], default=str)}\n"
    with naming(f"OUTPUT_DIR {folder} cannot be written"):
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(folder / "config_given.yaml", given)
        replace_text(folder / "config.yaml", dump_config(cfg))
