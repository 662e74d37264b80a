"""A config as text for people: whole, key by key, or what differs from the defaults."""

from pathlib import Path

import yaml
from yacs.config import CfgNode

from maskfeat.config import dump_config
from maskfeat.config.schema import is_inert, schema
from maskfeat.config.yaml_io import parse_entries

HOW = ("yaml", "keys", "diff")


def flat(cfg: CfgNode) -> dict[str, object]:
    """Return the values of a config by their full keys, as its YAML has them."""
    return {key: entry.value for key, entry in parse_entries(dump_config(cfg), Path("the config")).items()}


def differences(cfg: CfgNode, base: CfgNode) -> dict[str, tuple[object, object]]:
    """Return the keys whose values in `cfg` and `base` differ, with both; None where `base` lacks the key."""
    mine, theirs = flat(cfg), flat(base)
    return {key: (value, theirs.get(key)) for key, value in mine.items() if value != theirs.get(key)}


def plain(value: object) -> str:
    """Return a value as YAML in one line."""
    text = yaml.safe_dump([value], default_flow_style=True, width=float("inf"))
    return text.strip()[1:-1]


def shown(cfg: CfgNode, how: str, recipe: CfgNode | None = None) -> str:
    """Return a config as text, which is YAML in every form, and may be given as --cfg.

    Args:
        how: "yaml", as OUTPUT_DIR/config.yaml has it; "keys", one in each line; "diff", those whose values are not the
            defaults, with these as comments.
        recipe: the config without overrides; what differs from it is marked in a "diff". None = not known.
    """
    if how == "yaml":
        return dump_config(cfg)
    if how == "keys":
        return "".join(f"{key}: {plain(value)}\n" for key, value in flat(cfg).items())
    overridden = set() if recipe is None else set(differences(cfg, recipe))
    lines = [] if not cfg.PLUGINS else [f"PLUGINS: {plain(list(cfg.PLUGINS))}\n"]
    for key, (value, default) in differences(cfg, schema(cfg.PLUGINS).defaults).items():
        if key != "PLUGINS":
            by = ", not the recipe's" if key in overridden else ""
            was = "without effect" if is_inert(key) else f"default {plain(default)}"
            lines.append(f"{key}: {plain(value)}  # {was}{by}\n")
    return "".join(lines)
