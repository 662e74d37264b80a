"""What differs between the config that a checkpoint carries and that of this run, and what each difference does."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from maskfeat.checkpoint.reading import saved_entries, trained_model
from maskfeat.config.coerce import coerce
from maskfeat.config.ranges import lookup
from maskfeat.config.schema import schema
from maskfeat.errors import UserError
from maskfeat.registry import Spec, backbone_spec, dataset_spec, load, objective_spec

logger = logging.getLogger(__name__)

NOW, REFUSED = "takes effect", "refused"

_UNSAID = ("OUTPUT_DIR", "SHARD_ID")  # where the checkpoint lies is said beside it, and each machine has its number
# Read for every backbone, although one declares it.
_SHARED = ("MVIT.ZERO_DECAY_POS_CLS",)
# Other ones would sort the parameters into other groups than those of the optimizer's state.
_GROUPS = ("SOLVER.ZERO_WD_1D_PARAM", *_SHARED)
_NEVER = ("MODEL.MODEL_NAME", "SOLVER.OPTIMIZING_METHOD", *_GROUPS)
_STARTING = ("FILE_PATH", "TYPE", "INFLATE", "EPOCH_RESET", "AVERAGE", "CLEAR_NAME_PATTERN", "ALLOW")
_GOES_WITH = {
    "SOLVER.BETAS": ("SOLVER.OPTIMIZING_METHOD", "adamw"),
    **dict.fromkeys(
        ("SOLVER.MOMENTUM", "SOLVER.DAMPENING", "SOLVER.NESTEROV"),
        ("SOLVER.OPTIMIZING_METHOD", "sgd"),
    ),
    **dict.fromkeys(("SOLVER.COSINE_END_LR", "SOLVER.COSINE_AFTER_WARMUP"), ("SOLVER.LR_POLICY", "cosine")),
    **dict.fromkeys(("SOLVER.STEPS", "SOLVER.LRS"), ("SOLVER.LR_POLICY", "steps_with_relative_lrs")),
}
"""Keys that have an effect only where another one has a value."""
_WITHOUT_EFFECT = ("SOLVER.GAMMA", "TRAIN.CHECKPOINT_TYPE", "TEST.CHECKPOINT_TYPE")
_OF_TRAINING = ("SOLVER.", "AUG.", "RNG_SEED", "TRAIN.BATCH_SIZE", "TRAIN.MICRO_BATCH_SIZE")
"""Beside the keys that the objective declares."""

RESIZABLE = ("DATA.TRAIN_CROP_SIZE", "DATA.NUM_FRAMES")
"""Keys of the architecture to which weights are resized."""
_INPUTS = (
    "DATA.MEAN",
    "DATA.STD",
    "DATA.SAMPLING_RATE",
    "DATA.TARGET_FPS",
    "DATA.SEGMENT_SAMPLING",
    "DATA.DECODER_SCALE",
    "DATA.IN_VAL_CROP_RATIO",
    *RESIZABLE,
)


@dataclass(frozen=True)
class Change:
    """A key whose value in a checkpoint's config is another one than in this run."""

    key: str
    was: object
    now: object

    def __str__(self) -> str:
        return f"{self.key} was {self.was!r} and is {self.now!r}"


def listed(changes: Iterable[Change]) -> str:
    """Return changes as part of a sentence."""
    return "; ".join(map(str, changes))


def find_changes(content: Mapping[str, Any], cfg: CfgNode) -> list[Change]:
    """Return the keys of this run's schema whose values differ from those in a checkpoint's `cfg`.

    Keys that the checkpoint does not have, because it is older or of another program, are left out.
    """
    allowed, entries = schema(cfg.PLUGINS), saved_entries(content)
    found = []
    for key, default in allowed.known.items():
        if key not in entries:
            continue
        try:
            was = coerce(key, entries[key], allowed.rules.kinds[key], default)
        except UserError:  # of a type that this key does not have any more
            was = entries[key].value
        change = Change(key, was, lookup(cfg, key))
        if not _same(change, cfg):
            found.append(change)
    return found


def _same(change: Change, cfg: CfgNode) -> bool:
    """Whether both values mean the same."""
    key, was, now = change.key, change.was, change.now
    if key == "MODEL.ARCH":
        backbones = load(cfg.PLUGINS).backbones
        return backbones.get(str(was)) is backbones[str(now)]
    if key in ("TRAIN.DATASET", "TEST.DATASET"):
        return str(was).lower() == str(now).lower()
    if key == "MVIT.POOL_KV_STRIDE" and cfg.MVIT.POOL_KV_STRIDE_ADAPTIVE is not None:
        return True  # it follows from the other key, and PySlowFast writes it into its files
    return (list(was) if isinstance(was, tuple) else was) == (list(now) if isinstance(now, tuple) else now)


class _Roles:
    """Which keys do what in a run with this config."""

    def __init__(self, cfg: CfgNode) -> None:
        used: list[Spec] = [backbone_spec(cfg), objective_spec(cfg)]
        used += [dataset_spec(cfg, section) for section in ("TRAIN", "TEST")]
        functions = [spec.keys for spec in used]
        declared = schema(cfg.PLUGINS).declared_by.items()
        self.unused = {key for key, function in declared if function not in functions} - set(_SHARED)
        self.architecture = {"MODEL.ARCH", *(key for spec in used for key in spec.architecture)} - self.unused
        self.initial = {key for spec in used for key in spec.initial}
        self.objective = {key for key, function in declared if function is objective_spec(cfg).keys}


def _effect(change: Change, cfg: CfgNode, roles: _Roles, own: bool, finished: bool) -> str:
    """Return what a changed key does in a run that resumes: NOW, REFUSED, or a few words; arguments as `announce`."""
    key = change.key
    if key in roles.unused:
        return "no effect: of another model or data set"
    if key in _WITHOUT_EFFECT:
        return "no effect"
    needs, value = _GOES_WITH.get(key, ("", ""))
    if needs and lookup(cfg, needs) != value:
        return f"no effect: only with {needs} {value}"
    if own and key in [f"TRAIN.CHECKPOINT_{name}" for name in _STARTING]:
        return "no effect: the run resumes from its own checkpoint; with another OUTPUT_DIR it starts from that file"
    if key in roles.initial:
        return "no effect: only initial weights depend on it"
    if key in roles.architecture or key in _NEVER:
        return REFUSED
    if key == "SOLVER.LAYER_DECAY" and 1.0 in (change.was, change.now):
        return REFUSED  # without it there are other parameter groups
    if finished and (key in roles.objective or key.startswith(_OF_TRAINING)):
        return "no effect: nothing is left to train"
    if key == "RNG_SEED":
        return "from here on: order of samples, augmentation, masks; the initial weights came from the former seed"
    if key == "TRAIN.EMA" and not change.now:
        return "takes effect: the average that the checkpoint holds is not continued"
    if key == "TRAIN.EMA" and not change.was:
        return "takes effect: the average begins with the weights of the checkpoint"
    return NOW


def effects(
    changes: Iterable[Change], cfg: CfgNode, own: bool = True, finished: bool = False
) -> list[tuple[Change, str]]:
    """Return what each changed key does in a run that resumes; arguments as `announce`."""
    roles = _Roles(cfg)
    return [(c, _effect(c, cfg, roles, own, finished)) for c in changes if c.key not in _UNSAID]


def announce(path: str | Path, content: Mapping[str, Any], cfg: CfgNode, own: bool, finished: bool) -> None:
    """Log what changed since the checkpoint that a run resumes from: a table of key, values and effect.

    Args:
        own: whether the checkpoint lies in OUTPUT_DIR; otherwise TRAIN.CHECKPOINT_FILE_PATH names it.
        finished: whether nothing is left to train.

    Raises:
        UserError: a key changed with whose value the run cannot go on.
    """
    table = effects(find_changes(content, cfg), cfg, own, finished)
    refused = [change for change, effect in table if effect == REFUSED]
    if refused:
        other = f"start a new run in another OUTPUT_DIR than {cfg.OUTPUT_DIR}"
        if not own:
            other = "load its weights alone, TRAIN.CHECKPOINT_EPOCH_RESET True"
        raise UserError(f"{path} cannot be resumed with this config: {listed(refused)}. Restore that, or {other}")
    if table:
        rows = [("key", "was", "is", "effect")]
        rows += [(change.key, repr(change.was), repr(change.now), effect) for change, effect in table]
        wide = [min(max(len(row[i]) for row in rows), 32) for i in range(3)]
        lines = [
            "  " + "  ".join(f"{text:<{width}}" for text, width in zip(row, (*wide, 0), strict=True)) for row in rows
        ]
        logger.info("the config changed since %s was written:\n%s", path, "\n".join(lines))


def built_differently(content: Mapping[str, Any], cfg: CfgNode) -> list[Change]:
    """Return the changed keys that say which network weights belong to, of the parts that both runs have.

    Where the backbone is another one, that alone is returned.
    """
    before = load(cfg.PLUGINS).objectives.get(trained_model(content) or "")
    own = objective_spec(cfg).architecture
    apart = set(own) - set(before.architecture if before else ())
    roles = _Roles(cfg)
    found = [c for c in find_changes(content, cfg) if c.key in roles.architecture and c.key not in apart]
    return [c for c in found if c.key == "MODEL.ARCH"] or found


def seen_differently(content: Mapping[str, Any], cfg: CfgNode) -> list[Change]:
    """Return the changed keys that say what a network is shown in evaluation."""
    return [change for change in find_changes(content, cfg) if change.key in _INPUTS]
