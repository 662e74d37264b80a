"""Log lines, `json_stats:` lines, TensorBoard, and metrics that are accumulated on the device."""

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import simplejson
import torch
from PIL import Image
from torch import Tensor

from maskfeat.distributed.collectives import all_gather_object, all_reduce_sum, world_size
from maskfeat.distributed.world import World
from maskfeat.engine.event_file import EventFile
from maskfeat.engine.log_handlers import LogFile, screen_handler
from maskfeat.engine.trackers import Trackers
from maskfeat.errors import UserFileError, naming
from maskfeat.report.run_log import LOG, STATS, WARNING, parse_stats

logger = logging.getLogger(__name__)


def setup_logging(world: World) -> None:
    """Log to the terminal; on ranks other than 0 only warnings, with their rank.

    A terminal shows no `json_stats:` lines. Where standard output is a file or a pipe, they are there for scripts.
    """
    root = logging.getLogger("maskfeat")
    while root.handlers:
        root.handlers.pop().close()
    root.propagate = False
    root.setLevel(logging.INFO)
    screen = screen_handler()
    screen.setLevel(logging.INFO if world.is_main else logging.WARNING)
    if screen.stream.isatty():
        screen.addFilter(lambda record: not hasattr(record, _FOR_SCRIPTS))
    _add_handler(screen, "" if world.is_main else f"[rank {world.rank}] ")


@contextmanager
def logged_to_file(output_dir: str | Path) -> Iterator[None]:
    """Log to OUTPUT_DIR/stdout.log as well, within the block: what a notebook does after a run is not of that run.

    Raises:
        OSError: it cannot be opened.
    """
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    file = LogFile(Path(output_dir) / LOG)
    _add_handler(file)
    try:
        yield
    finally:
        logging.getLogger("maskfeat").removeHandler(file)
        file.close()


class _Formatter(logging.Formatter):
    """Says of a warning that it is one; texts of errors do so themselves."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.kind = WARNING if record.levelno == logging.WARNING else ""
        return super().formatMessage(record)


def _add_handler(handler: logging.Handler, who: str = "") -> None:
    handler.setFormatter(_Formatter(f"[%(asctime)s] {who}%(kind)s%(message)s", datefmt="%m/%d %H:%M:%S"))
    logging.getLogger("maskfeat").addHandler(handler)


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


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return simplejson.RawJSON(f"{value:.8g}") if math.isfinite(value) else str(value)
    return value


_FOR_SCRIPTS = "for_scripts"  # attribute of their log records


def read_json_stats(log: Path, kind: str) -> list[dict[str, Any]]:
    """Return the entries of one kind ("train_iter", "val_epoch", "test_final") in a run's stdout.log, in order.

    Steps that a killed run repeated are there twice: the last entry of a step counts. Lines that a full disk or a kill
    cut short are left out, and a warning says how many.
    """
    entries, broken = [], 0
    for line in Path(log).read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            entry = parse_stats(line)
        except ValueError:
            broken += 1
            continue
        if entry is not None and entry["_type"] == kind:
            entries.append(entry)
    if broken:
        logger.warning("%s: %d damaged lines are left out", log, broken)
    return entries


def last_json_stats(log: Path, kind: str) -> dict[str, Any]:
    """Return the last entry of one kind.

    Raises:
        UserFileError: there is none.
    """
    with naming(f"{log} cannot be read"):
        entries = read_json_stats(log, kind)
    if not entries:
        raise UserFileError(f"{log} has no {kind} entry that can be read: delete {log.parent}, and run it again")
    return entries[-1]


class MetricsLog:
    """Write every entry as a readable line, as a `json_stats:` line for scripts, and to TensorBoard.

    Args:
        world: only rank 0 writes.
        tensorboard_dir: folder of the event files; None = no TensorBoard.
        trackers: of rank 0, which get every entry and picture as well; None = none.
    """

    def __init__(self, world: World, tensorboard_dir: Path | None, trackers: Trackers | None = None) -> None:
        self._trackers = trackers
        self._folder = tensorboard_dir if world.is_main else None
        self._events: EventFile | None = None

    def begin(self, first_step: int) -> None:
        """Say, before training, with which step it begins: TensorBoard hides points of an earlier run from there on."""
        if self._folder is not None:
            self._events = EventFile(self._folder, first_step)
        if self._trackers is not None:
            self._trackers.begin(resume=first_step > 0)

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
        logger.info(STATS + "%s", simplejson.dumps({"_type": kind, **plain}), extra={_FOR_SCRIPTS: True})
        if self._folder is not None:
            scalars = {f"{kind}/{name}": value for name, value in stats.items() if isinstance(value, int | float)}
            self._event_file(self._folder).add(scalars, step)
        if self._trackers is not None:
            self._trackers.write(kind, stats, step)

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        """Write an RGB picture to TensorBoard and the trackers."""
        if self._folder is not None:
            self._event_file(self._folder).add_picture(name, np.asarray(picture), step)
        if self._trackers is not None:
            self._trackers.picture(name, picture, step)

    def _event_file(self, folder: Path) -> EventFile:
        self._events = self._events or EventFile(folder)
        return self._events

    def close(self) -> None:
        """Close the event file and the trackers."""
        if self._events is not None:
            self._events.close()
        if self._trackers is not None:
            self._trackers.close()
