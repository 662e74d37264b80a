"""What a run's stdout.log says: its curves, results, warnings, and how often and how long it worked."""

import json
import math
import re
import time
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from maskfeat.errors import naming

LOG = "stdout.log"
STATS = "json_stats: "
"""Begins the entries for scripts: one JSON object a line."""

WARNING = "warning: "
"""Begins the text of a warning."""

TRAIN, VALIDATION, TEST = "train_iter", "val_epoch", "test_final"

_RECORD = re.compile(r"\[(\d\d/\d\d \d\d:\d\d:\d\d)\] (.*)")
_STARTED = re.compile(r"((?:commit|maskfeat) \S+), (PyTorch \S+), on (.+?)(?:, TASK (.*))?")
_MODEL = re.compile(r"\w+, [\d.]+ M parameters, on \d+ x .*")
_ENDED = re.compile(r"(stopped on [^;]+); (?:the same command|TRAIN\.AUTO_RESUME).*", re.S)
_WEIGHTS = re.compile(r"(?:averaged )?weights from .*", re.S)
_RESUMED = "resumed from "
_GOES_ON = ("NOT SAVED", "NOT KEPT: ", "NOT FINITE in validation: ", "CHECKPOINT PASSED OVER: ", "GOING BACK to ")
"""Begin the texts of errors after which a run goes on."""
_ENDS = ("error: ", "HANG: ")
_BUG = "a bug, of this program"
"""Begin the texts of those that end it."""
_NOT_FINITE = ("nan", "inf", "-inf")
_MOST_TEXTS = 1000
"""Different warnings that are kept; more are counted as one."""
_OTHER_WARNINGS = "other warnings"


def parse_stats(line: str) -> dict[str, Any] | None:
    """Return the entry of a line; None where it has none.

    Raises:
        ValueError: it has one that is damaged.
    """
    if STATS not in line:
        return None
    try:
        entry = json.loads(line.rsplit(STATS, 1)[1])
        if isinstance(entry, dict) and isinstance(entry["_type"], str):
            return entry
    except (KeyError, RecursionError) as error:
        raise ValueError(line) from error
    raise ValueError(line)


def started(revision: str, torch_version: str, machine: str, task: str) -> str:
    """Return the line that a run begins with; `revision` is "commit X" or "maskfeat X"."""
    return f"{revision}, PyTorch {torch_version}, on {machine}" + (f", TASK {task}" if task else "")


@dataclass
class Curves:
    """Values over a training, each an array of the same length; NaN where an entry has none.

    Attributes:
        step: optimization steps done.
        epoch: the same in epochs.
        hour: hours of work until then, pauses between two starts left out.
        values: by name.
    """

    step: "array[float]" = field(default_factory=lambda: array("d"))
    epoch: "array[float]" = field(default_factory=lambda: array("d"))
    hour: "array[float]" = field(default_factory=lambda: array("d"))
    values: "dict[str, array[float]]" = field(default_factory=dict)

    def cut(self, epoch: float) -> None:
        """Forget what an earlier start had reached from this epoch on, since it is repeated."""
        if self.epoch and self.epoch[-1] >= epoch:
            kept = bisect_left(self.epoch, epoch)
            for column in (self.step, self.epoch, self.hour, *self.values.values()):
                del column[kept:]

    def add(self, step: float, epoch: float, hour: float, values: Mapping[str, float]) -> None:
        """Add values in place of those from this epoch on."""
        self.cut(epoch)
        for name in values:
            if name not in self.values:
                self.values[name] = array("d", [math.nan]) * len(self.step)
        for name, column in self.values.items():
            column.append(values.get(name, math.nan))
        self.step.append(step)
        self.epoch.append(epoch)
        self.hour.append(hour)


@dataclass
class RunLog:
    """What the log says of one task.

    Attributes:
        train, validation: curves.
        tests: the last entry of each test, by its name and views.
        seconds: of work, pauses between two starts left out.
        begun: when the first line was written, "MM/DD hh:mm:ss".
        revision, torch, machine, model: of the last start; "" where the log does not say.
        starts, resumes: how often.
        max_epoch: of the last entry; 0 where there is none.
        ending: the error or the signal that ended it last; "" = none.
        weights: the report of the last loading of weights.
        warnings: how often each was written.
        damaged: lines that cannot be read.
        begins: whether nothing is trained since the last start, which resumed from nothing either.
    """

    train: Curves = field(default_factory=Curves)
    validation: Curves = field(default_factory=Curves)
    tests: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: float = 0.0
    begun: str = ""
    revision: str = ""
    torch: str = ""
    machine: str = ""
    model: str = ""
    starts: int = 0
    resumes: int = 0
    max_epoch: int = 0
    ending: str = ""
    weights: str = ""
    warnings: Counter[str] = field(default_factory=Counter)
    damaged: int = 0
    begins: bool = False

    def note(self, text: str) -> None:
        """Take in a line, or several that belong together, that is no entry."""
        if match := _MODEL.fullmatch(text):
            self.model = match[0]
        elif text.startswith(_RESUMED):
            self.resumes, self.begins = self.resumes + 1, False
        elif match := _ENDED.fullmatch(text):
            self.ending = match[1]
        elif _WEIGHTS.fullmatch(text):
            self.weights = text
        elif text.startswith((WARNING, *_GOES_ON)):
            warning = text.removeprefix(WARNING)
            known = warning in self.warnings or len(self.warnings) < _MOST_TEXTS
            self.warnings[warning if known else _OTHER_WARNINGS] += 1
        elif text.startswith(_ENDS):
            self.ending = text
        elif text.startswith(_BUG):
            lines = text.splitlines()
            self.ending = " ".join(dict.fromkeys([lines[0], lines[-1]]))  # the traceback is in the log

    def take(self, entry: Mapping[str, Any]) -> None:
        """Take in an entry.

        Raises:
            ValueError, TypeError, KeyError, ZeroDivisionError: it is not as a run writes it.
        """
        kind = entry["_type"]
        if kind.startswith(TEST):
            self.tests[f"{kind.removeprefix('test_')} {entry.get('views', '')}".rstrip()] = dict(entry)
            return
        if kind not in (TRAIN, VALIDATION):
            return
        epoch, self.max_epoch = _fraction(entry["epoch"])
        self.ending = ""
        values, train = numbers(entry), self.train
        if self.begins:  # anew, in the folder of an earlier training
            for curves in (train, self.validation):
                curves.cut(0.0)
            self.tests.clear()
            self.begins = False
        if kind == TRAIN:
            step, steps = _fraction(entry["iter"])
            place = epoch - 1 + step / steps
            for curves in (train, self.validation):
                curves.cut(place)
            before, at = (train.step[-1], train.epoch[-1]) if train.step else (0.0, 0.0)
            train.add(round(before + (place - at) * steps), place, self.seconds / 3600, values)
            return
        # Validation has no step of its own: it is that of the training, whose last line may be a little earlier.
        rate = train.step[-1] / train.epoch[-1] if train.step else 1.0
        self.validation.add(round(epoch * rate), float(epoch), self.seconds / 3600, values)


def _fraction(text: str) -> tuple[int, int]:
    """Read "3/10"."""
    done, total = str(text).split("/")
    return int(done), int(total)


def direction(metric: str) -> int:
    """Return 1 where more of a metric is better, -1 where less is, 0 where nobody can say."""
    plain = metric.removeprefix("ema_")
    return 1 if plain.startswith("top") or plain == "mAP" else -1 if plain == "loss" else 0


def numbers(entry: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of an entry by name; those that are not finite are NaN."""
    kinds = (float, int)  # and not bool; this is called for every line
    found = {name: value for name, value in entry.items() if type(value) in kinds}
    return found | {name: math.nan for name, value in entry.items() if value in _NOT_FINITE}


def _records(path: Path) -> Iterator[tuple[str, str]]:
    """Yield time and text of each record, of one line or several; the lines before the first one have no time."""
    when, lines = "", [""]
    with naming(f"{path} cannot be read"), path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        for line in file:
            match = _RECORD.match(line)
            if match is None and STATS not in line and STATS not in lines[0]:
                lines.append(line)
                continue
            yield when, "".join(lines).rstrip("\n")
            when, lines = (when, [line]) if match is None else (match[1], [line[match.start(2) :]])
    yield when, "".join(lines).rstrip("\n")


class _Clock:
    """Reads the times of a log, which have no year."""

    def __init__(self, year: int) -> None:
        self._year, self._last = year, datetime(year, 1, 1)
        self._begun = False

    def since_last(self, when: str) -> float:
        """Return the seconds since the time before; 0 for the first one and for what is no time."""
        try:
            now = datetime.fromisoformat(f"{self._year}-{when[:2]}-{when[3:]}")
            if self._begun and (self._last - now).days > 180:
                self._year += 1
                now = now.replace(year=self._year)
        except ValueError:
            return 0.0
        seconds = (now - self._last).total_seconds() if self._begun else 0.0
        self._last, self._begun = now, True
        return max(seconds, 0.0)


def read_log(path: Path) -> dict[str, RunLog]:
    """Read a log.

    Returns:
        what it says of each TASK that wrote into it, in the order of their last starts; "" where none is said.

    Raises:
        UserFileError: it cannot be read.
    """
    with naming(f"{path} cannot be read"):
        clock = _Clock(time.localtime(path.stat().st_mtime).tm_year)
    runs = {"": RunLog()}
    run = runs[""]
    for when, text in _records(path):
        spent = clock.since_last(when)
        if start := _STARTED.fullmatch(text):
            task = start[4] or ""
            run = runs[task] = runs.pop(task, RunLog())
            run.revision, run.torch, run.machine, run.ending = start[1], start[2], start[3], ""
            run.starts, run.begins = run.starts + 1, True
        elif _MODEL.fullmatch(text) is None:  # before these two the run may have been stopped for any time
            run.seconds += spent
        run.begun = run.begun or when
        try:
            entry = parse_stats(text)
            if entry is None:
                run.note(text)
            else:
                run.take(entry)
        except (ValueError, TypeError, KeyError, ZeroDivisionError, OverflowError):
            run.damaged += 1
    if len(runs) > 1 and not (runs[""].train.step or runs[""].tests or runs[""].starts):
        del runs[""]
    return runs
