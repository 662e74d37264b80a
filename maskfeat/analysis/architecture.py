"""Which network the weights in a file belong to: by the config that the file carries, else by names and shapes."""

import math
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from yacs.config import CfgNode

from maskfeat.analysis.foreign import BACKBONE, CLASSIFIER, PRETRAINED, Guess, guess, holds_no_head
from maskfeat.analysis.shapes import shapes_in
from maskfeat.build import build_backbone, build_objective
from maskfeat.checkpoint.names import renamed
from maskfeat.checkpoint.reading import KIND, saved_entries
from maskfeat.checkpoint.weights import LoadRules
from maskfeat.config import load_config, validate
from maskfeat.config.merge import merge_entries
from maskfeat.config.schema import is_inert, schema
from maskfeat.config.yaml_io import Entry
from maskfeat.errors import UserError
from maskfeat.models.base import Backbone
from maskfeat.models.heads import token_norm
from maskfeat.objectives.base import Objective
from maskfeat.registry import lookup, objective_spec

_KNOWN = (
    "ViT and MViTv2 under PySlowFast's names (MaskFeat, classifiers, MAE on clips), ViT of timm, MAE and MFM, ResNet "
    "of torchvision and MFM, and checkpoints of maskfeat"
)


class Recognised(NamedTuple):
    """The network of a file.

    Attributes:
        cfg: frozen; see `build_recognised`.
        writer: what wrote the file, in words.
        kind: "classifier", "pre-trained" (with the head of its pre-training) or "backbone" (with neither).
        recipe: the recipe that `cfg` is made of; "" where the file carries its own config or the caller gave one.
        changed: the keys in which `cfg` differs from it, with their values.
        notes: what neither config, names nor shapes show and is therefore assumed, one sentence each.
        norm: of the kind "backbone", whether the file has a final norm.
    """

    cfg: CfgNode
    writer: str
    kind: str
    recipe: str = ""
    changed: Mapping[str, Any] = {}  # noqa: RUF012  # never changed
    notes: tuple[str, ...] = ()
    norm: bool = True


class Encoder(Objective):
    """A backbone with its final norm, of files that hold no head that is known here: it gives features and no loss.

    Args:
        backbone: any.
        norm: whether the file has a final norm.
        mean_pooling: whether that norm is of averaged tokens.
    """

    def __init__(self, backbone: Backbone, norm: bool, mean_pooling: bool) -> None:
        super().__init__()
        self.backbone, self.mean_pooling = backbone, mean_pooling
        self.norm = token_norm(backbone) if norm else nn.Identity()

    def renamed_state(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return renamed(state, lambda name: name.removeprefix("fc_") if name.startswith("fc_norm.") else name)

    def load_rules(self, state: Mapping[str, Tensor]) -> LoadRules:
        return LoadRules(dropped=("decoder*", "mask_token", "pred_head.*", "hogs.*"))


def recognise(content: Mapping[str, Any], cfg: CfgNode | None = None) -> Recognised:
    """Return which network the weights in a file belong to.

    Args:
        content: of the file.
        cfg: what the caller says that it is; None = see the file.

    Raises:
        UserError: the file has no parameters, its own config is not valid here, or nobody knows the network; lists what
            was found.
    """
    entries = saved_entries(content)
    if cfg is not None or entries:
        own = _own_config(entries) if cfg is None else cfg
        if _has_no_head(content, entries):
            return _backbone(own, _writer(entries), content)
        return Recognised(own, _writer(entries), _kind(own))
    found = guess(content)
    if found is None:
        raise UserError(_unknown(content))
    return _from_guess(found, content)


def _has_no_head(content: Mapping[str, Any], entries: Mapping[str, Entry]) -> bool:
    """Return whether a file holds a backbone alone, with or without its final norm."""
    return content.get(KIND) == BACKBONE if entries else holds_no_head(content)


def _backbone(cfg: CfgNode, writer: str, content: Mapping[str, Any]) -> Recognised:
    """Return the backbone of a config, with the final norm that the file has."""
    shapes = shapes_in(content)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MVIT.USE_MEAN_POOLING = shapes.have("fc_norm.")
    cfg.freeze()
    return Recognised(cfg, writer, BACKBONE, norm=shapes.have("norm.", "fc_norm."))


def build_recognised(found: Recognised) -> Objective:
    """Return the network, with random weights: a float32 module on the CPU."""
    if found.kind == BACKBONE:
        return Encoder(build_backbone(found.cfg), found.norm, found.cfg.MVIT.USE_MEAN_POOLING)
    return build_objective(found.cfg)


def _from_guess(found: Guess, content: Mapping[str, Any]) -> Recognised:
    base = load_config(found.recipe)
    changed = {key: value for key, value in found.keys.items() if lookup(base, key) != value}
    cfg = load_config(found.recipe, [part for pair in changed.items() for part in pair])
    norm = shapes_in(content).have("norm.", "fc_norm.")
    return Recognised(cfg, found.writer, found.kind, found.recipe, changed, tuple(found.notes), norm)


def _unknown(content: Mapping[str, Any]) -> str:
    """Return what a file holds whose network nobody knows."""
    shapes = shapes_in(content)
    shown = ", ".join(f"{name} {tuple(shape)}" for name, shape in list(shapes.items())[:6])
    return (
        f"its network is not known: {len(shapes)} tensors of {sum(map(math.prod, shapes.values())):,} numbers in all: "
        f"{shown}, ...; known are {_KNOWN}. Another network needs its recipe (cfg, --cfg)"
    )


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
