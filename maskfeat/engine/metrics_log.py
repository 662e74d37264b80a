"""Log lines, `json_stats:` lines, TensorBoard, and metrics that are accumulated on the device."""

import datetime
import logging
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import simplejson
import torch
from torch import Tensor

from maskfeat.distributed.collectives import all_gather_object, all_reduce_sum, world_size
from maskfeat.distributed.world import World

logger = logging.getLogger(__name__)


def setup_logging(output_dir: str | Path, world: World) -> None:
    """Log to the terminal and to OUTPUT_DIR/stdout.log on rank 0; on other ranks only warnings, with their rank."""
    root = logging.getLogger("maskfeat")
    root.handlers.clear()
    root.propagate = False
    root.setLevel(logging.INFO)
    who = "" if world.is_main else f"[rank {world.rank}] "
    form = logging.Formatter(f"[%(asctime)s] {who}%(message)s", datefmt="%m/%d %H:%M:%S")
    screen = logging.StreamHandler(sys.stdout)
    screen.setLevel(logging.INFO if world.is_main else logging.WARNING)
    screen.setFormatter(form)
    root.addHandler(screen)
    if world.is_main:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(Path(output_dir) / "stdout.log")
        file.setFormatter(form)
        root.addHandler(file)


class MetricWindow:
    """Accumulate scalars on the device. Only `read`, called a few times per epoch, synchronizes with it.

    `add` takes means over `weight` terms, and counts. `read` returns the means over all ranks since the last read, and
    the counts of one rank (all ranks count the same).
    """

    def __init__(self) -> None:
        self._means: list[str] = []
        self._counts: list[str] = []
        self._sums: Tensor | None = None

    def add(self, weight: Tensor, values: Mapping[str, Tensor], counts: Mapping[str, Tensor] | None = None) -> None:
        """Add means over `weight` terms (a scalar) and counts; all scalars on one device."""
        means, counted = list(values), list(counts or {})
        terms = torch.stack([v.detach().float().reshape(()) for v in values.values()]) * weight
        sums = torch.cat([terms, torch.stack([weight.float(), *(counts or {}).values()])]).double()
        if self._sums is None:
            self._means, self._counts, self._sums = means, counted, sums
            return
        assert (means, counted) == (self._means, self._counts), "metrics changed within a window"
        self._sums += sums

    def read(self, uneven: bool = False) -> dict[str, float]:
        """Return means and counts by name, empty where nothing was added, and start the next window.

        Args:
            uneven: whether some rank may have added nothing, as in evaluation; slower.
        """
        mine, self._sums = self._sums, None
        if uneven:
            shares = all_gather_object((self._means, self._counts, None if mine is None else mine.tolist()))
            filled = [share for share in shares if share[2] is not None]
            if not filled:
                return {}
            means, counts = filled[0][:2]
            total = [sum(parts) for parts in zip(*(share[2] for share in filled), strict=True)]
        elif mine is None:
            return {}
        else:
            means, counts, total = self._means, self._counts, all_reduce_sum(mine).tolist()
        weight, rest = total[len(means)], total[len(means) + 1 :]
        values = {name: value / weight if weight else math.nan for name, value in zip(means, total, strict=False)}
        return values | {name: value / world_size() for name, value in zip(counts, rest, strict=True)}


def format_eta(seconds: float) -> str:
    """Format seconds as h:mm:ss, with days where there are any."""
    return str(datetime.timedelta(seconds=int(seconds)))


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return simplejson.RawJSON(f"{value:.8g}") if math.isfinite(value) else str(value)
    return value


_STATS = "json_stats: "


def read_json_stats(log: Path, kind: str) -> list[dict[str, Any]]:
    """Return the entries of one kind ("train_iter", "val_epoch", "test_final") in a run's stdout.log, in order."""
    lines = log.read_text(encoding="utf-8").splitlines()
    entries = [simplejson.loads(line.split(_STATS, 1)[1]) for line in lines if _STATS in line]
    return [entry for entry in entries if entry["_type"] == kind]


class MetricsLog:
    """Write every entry as a readable line, as a `json_stats:` line for scripts, and to TensorBoard.

    Args:
        world: only rank 0 writes.
        tensorboard_dir: folder of the event files; None = no TensorBoard.
    """

    def __init__(self, world: World, tensorboard_dir: Path | None) -> None:
        self._writer: Any = None
        if world.is_main and tensorboard_dir:
            # Slow to import, and only one process of a run needs it.
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(tensorboard_dir))

    def write(self, kind: str, line: str, stats: Mapping[str, Any], step: int) -> None:
        """Write one entry.

        Args:
            kind: "train_iter", "val_epoch", "test_final".
            line: the readable line; "" = none.
            stats: values by name. "lr" is written in scientific notation.
            step: of TensorBoard's x axis.
        """
        if line:
            logger.info(line)
        plain = {name: _plain(value) for name, value in stats.items()}
        if "lr" in stats:
            plain["lr"] = simplejson.RawJSON(f"{stats['lr']:.5e}")
        logger.info(_STATS + "%s", simplejson.dumps({"_type": kind, **plain}))
        if self._writer is not None:
            for name, value in stats.items():
                if isinstance(value, int | float):
                    self._writer.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Flush and close the event file."""
        if self._writer is not None:
            self._writer.close()
