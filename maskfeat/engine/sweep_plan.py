"""The runs of a sweep: each combination of the values that keys have, or some that are drawn."""

import itertools
import json
import math
import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from maskfeat.config import load_config
from maskfeat.config.merge import override_entries
from maskfeat.errors import UserError
from maskfeat.file_io import unexpanded_path

DONE = "sweep_done.json"
"""In OUTPUT_DIR of a run that ended well: the command line that it had."""
_MOST_RUNS = 1000
_LONGEST_NAME = 200
_BRACKETS = {"[": 1, "(": 1, "{": 1, "]": -1, ")": -1, "}": -1}


class Run(NamedTuple):
    """A run of the sweep.

    Attributes:
        name: what differs from the others, which is the name of its folder.
        folder: its OUTPUT_DIR.
        argv: its command line, without the name of the program.
        gpus, backend: NUM_GPUS and DIST_BACKEND.
    """

    name: str
    folder: Path
    argv: list[str]
    gpus: int
    backend: str

    @property
    def is_done(self) -> bool:
        """Whether it ended well with this command line."""
        try:
            return bool(json.loads((self.folder / DONE).read_text(encoding="utf-8")) == self.argv)
        except (OSError, ValueError):
            return False


def split_values(text: str) -> list[str]:
    """Split at the commas that stand in no brackets and quotes: '1e-4,[1,2]' -> ['1e-4', '[1,2]']."""
    values, depth, quote = [""], 0, ""
    for mark in text:
        if quote or mark in "'\"":
            quote = "" if mark == quote else quote or mark
        else:
            depth += _BRACKETS.get(mark, 0)
        if mark == "," and not depth and not quote:
            values.append("")
        else:
            values[-1] += mark
    return values


def grid(opts: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Return the keys that have several values (KEY=VALUE,VALUE), and the other overrides.

    Raises:
        UserError: a word is no override, or a value is empty or given twice.
    """
    override_entries(opts)
    varied: dict[str, list[str]] = {}
    fixed: list[str] = []
    words = iter(opts)
    for word in words:
        key, equals, text = word.partition("=")
        values = split_values(text)
        if not equals:
            fixed += [word, next(words)]
        elif len(values) == 1:
            fixed.append(word)
        elif "" in values or len(set(values)) < len(values) or key in varied:
            raise UserError(f"{word}: a value is empty or given twice, or the key is; expected {key}=VALUE,VALUE")
        else:
            varied[key] = values
    return varied, fixed


def _names(keys: Sequence[str]) -> list[str]:
    """The last part of each key, or all of it where that is not clear."""
    last = [key.rpartition(".")[2] for key in keys]
    return [short if last.count(short) == 1 else key for short, key in zip(last, keys, strict=True)]


def plan(cfg: str, opts: Sequence[str], number: int | None = None, seed: int = 0) -> list[Run]:
    """Return the runs, each with a config that is valid.

    Args:
        cfg: the recipe.
        opts: overrides; KEY=VALUE,VALUE says which keys vary.
        number: of runs, drawn from the grid; None = all of it.
        seed: of the draw.

    Raises:
        UserError: nothing varies, there are too many runs, or one of them has no valid config.
    """
    varied, fixed = grid(opts)
    if not varied:
        raise UserError("no key has several values: give KEY=VALUE,VALUE, such as SOLVER.BASE_LR=1e-4,2e-4")
    if "OUTPUT_DIR" in varied:
        raise UserError("OUTPUT_DIR has several values: give one, in which each run has a folder")
    runs = [_run(cfg, fixed, dict(zip(varied, point, strict=True))) for point in _points(varied, number, seed)]
    names = [run.name for run in runs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"several runs would have the folder {twice[0]}: give values that differ in letters and digits")
    return runs


def _points(varied: dict[str, list[str]], number: int | None, seed: int) -> list[tuple[str, ...]]:
    """Return the values of each run: all of the grid, or those of `number` points drawn from all of it."""
    total = math.prod(map(len, varied.values()))
    if min(total, number or total) > _MOST_RUNS:
        raise UserError(f"the grid has more than {_MOST_RUNS} runs: fewer values, or --random N")
    if number is None:
        return list(itertools.product(*varied.values()))
    if total > sys.maxsize:  # more than Python draws from
        raise UserError(f"the grid has {total} points: fewer values, or fewer keys that vary")
    points = []
    for place in random.Random(seed).sample(range(total), min(number, total)):
        point = []
        for values in reversed(varied.values()):
            place, at = divmod(place, len(values))
            point.append(values[at])
        points.append(tuple(reversed(point)))
    return points


def _run(cfg: str, fixed: Sequence[str], point: dict[str, str]) -> Run:
    values = [re.sub(r"[^A-Za-z0-9.+-]+", "-", value.strip("[](){}'\" ")) for value in point.values()]
    name = "_".join(f"{key}={value}" for key, value in zip(_names(list(point)), values, strict=True))
    if len(name) > _LONGEST_NAME:
        raise UserError(f"{name[:60]}... is too long for the name of a folder: vary fewer keys at once")
    opts = [*fixed, *(f"{key}={value}" for key, value in point.items())]
    try:
        config = load_config(cfg, opts)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    folder = Path(config.OUTPUT_DIR) / name
    return Run(
        name,
        folder,
        ["--cfg", cfg, *opts, f"OUTPUT_DIR={unexpanded_path(str(folder))}"],
        config.NUM_GPUS,
        config.DIST_BACKEND,
    )
