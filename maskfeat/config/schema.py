"""Every key that a config may hold, with its default and its rules: the shared ones and those of registered specs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from yacs.config import CfgNode

from maskfeat.config.coerce import is_kind
from maskfeat.config.defaults import INERT_KEYS, INERT_SECTIONS, KINDS, shared_defaults
from maskfeat.config.ranges import CHOICES, LENGTHS, RANGES
from maskfeat.errors import UserError
from maskfeat.registry import Registered, Rules, Spec, load, lookup
from maskfeat.text import matches

V = TypeVar("V")


@dataclass(frozen=True)
class Schema:
    """What a config may hold.

    Attributes:
        defaults: a fresh config, not frozen.
        known: every effective key and its default.
        rules: of all keys; `kinds` names that of every effective key.
        declared_by: the function `keys` of a spec that declares a key; shared keys are not in it.
    """

    defaults: CfgNode
    known: Mapping[str, object]
    rules: Rules
    declared_by: Mapping[str, Callable[[CfgNode], None]]


def full_keys(cfg: CfgNode, prefix: str = "") -> Iterator[str]:
    """Yield the full names of all values in a config: "TRAIN.BATCH_SIZE", ..."""
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            yield from full_keys(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def is_inert(key: str) -> bool:
    """Return whether a key belongs to PySlowFast's other models or tools: it is accepted and kept, without effect."""
    in_section = any(key.startswith(f"{section}.") for section in INERT_SECTIONS)
    return in_section or matches(key, INERT_KEYS)


def schema(plugins: Sequence[str] = ()) -> Schema:
    """Return the keys of the package and of these plugins.

    Raises:
        UserError: a plugin cannot be used, see `maskfeat.registry.load`; or it changes a key that exists, or its
            rules name a key that does not.
    """
    registered = load(plugins)
    specs = registered.specs
    cfg = shared_defaults()
    cfg.PLUGINS = list(plugins)
    declared_by: dict[str, Callable[[CfgNode], None]] = {}
    for spec in specs:
        if spec.keys is not None and spec.keys not in declared_by.values():  # specs of one file may share a section
            before = set(full_keys(cfg))
            _add_keys(cfg, spec.keys, spec)
            declared_by.update(dict.fromkeys(set(full_keys(cfg)) - before, spec.keys))
    known = {key: lookup(cfg, key) for key in full_keys(cfg)}
    for spec in specs:
        _check_rules(spec, known)
    kinds = {key: type(default).__name__ for key, default in known.items()} | KINDS
    rules = Rules(
        kinds=_merged(kinds, *(spec.kinds for spec in specs)),
        choices=_merged(CHOICES, _names(registered), *(spec.choices for spec in specs)),
        ranges=_merged(RANGES, *(spec.ranges for spec in specs)),
        lengths=_merged(LENGTHS, *(spec.lengths for spec in specs)),
    )
    return Schema(cfg, known, rules, declared_by)


def _merged(*tables: Mapping[str, V]) -> dict[str, V]:
    return {key: value for table in tables for key, value in table.items()}


def get_defaults(plugins: Sequence[str] = ()) -> CfgNode:
    """Return a fresh config that holds every effective key at its default, not frozen."""
    return schema(plugins).defaults


def _names(registered: Registered) -> dict[str, tuple[object, ...]]:
    """Return the choices of the keys that choose an objective and a backbone."""
    losses = dict.fromkeys(loss for objective in registered.objectives.values() for loss in objective.losses)
    return {
        "MODEL.ARCH": tuple(registered.backbones),
        "MODEL.MODEL_NAME": tuple(registered.objectives),
        "MODEL.LOSS_FUNC": tuple(losses),
    }


def _add_keys(cfg: CfgNode, keys: Callable[[CfgNode], None], spec: Spec) -> None:
    """Call `spec.keys`, which may add keys whose type is known, and change none."""
    before = {key: lookup(cfg, key) for key in full_keys(cfg)}
    keys(cfg)
    after = {key: lookup(cfg, key) for key in full_keys(cfg)}
    changed = [key for key, value in before.items() if key not in after or after[key] != value]
    if changed:
        raise UserError(
            f"PLUGINS: {spec.module} sets {', '.join(changed)}, which other code has declared; `keys` of "
            f"{spec.name!r} may only add keys"
        )
    for key, default in after.items():
        if key not in before and not is_kind(spec.kinds.get(key, type(default).__name__)):
            raise UserError(
                f"PLUGINS: {spec.module}: the default {default!r} of {key} does not show its type; give it in `kinds` "
                f"of {spec.name!r}, such as 'list[int]' or 'float or None'"
            )


def _check_rules(spec: Spec, known: Mapping[str, object]) -> None:
    names = ("kinds", "choices", "ranges", "lengths", "architecture", "initial")
    for name, table in ((name, getattr(spec, name)) for name in names):
        missing = [key for key in table if key not in known and not is_inert(key)]
        if missing:
            raise UserError(
                f"PLUGINS: {spec.module}: `{name}` of {spec.name!r} has rules for {', '.join(missing)}, which is no key"
            )
