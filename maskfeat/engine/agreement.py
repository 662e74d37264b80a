"""That all processes of a run were given the same: their configs, and the samples of each split.

Machines may read their own copies of data and config. Where one copy lacks a class folder, labels differ without any
error; where one is shorter, processes make different numbers of steps and wait for one another until HANG_MINUTES.
"""

import hashlib
import platform
from collections.abc import Mapping

from yacs.config import CfgNode

from maskfeat.config.schema import schema
from maskfeat.config.show import flat
from maskfeat.data.loader import BatchLoader
from maskfeat.distributed.collectives import all_gather_object, world_size
from maskfeat.errors import UserError
from maskfeat.text import some

_SHOWN = 3  # differences
_OWN = ("SHARD_ID", "NUM_GPUS", "DATA_LOADER.NUM_WORKERS", "DATA_LOADER.PIN_MEMORY", "LOG_MODEL_INFO", "DATA.SOURCES")
"""Keys that may differ between machines, beside those of the section LOG and paths."""


def check_same_config(cfg: CfgNode) -> None:
    """Check that all processes have the same config, but for paths and what concerns one machine; collective.

    Raises:
        UserError: on every rank.
    """
    if world_size() == 1:
        return
    kinds = schema(cfg.PLUGINS).rules.kinds
    shared = {
        key: value
        for key, value in flat(cfg).items()
        if key not in _OWN and not key.startswith("LOG.") and kinds.get(key) != "path"
    }
    _check_same("config", shared, "start every machine with the same command")


def check_same_samples(split: str, loader: BatchLoader | None) -> None:
    """Check that all processes have found the same number of samples, with the same labels; collective.

    Args:
        loader: of the split; None = this process has found none.

    Raises:
        UserError: on every rank.
    """
    if world_size() == 1:
        return
    found: dict[str, object] = {"samples": 0}
    if loader is not None:
        labels = hashlib.sha256(repr(list(loader.labels)).encode()).hexdigest()
        found = {
            "samples": len(loader.labels),
            "samples of a process in a step": loader.batch_size,
            **{f"class {name}": number for number, name in enumerate(loader.classes or ())},
            "labels, as a hash": labels[:12],
        }
    _check_same(f"samples of {split}", found, "complete the copies of the data set, see DATA.PATH_TO_DATA_DIR")


def _check_same(what: str, mine: Mapping[str, object], advice: str) -> None:
    """Compare what each rank has; `advice`: what mends a difference."""
    digests = all_gather_object(hashlib.sha256(repr(sorted(mine.items())).encode()).hexdigest())
    if len(set(digests)) == 1:
        return
    of_ranks = all_gather_object((platform.node(), dict(mine)))
    other = next(rank for rank, digest in enumerate(digests) if digest != digests[0])
    (host, first), (other_host, second) = of_ranks[0], of_ranks[other]
    names = [name for name in first | second if first.get(name) != second.get(name)]
    listed = some([f"{name} {first.get(name)!r} and {second.get(name)!r}" for name in names], _SHOWN, "; ")
    raise UserError(
        f"processes do not have the same {what}: rank 0 on {host} and rank {other} on {other_host} have "
        f"{listed}: {advice}"
    )
